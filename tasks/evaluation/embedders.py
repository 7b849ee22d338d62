"""Finds embedders by name: functions from places to vectors.

==================== ==========================================================================
name                 embedding
==================== ==========================================================================
coordinates          longitude and latitude in degrees
unit vectors         points of the unit sphere
wrap, theory         `tasks.core.encoders.encodings`
spherical harmonics  the fixed features below the location encoder
geoclip              the weights in the package `geoclip`
satclip, sinr, csp   published weights, as NAME=PATH or NAME=URL; without them, shown as not given
location encoder     our location encoder, without retrieval
shuffled values      multi-head with the values dealt at random to other images: where without what, so that what
                     is left of its scores comes from position alone; on the places of a grid the grid's recipe
range, range+        retrieval from our database, as published: of several members by the first
multi-head           retrieval by heads side by side, those that the database chooses
URL of a grid        the vectors of a published grid
NAME=TABLE           a table of vectors at places, such as NAME=vectors.parquet
NAME=module:function a function of an installed package, from (n, 2) degrees (lon, lat) to (n, d)
several, joined by + their vectors side by side, such as `geoclip+range+`; the parts are scored too
==================== ==========================================================================
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from infra import storage
from infra.addresses import as_url, name_of, shown
from infra.errors import UserError
from tasks.cards import whole_of
from tasks.core.earth.sphere import unit_vectors
from tasks.core.encoders.encodings import theory, wrap
from tasks.core.encoders.harmonics import spherical_harmonics
from tasks.core.encoders.location import PlaceEncoder
from tasks.core.encoders.peers import embed_csp, embed_sinr
from tasks.core.ensemble import first_member
from tasks.core.retrieval import Method, RetrievalIndex
from tasks.core.retrieval import embed as embed_ours
from tasks.database.heads import index_of
from tasks.database.store import open_database
from tasks.evaluation.external import external, is_external
from tasks.evaluation.fusion import JOINT, parts_of, side_by_side
from tasks.grid.beside import embed_beside
from tasks.grid.companion import storing
from tasks.grid.store import attributes
from tasks.grid.tiles import load, load_encoder
from tasks.model.checkpoint import load_checkpoint
from tasks.model.geoclip import embed_geoclip
from tasks.model.satclip import import_satclip
from tasks.model.weights import load_foreign
from tasks.params import EmbedderParams, EmbedParams, PublishParams
from tasks.points.sample_grid import cells_at, sample_grid
from tasks.products import GridRecipe

Lonlat = NDArray[np.float64]
Embeddings = NDArray[np.float32]
Retrieval = tuple[PlaceEncoder, RetrievalIndex, Method]

DEGREE = 20  # degrees of the spherical harmonics where no checkpoint says another number
FIXED: dict[str, Callable[[Lonlat], NDArray]] = {
    "coordinates": np.asarray,
    "unit vectors": unit_vectors,
    "wrap": wrap,
    "theory": theory,
}
BY_PATH = ("satclip", "sinr", "csp")
OURS = {"location encoder": Method("none"), "range": Method("range"), "range+": Method("range+")}
SHUFFLED, MULTI_HEAD, GRID = "shuffled values", "multi-head", "grid"
SHUFFLE_SEED = 0
BY_HEADS = {SHUFFLED: True, MULTI_HEAD: False}  # whether the values are shuffled among the images
NAMES = (
    *FIXED,
    "spherical harmonics",
    "geoclip",
    *BY_PATH,
    "location encoder",
    SHUFFLED,
    "range",
    "range+",
    MULTI_HEAD,
)
WITHOUT_IMAGES = "location encoder"  # what retrieval adds to
STORED = "grid's vectors, "  # prefix of the names of a grid's vectors at exact places, before their dtype
NOT_GIVEN = "weights not given"


class Embedder(Protocol):
    """A function from places to vectors."""

    def __call__(self, lonlat: Lonlat, /) -> Embeddings:
        """Maps (n, 2) degrees (lon, lat) to (n, d); NaN where there is no vector."""


@dataclass(frozen=True)
class Named:
    """An embedder as a row of the table of scores."""

    name: str
    """Name in the table."""
    embed: Embedder | None
    """The embedder; None where its weights were not given."""
    version: str = ""
    """A text that changes when the weights do."""
    partial: bool = False
    """Whether it lacks vectors for some places."""
    parts: tuple[str, ...] = ()
    """Names of the embedders that it has side by side; none where it is one embedder."""
    tried: bool = False
    """Whether it stands beside those that know all places where it lacks none of those that are asked for."""


def embedders(checkpoint: str | None, database: str | None, grid: str | None, params: EmbedderParams) -> list[Named]:
    """Returns the embedders that were asked for, or all, in the order of the table, parts before what is fused of them.

    Args:
        checkpoint: URL of our location encoder.
        database: URL of the database encoded with it.
        grid: URL of a published grid to score.
        params: Names of the embedders.

    Raises:
        UserError: A name is unknown or of two embedders, or an embedder lacks its weights or products.
    """
    ours = {*OURS, *BY_HEADS}
    asked = params.embedder or tuple(name for name in NAMES if name not in ours or (checkpoint and database))
    chosen = _once([one for spec in asked for one in _rows(spec, checkpoint, database, params)])
    if grid:
        chosen.append(_grid(GRID, grid, params))
        if checkpoint and database:
            chosen += _stored(grid, checkpoint, database)
    return chosen


def beside_grids(
    checkpoint: str | None, database: str | None, grid: str | None, chosen: list[Named], params: EmbedderParams
) -> list[Named]:
    """Returns what is scored beside a grid on its places, asked for or not: what the gate compares it with.

    With a checkpoint and a database that is the location encoder, the grid's own recipe with shuffled values, and
    coordinates.
    """
    if not checkpoint or not database:
        return []
    there = {one.name: one for one in chosen}
    first, last = (there.get(n) or _named(n, checkpoint, database, params) for n in (WITHOUT_IMAGES, "coordinates"))
    return [first, *(_shuffled(grid, checkpoint, database, params) if grid else ()), last]


def _shuffled(grid: str, checkpoint: str, database: str, params: EmbedderParams) -> list[Named]:
    """Returns an embedder as a grid is, with its cells and dtype, of values dealt at random to other images.

    None where the grid does not tell what it is made of.
    """
    exact, kept = _exact(grid, checkpoint, database, shuffle=True), storing(as_url(grid))
    if exact is None:
        return []

    def shuffled(lonlat: Lonlat) -> Embeddings:
        return kept(exact(cells_at(grid, lonlat) if params.interpolation == "nearest" else lonlat))

    return [Named(SHUFFLED, shuffled)]


def _stored(grid: str, checkpoint: str, database: str) -> list[Named]:
    """Returns embedders of a grid's vectors at the exact places, in float32 and in the grid's dtype; none for float32.

    Their difference is the cost of the dtype alone: the size of the cells has no part in it.
    """
    dtype, kept = _attributes(grid)["geoemb:data_type"], storing(as_url(grid))
    exact = _exact(grid, checkpoint, database)
    if dtype == "float32" or exact is None:
        return []
    return [Named(f"{STORED}float32", exact), Named(STORED + dtype, lambda lonlat: kept(exact(lonlat)))]


def _exact(grid: str, checkpoint: str, database: str, shuffle: bool = False) -> Embedder | None:
    """Returns what makes a grid's vectors at the exact places, in float32, perhaps of shuffled values.

    None where the grid does not tell what it is made of.
    """
    retrieval = _retrieval_of_grid(grid, checkpoint, database)
    if retrieval is None:
        return None

    def exact(lonlat: Lonlat) -> Embeddings:
        encoder, index, method = retrieval()
        own = embed_ours(encoder, _dealt(index) if shuffle else index, lonlat, method)
        return np.concatenate([own, embed_beside(_recipe(grid).with_, lonlat)], axis=1)

    return exact


def _dealt(index: RetrievalIndex) -> RetrievalIndex:
    """Returns an index in which another image has the values of each: keys and locations stay."""
    values = index.values.numpy()[_order(len(index))]
    return RetrievalIndex(index.keys.numpy(), values, index.locations, location=index.location, weights=index.counts)


def _order(images: int) -> NDArray[np.int64]:
    return np.random.default_rng(SHUFFLE_SEED).permutation(images)


def retrieval_of(name: str, checkpoint: str, database: str, grid: str | None) -> Retrieval:
    """Returns what an embedder retrieves by: one of ours, or the grid; RANGE+ for others.

    Args:
        name: Name of the embedder.
        checkpoint: URL of our location encoder.
        database: URL of the database encoded with it.
        grid: URL of the grid that is named `grid`.
    """
    if name == MULTI_HEAD:
        return _multi_head(checkpoint, database)
    if grid and name == GRID and (retrieval := _retrieval_of_grid(grid, checkpoint, database)):
        return retrieval()
    return *_as_published(checkpoint, database), OURS.get(name.lower(), OURS["range+"])


def _retrieval_of_grid(grid: str, checkpoint: str, database: str) -> Callable[[], Retrieval] | None:
    """Returns what loads the retrieval of a grid's cells; None where the grid does not tell what it is made of."""
    if not _attributes(grid).get("rangegrid:made_of"):
        return None
    params = _recipe(grid)
    projected_by = whole_of(grid) if params.is_compact else None
    return lambda: (*load(checkpoint, database, projected_by), params.retrieval)


