"""A plan of faults: a pure function of a seed, so that what a soak went through can be gone through again."""

import itertools
import random
from dataclasses import dataclass

KINDS = (
    "Prefect worker",
    "Prefect worker and its runs",
    "process of a run",
    "Dask worker",
    "Dask scheduler",
    "S3 server",
    "Prefect server",
    "STAC server",
    "503 SlowDown from S3",
    "second run at once",
)
LEAD, GAP = 20.0, 30.0  # seconds before the first fault, and from one to the next


@dataclass(frozen=True)
class Fault:
    """What happens at a moment."""

    at: float
    """Seconds from the start."""
    kind: str
    """One of `KINDS`."""
    lasts: float
    """Seconds until what was killed is started again."""
    draw: float
    """In [0, 1): which one, where there are several."""


def plan(seed: int, seconds: float) -> list[Fault]:
    """Faults in their order: every kind in turn, in an order drawn anew for each round of all kinds."""
    rng = random.Random(seed)
    kinds = itertools.chain.from_iterable(rng.sample(KINDS, len(KINDS)) for _ in itertools.count())
    return [
        Fault(LEAD + GAP * (i + rng.uniform(0, 0.5)), kind, rng.uniform(2, 10), rng.random())
        for i, kind in enumerate(itertools.islice(kinds, int((seconds - LEAD) // GAP)))
    ]
