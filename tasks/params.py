"""Defines the parameters of every step: what to compute, with the texts that Prefect's form and `--help` show.

Light to import, so that the command line is quick.
"""

import datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

from infra.intervals import Interval
from tasks import windows
from tasks.core.methods import Head, Method
from tasks.presets import Preset, laid_under

if TYPE_CHECKING:
    from tasks.core.earth.grid import GridSpec

BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")  # all of Sentinel-2 L2A

Instant = datetime.datetime
LINE = r"^([A-Za-z0-9][A-Za-z0-9_.-]{0,63})?$"  # name of a product line; it becomes part of a path
BOUNDS: dict[type, tuple[str, str]] = {  # by the kind of bound: its attribute, and its name in form and help
    Ge: ("ge", "at least"),
    Gt: ("gt", "above"),
    Le: ("le", "at most"),
    Lt: ("lt", "below"),
}


def described(field: FieldInfo) -> str:
    """Returns a field's description with its bounds in words: `Width of a layer. At least 2, at most 8,192.`"""
    told = []
    for bound in field.metadata:
        if type(bound) in BOUNDS:
            name, word = BOUNDS[type(bound)]
            told.append(f"{word} {getattr(bound, name):,}".removesuffix(".0"))
    description = field.description or ""
    if not told:
        return description
    return f"{description} {', '.join(told).capitalize()}.".strip()


def _tell(schema: dict[str, Any], model: type[BaseModel]) -> None:
    """Describes each field with its bounds, and adds its position to its schema.

    Prefect's form shows bounds nowhere else before it refuses a value. The form sorts by position, since PostgreSQL
    keeps no order of keys.
    """
    for position, (name, field) in enumerate(schema.get("properties", {}).items()):
        if "description" in field:  # a part of the pipeline is described by its own model
            field["description"] = described(model.model_fields[name])
        field["position"] = position


BETA = 0.5  # share of the semantic half in RANGE+, as published
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # the range that NumPy's and PyTorch's generators share
RCF_PIXELS = 12  # smallest side of an image for `rcf`: its widest window is 3 pixels, on an image coarsened by 4


class Params(BaseModel):
    """Base of the parameter models: frozen, with unknown names refused and descriptions taken from docstrings.

    Prefect's form and the command line are made from the same fields, in declared order. Numbers are finite, texts
    are not empty, and true or false is no number.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        json_schema_extra=_tell,
        allow_inf_nan=False,
        str_min_length=1,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        items = value if isinstance(value, list | tuple) else [value]
        if (
            any(isinstance(item, bool) for item in items)
            and cls.model_fields[str(info.field_name)].annotation is not bool
        ):
            raise ValueError("true and false are for what is switched on or off: give a number or a text")
        return value

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        """Fills in the values of the named preset where none is given, in nested models too."""
        if not (isinstance(given, dict) and given.get("preset")):
            return given
        defaults = {name: field.get_default(call_default_factory=True) for name, field in cls.model_fields.items()}
        named = {
            name: {"preset": given["preset"], **dict(given.get(name, ()))}
            for name, part in defaults.items()
            if isinstance(part, Params) and "preset" in type(part).model_fields
        }
        for name, part in named.items():  # before the presets are laid under, whose box a region replaces
            if isinstance(defaults[name], RegionParams) and given.get("region") and not part.get("region"):
                part |= {"region": given["region"], "buffer_km": given.get("buffer_km", 0.0)}
        return laid_under(given["preset"], [kind.__name__ for kind in cls.__mro__], given, defaults) | named

    def at(self, when: Instant) -> Self:
        """Returns a copy with dates in place of rolling time windows, as they are at `when`."""
        rolling = {name: value.at(when) for name, value in self if isinstance(value, Params)}
        if rolling:
            return self.model_copy(update=rolling)
        return self


def known_bands(bands: tuple[str, ...]) -> tuple[str, ...]:
    """Returns bands after a check that each is one of Sentinel-2 L2A's, and there once."""
    if not bands or not set(bands) <= set(BANDS) or len(set(bands)) < len(bands):
        raise ValueError(f"give bands of Sentinel-2 L2A, each once: {', '.join(BANDS)}")
    return bands


class RegionParams(Params):
    """Where: everywhere, or in a region."""

    region: tuple[str, ...] = ()
    """Region, several of which are united: a country by ISO code or name, such as KE; a file of polygons, by path or
    URL; or a box in degrees, as "34 -5 42 6": west, south, east, north. Unset: everywhere."""
    buffer_km: float = Field(0.0, ge=0, le=2000)
    """Distance in km by which the region is widened."""


