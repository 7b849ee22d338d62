"""Cells per second end to end, and bytes, of the variants of one grid.

`python -m tests.benchmarks.variants CHECKPOINT DATABASE [--step 1] [--variant float32]` publishes the grid of a
database to the storage of the settings, each variant anew and whole: survey, tiles, validation, pictures, card; none
becomes the latest. Size is that of the objects under `grid.zarr`.
"""

import argparse
import time

import numpy as np

from infra import clusters, storage
from tasks.grid.store import open_vectors
from tasks.params import PublishParams
from tasks.publish import publish_grid
from tests.benchmarks.retrieval import machine

VARIANTS: dict[str, dict[str, object]] = {
    "float32": {},
    "float16": {"dtype": "float16"},
    "int8": {"dtype": "int8"},
    "compact, 64": {"compact_dims": 64},
    "compact, 64, int8": {"compact_dims": 64, "dtype": "int8"},
    "float32 with evidence": {"evidence": True},
}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("database")
    parser.add_argument("--step", type=float, default=1.0)
    parser.add_argument("--variant", choices=VARIANTS, action="append", help="by default all")
    options = parser.parse_args()
    print(machine())
    print(f"{'variant':<24}{'cells':>9}{'seconds':>9}{'cells/s':>9}{'MB':>8}{'bytes/cell':>12}")
    with clusters.connect() as client:
        for name in options.variant or VARIANTS:
            params = PublishParams.model_validate({"step": options.step, "promote": False, **VARIANTS[name]})
            start = time.perf_counter()
            grid = publish_grid(client, options.checkpoint, options.database, params)
            taken, size = time.perf_counter() - start, storage.size(grid)
            cells = int(np.isfinite(open_vectors(grid)[0]).sum())
            storage.delete(grid.rpartition("/")[0])  # so that the next run makes it anew
            print(f"{name:<24}{cells:>9}{taken:>9.1f}{cells / taken:>9.0f}{size / 1e6:>8.1f}{size / cells:>12.0f}")


if __name__ == "__main__":
    main()
