"""Memory of a stream of embeddings, in a process that does nothing else.

`python -m tests.benchmarks.memory CHECKPOINT DATABASE PLACES` (URLs of stored products) prints in MB, as the kernel
counts them: the program (resident after its imports), the database (bytes of its arrays), the peak of the process
from its start, and what that is above both, and above the database alone.
"""

import sys
from pathlib import Path

import numpy as np

from tasks.core.retrieval import BATCH, Method, RetrievalIndex, embed
from tasks.database.store import open_database
from tasks.model.checkpoint import load_checkpoint

HEADER = f"{'places':>8}{'program':>9}{'database':>10}{'peak':>7}{'above both':>12}{'above the database':>20}"


def main(checkpoint: str, database: str, places: int) -> None:
    """Loads both, embeds random places batch by batch, and prints one line."""
    program = resident("VmRSS")
    encoder, data = load_checkpoint(checkpoint).location, open_database(database)
    index, rng = RetrievalIndex(data.keys, data.values, data.locations), np.random.default_rng(1)
    held = sum(array.nbytes for array in (data.keys, data.values, data.locations, index.places)) / 1e6
    for start in range(0, places, BATCH):
        count = min(BATCH, places - start)
        embed(encoder, index, np.c_[rng.uniform(-180, 180, count), rng.uniform(-90, 90, count)], Method())
    peak = resident("VmHWM")
    print(f"{places:>8}{program:>9.0f}{held:>10.0f}{peak:>7.0f}{peak - program - held:>12.0f}{peak - held:>20.0f}")


def resident(name: str) -> float:
    """MB of this process, by a name of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e6


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
