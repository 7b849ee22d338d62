"""Images per CPU second of the image encoders, on one core: `python -m tests.benchmarks.images`.

First the same random convolutional features five ways: by `conv2d` with the bands together in memory, as in
`tasks.core.encoders.rcf`, and apart; by cutting windows and one matrix product; by FFT; and by separable filters
(each a sum of rank-one filters, exact at full rank). All take the same batches. Then every encoder by name, towers
with random weights. Synthetic 12-band patches. The processor's time is counted, so that other work on the machine
disturbs little; the best of two runs.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tasks.core.encoders import images as module
from tasks.core.encoders.images import take_bands
from tasks.core.encoders.rcf import RandomConvolutionalFeatures, fit_rcf
from tasks.core.encoders.registry import SENTINEL2, TOWERS, load_tower

BANDS = tuple(band for band in SENTINEL2 if band != "B10")
SIZES = {64: 16, 256: 4}  # pixels along one side: images
Respond = Callable[[Tensor, Tensor, int], Tensor]


def best(call: Callable[[], object], runs: int = 2) -> float:
    """Seconds of processor time of the fastest of some calls."""
    seconds = []
    for _ in range(runs):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return min(seconds)


def by_bands_apart(images: Tensor, filters: Tensor, coarsen: int) -> Tensor:
    """Plain convolution of band after band in memory."""
    return functional.conv2d(functional.avg_pool2d(images, coarsen), filters).flatten(2)


def by_windows(images: Tensor, filters: Tensor, coarsen: int) -> Tensor:
    """Windows as columns, then one matrix product."""
    images = functional.avg_pool2d(images, coarsen)
    return filters.flatten(1) @ functional.unfold(images, filters.shape[-1])


def by_fft(images: Tensor, filters: Tensor, coarsen: int) -> Tensor:
    """Products in frequency, summed over the bands before the way back."""
    images = functional.avg_pool2d(images, coarsen)
    width, shape = filters.shape[-1], images.shape[2:]
    there = torch.fft.rfft2(images)
    kernels = torch.fft.rfft2(filters, s=shape).conj()
    product = torch.einsum("nbyx,fbyx->nfyx", there, kernels)
    out = torch.fft.irfft2(product, s=shape)
    return out[:, :, : shape[0] - width + 1, : shape[1] - width + 1].flatten(2)


def by_separable(images: Tensor, filters: Tensor, coarsen: int) -> Tensor:
    """Each band's filter as a sum of column times row, columns first."""
    images = functional.avg_pool2d(images, coarsen)
    count, bands, width, _ = filters.shape
    left, size, right = torch.linalg.svd(filters)
    columns = (left * size[..., None, :]).permute(1, 0, 3, 2).reshape(bands * count * width, 1, width, 1)
    down = functional.conv2d(images, columns, groups=bands)
    down = down.unflatten(1, (bands, count, width)).transpose(1, 2).flatten(1, 3)
    rows = right.reshape(count, bands * width, 1, width)
    return functional.conv2d(down, rows, groups=count).flatten(2)


@contextmanager
def responding(one: Respond) -> Iterator[None]:
    """While it lasts, `encode` responds in another way."""
    ours, module.respond = module.respond, one
    try:
        yield
    finally:
        module.respond = ours


def main() -> None:
    """Prints both tables."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    print(f"{'rcf, 1024 features':<24} {'pixels':>6} {'images/s':>9} {'x ours':>9} {'largest difference':>19}")
    for pixels, count in SIZES.items():
        images = rng.uniform(0, 1, (count, len(BANDS), pixels, pixels)).astype(np.float32)
        encoder = fit_rcf(images, BANDS)
        _compare(encoder, images, pixels)
    print(f"\n{'encoder, 256 pixels':<24} {'dim':>6} {'images/s':>9}")
    _row("rcf", encoder.dim, best(lambda: encoder.encode(images)), len(images))
    for name, tower in TOWERS.items():
        network = tower.network(len(tower.channels))
        loaded = load_tower(name, {key: value.numpy() for key, value in network.state_dict().items()})
        seen = take_bands(images, BANDS, loaded.bands)
        _row(name, tower.dim, best(lambda e=loaded, x=seen: e.encode(x)), len(images))


def _compare(encoder: RandomConvolutionalFeatures, images: NDArray, pixels: int) -> None:
    ways: dict[str, Respond] = {"conv2d, bands together": module.respond, "conv2d, bands apart": by_bands_apart}
    ways |= {"windows and product": by_windows, "FFT": by_fft, "separable": by_separable}
    expected, base = encoder.encode(images), best(lambda: encoder.encode(images))
    for name, one in ways.items():
        with responding(one):
            seconds, apart = best(lambda: encoder.encode(images)), np.abs(encoder.encode(images) - expected).max()
        print(f"{name:<24} {pixels:>6} {len(images) / seconds:>9.1f} {base / seconds:>9.2f} {apart:>19.1g}")


def _row(name: str, dim: int, seconds: float, images: int) -> None:
    print(f"{name:<24} {dim:>6} {images / seconds:>9.1f}")


if __name__ == "__main__":
    main()
