"""Settles what the multi-head method leaves open: heads that the database's own images choose, and projections."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from infra.errors import UserError
from tasks.cards import read_card
from tasks.core.bandwidths import Curve, curves, drawn
from tasks.core.compact import Compact, Projection, Rows, Weights, project
from tasks.core.earth.region import Region
from tasks.core.methods import Head, Kind
from tasks.core.retrieval import Encodes, RetrievalIndex
from tasks.database.store import Database, read_array, read_weights, stored_keys, stored_values
from tasks.model.checkpoint import load_checkpoint
from tasks.params import EmbedParams, PublishParams
from tasks.products import DatabaseCard
from tasks.units import log

DEFAULT: dict[Kind, float] = {"semantic": 12.0, "geodesic": 1000.0}  # heads by default, where too few images choose
HEAD_DIMS, LOCATION_DIMS = 128, 256  # dimensions of a head and of the location part by default
FITTED_ON = 16_384  # images at whose places the projection of the location part is fitted

MultiHead = TypeVar("MultiHead", PublishParams, EmbedParams)


def curves_of(card: DatabaseCard, measure: Callable[[], list[Curve]]) -> list[Curve]:
    """Returns the curves of a database: those of its card, or where a former card has none, measured now."""
    if card.heads is None:
        return measure()
    return [Curve(c["kind"], tuple(c["at"]), tuple(c["one_out"]), tuple(c["block_out"])) for c in card.heads]


def settled(params: MultiHead, card: DatabaseCard, measure: Callable[[], list[Curve]]) -> MultiHead:
    """Returns parameters with the heads and dimensions of multi-head settled; those of other methods as they are.

    Args:
        params: What was asked for.
        card: The database's card.
        measure: Measures the curves, where heads are left open and the card has none.

    Raises:
        UserError: More components are asked for than there are.
    """
    most = min(card.images, card.value_dim)
    if params.compact_dims and params.compact_dims > most:
        raise UserError(f"--compact-dims {params.compact_dims}: the database's values have {most} components")
    if params.method != "multi-head":
        return params
    if params.location_dims and params.location_dims > card.key_dim:
        raise UserError(f"--location-dims {params.location_dims}: the location encoder has {card.key_dim} dimensions")
    heads = params.heads or tuple(map(str, chosen(curves_of(card, measure))))
    location = params.location_dims or LOCATION_DIMS
    return params.model_copy(
        update={
            "heads": heads,
            "compact_dims": params.compact_dims or min(HEAD_DIMS, most),
            "location_dims": location if location < card.key_dim else None,
        }
    )


def chosen(found: list[Curve]) -> list[Head]:
    """Returns the heads of multi-head by default."""
    best = {curve.kind: curve.chosen for curve in found}
    return [best.get(kind, Head(kind, at)) for kind, at in DEFAULT.items()]


def measured(
    encoder: Encodes,
    keys: Rows,
    values: Rows,
    locations: NDArray[np.float64],
    weights: Weights = None,
    region: Region | None = None,
) -> list[Curve]:
    """Measures the curves of a database, or of its images in a region; keys and values are read in blocks."""
    queries = PlacesOf(encoder, locations)
    if region is None:
        return curves(queries, keys, values, locations, weights)
    return curves(queries, keys, values, locations, weights, region.holds(locations), region.block_degrees())


@dataclass(frozen=True)
class PlacesOf:
    """Embeds places of images as they are asked for."""

    encoder: Encodes
    """The location encoder."""
    locations: NDArray[np.float64]
    """(n, 2) degrees."""

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return self.encoder.embed(self.locations[rows])


@lru_cache(maxsize=4)
def measured_at(checkpoint: str, database: str, region: Region | None = None) -> list[Curve]:
    """Measures the curves of a stored database, or of its images in a region, once per process."""
    encoder, weights = load_checkpoint(checkpoint).location, read_weights(database)
    locations = read_array(database, "locations")
    return measured(encoder, stored_keys(database), stored_values(database), locations, weights, region)


def in_region(params: PublishParams, checkpoint: str, database: str, region: Region | None) -> PublishParams:
    """Returns parameters with the heads that the images in a region choose, where they are left open.

    Where the region has too few images, they are left open.
    """
    if region is None or params.method != "multi-head" or params.heads:
        return params
    found = measured_at(checkpoint, database, region)
    if not found:
        return params
    heads = tuple(map(str, chosen(found)))
    log().info("heads that the images in %s choose: %s", region.name, " ".join(heads))
    return params.model_copy(update={"heads": heads})


def index_of(
    encoder: Encodes, data: Database, params: EmbedParams, **options: Any
) -> tuple[RetrievalIndex, EmbedParams, dict[str, Any]]:
    """Makes the index of a database in memory, as parameters ask for it.

    Args:
        encoder: The location encoder.
        data: The database.
        params: What was asked for.
        **options: Options of the index.

    Returns:
        The index, the settled parameters, and what to tell of them beside the vectors.

    Raises:
        UserError: More components are asked for than there are.
    """
    measure = partial(measured, encoder, data.keys, data.values, data.locations, data.weights)
    params = settled(params, data.card, measure)
    some, counts = _fitted_on(len(data.keys), data.weights)
    compact = compact_of(params, encoder, data.values, data.locations[some], data.weights, counts)
    index = projected_index(data, compact, **options)
    told: dict[str, Any] = {"method": params.method, "beta": params.beta}
    if params.heads:
        told = {"method": params.method, "heads": list(params.heads)}
    if compact.values:
        told["explained_variance"] = round(compact.values.explained, 6)
    return index, params, told


def projected_index(data: Database, compact: Compact, **options: Any) -> RetrievalIndex:
    """Makes the index of some images, with values and location part as projections make them."""
    values = project(compact.values, data.values)
    options |= {"location": compact.location, "weights": data.weights}
    return RetrievalIndex(data.keys, values, data.locations, **options)


def _fitted_on(images: int, weights: Weights) -> tuple[NDArray[np.int64], Weights]:
    """Returns the rows of the images at whose places the projection of the location part is fitted, and their weights.

    Of many some are drawn, likelier the more they count, and then count alike.
    """
    if images > FITTED_ON:
        return np.sort(drawn(images, FITTED_ON, weights)), None
    return np.arange(images), weights


def compact_of(
    params: MultiHead,
    encoder: Encodes,
    values: Rows,
    places: NDArray[np.float64],
    weights: Weights = None,
    place_weights: Weights = None,
) -> Compact:
    """Returns the projections of settled parameters.

    Args:
        params: Settled parameters.
        encoder: The location encoder.
        values: The database's values, (n, v).
        places: Places of images, of all or of some, (m, 2) degrees.
        weights: How much each image counts, (n,); unset, 1.
        place_weights: How much each of the places counts, (m,); unset, 1.
    """
    if params.method != "multi-head":
        return Compact(Projection.fit(values, params.compact_dims, weights) if params.compact_dims else None)
    assert params.compact_dims  # for the type checker: settled
    location = None
    if params.location_dims:
        embedded = encoder.embed(places)
        location = Projection.rotated(embedded, params.location_dims, standardise=False, weights=place_weights)
    return Compact(Projection.rotated(values, params.compact_dims, weights=weights), location)


def stored_compact(params: PublishParams, checkpoint: str, database: str) -> Compact:
    """Returns the projections for settled parameters of a stored database, whose values are read in blocks."""
    places, weights, counts = np.empty((0, 2)), read_weights(database), None
    if params.location_dims:
        some, counts = _fitted_on(read_card(database, DatabaseCard).images, weights)
        places = read_array(database, "locations")[some]
    return compact_of(params, load_checkpoint(checkpoint).location, stored_values(database), places, weights, counts)
