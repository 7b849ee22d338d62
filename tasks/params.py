"""The parameter models: what to compute, in a form that describes itself.

Light to import, so that the command line is quick.
"""

import datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from infra.intervals import Interval
from tasks import windows
from tasks.presets import Preset, laid_under

if TYPE_CHECKING:
    from tasks.core.earth.grid import GridSpec

BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")  # of Sentinel-2 L2A

Instant = datetime.datetime
LINE = r"^([A-Za-z0-9][A-Za-z0-9_.-]{0,63})?$"  # a line's name: part of a path
BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def _tell(schema: dict[str, Any]) -> None:
    """Tells each field's bounds, which a form shows nowhere else before it refuses a value, and its position.

    A form sorts by the position, since PostgreSQL keeps no order of keys.
    """
    for position, field in enumerate(schema.get("properties", {}).values()):
        limits = field | next(iter(field.get("anyOf", [])), {})  # of what may be unset, the first says what else it is
        told = [f"{word} {limits[name]:,}".removesuffix(".0") for name, word in BOUNDS.items() if name in limits]
        if told:
            field["description"] += f" {', '.join(told).capitalize()}."
        field["position"] = position


Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # what every generator of random numbers takes
RCF_PIXELS = 12  # side of the smallest image that `rcf` takes: its widest window, 3, coarsened by 4


class Params(BaseModel):
    """Frozen, refuses unknown names, and takes each field's description from its docstring.

    Prefect's form and the command line are made from the same fields, in declared order. No number is infinite or NaN,
    no text is empty, and a truth value is no number.
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
        """Lays the values of the preset that is named under those that are given, of nested models too."""
        if not (isinstance(given, dict) and given.get("preset")):
            return given
        defaults = {name: field.get_default(call_default_factory=True) for name, field in cls.model_fields.items()}
        named = {
            name: {"preset": given["preset"], **dict(given.get(name, ()))}
            for name, part in defaults.items()
            if isinstance(part, Params) and "preset" in type(part).model_fields
        }
        return laid_under(given["preset"], [kind.__name__ for kind in cls.__mro__], given, defaults) | named

    def at(self, when: Instant) -> Self:
        """The same with dates in place of rolling windows of time, as they are at `when`."""
        rolling = {name: value.at(when) for name, value in self if isinstance(value, Params)}
        return self.model_copy(update=rolling) if rolling else self


class SampleParams(Params):
    """Where, when and how many patches."""

    patches: int = Field(10_000, ge=1, le=10_000_000)
    """Number of patches."""
    seed: Seed = 0
    """Seed of the places; the same seed and more patches extends the same sample."""
    places: Literal["area", "tile", "class", "list"] = "area"
    """Uniform by area on land; by tile, as S2-100K and biased like it; by the classes of a raster in turn; a list."""
    source: str | None = None
    """For `class` a GeoTIFF in longitude and latitude, 0 no class; for `list` a CSV or Parquet with lon and lat."""
    datetime: str = Field("2021-01-01/2022-12-31", min_length=0)  # so that its own check tells what is wrong
    """Time window: a day, a month, a year, or two with / between, as 2021-01-01/2021-12-31, .. for an open end; or a
    rolling one: `last 90 days`, `previous month`, `previous season`, `previous year`."""
    line: str = Field("", pattern=LINE, min_length=0)
    """Name of the line of products that it belongs to, and what is made of it; `newest:NAME` finds them."""
    max_cloud_percent: float = Field(60.0, ge=0, le=100)
    """Largest cloud cover of a scene."""
    scene: Literal["least-cloudy", "nearest", "seasons"] = "least-cloudy"
    """Of a place's scenes the least cloudy, the nearest to `date`, or the least cloudy of each season."""
    date: str | None = None
    """Day that `nearest` is near to, as 2021-06-30."""
    min_clear_fraction: float = Field(0.9, ge=0, le=1)
    """Smallest clear share of a patch, by the scene classification."""
    max_nodata_fraction: float = Field(0.0, ge=0, le=1)
    """Largest share of a patch's pixels without data in some band."""
    max_saturated_fraction: float = Field(0.01, ge=0, le=1)
    """Largest saturated or defective share of a patch, by the scene classification."""
    max_tries: float = Field(20.0, ge=1, le=1000)
    """Places that may be tried for each patch before the run is given up."""
    bands: tuple[str, ...] = BANDS
    """Bands, by their Sentinel-2 names."""
    patch_pixels: int = Field(256, ge=4, le=2048)
    """Side of a patch in pixels."""
    resolution_m: float = Field(10.0, ge=0.1, le=50_000)
    """Pixel size in metres."""
    south: float = Field(-80.0, ge=-80, le=84)
    """Southern limit in degrees; UTM begins at -80."""
    north: float = Field(84.0, ge=-80, le=84)
    """Northern limit in degrees; UTM ends at 84."""
    shard_patches: int = Field(512, ge=1, le=100_000)
    """Patches in one shard, which is one unit of work."""
    max_failed_fraction: float = Field(0.02, ge=0, le=1)
    """Share of the cells or shards that may fail before the others are given up; a rerun does those that failed."""
    preset: Preset | None = Field(None, exclude=True)
    """Parameters for a try, a continent or the globe: of all fields here that are left at their default."""

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
        unknown = [band for band in bands if band not in BANDS]
        if unknown or not bands or len(set(bands)) < len(bands):
            raise ValueError(f"give bands of Sentinel-2 L2A, each once: {', '.join(BANDS)}")
        return bands

    @field_validator("datetime")
    @classmethod
    def _interval(cls, text: str) -> str:
        if windows.is_rolling(text):
            windows.fixed(text, datetime.datetime.now(datetime.UTC))
        else:
            Interval.parse(text)
        return text

    def at(self, when: Instant) -> Self:
        """The same with dates in place of a rolling window of time."""
        if not windows.is_rolling(self.datetime):
            return self
        return self.model_copy(update={"datetime": windows.fixed(self.datetime, when)})

    @field_validator("date")
    @classmethod
    def _day(cls, text: str | None) -> str | None:
        return text if text is None else datetime.date.fromisoformat(text).isoformat()