class SampleParams(RegionParams):
    """Where, when and how many Sentinel-2 patches to sample."""

    patches: int = Field(10_000, ge=1, le=10_000_000)
    """Number of patches."""
    spacing_km: float | None = Field(None, gt=0, le=2000)
    """Distance in km at which places lie apart, in place of their number: there are as many as the land area in km²
    has squares of this side."""
    seed: Seed = 0
    """Seed of the places. The same seed with more patches extends the same sample."""
    places: Literal["even", "area", "tile", "class", "list"] = "even"
    """How places are drawn. `even`: evenly over the land area, without holes (a sequence of low discrepancy). `area`:
    uniformly over the land area, each independent of the others. `tile`: by Sentinel-2 tile, with the bias of S2-100K.
    `class`: equally from each class of a raster. `list`: the places of a table."""
    source: str | None = None
    """Path or URL of the source of places. For `class`: a GeoTIFF in longitude and latitude, where 0 is no class. For
    `list`: a CSV or Parquet table with columns lon and lat."""
    datetime: str = Field("2021-01-01/2022-12-31", min_length=0)  # so that its own check tells what is wrong
    """Time window: a day, a month or a year, or two of them with / between, such as 2021-01-01/2021-12-31, with .. for
    an open end. Or a rolling window: `last 90 days`, `previous month`, `previous season`, `previous year`."""
    line: str = Field("", pattern=LINE, min_length=0)
    """Name of the product line that these patches belong to, with everything made from them. A later run finds the
    newest product of a line by `newest:NAME`."""
    max_cloud_percent: float = Field(60.0, ge=0, le=100)
    """Largest cloud cover of a scene in percent."""
    scene: Literal["least-cloudy", "nearest", "seasons", "composite"] = "least-cloudy"
    """Which scene of a place to take: the least cloudy, the nearest to `date`, or the least cloudy of each season.
    `composite`: the median of the clear pixels of several scenes of one tile and season, of which the first is taken as
    the least cloudy is."""
    composite_scenes: int = Field(5, ge=2, le=12)
    """Largest number of scenes of a `composite`."""
    date: str | None = None
    """Day for `nearest`, such as 2021-06-30."""
    min_clear_fraction: float = Field(0.9, ge=0, le=1)
    """Smallest share of a patch that is clear, by the scene classification layer (SCL)."""
    max_nodata_fraction: float = Field(0.0, ge=0, le=1)
    """Largest share of a patch's pixels that have no data in one or more bands."""
    max_saturated_fraction: float = Field(0.01, ge=0, le=1)
    """Largest share of a patch that is saturated or defective, by the scene classification layer (SCL)."""
    max_tries: float = Field(20.0, ge=1, le=1000)
    """Places that may be tried per patch, on average, before the run gives up."""
    bands: tuple[str, ...] = BANDS
    """Sentinel-2 bands, by their names, such as B04."""
    patch_pixels: int = Field(256, ge=4, le=2048)
    """Side of a patch in pixels."""
    resolution_m: float = Field(10.0, ge=0.1, le=50_000)
    """Pixel size in metres."""
    south: float = Field(-80.0, ge=-80, le=84)
    """Southern limit in degrees; UTM begins at -80."""
    north: float = Field(84.0, ge=-80, le=84)
    """Northern limit in degrees; UTM ends at 84."""
    shard_patches: int = Field(512, ge=1, le=100_000)
    """Patches in one Zarr shard, which is one unit of work."""
    max_failed_fraction: float = Field(0.02, ge=0, le=1)
    """Share of the units of work (searches of the catalog, shards) that may fail before the run gives up. A rerun does
    only those that failed."""
    preset: Preset | None = Field(None, exclude=True)
    """Sets the fields that are left at their default for a quick trial, a continent or the globe, or as SatCLIP was
    trained."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.places in ("class", "list") and not self.source:
            raise ValueError(f"places {self.places!r} needs a source: a class raster or a table of points")
        if self.scene == "nearest" and not self.date:
            raise ValueError("scene 'nearest' needs a date, such as 2021-06-30")
        if self.south >= self.north:
            raise ValueError(f"south {self.south:g} is not below north {self.north:g}: give the southern limit first")
        return self

    @field_validator("bands")
    @classmethod
    def _known(cls, bands: tuple[str, ...]) -> tuple[str, ...]:
        return known_bands(bands)

    @field_validator("datetime")
    @classmethod
    def _interval(cls, text: str) -> str:
        if windows.is_rolling(text):
            windows.fixed(text, datetime.datetime.now(datetime.UTC))
        else:
            Interval.parse(text)
        return text

    def at(self, when: Instant) -> Self:
        """Returns a copy with dates in place of a rolling time window, as they are at `when`."""
        if not windows.is_rolling(self.datetime):
            return self
        return self.model_copy(update={"datetime": windows.fixed(self.datetime, when)})

    @field_validator("date")
    @classmethod
    def _day(cls, text: str | None) -> str | None:
        if text is None:
            return text
        return datetime.date.fromisoformat(text).isoformat()


class ImportParams(Params):
    """Which patches of a folder to import, and how."""

    offset: Literal["auto", "0", "-1000"] = "auto"
    """Number to add to pixel values before they are reflectance. `auto`: by what an image tells of its processing, else
    by its pixels, each image by itself. 0 or -1000: of all images, where you know it."""
    silent: Literal["likeliest", "leave-out"] = "likeliest"
    """What becomes of images whose offset nothing tells, such as bright deserts. `likeliest`: they get the offset that
    most others of the folder have. `leave-out`: they are not imported."""
    bands: tuple[str, ...] = BANDS
    """Sentinel-2 bands to import, by their names, such as B04."""
    patch_pixels: int = Field(256, ge=4, le=2048)
    """Side of a patch in pixels. Of larger images the middle is taken."""
    resolution_m: float = Field(10.0, ge=0.1, le=50_000)
    """Pixel size in metres. Bands of a multiple of it are repeated."""
    max_nodata_fraction: float = Field(0.0, ge=0, le=1)
    """Largest share of a patch's pixels that have no data in one or more bands."""
    line: str = Field("", pattern=LINE, min_length=0)
    """Name of the product line that these patches belong to, with everything made from them."""
    shard_patches: int = Field(512, ge=1, le=100_000)
    """Patches in one Zarr shard, which is one unit of work."""
    max_failed_fraction: float = Field(0.02, ge=0, le=1)
    """Share of the units of work that may fail before the run gives up. A rerun does only those that failed."""

    @field_validator("bands")
    @classmethod
    def _known(cls, bands: tuple[str, ...]) -> tuple[str, ...]:
        return known_bands(bands)


