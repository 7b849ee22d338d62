"""What the card of each kind of product tells.

Former versions named some things otherwise, or not at all. The models here read those cards too, so that nothing else
needs to know. What a card holds beyond its model is kept.
"""

from typing import Any, ClassVar, Literal, Self

from pydantic import AliasChoices, Field, model_validator

from tasks.cards import Card, Part, Source, fingerprint, name_of
from tasks.params import PublishParams

FORMER_LAND: Literal["centre"] = "centre"  # which cells are land of a grid whose card does not tell: of the first ones


def told_land(land: str | None) -> dict[str, Any]:
    """Returns what a card tells of the rule of land: nothing where it is the first grids', which cards never told."""
    if land == FORMER_LAND:
        return {}
    return {"land": land}


def _sources(directory: str, *named: Any) -> set[Source]:
    """Returns the products of a kind that are named by URL, fingerprint or digest."""
    return {(directory, name_of(name)) for name in named if name and isinstance(name, str)}


class RegionFacts(Part):
    """The region that a product is cut to; the product has all its polygons beside it, in `region.parquet`."""

    name: str
    """Its name."""
    digest: str
    """Digest of its polygons."""
    geometry: dict[str, Any]
    """Its shape as GeoJSON, simplified where it has many vertices."""


class SampleRecipe(Part):
    """What patches are made of, as far as other steps ask."""

    patches: int | None = None
    """Number of patches."""
    datetime: str | None = None
    """Time window of the images."""
    resolution_m: float | None = None
    """Pixel size in metres."""
    places: str = ""
    """How places were drawn."""
    source: str | None = None
    """Class raster, or table of places, that they were drawn by."""
    source_sha256: str | None = None
    """Digest of it."""
    south: float = -80.0
    """Southern limit in degrees."""
    north: float = 84.0
    """Northern limit in degrees."""


class PatchesCard(Card):
    """The card of patches."""

    directory: ClassVar[str] = "patches"

    kind: Literal["patches"] = "patches"
    fingerprint: str
    manifest_sha256: str | None = None
    """Digest of the manifest; former cards have none."""
    region: RegionFacts | None = None
    """The region that the places were drawn in; none where they are of everywhere."""

    @property
    def recipe(self) -> SampleRecipe:
        """Returns what the patches are made of."""
        return SampleRecipe.model_validate(self.made_of)


class EncoderFacts(Part):
    """What an image encoder states; beside these its resolution and its normalisation."""

    name: str
    """Its name, as the registry of encoders knows it."""
    bands: tuple[str, ...] = ()
    """The bands that it takes."""
    dim: int = 0
    """Length of a feature vector."""


class FeaturesCard(Card):
    """The card of features: all patches, encoded by one image encoder."""

    directory: ClassVar[str] = "features"

    kind: Literal["features"] = "features"
    fingerprint: str
    images: int | None = None
    """Number of images."""
    encoder: EncoderFacts

    @property
    def sources(self) -> set[Source]:
        """Returns the patches."""
        return _sources("patches", self.made_of.get("patches"))