class EncoderParams(Params):
    """Which image encoder."""

    name: str = "rcf"
    """`rcf`, satclip-vit16, satclip-resnet18, satclip-resnet50, satmae or module:function; all but rcf need weights."""
    weights: str | None = None
    """Path or URL of a .safetensors, or of an imported SatCLIP checkpoint."""
    dim: int = Field(1024, ge=2, le=8192, multiple_of=2)
    """Length of a feature vector of `rcf`, and so of the database's values; the others have their own."""
    seed: Seed = 0
    """Of the random choices of `rcf`."""


class TrainParams(Params):
    """Architecture and schedule of the location encoder."""

    encoder: EncoderParams = Field(default_factory=EncoderParams)
    """The image encoder, frozen."""
    degree: int = Field(20, ge=1, le=100)
    """Degrees of spherical harmonics: structure down to about 180 degrees / degree."""
    hidden: int = Field(512, ge=8, le=4096)
    """Width of the two sine layers."""
    dim: int = Field(256, ge=2, le=4096)
    """Length of a location embedding and of a key."""
    smoothness: float = Field(2.0, ge=0, le=4)
    """Harmonics of degree l enter times (1 + l) ** -smoothness; 0 is SatCLIP's own."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of hidden units dropped in training."""
    steps: int = Field(150, ge=1, le=1_000_000)
    """Optimiser steps."""
    views: int = Field(1, ge=1, le=16)
    """Views of each image to train on: itself, 7 turned and mirrored ones, then as many of its corners."""
    batch: int = Field(1024, ge=2, le=65_536)
    """Pairs in a batch: each image is told from all others in it."""
    shuffle: int = Field(65_536, ge=2, le=100_000_000)
    """Pairs that are shuffled together, and so held in memory; the rest is read as its turn comes."""
    lr: float = Field(1e-3, gt=0, le=1)
    """Highest learning rate, after the warm-up."""
    weight_decay: float = Field(0.01, ge=0, le=10)
    """AdamW's weight decay, of matrices alone."""
    mask_km: float = Field(0.0, ge=0, le=2000)
    """Places in a batch that are this near are not told apart; 0: all are."""
    held_out_share: float = Field(0.1, ge=0, le=0.5)
    """Share of the 10-degree blocks whose pairs only measure retrieval."""
    patience: int = Field(0, ge=0, le=20)
    """Twentieths of the steps without better held-out retrieval that end training, with the best weights; 0: none."""
    seed: Seed = 0
    """Of the weights, the batches and the held-out blocks."""
    save_every: int = Field(100, ge=1, le=1_000_000)
    """Steps after which the state is stored that a killed run goes on from."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train; auto takes the first of cuda, mps and cpu that is there."""
    precision: Literal["float32", "bf16"] = "float32"
    """Of the matrix products above the harmonics; bf16 is for GPUs."""
    preset: Preset | None = Field(None, exclude=True)
    """Parameters for a try, a continent or the globe: of all fields here that are left at their default."""

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.patience and not self.held_out_share:
            raise ValueError("patience needs held-out pairs: give held_out_share above 0, or patience 0")
        if self.shuffle < self.batch:
            raise ValueError(f"shuffle {self.shuffle} is less than a batch of {self.batch}: give at least the batch")
        return self


