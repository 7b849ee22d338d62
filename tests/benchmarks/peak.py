"""Peak memory of `publish` by the step of the grid: it should be that of its tiles, however many there are.

`python -m tests.benchmarks.peak [--step 0.25 0.05] [--box W S E N] [--dims 64] [--images 2000]` publishes a box of a
made-up database and an untrained encoder, each step in a process of its own with one Dask thread, to a folder that is
deleted: survey, tiles, validation, card, pictures. It prints the peak as the kernel counts it, and what it is above
what the process had after its imports.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from infra import clusters
from tasks.cards import read_card
from tasks.core.encoders.location import LocationEncoder
from tasks.database.store import create_database, finish_database, write_rows
from tasks.model.checkpoint import save_checkpoint
from tasks.params import PublishParams
from tasks.products import CheckpointCard
from tasks.publish import publish_grid
from tests.benchmarks.memory import resident
from tests.core.test_retrieval import places, unit

KEY = 32


def main() -> None:
    """Prints one line a step."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--step", type=float, nargs="+", default=[0.25, 0.05])
    parser.add_argument("--box", type=float, nargs=4, default=[-25, -35, 55, 70])
    parser.add_argument("--dims", type=int, default=64)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--tile", type=int, default=240)
    options = parser.parse_args()
    if len(options.step) == 1:
        publish(options.step[0], options)
        return
    print(f"{'step':>6}{'cells':>12}{'seconds':>9}{'program, MB':>13}{'peak, MB':>10}{'above it':>10}", flush=True)
    for step in options.step:
        one = [
            f"--step={step}",
            "--box",
            *map(str, options.box),
            f"--dims={options.dims}",
            f"--images={options.images}",
        ]
        command = [sys.executable, "-m", "tests.benchmarks.peak", *one, f"--tile={options.tile}"]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def publish(step: float, options: argparse.Namespace) -> None:
    """Publishes one grid, and prints its line."""
    west, south, east, north = options.box
    box = {"west": west, "south": south, "east": east, "north": north}
    params = PublishParams(step=step, tile_cells=options.tile, promote=False, **box)
    rows, columns = params.spec.shape
    with TemporaryDirectory() as folder:
        os.environ |= {"RANGEGRID_STORAGE_URL": Path(folder).as_uri(), "RANGEGRID_WORKERS": "1"}
        checkpoint, database = products(Path(folder).as_uri(), options.images, options.dims)
        before, start = resident("VmRSS"), time.perf_counter()
        with clusters.connect("threads", 1) as client:
            publish_grid(client, checkpoint, database, params)
        peak, taken = resident("VmHWM"), time.perf_counter() - start
    print(f"{step:>6g}{rows * columns:>12,}{taken:>9.0f}{before:>13.0f}{peak:>10.0f}{peak - before:>10.0f}", flush=True)


def products(home: str, images: int, dims: int) -> tuple[str, str]:
    """URLs of an untrained encoder and of a database of random numbers."""
    rng, checkpoint, database = np.random.default_rng(0), f"{home}/checkpoint", f"{home}/database"
    save_checkpoint(checkpoint, LocationEncoder(10, hidden=64, dim=KEY))
    data = {"keys": unit(rng.normal(size=(images, KEY))).astype("f4"), "locations": places(images)}
    data |= {"values": rng.normal(size=(images, dims)).astype("f4"), "row_ids": np.arange(images)}
    create_database(database, images, KEY, dims, images)
    write_rows(database, 0, data)
    space = read_card(checkpoint, CheckpointCard).fingerprint
    finish_database(database, checkpoint=space, fingerprint="peak", attribution="nobody")
    return checkpoint, database


if __name__ == "__main__":
    main()
