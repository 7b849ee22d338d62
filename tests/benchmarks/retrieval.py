"""Places per second of retrieval beside rangegeo's and beside what the machine's matrix product allows.

`python -m tests.benchmarks.retrieval` compares on a random database of 82,000 images, the size of the published one.
`python -m tests.benchmarks.retrieval heads` compares heads by distance, on as many images with values of 128.
`python -m tests.benchmarks.retrieval CHECKPOINT DATABASE` compares interpolated grid tiles with exact ones, on a
trained encoder: random weights are no field of embeddings. Both arguments are as `rangegrid embed` takes them.
"""

import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rangegeo import RANGE

from tasks.core.adaptive import Cells, Report, embed_cells, relative_error
from tasks.core.compact import Projection
from tasks.core.earth.grid import GridSpec
from tasks.core.earth.sphere import unit_vectors
from tasks.core.encoders.location import LocationEncoder
from tasks.core.evidence import evidence
from tasks.core.methods import Head
from tasks.core.retrieval import Method, RetrievalIndex, embed
from tasks.database.store import create_database, finish_database, write_rows
from tasks.grid.tiles import land_cells
from tasks.model.checkpoint import load_checkpoint, save_checkpoint
from tasks.model.satclip import export_satclip, import_satclip
from tasks.params import EmbedParams
from tasks.points.embed import open_embedder
from tests.benchmarks.memory import HEADER

IMAGES, KEY, VALUE, PLACES, ROUNDS = 82_000, 256, 1024, 2000, 5
SHARD = 512  # images
HEAD, FEW = 128, 100  # of the table of heads: length of a value, and places that are summed over all images
BETAS = (0.1, 0.3, 0.5, 0.7, 0.9)
SQUARE = 4096  # side of the matrices whose product is the machine's limit
TILES = 8
TOLERANCES = (1e-2, 1e-3)

Calls = dict[str, Callable[[], Any]]