class ValueParams(EncoderParams):
    """Which image encoder makes the database's values."""

    name: str = "checkpoint"
    """`checkpoint`, its own image encoder, or one by name as in training, beside the checkpoint's keys."""

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.name == "checkpoint" and self.weights:
            raise ValueError("weights of the values need the name of their encoder, such as satmae")
        return self


class EncodeParams(Params):
    """How the database is written."""

    values: ValueParams = Field(default_factory=ValueParams)
    """The image encoder of the values."""
    shard_rows: int = Field(512, ge=1, le=65_536)
    """Images per shard, which is one unit of work."""


class PublishParams(Params):
    """What grid to publish."""

    step: float = Field(0.5, gt=0)
    """Cell size in the units of the CRS, degrees or metres; divides the box."""
    crs: str = "EPSG:4326"
    """Coordinate reference system: geographic in degrees, or projected in metres, which needs a box; code or WKT."""
    west: float = -180.0
    """Western edge of the box, in the units of the CRS; by default the box is the whole globe."""
    south: float = -90.0
    """Southern edge."""
    east: float = 180.0
    """Eastern edge; beyond 180 degrees for a box that crosses them, as 170 to 190."""
    north: float = 90.0
    """Northern edge."""
    land: Literal["any", "centre"] | None = None
    """Which cells have a vector: of any land, or of land at their centre; unset, as the parent, else any."""
    method: Literal["range+", "range"] = "range+"
    """Retrieval: RANGE+ (semantic and geodesic) or RANGE (semantic only)."""
    beta: float = Field(0.5, ge=0, le=1)
    """Share of the semantic half in RANGE+; 1 is purely semantic."""
    tile_cells: int | None = Field(None, ge=1, le=1024)
    """Cells along one side of a tile, one shard and one unit of work; a multiple of 20; unset, for shards of 50 MB."""
    tolerance: float = Field(0.0, ge=0, le=0.1)
    """Relative error of the visual part that interpolation may leave, 99th percentile of a tile; 0: all exact."""
    compact_dims: int | None = Field(None, ge=1, le=8192)
    """Principal components to keep of the visual part, for example 64; unset, all of it."""
    dtype: Literal["float32", "float16", "int8"] = "float32"
    """How a number is stored: 4, 2 or 1 bytes; what the fewer bytes lose is measured and told in the attributes."""
    evidence: bool = False
    """Adds layers of what a cell rests on: effective_images, largest_weight, distance_km; half the work again."""
    overviews: int = Field(0, ge=0, le=8)
    """Coarser levels to add, each of half the rows and columns, whose cells are means."""
    keep_sums: bool = False
    """Keeps the sums behind the grid beside it, twice its size, so that a later grid can have it as parent."""
    parent: str | None = None
    """URL of a grid with kept sums, of a former database: only the images that came and went are computed."""
    line: str = Field("", pattern=LINE, min_length=0)
    """Product line whose latest it becomes, a name; unset, that of grids of the same CRS, box, step, dtype and dims."""
    promote: bool = True
    """Makes the grid its line's latest, which readers open, once it is good; false: `rangegrid grid promote` does."""
    drift_alert: float = Field(0.1, ge=0, le=2)
    """Turn of the vectors since the latest grid, 1 - mean cosine, from which an event is sent."""
    preset: Preset | None = Field(None, exclude=True)
    """Parameters for a try, a continent or the globe: of all fields here that are left at their default."""

    @field_validator("crs")
    @classmethod
    def _known(cls, crs: str) -> str:
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
        rows, columns = self.spec.shape
        if rows % 2**self.overviews or columns % 2**self.overviews:
            raise ValueError(
                f"{rows} rows and {columns} columns of cells cannot be halved {self.overviews} times: give fewer "
                f"overviews, or a box of sides that {self.step * 2**self.overviews:g} divides"
            )
        return self

    @property
    def box(self) -> tuple[float, float, float, float]:
        """West, south, east and north."""
        return self.west, self.south, self.east, self.north

    @property
    def spec(self) -> "GridSpec":
        """The grid; a size of tiles that is not given is for the database to tell (`tasks.publish.settled`)."""
        from tasks.core.earth.grid import GridSpec

        return GridSpec(self.step, self.tile_cells or GridSpec.tile, self.box, self.crs, self.land or "any")

    @model_validator(mode="after")
    def _exact(self) -> Self:
        if self.tolerance and (self.keep_sums or self.parent):
            raise ValueError("sums are those of exact cells: give keep_sums and parent without a tolerance")
        if self.parent and (self.evidence or self.dtype != "float32"):
            raise ValueError(
                "evidence and the scales of dtype need a look at all images, which an update spares: give no parent, "
                "or float32 without evidence"
            )
        return self


