"""Contrastive training: the chunked loss beside PyTorch's cross-entropies, large batches, and streamed features.

`python -m tests.benchmarks.training` prints the tables, on random pairs; `losses`, `steps` or `streams` after it print
one of them. Memory is the peak of a process of its own, program included: that alone is most of the first row.
"""

import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import zarr
from torch import Tensor
from torch.nn import functional

from tasks.core.contrastive import ImageProjection, info_nce
from tasks.core.encoders.location import LocationEncoder
from tasks.core.training import Features, Pairs, Precision, Schedule, Trainer, train
from tasks.model.features import StoredFeatures
from tests.benchmarks.retrieval import machine, places, seconds
from tests.core.feature_array import FeatureArray

DIM, FEATURES, HIDDEN = 256, 1024, 512
BATCHES = (1024, 4096, 8192)
PAIRS, RUN = 65_536, 512
WINDOW = 16_384  # pairs in memory when features are streamed
ROUNDS = 3

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def direct(images: Tensor, others: Tensor, scale: Tensor) -> Tensor:
    """The loss by its definition, on the whole matrix, with PyTorch's own gradients."""
    logits, own = scale * images @ others.T, torch.arange(len(images))
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2


LOSSES: dict[str, Loss] = {"chunked": info_nce, "direct": direct}


def inputs(n: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Random unit vectors and the first logit scale."""
    rng = torch.Generator().manual_seed(0)
    vectors = [functional.normalize(torch.randn(n, DIM, generator=rng), dim=-1) for _ in range(2)]
    return [value.to(dtype).requires_grad_() for value in (*vectors, torch.tensor(1 / 0.07))]


def gradients(loss: Loss, n: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Value and gradients."""
    values = inputs(n, dtype)
    value = loss(*values)
    return [value.detach(), *torch.autograd.grad(value, values)]


def peak(name: str, n: int) -> float:
    """GB that a process takes for one loss and its gradients, or for two steps of training at degree `name`."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    if name in LOSSES:
        gradients(LOSSES[name], n)
    else:
        run(int(name), n, steps=2)
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) / 1e6 if found else float("nan")


def apart(name: str, n: int) -> float:
    """`peak` in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak, (name, n))


def random_pairs(n: int = PAIRS, features: Features | None = None) -> Pairs:
    """Random places and features, none held out."""
    rng = np.random.default_rng(0)
    values = features or FeatureArray(rng.normal(size=(1, n, FEATURES)).astype(np.float32))
    return Pairs(places(n, rng), values, np.zeros(n, bool))


def run(
    degree: int,
    batch: int,
    steps: int,
    precision: Precision = "float32",
    mask_km: float = 0.0,
    pairs: Pairs | None = None,
    window: int = PAIRS,
) -> float:
    """Trains some steps and returns pairs per second, without the first step, which computes the harmonics."""
    pairs = pairs or random_pairs(2 * batch)
    schedule = Schedule(steps, batch, 1e-3, 0.01, 1, window=window, mask_km=mask_km, precision=precision)
    location = LocationEncoder(degree, HIDDEN, dim=DIM, smoothness=1)
    trainer = Trainer(location, ImageProjection(FEATURES, DIM), schedule)
    walk = train(trainer, pairs, steps + 1)
    next(walk)
    start = time.perf_counter()
    for _ in walk:
        pass
    return batch * (steps - 1) / (time.perf_counter() - start)


def compare_losses() -> None:
    """Prints seconds, memory and the largest difference from the direct float64 loss."""
    print(f"\n{'loss and gradients':<20}{'batch':>7}{'seconds':>10}{'GB':>7}{'difference':>13}")
    for n in BATCHES:
        exact = gradients(direct, n, torch.float64)
        taken = seconds({name: lambda loss=loss, n=n: gradients(loss, n) for name, loss in LOSSES.items()}, ROUNDS)
        for name, loss in LOSSES.items():
            found = zip(gradients(loss, n), exact, strict=True)
            worst = max(((a - b).abs().max() / b.abs().max()).item() for a, b in found)
            print(f"{name:<20}{n:>7}{taken[name]:>10.2f}{apart(name, n):>7.2f}{worst:>13.1e}", flush=True)


def compare_steps() -> None:
    """Prints pairs per second and memory of whole steps."""
    print(f"\n{'training':<32}{'batch':>7}{'pairs/s':>10}{'GB':>7}")
    for degree, batch in ((20, 1024), (20, 8192), (40, 8192)):
        steps = 40_960 // batch
        rate, memory = run(degree, batch, steps), apart(str(degree), batch)
        print(f"{f'L = {degree}':<32}{batch:>7}{rate:>10,.0f}{memory:>7.2f}", flush=True)
    print(f"{'L = 20, bf16':<32}{8192:>7}{run(20, 8192, 5, 'bf16'):>10,.0f}")
    print(f"{'L = 20, mask_km 50':<32}{8192:>7}{run(20, 8192, 5, mask_km=50.0):>10,.0f}")


def compare_streams() -> None:
    """Prints pairs per second with features in memory, and from the disk, window by window."""
    with tempfile.TemporaryDirectory() as folder:
        _compare_streams(Path(folder))


def _compare_streams(folder: Path) -> None:
    memory = random_pairs()
    group = zarr.open_group(folder / "features.zarr", mode="w")
    shape, chunks = (1, PAIRS, FEATURES), (1, RUN, FEATURES)
    group.create_array("features", shape=shape, dtype="f4", chunks=chunks)[:] = memory.features.values  # type: ignore
    stored = random_pairs(features=StoredFeatures(folder.as_uri(), WINDOW))
    steps = 2 * PAIRS // 1024
    print(f"\n{f'{PAIRS} pairs, batch 1024, L = 20':<39}{'pairs/s':>10}")
    print(f"{'in memory':<39}{run(20, 1024, steps, pairs=memory):>10,.0f}", flush=True)
    print(f"{f'streamed, windows of {WINDOW}':<39}{run(20, 1024, steps, pairs=stored, window=WINDOW):>10,.0f}")


TABLES = {"losses": compare_losses, "steps": compare_steps, "streams": compare_streams}


def main() -> None:
    """Prints the tables."""
    print(machine())
    for name in sys.argv[1:] or TABLES:
        TABLES[name]()


if __name__ == "__main__":
    main()