class EncoderParams(Params):
    """Which image encoder to use."""

    name: str = "rcf"
    """rcf (random convolutional features), satclip-vit16, satclip-resnet18, satclip-resnet50, satmae, satmae-sentinel2,
    or your own as module:function. All but rcf need weights."""
    weights: str | None = None
    """Path or URL of a .safetensors, .pth or .bin file, or of an imported SatCLIP checkpoint."""
    dim: int = Field(1024, ge=2, le=8192, multiple_of=2)
    """Length of a feature vector of rcf, and so of the database's values. The other encoders have a fixed length."""
    seed: Seed = 0
    """Seed of the random choices of rcf."""


class TrainParams(Params):
    """Architecture and training schedule of the location encoder."""

    encoder: EncoderParams = Field(default_factory=EncoderParams)
    """The image encoder, which stays frozen."""
    location: Literal["harmonics", "tessellation"] = "harmonics"
    """The location encoder. `harmonics`: spherical harmonics and a network of sines, as in SatCLIP. `tessellation`:
    learnable sites on the sphere, softly assigned, and tokens that they share, after Tessellating the Earth."""
    degree: int = Field(20, ge=1, le=100)
    """Number of degrees of spherical harmonics. They resolve structure down to about 180° / degree."""
    sites: int = Field(1024, ge=2, le=16_384)
    """Number of sites of a tessellation. They begin at places of images that are trained on."""
    tokens: int = Field(64, ge=1, le=4096)
    """Number of tokens that the sites of a tessellation share."""
    hidden: int = Field(512, ge=8, le=4096)
    """Width of the two hidden layers. A site of a tessellation has as many numbers."""
    dim: int = Field(256, ge=2, le=4096)
    """Length of a location embedding, and of a key of the database; with members, of each."""
    smoothness: float = Field(2.0, ge=0, le=4)
    """Harmonics of degree l are scaled by (1 + l) ** -smoothness before the network. 0: not at all, as in SatCLIP."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout: share of hidden units dropped in training."""
    steps: int = Field(150, ge=1, le=1_000_000)
    """Number of optimiser steps."""
    views: int = Field(1, ge=1, le=16)
    """Augmentation: views of each image to train on. 1: the image itself. Up to 8: with its rotations and
    reflections. Up to 16: with crops of its corners too."""
    batch: int = Field(1024, ge=2, le=65_536)
    """Pairs in a batch. The other pairs of the batch are the negatives of each pair."""
    shuffle: int = Field(65_536, ge=2, le=100_000_000)
    """Shuffle buffer: number of pairs that are shuffled together and held in memory."""
    lr: float = Field(1e-3, gt=0, le=1)
    """Peak learning rate, reached after the warm-up."""
    weight_decay: float = Field(0.01, ge=0, le=10)
    """Weight decay of AdamW, for weight matrices only."""
    mask_km: float = Field(0.0, ge=0, le=2000)
    """Pairs of a batch whose places are within this distance in km are no negatives of each other. 0: all are
    negatives."""
    jitter_degrees: float = Field(0.0, ge=0, le=5)
    """Longitude and latitude of a place are moved at random by up to this many degrees each way, anew in each step."""
    held_out_share: float = Field(0.1, ge=0, le=0.5)
    """Share of the 10° blocks of the Earth that are held out: their pairs are used for evaluation only."""
    patience: int = Field(0, ge=0, le=20)
    """Early stopping: end training after this many evaluations without improvement, and keep the best weights. The
    model is evaluated on the held-out pairs 20 times over the run. 0 turns early stopping off."""
    seed: Seed = 0
    """Seed of the initial weights, the order of the batches and the choice of held-out blocks."""
    members: int = Field(1, ge=1, le=16)
    """Number of location encoders that are trained with the seeds seed, seed + 1 ... and put side by side: an embedding
    has dim numbers of each. All share the image features and the held-out blocks."""
    save_every: int = Field(100, ge=1, le=1_000_000)
    """Steps between saved training states. A run that was killed resumes from the last one."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train. auto takes the first of cuda, mps and cpu that is available."""
    precision: Literal["float32", "bf16"] = "float32"
    """Precision of the matrix products after the spherical harmonics. bf16 is for GPUs."""
    preset: Preset | None = Field(None, exclude=True)
    """Sets the fields that are left at their default for a quick trial, a continent or the globe, or as SatCLIP was
    trained."""

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.patience and not self.held_out_share:
            raise ValueError("patience needs held-out pairs: give held_out_share above 0, or patience 0")
        if self.shuffle < self.batch:
            raise ValueError(f"shuffle {self.shuffle} is less than a batch of {self.batch}: give at least the batch")
        return self