def seconds(calls: Calls, rounds: int = ROUNDS, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """The fastest run of each; the runs are interleaved, so that a busy moment falls on all alike."""
    best = dict.fromkeys(calls, np.inf)
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            call()
            best[name] = min(best[name], clock() - start)
    return best


def places(n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Drawn uniformly on the sphere."""
    return np.c_[rng.uniform(-180, 180, n), np.degrees(np.arcsin(rng.uniform(-1, 1, n)))]


def database() -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float64]]:
    """Random keys, values and locations."""
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(IMAGES, KEY)).astype(np.float32)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    return keys, rng.normal(size=(IMAGES, VALUE)).astype(np.float32), places(IMAGES, rng)


def machine() -> str:
    """What this runs on."""
    model = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return (
        f"{model[0]}, {torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}"
    )


def main() -> None:
    """Prints the tables."""
    print(machine())
    if len(sys.argv) == 3:
        compare_grids(*sys.argv[1:])
        return
    if sys.argv[1:] == ["heads"]:
        compare_heads()
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder))
        memory(Path(folder))


def compare_heads() -> None:
    """Prints places per second of the cores' own time of heads by distance: by the spectrum, by the tree, over all."""
    keys, values, where = database()
    index = RetrievalIndex(keys, values[:, :HEAD], where)
    asked = places(PLACES, np.random.default_rng(1))
    queries, torch_values = np.zeros((PLACES, KEY), np.float32), torch.from_numpy(values[:, :HEAD])
    points, images = (torch.from_numpy(unit_vectors(lonlat)) for lonlat in (asked[:FEW], where))

    def directly(temperature: float) -> NDArray:
        logits = points @ images.T * temperature
        return (torch.softmax(logits, 1).float() @ torch_values).numpy()

    heads = ("geodesic:40", "geodesic:1000", "geodesic:5000", "geodesic:50000", "nearest:1", "nearest:8")
    methods = {name: Method("multi-head", side_by_side=(Head.parse(name),)) for name in heads}
    calls: Calls = {name: partial(index.retrieve, queries, asked, method) for name, method in methods.items()}
    calls |= {f"softmax {t}": partial(directly, float(t)) for t in (40, 5000)}
    found = {name: call() for name, call in calls.items()}  # the spectrum and the tree are made here, once
    best = seconds(calls, clock=time.process_time)
    print(f"{IMAGES} images, values of {HEAD}, {PLACES} places ({FEW} by the softmax), best of {ROUNDS}")
    print(f"{'':<16}{'places/s':>10}{'x geodesic:40':>15}")
    rates = {name: len(found[name]) / taken for name, taken in best.items()}
    for name, rate in rates.items():
        print(f"{name:<16}{rate:10,.0f}{rate / rates['geodesic:40']:15.2f}")
    for t in (40, 5000):
        apart = np.abs(found[f"geodesic:{t}"][:FEW] - found[f"softmax {t}"]).max() / np.abs(values).max()
        print(f"geodesic:{t} from the softmax over all images, of the largest value: {apart:.1e}")


def compare(folder: Path) -> None:
    """Prints places per second of ours and of rangegeo, on the same weights, database and places."""
    keys, values, where = database()
    encoder, peers = _encoders(folder, keys, values, where)
    index = RetrievalIndex(keys, values, where)
    start = time.perf_counter()
    index.spectrum(40.0)
    spectrum = time.perf_counter() - start
    projection = Projection.fit(values)
    compact = RetrievalIndex(keys, projection.apply(values), where)
    half = RetrievalIndex(keys, values, where, precision="bf16")
    asked, square = places(PLACES, np.random.default_rng(1)), torch.randn(SQUARE, SQUARE)
    queries = encoder.embed(asked)
    calls: Calls = {
        "rangegeo RANGE": lambda: peers["RANGE"].encode(asked, PLACES),
        "rangegeo RANGE+": lambda: peers["RANGE+"].encode(asked, PLACES),
        "RANGE": lambda: embed(encoder, index, asked, Method("range")),
        "RANGE+": lambda: embed(encoder, index, asked, Method()),
        "RANGE+, 5 betas": lambda: _betas(encoder, index, asked),
        "RANGE+, values of 64": lambda: embed(encoder, compact, asked, Method()),
        "RANGE+, bf16 values": lambda: embed(encoder, half, asked, Method()),
        "evidence of RANGE+": lambda: evidence(index, queries, asked, Method()),
        "location encoder": lambda: encoder.embed(asked),
        "sgemm": lambda: square @ square,
    }
    for call in calls.values():
        call()
    best = seconds(calls)
    limit = 2 * SQUARE**3 / best["sgemm"]
    print(f"sgemm {SQUARE}: {limit / 1e9:.0f} GFLOP/s; the spectrum took {spectrum:.1f} s, once\n")
    print(f"{IMAGES} x ({KEY} keys, {VALUE} values), L = 40, {PLACES} places, best of {ROUNDS}")
    print(f"{'':<24}{'places/s':>10}{'x rangegeo':>12}{'of sgemm':>10}")
    for name, taken in best.items():
        if name == "sgemm":
            continue
        peer = best["rangegeo RANGE" if name.endswith("RANGE") else "rangegeo RANGE+"]
        share = f"{_work(name) / (taken - best['location encoder']) / limit:10.0%}" if _work(name) else ""
        print(f"{name:<24}{PLACES / taken:10.0f}{peer / taken:12.2f}{share}")
    print(f"largest difference from rangegeo, of the largest value: {_difference(encoder, index, peers, asked):.1e}")


def _encoders(folder: Path, *arrays: NDArray) -> tuple[LocationEncoder, dict[str, RANGE]]:
    torch.manual_seed(0)
    save_checkpoint(f"{folder.as_uri()}/ours", LocationEncoder(40, basis="analytic").double())
    export_satclip(f"{folder.as_uri()}/ours", folder / "satclip.ckpt")
    import_satclip(folder / "satclip.ckpt", f"{folder.as_uri()}/imported")
    np.savez(folder / "db.npz", satclip_embeddings=arrays[0], image_embeddings=arrays[1], locs=arrays[2])
    files = {"pretrained_path": str(folder / "satclip.ckpt"), "db_path": str(folder / "db.npz")}
    peers = {name: RANGE(name, device="cpu", **files) for name in ("RANGE", "RANGE+")}
    return load_checkpoint(f"{folder.as_uri()}/imported").location.float(), peers


def _betas(encoder: LocationEncoder, index: RetrievalIndex, asked: NDArray) -> list[NDArray]:
    halves = index.select(encoder.embed(asked), asked, Method())
    return [halves.mix(beta) for beta in BETAS]


def _work(name: str) -> int:
    """Floating-point operations of the semantic half, for the rows where they are all that counts."""
    return 2 * PLACES * IMAGES * (KEY + VALUE) if name in ("RANGE", "RANGE+") else 0


def _difference(encoder: LocationEncoder, index: RetrievalIndex, peers: dict[str, RANGE], asked: NDArray) -> float:
    ours, theirs = embed(encoder, index, asked, Method()), peers["RANGE+"].encode(asked, PLACES)
    return float(np.abs(ours - theirs)[:, :VALUE].max() / np.abs(theirs[:, :VALUE]).max())


def memory(folder: Path) -> None:
    """Prints the peak memory for few places and for many, each in a process of its own."""
    keys, values, where = database()
    url = f"{folder.as_uri()}/database"
    create_database(url, IMAGES, KEY, VALUE, SHARD)
    for start in range(0, IMAGES, SHARD):
        rows = slice(start, min(start + SHARD, IMAGES))
        ids = np.arange(rows.start, rows.stop)
        write_rows(url, start, {"keys": keys[rows], "values": values[rows], "locations": where[rows], "row_ids": ids})
    finish_database(url, checkpoint="", fingerprint="")
    print(f"\nMB of a process of its own\n{HEADER}", flush=True)
    for count in (PLACES, 10 * PLACES):
        call = [sys.executable, "-m", "tests.benchmarks.memory", f"{folder.as_uri()}/imported", url, str(count)]
        subprocess.run(call, check=True)


def compare_grids(checkpoint: str, database: str) -> None:
    """Prints interpolated against exact tiles, on random tiles with land."""
    made = open_embedder(checkpoint, database, EmbedParams(), 10**9)
    made.index.spectrum(40.0)
    print(f"{len(made.index)} images, L = {made.encoder.degree}, {TILES} random tiles with land")
    print(
        f"{'step':>5}{'tile':>6}{'tolerance':>11}{'cells':>8}{'retrieved':>11}{'x exact':>9}"
        f"{'worst p99':>11}{'worst':>9}"
    )
    for step, side in ((0.25, 60), (0.1, 60), (0.1, 120)):
        _compare_tiles(made.encoder, made.index, GridSpec(step, side))


def _compare_tiles(encoder: LocationEncoder, index: RetrievalIndex, spec: GridSpec) -> None:
    tiles = land_tiles(spec)
    whole, taken = _timed(encoder, index, tiles, 0)
    visual = index.values.shape[1]
    for tolerance in TOLERANCES:
        found, less = _timed(encoder, index, tiles, tolerance)
        errors = [relative_error(a[0][:, :visual], b[0][:, :visual]) for a, b in zip(found, whole, strict=True)]
        cells, asked = (sum(getattr(report, name) for _, report in found) for name in ("cells", "evaluated"))
        worst = max(np.quantile(error, 0.99) for error in errors), max(error.max() for error in errors)
        print(
            f"{spec.step:>5}{spec.tile:>6}{tolerance:>11g}{cells:>8}{asked:>11}{taken / less:>9.1f}"
            f"{worst[0]:>11.1e}{worst[1]:>9.1e}",
            flush=True,
        )


def _timed(
    encoder: LocationEncoder, index: RetrievalIndex, tiles: list[Cells], tolerance: float
) -> tuple[list[tuple[NDArray[np.float32], Report]], float]:
    start = time.perf_counter()
    made = [embed_cells(encoder, index, cells, Method(), tolerance) for cells in tiles]
    return made, time.perf_counter() - start


def land_tiles(spec: GridSpec) -> list[Cells]:
    """Random tiles with land."""
    tiles, found = list(spec.tiles()), []
    for i in np.random.default_rng(3).permutation(len(tiles)):
        cells = land_cells(spec, tiles[i])
        if cells.wanted.any():
            found.append(cells)
    return found[:TILES]


if __name__ == "__main__":
    main()