class PruneParams(Params):
    """Which versions of the grid to delete; never the latest or the previous one of a line, or what these need."""

    keep: int = Field(3, ge=0, le=1_000_000)
    """How many of the newest versions of each line are kept."""
    line: str = Field("", pattern=LINE, min_length=0)
    """The only line to delete versions of; unset, every line."""
    unfinished: bool = False
    """Also deletes what broken runs left; for when no run publishes."""
    dry_run: bool = False
    """Deletes nothing, and tells what would be deleted."""


class EmbedParams(Params):
    """How points are embedded."""

    method: Literal["range+", "range", "top1", "topk", "none"] = "range+"
    """Retrieval: soft (range+, range), hard (top1, topk), or none: the location part alone."""
    beta: float = Field(0.5, ge=0, le=1)
    """Share of the semantic half in RANGE+; 1 is purely semantic."""
    k: int = Field(10, ge=1, le=10_000_000)
    """Images that topk averages."""
    compact_dims: int | None = Field(None, ge=1, le=8192)
    """Principal components to keep of the visual part, for example 64; unset, all of it."""
    evidence: bool = False
    """Adds columns: effective_images, largest_weight, distance_km to the nearest image."""
    top_images: int = Field(0, ge=0, le=100)
    """Adds a column image_ids: row ids of that many images with the largest weights."""
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:[0-9]{1,3})?)$")
    """Where the database lives and the products run: cpu, cuda, cuda:1."""
    precision: Literal["float32", "float64", "tf32", "bf16"] = "float32"
    """Of the products; float64 takes three times as long, tf32 is for cuda, bf16 rounds weights and values."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.precision == "tf32" and self.device == "cpu":
            raise ValueError("precision tf32 is a mode of cuda: give device cuda, or precision float32")
        return self


Sampling = Literal["nearest", "bilinear"]


class EmbedderParams(Params):
    """Which embedders are compared."""

    embedder: tuple[str, ...] = ()
    """Names, NAME=WEIGHTS for those with weights of their own, or URLs of grids; unset, all."""
    interpolation: Sampling = "nearest"
    """How a grid is read between its cells."""


class EvaluateParams(EmbedderParams):
    """Which labels, embedders and splits."""

    labels: tuple[str, ...] = ()
    """Tables by path or URL: CSV, Parquet, GeoParquet, GeoJSON, shapefile; unset, the demo's labels."""
    label: str | None = None
    """Column of the labels, where it is not one of the paper's tasks, which are recognised."""
    kind: Literal["classification", "regression"] | None = None
    """Whether that column has classes or numbers."""
    lon: str | None = None
    """Column of the longitudes in degrees; unset, by its name."""
    lat: str | None = None
    """Column of the latitudes in degrees; unset, by its name."""
    log1p: bool = False
    """Takes log(1 + label), as the paper does for population."""
    points: int | None = Field(None, ge=200, le=1_000_000)
    """Most labelled places per task; unset, 2,500 of the demo's, 10,000 in polygons, and every row of a table."""
    repeats: int = Field(1, ge=1, le=100)
    """Random splits; the first is the paper's."""
    folds: int = Field(5, ge=2, le=100)
    """Folds of whole blocks."""
    block_degrees: float | None = Field(None, ge=0.01, le=90)
    """Side of the blocks in degrees; unset, 10, and 1 for California housing."""
    near_km: float = Field(1.0, gt=0, le=1000)
    """Scored places with a training place this near are counted as near-duplicates."""
    seed: Seed = 2
    """Seed of the places that are drawn; another one than the sample's."""
    preset: Preset | None = Field(None, exclude=True)
    """Parameters for a try, a continent or the globe: of all fields here that are left at their default."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.label and not self.kind:
            raise ValueError("label needs a kind: classification or regression")
        if self.label and not self.labels:
            raise ValueError("label is a column of labels: give the table too")
        if (self.kind or self.log1p) and not self.label:
            raise ValueError("kind and log1p are of a label: name its column, or leave them")
        if self.log1p and self.kind == "classification":
            raise ValueError("log1p is of numbers, and classes have none: give kind regression, or no log1p")
        if self.lon and self.lon == self.lat:
            raise ValueError(f"{self.lon} cannot have both longitudes and latitudes: name a column of each")
        return self


Choice = Literal["strategy", "k", "temperature", "beta", "size", "values", "variants"]


class AblateParams(EvaluateParams):
    """Which choice is varied, and how it is scored."""

    folds: int = Field(3, ge=2, le=100)
    """Folds of whole blocks."""
    steps: tuple[float, ...] = ()
    """Values of k, temperature, beta or size to try; unset, a usual range."""
    databases: tuple[str, ...] = ()
    """For `values`: databases of the same checkpoint with other value encoders."""


class PipelineParams(Params):
    """The parameters of every step."""

    preset: Preset | None = Field(None, exclude=True)
    """Parameters for a try, a continent or the globe: of all fields here that are left at their default."""
    sample: SampleParams = Field(default_factory=SampleParams)
    """Where, when and how many patches."""
    train: TrainParams = Field(default_factory=TrainParams)
    """Architecture and schedule of the location encoder."""
    encode: EncodeParams = Field(default_factory=EncodeParams)
    """How the database is encoded."""
    publish: PublishParams = Field(default_factory=PublishParams)
    """Which grid, which retrieval."""
    evaluate: EvaluateParams = Field(default_factory=EvaluateParams)
    """Which labels and splits."""
    gate_margin: float = Field(0.02, ge=0, le=1)
    """What a blocked score may fall by, against the grid that readers have, for the new one to be promoted."""

    @model_validator(mode="after")
    def _enough_patches(self) -> Self:
        if self.train.batch > self.sample.patches:
            raise ValueError(
                f"a batch of {self.train.batch} pairs needs more than {self.sample.patches} patches: raise "
                "sample.patches or lower train.batch"
            )
        return self

    @model_validator(mode="after")
    def _large_enough(self) -> Self:
        side, corners = self.sample.patch_pixels, self.train.views > 8  # of three quarters of the side
        trained = 4 * RCF_PIXELS // 3 if corners else RCF_PIXELS
        for encoder, least in ((self.train.encoder, trained), (self.encode.values, RCF_PIXELS)):
            if encoder.name == "rcf" and side < least:
                raise ValueError(
                    f"the encoder rcf needs patches of {least} x {least} pixels{' for so many views' * corners}, and "
                    f"these have {side} x {side}: raise sample.patch_pixels"
                )
        return self
