"""Images per second of the image encoders: `python -m tests.benchmarks.images`.

First the same random convolutional features four ways: by `conv2d` as in `tasks.core.images`, by cutting windows
and one matrix product, by FFT, and by separable filters (each a sum of rank-one filters, exact at full rank). Then
every encoder by name, towers with random weights. Synthetic 12-band patches, all cores, the best of two runs.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tasks.core.encoders import SENTINEL2, TOWERS, load_tower
from tasks.core.images import RandomConvolutionalFeatures, fit_rcf, respond, standardise, take_bands
from tests.benchmarks.location import best as best_of

BANDS = tuple(band for band in SENTINEL2 if band != "B10")
SIZES = {64: 16, 256: 4}  # pixels along one side: images
best = partial(best_of, runs=2)
Respond = Callable[[Tensor, Tensor, int], Tensor]


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


def features(encoder: RandomConvolutionalFeatures, images: NDArray, one: Respond) -> NDArray:
    """`encoder.encode` with another way to respond, image by image."""
    out = []
    for image in images:
        x = torch.from_numpy(standardise(image[None], encoder.mean, encoder.std))
        parts = []
        for filters, threshold, coarsen in zip(encoder.filters, encoder.thresholds, encoder.coarsen, strict=True):
            response = one(x, torch.from_numpy(filters), coarsen) - torch.from_numpy(threshold)[:, None]
            parts += [response.relu().mean(-1), (-response).relu().mean(-1)]
        out.append(torch.cat(parts, 1))
    return torch.cat(out).numpy()


def main() -> None:
    """Prints both tables."""
    rng = np.random.default_rng(0)
    print(f"{'rcf, 1024 features':<24} {'pixels':>6} {'images/s':>9} {'x conv2d':>9} {'largest difference':>19}")
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
    ways = {"conv2d": respond, "windows and product": by_windows, "FFT": by_fft, "separable": by_separable}
    expected, base = encoder.encode(images), best(lambda: features(encoder, images, respond))
    for name, one in ways.items():
        seconds = best(lambda one=one: features(encoder, images, one))
        apart = np.abs(features(encoder, images, one) - expected).max()
        print(f"{name:<24} {pixels:>6} {len(images) / seconds:>9.1f} {base / seconds:>9.2f} {apart:>19.1g}")
    seconds = best(lambda: encoder.encode(images))
    print(f"{'encode, in batches':<24} {pixels:>6} {len(images) / seconds:>9.1f} {base / seconds:>9.2f} {0:>19}")


def _row(name: str, dim: int, seconds: float, images: int) -> None:
    print(f"{name:<24} {dim:>6} {images / seconds:>9.1f}")


if __name__ == "__main__":
    main()
