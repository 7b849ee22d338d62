"""Measures a field of embeddings before its grid is written: how fine it is, and what fewer bits lose.

Some hundred places on land and their neighbours are embedded exactly, as a cell would be. From them come the
structure function (`tasks.core.field`), the scales of int8, and the loss of storing fewer bits: cosines, errors, and
the score of a probe that asks the embeddings for the latitude, with 10-degree blocks held out.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra.errors import UserError
from tasks.cards import read_card
from tasks.core.compact import Compact
from tasks.core.earth.grid import GridSpec
from tasks.core.earth.land import is_land, land_mask
from tasks.core.earth.region import Region
from tasks.core.field import DISTANCES_KM, FINER, NEARER_KM, Change, Km, kernel_width_km, probe_places, whole
from tasks.core.methods import Head
from tasks.core.probes import blocked_folds, score
from tasks.core.quantize import DType, Scale, half, loss, lost_by_dimension
from tasks.core.retrieval import embed
from tasks.database.heads import projected_index
from tasks.database.store import open_database
from tasks.grid.store import BLOCKS
from tasks.grid.tiles import Job, load, load_encoder
from tasks.products import CheckpointCard
from tasks.units import log

BLOCK_DEGREES, FOLDS = 10.0, 5  # blocks of the probe, and their folds: one fold is scored

CELLS, SHORE = 20_000, 1000  # land cells that are looked at for such as lie at sea, and of these at most

SPOILED = 0.1  # share of a dimension's deviation that storing it may lose before a warning


@dataclass(frozen=True)
class Survey:
    """Results of a survey."""

    attrs: dict[str, Any]
    """Attributes for the grid."""
    dtype: DType = "float32"
    """How the grid's numbers will be stored."""
    scales: dict[str, Scale] = field(default_factory=dict)
    """Scale of each block, for int8."""


def survey(job: Job, dtype: DType, compact: Compact) -> Survey:
    """Embeds the probes and measures.

    Args:
        job: The grid.
        dtype: How its numbers will be stored.
        compact: Its projections.
    """
    cell_km, region = round(job.spec.gsd / 1000, 1), job.spec.region
    distances = tuple(sorted({cell_km, *DISTANCES_KM, *(NEARER_KM if region else ())} - {0.0}))
    places = probe_places(distances, region=region)
    flat = places.reshape(-1, 2)
    if dtype == "int8":
        flat = np.concatenate([flat, shore_cells(job.spec)])
    blocks = dict(zip(BLOCKS, _embedded(job, flat, compact), strict=True))
    probed = {name: part[: places[..., 0].size].reshape(*places.shape[:2], -1) for name, part in blocks.items()}
    parts = _parted(probed, job.method.blocks)
    changes = {name: Change.of(part, distances) for name, part in (parts | {"whole": whole(parts.values())}).items()}
    attrs: dict[str, Any] = {"rangegrid:field": _field(changes, cell_km)}
    if region:
        _tell_step(job.spec.size, cell_km, changes["whole"].half_km, region)
    if dtype == "float32":
        return Survey(attrs)
    if dtype == "int8":
        scales = {name: Scale.fit(part) for name, part in blocks.items()}
    else:
        scales = {}
    attrs["rangegrid:loss"] = {"dtype": dtype} | _loss(flat, blocks, scales)
    return Survey(attrs | _quantization(dtype, scales), dtype, scales)


def shore_cells(spec: GridSpec) -> NDArray[np.float64]:
    """Centres of some land cells that lie at sea, (n, 2) in degrees: a scale must hold them too."""
    rows, columns = np.nonzero(land_mask(spec))
    picked = np.random.default_rng(0).permutation(len(rows))[:CELLS]
    centres = spec.plane.lonlat(np.column_stack([spec.x[columns[picked]], spec.y[rows[picked]]]))
    return centres[~is_land(centres)][:SHORE]


def _embedded(job: Job, places: NDArray[np.float64], compact: Compact) -> list[NDArray[np.float32]]:
    """Returns visual and location part."""
    if compact == Compact():
        encoder, index = load(job.checkpoint, job.database)
    else:  # there is no grid yet from which tiles, and so `load`, could take the projections
        encoder, index = (
            load_encoder(job.checkpoint),
            projected_index(open_database(job.database), compact, queries=len(places)),
        )
    vectors = embed(encoder, index, places, job.method)
    return np.split(vectors, [job.method.width * index.values.shape[1]], axis=1)


def _parted(probed: dict[str, NDArray[np.float32]], heads: tuple[str, ...]) -> dict[str, NDArray[np.float32]]:
    """Returns the parts that a reader may want alone: of heads side by side each, in place of all."""
    if not heads:
        return probed
    visual, location = (probed[name] for name in BLOCKS)
    return dict(zip(heads, np.split(visual, len(heads), axis=-1), strict=True)) | {BLOCKS[1]: location}