class ValueParams(EncoderParams):
    """Which image encoder makes the values of the database."""

    name: str = "checkpoint"
    """checkpoint: the image encoder that the checkpoint was trained with. Or the name of another one, as in training.
    The keys come from the checkpoint in either case."""

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.name == "checkpoint" and self.weights:
            raise ValueError("weights of the values need the name of their encoder: give one, such as satmae")
        return self


class EncodeParams(Params):
    """How to encode the database."""

    values: ValueParams = Field(default_factory=ValueParams)
    """The image encoder that makes the values."""
    shard_rows: int = Field(512, ge=1, le=65_536)
    """Images in one Zarr shard, which is one unit of work."""


class JoinParams(Params):
    """How to join databases."""

    weights: Literal["design", "estimated"] = "design"
    """How much an image counts: as much as the land that it stands for. `design`: by the design of the samples.
    `estimated`: by how densely the images lie, where samples do not tell their design, as imported databases."""
    shard_rows: int = Field(512, ge=1, le=65_536)
    """Images in one Zarr shard."""
    line: str = Field("", pattern=LINE, min_length=0)
    """Name of the product line that the joined database belongs to. Unset: that of the first database."""


def check_heads(heads: tuple[str, ...]) -> tuple[str, ...]:
    """Returns heads as they are written, each once.

    Raises:
        ValueError: A text is no head, or is there twice.
    """
    told = tuple(str(Head.parse(head)) for head in heads)
    if len(set(told)) < len(told):
        raise ValueError("give each head once")
    return told


def check_method(params: Any) -> None:
    """Refuses parameters of another method than the one that was chosen.

    Raises:
        ValueError: It names them.
    """
    if params.method != "multi-head" and (params.heads or params.location_dims):
        raise ValueError(f"heads and location_dims are of multi-head: give method multi-head, or {params.method} alone")
    if params.method == "multi-head" and params.beta != BETA:
        raise ValueError(f"beta {params.beta:g} mixes the halves of range+: give method range+, or leave beta out")


def method_of(name: Any, heads: tuple[str, ...], beta: float, k: int = 10) -> Method:
    """Returns the retrieval method that parameters tell."""
    return Method(name, beta, k, side_by_side=tuple(map(Head.parse, heads)))


AUTO = "auto"


