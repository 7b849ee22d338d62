"""Places per second of the location encoder beside rangegeo's: `python -m tests.benchmarks.location`.

The same random SatCLIP weights in both, all cores, the best of three runs.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rangegeo import load_satclip_location_encoder

from tasks.core.earth.grid import GridSpec, Tile
from tasks.core.encoders.location import LocationEncoder
from tasks.model.checkpoint import load_checkpoint, save_checkpoint
from tasks.model.satclip import export_satclip, import_satclip

PLACES = 10_000


def best(call: Callable[[], object], runs: int = 3) -> float:
    """Seconds of the fastest of some calls."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def scattered() -> NDArray[np.float64]:
    """Places drawn uniformly on the sphere."""
    rng = np.random.default_rng(0)
    return np.c_[rng.uniform(-180, 180, PLACES), np.degrees(np.arcsin(rng.uniform(-1, 1, PLACES)))]


def cells() -> NDArray[np.float64]:
    """Cells of a quarter-degree grid."""
    spec = GridSpec(0.25, 100)
    return spec.lonlat(Tile(200, 0, 100, 100)).reshape(-1, 2)


def main() -> None:
    """Prints the table."""
    print(f"{'L':>3} {'encoder':<42} {'places':<10} {'seconds':>8} {'x rangegeo':>11}")
    for degree in (10, 40):
        with tempfile.TemporaryDirectory() as folder:
            _compare(degree, Path(folder))


def _compare(degree: int, folder: Path) -> None:
    torch.manual_seed(0)
    home, file = folder.as_uri(), folder / "satclip.ckpt"
    save_checkpoint(f"{home}/analytic", LocationEncoder(degree, basis="analytic").double())
    export_satclip(f"{home}/analytic", file)
    import_satclip(file, f"{home}/imported")
    published = load_checkpoint(f"{home}/imported").location.double()
    ours = LocationEncoder(degree)
    theirs = load_satclip_location_encoder(file)
    with torch.no_grad():
        base = best(lambda: theirs(torch.from_numpy(scattered())))
        _row(degree, "rangegeo, float64", "scattered", base, base)
        _row(degree, "imported weights, float64", "scattered", best(lambda: published.embed(scattered())), base)
        published.float()
        _row(degree, "imported weights, float32", "scattered", best(lambda: published.embed(scattered())), base)
        for name, places in (("scattered", scattered()), ("grid cells", cells())):
            _row(degree, "orthonormal, float32", name, best(lambda p=places: ours.embed(p)), base)


def _row(degree: int, name: str, places: str, seconds: float, base: float) -> None:
    print(f"{degree:>3} {name:<42} {places:<10} {seconds:8.3f} {base / seconds:11.1f}")


if __name__ == "__main__":
    main()