class Architecture(Part):
    """What rebuilds a location encoder: beside these every other argument that it was made with."""

    kind: Literal["harmonics", "tessellation"] = "harmonics"
    """The kind of location encoder."""
    degree: int = 0
    """Degrees of spherical harmonics; 0 where it has none."""
    dim: int
    """Length of a location embedding, of all members together."""
    members: int = Field(1, ge=1, le=16)
    """Number of location encoders side by side."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.kind == "harmonics" and self.degree < 1:
            raise ValueError("an encoder of harmonics has a degree of at least 1")
        if self.dim % self.members:
            raise ValueError(f"{self.dim} numbers are not {self.members} times as many")
        return self


class MemberFacts(Part):
    """How one of several members was trained."""

    seed: int
    """Seed of its initial weights, of its batches and of its dropout."""
    metrics: dict[str, Any]
    """What was measured at the end of its training."""
    history: tuple[dict[str, Any], ...] = ()
    """What was measured during its training."""


class CheckpointCard(Card):
    """The card of a checkpoint."""

    directory: ClassVar[str] = "checkpoints"

    kind: Literal["checkpoint"] = "checkpoint"
    fingerprint: str
    architecture: Architecture
    encoder: EncoderFacts | None = None
    """The image encoder; none where only the location part was imported."""
    patches: str | None = None
    """Fingerprint of the patches."""
    image_side: str | None = None
    """Why the image side was not imported."""
    metrics: dict[str, Any] | None = None
    """What was measured at the end of training, of all members together."""
    history: tuple[dict[str, Any], ...] = ()
    """What was measured during training; nothing where there are several members."""
    members: tuple[MemberFacts, ...] = ()
    """The training of each of several members."""

    @property
    def sources(self) -> set[Source]:
        """Returns the patches, and the features that it was trained on."""
        made_of, encoder = self.made_of, self.made_of.get("encoder")
        found = _sources("patches", self.patches, made_of.get("patches"))
        if isinstance(encoder, dict) and {"patches", "views"} <= made_of.keys():
            features = {"patches": made_of["patches"], "views": made_of["views"], **encoder}
            found |= _sources("features", fingerprint(features))
        return found


class Values(Part):
    """What made the values of a database."""

    encoder: EncoderFacts | None = None
    """Their image encoder."""
    features: str | None = None
    """URL of the features that they were taken from; none where the checkpoint's own encoder made them."""


class Origin(Part):
    """A sample that a joined database is of, and its design."""

    database: str
    """Fingerprint of the sample's own database."""
    patches: str | None = None
    """Fingerprint of its patches, to whose manifest row ids lead; none of an imported database."""
    images: int
    """Number of its images."""
    land_km2: float | None = None
    """Area of the land that they were drawn on, each place as likely as any other; none where that is unknown."""
    south: float = -90.0
    """Southern limit of that land in degrees."""
    north: float = 90.0
    """Northern limit in degrees."""
    region: dict[str, Any] | None = None
    """The region that it was cut to, as GeoJSON; none for all land."""

    @property
    def density(self) -> float:
        """Returns images per km² of land; 0 where that is unknown."""
        return self.images / self.land_km2 if self.land_km2 else 0.0


class DatabaseCard(Card):
    """The card of a database."""

    directory: ClassVar[str] = "databases"

    kind: Literal["database"] = "database"
    fingerprint: str
    checkpoint: str
    """Fingerprint of the checkpoint in whose space the keys live."""
    images: int
    """Number of images."""
    key_dim: int
    """Length of a key."""
    value_dim: int
    """Length of a value."""
    patches: str | None = None
    """Fingerprint of the patches; none of an imported database."""
    encoder: EncoderFacts | None = None
    """The image encoder of the keys."""
    values: Values = Values()
    """What made the values; an imported database does not tell."""
    origins: tuple[Origin, ...] = ()
    """The samples of a joined database; none of a database of one."""
    weighted: bool = False
    """Whether images have weights; else each counts 1, as in all former databases."""
    heads: tuple[dict[str, Any], ...] | None = None
    """How well heads restore images that were left out (`tasks.core.bandwidths.Curve`); former cards have none."""

    @property
    def sources(self) -> set[Source]:
        """Returns the patches, the checkpoint, and the features that the values were taken from."""
        patches = _sources("patches", self.patches, self.made_of.get("patches"))
        space = _sources("checkpoints", self.checkpoint, self.made_of.get("checkpoint"))
        joined = _sources("databases", *self.made_of.get("joined", ()))
        joined |= _sources("patches", *(origin.patches for origin in self.origins))
        return patches | space | joined | _sources("features", self.values.features)


