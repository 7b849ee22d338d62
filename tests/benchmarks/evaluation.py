"""How long the paper's whole table takes: seven tasks by twelve embedders, on features of the sizes that they have.

`python -m tests.benchmarks.evaluation [POINTS]` prints the seconds of the probes alone, by embedder: wall clock, and
the cores' own, of which half is what two free cores would take. Features are random, so the scores mean nothing.
"""

import sys
import time

import numpy as np
from numpy.typing import NDArray

from tasks.evaluation.embedders import Named
from tasks.evaluation.labels import LabelSet
from tasks.evaluation.scoring import score_all
from tasks.params import EvaluateParams

POINTS = 10_000
CLASSES = {"biome": 14, "ecoregion": 800, "country": 200}
NUMBERS = ("temperature", "elevation", "population", "housing")
DIMS = {
    "coordinates": 2, "unit vectors": 3, "wrap": 4, "theory": 192, "spherical harmonics": 400, "GeoCLIP": 512,
    "SatCLIP": 256, "SINR": 256, "CSP": 256, "location encoder": 256, "RANGE": 1280, "RANGE+": 1280,
}  # fmt: skip


def main() -> None:
    """Prints a line per embedder and the sum."""
    points = int(sys.argv[1]) if len(sys.argv) > 1 else POINTS
    rng = np.random.default_rng(0)
    lonlat = np.column_stack([rng.uniform(-180, 180, points), rng.uniform(-60, 75, points)])
    sets = [LabelSet(name, "classification", lonlat, _skewed(rng, n, points), "") for name, n in CLASSES.items()]
    sets += [LabelSet(name, "regression", lonlat, rng.normal(size=points), "") for name in NUMBERS]
    print(f"{points:,} points, 1 random split and 5 blocked folds of {len(sets)} tasks\n{'':<22}dims  wall s  core s")
    whole = np.zeros(2)
    for name, dims in DIMS.items():
        features = rng.normal(size=(points, dims)).astype(np.float32)
        before = np.array([time.perf_counter(), time.process_time()])
        score_all(sets, [Named(name, lambda _, given=features: given)], EvaluateParams(), lambda _: None)
        took = np.array([time.perf_counter(), time.process_time()]) - before
        whole += took
        print(f"{name:<22}{dims:>4}{took[0]:>8.1f}{took[1]:>8.1f}", flush=True)
    print(f"{'all':<26}{whole[0]:>8.1f}{whole[1]:>8.1f}")


def _skewed(rng: np.random.Generator, classes: int, points: int) -> NDArray[np.int64]:
    """Classes of which some are common and many are rare, as ecoregions are."""
    return (classes * rng.random(points) ** 2).astype(np.int64)


if __name__ == "__main__":
    main()