class PublishParams(RegionParams):
    """Which grid to publish, and how."""

    step: float = Field(0.5, gt=0)
    """Cell size in the units of the CRS, degrees or metres. The sides of the box must be multiples of it."""
    crs: str = "EPSG:4326"
    """Coordinate reference system, as a code or WKT: geographic in degrees, or projected in metres. A projected one
    needs a box or a region. auto: that of the region, its UTM zone, or where it is larger an equal-area plane, both in
    metres."""
    west: float = -180.0
    """Western edge of the box in the units of the CRS. The default box is the whole globe, or with a region the cells
    around it."""
    south: float = -90.0
    """Southern edge of the box."""
    east: float = 180.0
    """Eastern edge of the box. A box that crosses the antimeridian goes beyond 180, for example from 170 to 190."""
    north: float = 90.0
    """Northern edge of the box."""
    land: Literal["any", "centre"] | None = None
    """Which cells get an embedding: those with any land, or those with land at their centre. Unset: as the parent grid
    has it, else any."""
    method: Literal["multi-head", "range+", "range"] = "multi-head"
    """Retrieval method: multi-head (selections of images side by side, as sharp as the database allows), or as
    published RANGE+ (a mixture of semantic and geodesic similarity) or RANGE (by semantic similarity only)."""
    heads: tuple[str, ...] = ()
    """Heads of multi-head: semantic:T and geodesic:T at a temperature, or nearest:K with the bandwidth of the k-th
    nearest image. Unset: those that the database's own images choose, without labels."""
    beta: float = Field(BETA, ge=0, le=1)
    """Share of the semantic half in RANGE+; 1 is purely semantic."""
    tile_cells: int | None = Field(None, ge=1, le=1024)
    """Side of a tile in cells. A tile is one Zarr shard and one unit of work. Must be a multiple of 20. Unset: chosen
    for shards of about 50 MB."""
    tolerance: float = Field(0.0, ge=0, le=0.1)
    """Largest relative error of the retrieved (visual) part that interpolation between cells may leave, as the 99th
    percentile of a tile. 0 computes every cell exactly."""
    compact_dims: int | None = Field(None, ge=1, le=8192)
    """Principal components to keep of the visual part, for example 64, of each head in multi-head. Unset: all of it,
    and 128 in multi-head."""
    location_dims: int | None = Field(None, ge=1, le=8192)
    """Dimensions to keep of the location part in multi-head. Unset: 256, or all if fewer."""
    dtype: Literal["float32", "float16", "int8"] = "float32"
    """How each number is stored, in 4, 2 or 1 bytes. The error of the smaller types is measured and written to the
    attributes of the grid."""
    evidence: bool = False
    """Adds layers that tell how well each cell is supported: effective_images, largest_weight and distance_km to the
    nearest image. Takes half as much work again."""
    overviews: int = Field(0, ge=0, le=8)
    """Number of overviews: coarser levels with half the rows and columns each, whose cells are means."""
    with_: tuple[Literal["geoclip"], ...] = ()
    """Blocks of other encoders to carry beside the grid's own, after the location part, in float32 or float16: geoclip,
    512 numbers a cell by the weights in its package. Unset: those of the parent grid, else none."""
    keep_sums: bool = False
    """Stores the sums behind the grid too, so that a later grid can be updated from this one as its parent. They are
    twice the size of the grid."""
    parent: str | None = None
    """Incremental update: URL of a grid of an earlier database, published with keep_sums. Only images that were added
    or removed since are computed."""
    line: str = Field("", pattern=LINE, min_length=0)
    """Name of the product line whose latest version this grid becomes. Unset: the line of grids with the same CRS, box,
    step, dtype and dimensions."""
    promote: bool = True
    """Makes the grid the latest version of its line, which readers open, once it is validated. If false, do so later
    with `rangegrid grid promote`."""
    drift_alert: float = Field(0.1, ge=0, le=2)
    """Drift of the embeddings since the latest version, as 1 - mean cosine similarity, from which an alert is sent."""
    preset: Preset | None = Field(None, exclude=True)
    """Sets the fields that are left at their default for a quick trial, a continent or the globe, or as SatCLIP was
    trained."""

    _heads = field_validator("heads")(check_heads)

    @field_validator("crs")
    @classmethod
    def _known(cls, crs: str) -> str:
        if crs == AUTO:
            return crs
        from tasks.core.earth.plane import Plane  # here, since forms and the command line's help need no pyproj

        return Plane(crs).name

    @field_validator("tile_cells")
    @classmethod
    def _whole_chunks(cls, cells: int | None) -> int | None:
        from tasks.core.earth.grid import check_tile  # here, as above

        if cells is not None:
            check_tile(cells)
        return cells

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.crs == AUTO and not self.region:
            raise ValueError("crs auto is that of a region: give one, or a code such as EPSG:3035")
        if self.crs == AUTO and not self.is_open:
            raise ValueError("crs auto takes the box around the region: give no box, or a code such as EPSG:3035")
        if self.is_open:
            return self
        rows, columns = self.spec.shape
        if rows % 2**self.overviews or columns % 2**self.overviews:
            raise ValueError(
                f"{rows} rows and {columns} columns of cells cannot be halved {self.overviews} times: give fewer "
                f"overviews, or a box of sides that {self.step * 2**self.overviews:g} divides"
            )
        return self

    @property
    def is_open(self) -> bool:
        """Tells whether the box is the one around the region, which `tasks.publish.placed` sets."""
        return bool(self.region) and self.box == (-180.0, -90.0, 180.0, 90.0)

    @property
    def retrieval(self) -> Method:
        """Returns the retrieval method. Where multi-head has no heads, `tasks.publish.settled` sets them."""
        return method_of(self.method, self.heads, self.beta)

    @property
    def is_compact(self) -> bool:
        """Tells whether values are projected."""
        return self.compact_dims is not None

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Returns west, south, east and north in the units of the CRS."""
        return self.west, self.south, self.east, self.north

    @property
    def spec(self) -> "GridSpec":
        """Returns the grid. Where no tile size is given, `tasks.publish.settled` sets it from the database."""
        from tasks.core.earth.grid import GridSpec

        return GridSpec(self.step, self.tile_cells or GridSpec.tile, self.box, self.crs, self.land or "any")

    @model_validator(mode="after")
    def _exact(self) -> Self:
        if self.tolerance and (self.keep_sums or self.parent):
            raise ValueError("keep_sums and parent need every cell computed exactly: give them without a tolerance")
        if self.parent and (self.evidence or self.dtype != "float32"):
            raise ValueError(
                "evidence, float16 and int8 need all images, and an update reads only the changed ones: give no "
                "parent, or float32 without evidence"
            )
        return self

    @model_validator(mode="after")
    def _once(self) -> Self:
        if len(set(self.with_)) < len(self.with_):
            raise ValueError(f"with names {', '.join(self.with_)}: give each block once")
        if self.with_ and self.dtype == "int8":
            raise ValueError("blocks of other encoders are stored in float32 or float16: give no int8, or no with")
        return self

    @model_validator(mode="after")
    def _of_one_method(self) -> Self:
        check_method(self)
        reaching = [head for head in self.heads if not Head.parse(head).is_additive]
        if reaching and (self.keep_sums or self.parent):
            raise ValueError(
                f"the bandwidth of {reaching[0]} depends on all images, so that its sums cannot be updated: give heads "
                "geodesic:T, or neither keep_sums nor parent"
            )
        return self


class PruneParams(Params):
    """Which versions of the grid to delete. The latest and the previous version of each line, and what they need,
    stay."""

    keep: int = Field(3, ge=0, le=1_000_000)
    """Number of newest versions of each line to keep."""
    line: str = Field("", pattern=LINE, min_length=0)
    """Product line to delete versions of. Unset: every line."""
    unfinished: bool = False
    """Also deletes what failed runs left behind. Use it only while no run is publishing."""
    dry_run: bool = False
    """Only tells what would be deleted."""


class EmbedParams(Params):
    """How to embed points."""

    method: Literal["multi-head", "range+", "range", "top1", "topk", "none"] = "multi-head"
    """Retrieval method: soft (multi-head, or as published range+ and range) or hard (top1, topk). none gives the
    location embedding alone."""
    heads: tuple[str, ...] = ()
    """Heads of multi-head: semantic:T and geodesic:T at a temperature, or nearest:K with the bandwidth of the k-th
    nearest image. Unset: those that the database's own images choose, without labels."""
    beta: float = Field(BETA, ge=0, le=1)
    """Share of the semantic half in RANGE+; 1 is purely semantic."""
    k: int = Field(10, ge=1, le=10_000_000)
    """Number of images that topk averages."""
    compact_dims: int | None = Field(None, ge=1, le=8192)
    """Principal components to keep of the visual part, for example 64, of each head in multi-head. Unset: all of it,
    and 128 in multi-head."""
    location_dims: int | None = Field(None, ge=1, le=8192)
    """Dimensions to keep of the location part in multi-head. Unset: 256, or all if fewer."""
    evidence: bool = False
    """Adds columns that tell how well a point is supported: effective_images, largest_weight and distance_km to the
    nearest image."""
    top_images: int = Field(0, ge=0, le=100)
    """Adds a column image_ids with the row ids of this many images, those with the largest weights."""
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:[0-9]{1,3})?)$")
    """Device that holds the database and computes: cpu, cuda, or one of several GPUs, such as cuda:1."""
    precision: Literal["float32", "float64", "tf32", "bf16"] = "float32"
    """Precision of the matrix products. float64 takes three times as long. tf32 needs cuda. bf16 rounds weights and
    values."""

    _heads = field_validator("heads")(check_heads)

    @property
    def retrieval(self) -> Method:
        """Returns the retrieval method; multi-head must have its heads."""
        return method_of(self.method, self.heads, self.beta, self.k)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        check_method(self)
        if self.precision == "tf32" and self.device == "cpu":
            raise ValueError("precision tf32 is a mode of cuda: give device cuda, or precision float32")
        return self