def _tell_step(size: str, cell_km: float, half_km: Km, region: Region) -> None:
    """Warns of cells that are smaller than what the field resolves in a region."""
    if isinstance(half_km, str) or cell_km < half_km:
        log().warning(
            "cells of %s (%g km) are finer than the field resolves in %s: there an embedding changes by half of its "
            "variance over %s km. More images resolve more, smaller cells do not",
            *(size, cell_km, region.name, half_km),
        )


def _field(changes: dict[str, Change], cell_km: float) -> dict[str, Any]:
    distances = next(iter(changes.values())).distances_km
    found: dict[str, Any] = {"distances_km": list(distances), "cell_km": cell_km}
    for name, change in changes.items():
        found[f"{name}_change"] = list(change.shares)
        found[f"{name}_half_km"] = change.half_km
        found[f"{name}_interval_km"] = list(change.interval_km)
    cell = distances.index(cell_km)
    largest = [max(change.shares[i] for change in changes.values()) for i in range(len(distances))]
    enough = next((d for d, share in zip(distances, largest, strict=True) if share >= FINER), None)
    if largest[cell] < FINER:
        found["warning"] = (
            f"finer than the field: over one cell ({cell_km:g} km) an embedding changes by {largest[cell]:.2%} of its "
            f"variance; " + (f"cells of {enough:g} km differ by 1 %" if enough else "no distance changes it by 1 %")
        )
        log().warning("the grid is %s", found["warning"])
    return found


def _loss(
    places: NDArray[np.float64], blocks: dict[str, NDArray[np.float32]], scales: dict[str, Scale]
) -> dict[str, Any]:
    stored = {name: _stored(part, scales.get(name)) for name, part in blocks.items()}
    exact = np.concatenate(list(blocks.values()), axis=1)
    back = np.concatenate(list(stored.values()), axis=1)
    probes = {"float32": _latitude_score(exact, places), "stored": _latitude_score(back, places)}
    parts = {name: loss(part, stored[name]) | _by_dimension(part, stored[name]) for name, part in blocks.items()}
    return loss(exact, back) | parts | {"latitude_probe_r2": probes} | _warning(parts)


def _latitude_score(vectors: NDArray[np.float32], places: NDArray[np.float64]) -> float:
    split = blocked_folds(places, BLOCK_DEGREES, FOLDS)[0]
    return round(score(vectors, places[:, 1], "regression", split), 4)


def _by_dimension(exact: NDArray[np.float32], stored: NDArray[np.float32]) -> dict[str, Any]:
    """Returns the loss of each dimension of a block, and how many lost too much, in digits that a rerun reproduces."""
    shares = [float(f"{share:.2g}") for share in lost_by_dimension(exact, stored)]
    return {"lost": shares, "worst": int(np.argmax(shares)), "spoiled": sum(share > SPOILED for share in shares)}


def _warning(parts: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Returns a warning where the worst dimension lost too much, which cosines do not show; else an empty one."""
    bad = [
        f"{part['spoiled']} of {len(part['lost'])} {name} dimensions lose more than {SPOILED:.0%} of their deviation "
        f"(number {part['worst']} {part['lost'][part['worst']]:.0%})"
        for name, part in parts.items()
        if part["spoiled"]
    ]
    if bad:
        return {"warning": f"fewer bits spoil {', '.join(bad)}; float32 loses nothing"}
    return {}


def _stored(part: NDArray[np.float32], scale: Scale | None) -> NDArray[np.float32]:
    """Returns what a reader gets back."""
    try:
        if scale:
            return scale.decode(scale.encode(part))
        return half(part).astype(np.float32)
    except OverflowError as error:
        raise UserError(f"{error}: publish float32 or int8") from None


def _quantization(dtype: DType, scales: dict[str, Scale]) -> dict[str, Any]:
    """Returns the entry of the geoemb: convention; the scales of the two blocks are in their variables."""
    about: dict[str, Any] = {"method": "linear per block" if scales else "rounding", "original_dtype": "float32"}
    return {"geoemb:quantization": about | {"quantized_dtype": dtype}}


def kernels(job: Job) -> dict[str, Any]:
    """Returns what is known of the retrieval's kernels without measuring."""
    method, architecture = job.method, read_card(job.checkpoint, CheckpointCard).architecture
    found: dict[str, Any] = {}
    if architecture.degree:
        found["harmonic_degree"] = architecture.degree - 1
    if method.is_side_by_side:
        return {"rangegrid:kernels": found | {"heads": [_told(head) for head in method.heads]}}
    semantic, *geodesic = method.heads
    found["semantic_temperature"] = semantic.at
    for head in geodesic:
        found |= {"geodesic_temperature": head.at, "geodesic_width_km": kernel_width_km(head.at)}
    return {"rangegrid:kernels": found}


def _told(head: Head) -> dict[str, Any]:
    """Returns what is known of a head, with its width where that is the same everywhere."""
    width = {"width_km": kernel_width_km(head.at)} if head.kind == "geodesic" else {}
    return {"kind": head.kind, "k" if head.kind == "nearest" else "temperature": head.at} | width
