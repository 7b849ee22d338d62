"""What the compact product of a grid costs, by probes: its components and prefixes of them beside the grid's float32.

`python -m tests.benchmarks.compact GRID [--points 5000] [--fold-seeds 3]` scores the cells of labelled places, by the
evaluation's own probes on the demo's labels: random splits, and blocks of 10 degrees held out. `rotated` are the same
components after a random rotation, so that each has about the same variance: what a probe makes of them that does not
rescale every number by itself.
"""

import argparse
from functools import partial

import numpy as np
from numpy.typing import NDArray

from infra import storage
from infra.addresses import as_url
from tasks.core.compact import rotation
from tasks.evaluation.embedders import Named
from tasks.evaluation.label_tables import label_sets
from tasks.evaluation.scoring import score_all
from tasks.grid.companion import PREFIXES, companion_url
from tasks.params import EvaluateParams
from tasks.points.sample_grid import sample_grid
from tests.benchmarks.retrieval import machine


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("grid")
    parser.add_argument("--points", type=int, default=5000)
    parser.add_argument("--fold-seeds", type=int, default=3)
    options = parser.parse_args()
    params = EvaluateParams(points=options.points, fold_seeds=options.fold_seeds)
    grid, compact = as_url(options.grid), companion_url(options.grid)
    print(
        machine(),
        f"{storage.size(grid) / 1e6:.1f} MB of the grid, {storage.size(compact) / 1e6:.1f} MB compact",
        sep="\n",
    )
    sets = label_sets(params)
    chosen = {"grid": partial(sample_grid, grid)}
    chosen |= {str(n): partial(prefix, compact, n) for n in PREFIXES}
    chosen |= {f"{n}, rotated": partial(rotated, compact, n) for n in PREFIXES}
    named = [Named(name, embed, name, partial=True) for name, embed in chosen.items()]
    table = score_all(sets, named, params, lambda *_: None).table
    table = table[table["places"] != "all"]
    for split in ("random", "blocked"):
        scores = table.pivot_table(index="embedder", columns="task", values=split, sort=False)
        scores["mean"] = scores.mean(axis=1)
        print(f"\n{split}\n{scores.round(3).to_string()}")


def prefix(compact: str, count: int, lonlat: NDArray[np.float64]) -> NDArray[np.float32]:
    """Returns the first components at places."""
    return sample_grid(compact, lonlat)[:, :count]


def rotated(compact: str, count: int, lonlat: NDArray[np.float64]) -> NDArray[np.float32]:
    """Returns the first components at places, rotated."""
    return (prefix(compact, count, lonlat) @ rotation(count)).astype(np.float32)


if __name__ == "__main__":
    main()