Sampling = Literal["nearest", "bilinear"]


class EmbedderParams(Params):
    """Which embedding methods to compare."""

    embedder: tuple[str, ...] = ()
    """Embedding methods to compare: names, NAME=WEIGHTS for those that need weights, or URLs of grids, also as
    NAME=URL. Those of other projects as NAME=TABLE of vectors at places or NAME=module:function. Several joined by +
    are one, with their vectors side by side: geoclip+range+. Unset: all."""
    interpolation: Sampling = "nearest"
    """How a grid is read at a place: its nearest cell, or bilinear interpolation of four cells."""


class EvaluateParams(RegionParams, EmbedderParams):
    """Which labels, embedding methods and splits to evaluate."""

    labels: tuple[str, ...] = ()
    """Tables of labels, by path or URL: CSV, Parquet, GeoParquet, GeoJSON or shapefile. Tables with labels of one name
    are one task, in the order given. Unset: the labels of the demo."""
    label: str | None = None
    """Column of the labels. Not needed for the tasks of the RANGE paper, which are recognised."""
    kind: Literal["classification", "regression"] | None = None
    """Whether that column holds classes or numbers."""
    lon: str | None = None
    """Column of longitudes in degrees. Unset: recognised by its name."""
    lat: str | None = None
    """Column of latitudes in degrees. Unset: recognised by its name."""
    log1p: bool = False
    """Predicts log(1 + label), as the paper does for population."""
    split: str | None = None
    """Column of a split of the table's own: train for rows to fit, test or val for rows to score. Or `files`: one table
    of a task is fitted, by its name or the first, and the others are scored. Unset: the paper's random split, and of
    its tables of land and ocean, which are two, by files."""
    points: int | None = Field(None, ge=200, le=1_000_000)
    """Largest number of labelled places per task. Unset: 10,000 for the demo's labels or drawn in polygons, all
    rows of a table."""
    spacing_km: float | None = Field(None, gt=0, le=2000)
    """Distance in km at which labelled places lie apart, in place of their largest number: there are as many as the
    land area in km² has squares of this side."""
    repeats: int = Field(1, ge=1, le=100)
    """Number of random splits. The first is the one of the paper, or the table's own."""
    folds: int = Field(5, ge=2, le=100)
    """Number of folds of spatial cross-validation, made of whole blocks."""
    fold_seeds: int = Field(3, ge=1, le=100)
    """Number of times that the blocks are dealt to the folds, each time by another seed. A blocked score is the mean
    over all of these splits."""
    reference: str | None = None
    """Embedding method to which the others are compared, split by split. A grid is one for grids of the same cells.
    Unset: the location encoder where it is scored, else coordinates, else the first."""
    block_degrees: float | None = Field(None, ge=0.01, le=90)
    """Side of a block of spatial cross-validation in degrees. Unset: 10, 1 for California housing, and in a region as
    many blocks as folds need."""
    near_km: float = Field(1.0, gt=0, le=1000)
    """Distance in km to a training place below which a test place is counted as a near-duplicate."""
    seed: Seed = 2
    """Seed of the evaluated places. Choose another seed than that of the sample."""
    suite: Literal["coordbench"] | None = None
    """A public suite of labelled places to score by its own protocol, in place of labels: coordbench, of
    torchgeo-bench."""
    data: str | None = None
    """Path or URL of the folder of that suite's tables, data/NAME/data.parquet."""
    preset: Preset | None = Field(None, exclude=True)
    """Sets the fields that are left at their default for a quick trial, a continent or the globe, or as SatCLIP was
    trained."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.label and not self.kind:
            raise ValueError("label needs a kind: classification or regression")
        if self.label and not self.labels:
            raise ValueError("label names a column: give the table that it is in with labels")
        if (self.kind or self.log1p) and not self.label:
            raise ValueError("kind and log1p are of a label: name its column with label, or leave them out")
        if self.log1p and self.kind == "classification":
            raise ValueError("log1p is of numbers, and classes are none: give kind regression, or no log1p")
        if self.lon and self.lon == self.lat:
            raise ValueError(f"{self.lon} cannot have both longitudes and latitudes: name a column of each")
        if self.split and not self.labels:
            raise ValueError("split is of a table: give the table with labels, or leave split out")
        return self

    @model_validator(mode="after")
    def _one_protocol(self) -> Self:
        if bool(self.suite) != bool(self.data):
            raise ValueError("a suite and the folder of its data go together: give both, or neither")
        if self.suite and (self.labels or self.region):
            raise ValueError("a suite has its own places and labels: leave out labels and region")
        return self


Choice = Literal["strategy", "k", "temperature", "beta", "size", "values", "variants"]


class AblateParams(EvaluateParams):
    """Which choice of the retrieval to vary, and how to score it."""

    folds: int = Field(3, ge=2, le=100)
    """Number of folds of spatial cross-validation, made of whole blocks."""
    steps: tuple[float, ...] = ()
    """Values of k, temperature, beta or size to try. Unset: a usual range."""
    databases: tuple[str, ...] = ()
    """For `values`: databases encoded with the same checkpoint but other image encoders for the values."""

    @model_validator(mode="after")
    def _by_labels(self) -> Self:
        if self.suite:
            raise ValueError("ablations are scored on labels: a suite is for evaluate")
        return self


class PipelineParams(RegionParams):
    """The parameters of every step of the pipeline. A region is that of sample, publish and evaluate, where these have
    none of their own."""

    preset: Preset | None = Field(None, exclude=True)
    """Sets the fields that are left at their default for a quick trial, a continent or the globe, or as SatCLIP was
    trained."""
    spacing_km: float | None = Field(None, gt=0, le=2000)
    """Distance in km at which places lie apart, in place of their number, where the sample has none of its own."""
    base: tuple[str, ...] = Field((), max_length=2)
    """URLs of a checkpoint and of the world's database that it encoded, or newest:LINE. The patches are encoded with
    that checkpoint and joined to that database, nothing is trained, and the grid is scored beside one of that database
    alone. Unset: a model is trained on the patches."""
    sample: SampleParams = Field(default_factory=SampleParams)
    """Where, when and how many Sentinel-2 patches to sample."""
    train: TrainParams = Field(default_factory=TrainParams)
    """Architecture and training schedule of the location encoder."""
    encode: EncodeParams = Field(default_factory=EncodeParams)
    """How to encode the database."""
    publish: PublishParams = Field(default_factory=PublishParams)
    """Which grid to publish, and how."""
    evaluate: EvaluateParams = Field(default_factory=EvaluateParams)
    """Which labels, embedding methods and splits to evaluate."""
    gate_margin: float = Field(0.02, ge=0, le=1)
    """How much lower a score on blocked splits may be than that of the current latest grid. A new grid is not promoted
    where a score is lower by more than that, beyond noise, or where its scores are not beyond noise above those of the
    location encoder alone, and of the same recipe with values shuffled among the images."""

    def in_region(self) -> Self:
        """Returns a copy whose steps have the region and the spacing, unless they have their own."""
        ours = {"region": self.region, "buffer_km": self.buffer_km}
        steps: dict[str, RegionParams] = {"sample": self.sample, "publish": self.publish, "evaluate": self.evaluate}
        open_ = {name: step for name, step in steps.items() if self.region and not step.region}
        placed = {name: step.model_copy(update=ours) for name, step in open_.items()}
        if self.spacing_km and not self.sample.spacing_km:
            sample = placed.get("sample", self.sample)
            placed["sample"] = sample.model_copy(update={"spacing_km": self.spacing_km})
        return self.model_copy(update=placed)

    @field_validator("base")
    @classmethod
    def _both(cls, base: tuple[str, ...]) -> tuple[str, ...]:
        if len(base) == 1:
            raise ValueError(f"{base[0]}: give two, a checkpoint and the database that it encoded")
        return base

    @model_validator(mode="after")
    def _gated(self) -> Self:
        if self.evaluate.suite:
            raise ValueError("the pipeline's gate compares scores on labels: score a suite by evaluate, afterwards")
        return self

    @model_validator(mode="after")
    def _enough_patches(self) -> Self:
        if self.base or self.spacing_km or self.sample.spacing_km:
            return self
        if self.train.batch > self.sample.patches:
            raise ValueError(
                f"a batch of {self.train.batch} pairs needs more than {self.sample.patches} patches: raise "
                "sample.patches or lower train.batch"
            )
        return self

    @model_validator(mode="after")
    def _large_enough(self) -> Self:
        side, corners = self.sample.patch_pixels, self.train.views > 8  # a corner has three quarters of the side
        trained = 4 * RCF_PIXELS // 3 if corners else RCF_PIXELS
        for encoder, least in ((self.train.encoder, trained), (self.encode.values, RCF_PIXELS)):
            if encoder.name == "rcf" and side < least:
                raise ValueError(
                    f"the encoder rcf needs patches of {least} x {least} pixels{' for so many views' * corners}, and "
                    f"these have {side} x {side}: raise sample.patch_pixels"
                )
        return self