class GridRecipe(Part):
    """What a grid is made of, by the names of today; what a former card lacks is as it was for all grids then."""

    database: str | None = None
    """Fingerprint of the database."""
    parent: str | None = None
    """Fingerprint of the grid whose sums were updated."""
    step: float = Field(0.5, validation_alias=AliasChoices("step", "step_degrees"))
    """Cell size in the units of the CRS."""
    crs: str = "EPSG:4326"
    """The coordinate reference system, a code or WKT."""
    west: float = -180.0
    south: float = -90.0
    east: float = 180.0
    north: float = 90.0
    land: Literal["any", "centre"] = FORMER_LAND
    """Which cells have a vector."""
    tile_cells: int | None = None
    """Cells along one side of a tile."""
    compact_dims: int | None = None
    """Dimensions of the values that were kept."""
    location_dims: int | None = None
    """Dimensions of the location part that were kept."""
    dtype: str = "float32"
    """How a number is stored."""
    method: Literal["multi-head", "range+", "range"] = "range+"
    """Retrieval method."""
    with_: tuple[str, ...] = ()
    """Blocks of other encoders beside the grid's own."""
    heads: tuple[str, ...] = ()
    """Heads of multi-head."""
    region: str | None = None
    """Digest of the region that the grid is cut to."""

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Returns west, south, east and north."""
        return self.west, self.south, self.east, self.north

    @property
    def params(self) -> PublishParams:
        """Returns the parameters, without the parent, of which only the fingerprint is known."""
        return PublishParams(**self.model_dump(include=PublishParams.model_fields.keys() - {"parent", "region"}))


class GridCard(Card):
    """The card of a grid."""

    directory: ClassVar[str] = "grids"

    kind: Literal["grid"] = "grid"
    database: str = ""
    """URL of the database."""
    checkpoint: str = ""
    """URL of the checkpoint; the first cards have none."""
    dims: int | None = None
    """Numbers of a vector; former cards have none, and the grid's metadata tell."""
    resolution_km: float | str | None = None
    """Distance over which the embeddings change by half of their variance, or the text ">3200" where that is beyond;
    none where the field was not measured, as of former cards."""
    loss: dict[str, Any] | None = None
    """What fewer bits lost; none of float32."""
    sums: dict[str, Any] | None = None
    """What the kept sums have in common with those that can update them; none where no sums are kept."""
    region: RegionFacts | None = None
    """The region that the grid is cut to; none where it has all land of its box."""

    @model_validator(mode="after")
    def _sound(self) -> Self:
        GridRecipe.model_validate(self.made_of)  # so that a damaged card is refused where it is read
        return self

    @property
    def recipe(self) -> GridRecipe:
        """Returns what the grid is made of."""
        return GridRecipe.model_validate(self.made_of)

    @property
    def sources(self) -> set[Source]:
        """Returns the checkpoint, the database and the parent."""
        recipe = self.recipe
        databases = _sources("databases", self.database, recipe.database)
        return databases | _sources("checkpoints", self.checkpoint) | _sources("grids", recipe.parent)


class ReportCard(Card):
    """The card of an evaluation."""

    directory: ClassVar[str] = "reports"

    kind: Literal["report"] = "report"
    scores: tuple[dict[str, Any], ...] = ()
    """The table of scores, a row for each task and embedder."""

    @property
    def sources(self) -> set[Source]:
        """Returns the database and the grid."""
        return _sources("databases", self.made_of.get("database")) | _sources("grids", self.made_of.get("grid"))


class AblationCard(Card):
    """The card of an ablation."""

    directory: ClassVar[str] = "ablations"

    kind: Literal["ablation"] = "ablation"

    @property
    def sources(self) -> set[Source]:
        """Returns the databases."""
        return _sources("databases", self.made_of.get("database"), *self.made_of.get("databases", ()))


CARDS = (
    PatchesCard,
    FeaturesCard,
    CheckpointCard,
    DatabaseCard,
    GridCard,
    ReportCard,
    AblationCard,
)  # as they are made
