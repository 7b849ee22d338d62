"""Memory and time of joining databases: `python -m tests.benchmarks.region.joining ROWS [--values 64]`.

Writes a world's database of half the rows and one of the northern half of the land of the other half, of random keys of
256 numbers, in a temporary folder; then joins them in a process that does nothing else, with heads measured, and
prints seconds, the peak of the process as the kernel counts it, and the bytes of the joined database's arrays.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tasks.cards import read_card, write_card
from tasks.core.earth.sampling import draw_even
from tasks.core.encoders.location import LocationEncoder
from tasks.database.join import join_databases
from tasks.database.store import create_database, finish_database, write_rows
from tasks.model.checkpoint import save_checkpoint
from tasks.products import CheckpointCard, DatabaseCard, PatchesCard
from tests.benchmarks.memory import resident

KEY, SHARD = 256, 4096


def main() -> None:
    """Writes the databases, and starts the join in a process of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=int)
    parser.add_argument("--values", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder).as_uri()
        save_checkpoint(f"{home}/checkpoints/space", LocationEncoder(10, hidden=64, dim=KEY))
        urls = [
            sampled(home, name, options.rows // 2, south, options.values)
            for name, south in (("world", -80.0), ("north", 0.0))
        ]
        command = [sys.executable, "-c", "from tests.benchmarks.region.joining import join; join()", *urls]
        subprocess.run(command, check=True, env=os.environ | {"RANGEGRID_STORAGE_URL": home})


def sampled(home: str, name: str, count: int, south: float, dim: int) -> str:
    """Writes a database of even places, and the card of its patches; returns its URL."""
    url, places, rng = f"{home}/databases/{name}", draw_even(count, len(name), south), np.random.default_rng(1)
    card = PatchesCard(fingerprint=name, made_of={"places": "even", "south": south, "north": 84.0})
    write_card(f"{home}/patches/{name}", card)
    create_database(url, count, KEY, dim, SHARD)
    for start in range(0, count, SHARD):
        ids = np.arange(start, min(start + SHARD, count))
        keys, values = (rng.normal(size=(len(ids), size)).astype("f4") for size in (KEY, dim))
        keys /= np.linalg.norm(keys, axis=1, keepdims=True)
        write_rows(url, start, {"keys": keys, "values": values, "locations": places[ids], "row_ids": ids})
    space = read_card(f"{home}/checkpoints/space", CheckpointCard).fingerprint
    finish_database(url, checkpoint=space, fingerprint=name, patches=name)
    return url


def join() -> None:
    """Joins the databases that are named on the command line, and prints one line."""
    program, begun = resident("VmRSS"), time.perf_counter()
    url = join_databases(sys.argv[1:])
    took, card = time.perf_counter() - begun, read_card(url, DatabaseCard)
    arrays = card.images * ((card.key_dim + card.value_dim) * 4 + 16 + 5 * 8) / 1e6
    print(
        f"{card.images:,} images of {KEY} and {card.value_dim} numbers, {arrays:,.0f} MB: {took:,.0f} s, "
        f"peak {resident('VmHWM'):,.0f} MB, of which the program {program:,.0f} MB"
    )


if __name__ == "__main__":
    main()