def _recipe(grid: str) -> PublishParams:
    """Returns the parameters of a grid that tells what it is made of."""
    return GridRecipe.model_validate(_attributes(grid)["rangegrid:made_of"]).params


def _attributes(grid: str) -> Mapping[str, Any]:
    return attributes(as_url(grid))


def dtype_costs(scores: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the cost of a grid's dtype in each task: the scores of its vectors in float32, and as stored."""
    rows = [row for row in scores if row["embedder"].startswith(STORED)]
    return [_cost(exact, stored) for exact, stored in pairwise(rows) if exact["task"] == stored["task"]]


def _cost(exact: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """Returns the cost in one task, from the scores in float32 and as stored."""
    cost = {"task": exact["task"], "metric": exact["metric"], "dtype": stored["embedder"].removeprefix(STORED)}
    for split in ("random", "blocked"):
        cost[split] = {"float32": exact[split], "stored": stored[split]}
    return cost


def _once(found: list[Named]) -> list[Named]:
    """Returns each embedder once; refuses two that a table could not tell apart."""
    by_name: dict[str, Named] = {}
    for one in found:
        if by_name.setdefault(one.name, one).version != one.version:
            raise UserError(f"two embedders would both be named {one.name}: evaluate one after the other")
    return list(by_name.values())


def _rows(spec: str, checkpoint: str | None, database: str | None, params: EmbedderParams) -> list[Named]:
    """Returns an embedder, after its parts where it is fused."""
    specs = parts_of(spec, NAMES)
    if len(specs) == 1:
        return [_named(spec, checkpoint, database, params)]
    parts = [_named(part, checkpoint, database, params) for part in specs if part]
    names = tuple(one.name for one in parts)
    if len(set(names)) < max(2, len(specs)):
        raise UserError(f"the embedder {spec!r} needs two or more different ones, each once, such as geoclip+range+")
    embeds = [one.embed for one in parts if one.embed]
    embed = partial(side_by_side, embeds) if len(embeds) == len(parts) else None
    version = JOINT.join(one.version for one in parts)
    partial_ = any(one.partial for one in parts)
    tried = partial_ and all(one.tried for one in parts if one.partial)
    return [*parts, Named(JOINT.join(names), embed, version, partial_, names, tried)]


def _named(spec: str, checkpoint: str | None, database: str | None, params: EmbedderParams) -> Named:
    given, _, path = spec.partition("=")
    name = given.strip().lower()
    if name in BY_PATH:
        return _by_path(name, path.strip())
    if is_external(path if path and "://" not in given else spec):
        return _external(given.strip(), path.strip(), spec.strip())
    if "://" not in given and _is_grid(path):
        return _grid(given.strip(), as_url(path.strip()), params)
    if _is_grid(spec):
        return _grid(shown(spec), as_url(spec), params)
    if name in FIXED:
        return Named(name, lambda lonlat: FIXED[name](lonlat).astype(np.float32))
    if name == "spherical harmonics":
        return Named(name, partial(_harmonics, _degree(checkpoint)))
    if name == "geoclip":
        return Named("GeoCLIP", embed_geoclip if find_spec("geoclip") else None)
    if name in OURS or name in BY_HEADS:
        return _ours(name, checkpoint, database)
    raise UserError(
        f"the embedder {spec!r} is unknown: use {', '.join(NAMES)}, the URL of a grid, NAME=TABLE of "
        "vectors, NAME=module:function, or some joined by +"
    )


def _external(name: str, path: str, spec: str) -> Named:
    """Returns an embedder of another project, by the name that was given or that of its file."""
    if not path or "://" in name:
        name, path = name_of(as_url(spec)).split(".")[0] if ":" not in spec or "://" in spec else spec, spec
    if name.lower() in (*NAMES, GRID):
        raise UserError(f"the embedder {spec!r} has a name that is taken: give it another than {name}")
    embed, told = external(path)
    return Named(name, embed, told, partial=True, tried=True)


def _ours(name: str, checkpoint: str | None, database: str | None) -> Named:
    if not checkpoint or not database:
        raise UserError(f"the embedder {name!r} is ours: name the checkpoint and the database to evaluate")
    shown = name.upper() if name.startswith("range") else name

    def ours(lonlat: Lonlat) -> Embeddings:
        if name in BY_HEADS:
            encoder, index, method = _multi_head(checkpoint, database, shuffle=BY_HEADS[name])
            return embed_ours(encoder, index, lonlat, method)
        if name == WITHOUT_IMAGES:
            return load_encoder(checkpoint).embed(lonlat)
        return embed_ours(*_as_published(checkpoint, database), lonlat, OURS[name])

    return Named(shown, ours)


@lru_cache(maxsize=1)
def _as_published(checkpoint: str, database: str) -> tuple[PlaceEncoder, RetrievalIndex]:
    """Opens a database for RANGE and RANGE+, which have one location encoder: of several members the first."""
    everyone, index = load(checkpoint, database)
    encoder, keys = first_member(everyone, index.keys.numpy())
    if encoder is everyone:
        return encoder, index
    return encoder, RetrievalIndex(keys, index.values.numpy(), index.locations, weights=index.counts)


@lru_cache(maxsize=2)
def _multi_head(checkpoint: str, database: str, shuffle: bool = False) -> Retrieval:
    """Opens a database for the multi-head method by default, by the heads that its own values choose.

    Shuffled, another image has the values of each: keys and locations stay.
    """
    encoder, data = load_encoder(checkpoint), open_database(database)
    index, params, _ = index_of(encoder, data, EmbedParams())
    if shuffle:
        dealt = replace(data, values=data.values[_order(len(data.values))])
        index, params, _ = index_of(encoder, dealt, params)
    return encoder, index, params.retrieval


def _degree(checkpoint: str | None) -> int:
    """Returns the degrees of a checkpoint's harmonics, or as many as it would have by default where it has none."""
    return (load_checkpoint(checkpoint).location.degree if checkpoint else 0) or DEGREE


def _harmonics(degree: int, lonlat: Lonlat) -> Embeddings:
    return spherical_harmonics(lonlat, degree).astype(np.float32)


def _is_grid(text: str) -> bool:
    return "://" in text or text.rstrip("/ ").endswith(".zarr")


def _grid(name: str, url: str, params: EmbedderParams) -> Named:
    embed = partial(sample_grid, url, method=params.interpolation)
    return Named(name, embed, _version(storage.join(url, "zarr.json")), partial=True)


def _version(url: str) -> str:
    try:
        return storage.version(url)
    except FileNotFoundError:
        raise UserError(f"there is nothing at {shown(url)}: check the path or URL of the embedder") from None


SHOWN = {"satclip": "SatCLIP", "sinr": "SINR", "csp": "CSP"}


def _by_path(name: str, path: str) -> Named:
    if not path:
        return Named(SHOWN[name], None)
    load_weights = {"satclip": load_satclip, "sinr": load_sinr, "csp": load_csp}[name]
    return Named(SHOWN[name], load_weights(path), _version(as_url(path)))


def load_satclip(path: str) -> Embedder:
    """Loads SatCLIP's location encoder from a `satclip-*.ckpt`; its vectors are not normalised, as in the paper."""
    with TemporaryDirectory() as scratch:
        url = Path(scratch, "checkpoint").as_uri()
        import_satclip(path, url)
        location = load_checkpoint(url).location

    def satclip(lonlat: Lonlat) -> Embeddings:
        parts = [
            location(lonlat[start : start + 4096]).detach().float().numpy() for start in range(0, len(lonlat), 4096)
        ]
        return np.concatenate(parts)

    return satclip


def load_sinr(path: str) -> Embedder:
    """Loads SINR's encoder from a `.pt` of its training script, or a `.safetensors`."""
    content = load_foreign(path, "SINR's weights, a .pt or .safetensors")
    return _checked(path, "SINR", partial(embed_sinr, content.get("state_dict", content)))


def load_csp(path: str) -> Embedder:
    """Loads CSP's encoder from a published `.pth.tar`."""
    content = load_foreign(path, "CSP's weights, a .pth.tar")
    state: Mapping[str, Tensor] = content.get("state_dict", {})
    weights = {name.rpartition("spa_enc.ffn.")[2]: tensor for name, tensor in state.items() if "spa_enc.ffn." in name}
    return _checked(path, "CSP", partial(embed_csp, weights, content.get("params", {})))


def _checked(path: str, name: str, embedder: Any) -> Embedder:
    """Returns the embedder after it embedded one place, so that a wrong file is refused before the work."""
    try:
        embedder(np.zeros((1, 2)))
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"{shown(path)} has no {name} that can be used ({error}): give its published weights"
        ) from error
    return embedder
