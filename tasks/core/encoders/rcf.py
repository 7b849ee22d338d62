"""Encodes images by random convolutional features (`rcf`), which need no weights.

As in MOSAIKS (Rolf et al. 2021, 10.1038/s41467-021-24638-z). The filters are small whitened windows cut from the images
themselves. A feature is the mean over the image of one filter's response above or below a threshold. So the features
tell how colours, edges and textures are distributed.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tasks.core.encoders.images import Images, check_images, standardise


@dataclass(frozen=True)
class FilterScale:
    """One size of structure: filters of one width, on images coarsened by one factor."""

    coarsen: int
    """Factor of coarsening: pixels along one side that are averaged first."""
    width: int
    """Pixels along one side of a filter, after coarsening."""
    share: float
    """Share of all filters."""


SCALES = (FilterScale(1, 3, 0.375), FilterScale(2, 3, 0.375), FilterScale(4, 3, 0.25))
WINDOWS = 20_000  # windows cut from the sample to estimate the whitening
FLOOR = 0.1  # share of the mean eigenvalue that whitening adds to each, so that noise is not amplified
PIXELS = 32_768  # pixels of all images computed at a time: the responses of 192 filters, 25 MB, stay near the cache


@dataclass(frozen=True)
class RandomConvolutionalFeatures:
    """A fitted `rcf` encoder, for images of at least 12 pixels of any resolution.

    Reflectance is standardised per band. Nodata gets the mean of its image and band, or where the whole band is
    missing, the mean of the fitted sample.
    """

    bands: tuple[str, ...]
    """The bands that it takes, in order."""
    mean: NDArray[np.float32]
    """Mean of each band in the sample, (band,)."""
    std: NDArray[np.float32]
    """Standard deviation of each band in the sample, (band,)."""
    filters: tuple[NDArray[np.float32], ...]
    """Filters of each scale, (filter, band, width, width), for standardised images."""
    thresholds: tuple[NDArray[np.float32], ...]
    """Thresholds of each scale, (filter,), in standard deviations of the response."""
    coarsen: tuple[int, ...]
    """Factor of coarsening of each scale."""
    name: str = "rcf"
    resolution_m: float | None = None
    normalisation: str = "each band to mean 0 and deviation 1 of the sample; nodata to its band's mean in the image"

    @property
    def dim(self) -> int:
        """Returns the number of features: two per filter, above and below its threshold."""
        return 2 * sum(len(threshold) for threshold in self.thresholds)

    @torch.no_grad()
    def encode(self, reflectance: Images) -> NDArray[np.float32]:
        """Encodes (n, band, y, x) reflectance, NaN for nodata, as (n, dim)."""
        check_images(reflectance, self.bands)
        out = np.empty((len(reflectance), self.dim), np.float32)
        batch = max(1, PIXELS // (reflectance.shape[2] * reflectance.shape[3]))
        for start in range(0, len(reflectance), batch):
            images = torch.from_numpy(self._standardise(reflectance[start : start + batch]))
            out[start : start + batch] = torch.cat(self._pooled(images), 1).numpy()
        return out

    def _standardise(self, images: Images) -> Images:
        return standardise(images, self.mean, self.std)

    def _pooled(self, images: Tensor) -> list[Tensor]:
        features = []
        for filters, threshold, coarsen in zip(self.filters, self.thresholds, self.coarsen, strict=True):
            response = respond(images, torch.from_numpy(filters), coarsen)
            response -= torch.from_numpy(threshold)[:, None]
            above = functional.relu(response).mean(-1)
            features += [above, above - response.mean(-1)]  # relu(-x) = relu(x) - x
        return features

    def arrays(self) -> dict[str, NDArray]:
        """Returns everything that was fitted, by name."""
        scales = {f"filters{i}": a for i, a in enumerate(self.filters)}
        scales |= {f"thresholds{i}": a for i, a in enumerate(self.thresholds)}
        return {"mean": self.mean, "std": self.std, "coarsen": np.array(self.coarsen, np.int64), **scales}


def respond(images: Tensor, filters: Tensor, coarsen: int) -> Tensor:
    """Returns responses of filters to images, (n, filter, place); channels-last memory is fastest here."""
    if coarsen > 1:
        images = functional.avg_pool2d(images, coarsen)
    layout = torch.channels_last
    return functional.conv2d(images.to(memory_format=layout), filters.to(memory_format=layout)).flatten(2)


def fit_rcf(
    sample: Images,
    bands: tuple[str, ...],
    dim: int = 1024,
    seed: int = 0,
    scales: tuple[FilterScale, ...] = SCALES,
) -> RandomConvolutionalFeatures:
    """Fits random convolutional features to a sample of images.

    Args:
        sample: (n, band, y, x) reflectance, NaN for nodata; some hundred images or more.
        bands: Names of the bands.
        dim: Length of a feature vector; even.
        seed: Seed of windows and thresholds. The same seed and sample give the same encoder.
        scales: Sizes of structure.
    """
    check_images(sample, bands)
    _check_size(sample, scales)
    mean = np.asarray(np.nanmean(sample, (0, 2, 3), dtype=np.float64), np.float32)
    spread = np.nanstd(sample, (0, 2, 3), dtype=np.float64)
    std = np.asarray(np.maximum(spread, 1e-4), np.float32)
    images = torch.from_numpy(standardise(sample, mean, std))
    rng = np.random.default_rng(seed)
    counts = _shares([scale.share for scale in scales], dim // 2)
    fitted = [_fit_scale(images, scale, n, rng) for scale, n in zip(scales, counts, strict=True)]
    filters, thresholds = zip(*fitted, strict=True)
    return RandomConvolutionalFeatures(
        tuple(bands), mean, std, filters, thresholds, tuple(scale.coarsen for scale in scales)
    )


def _check_size(sample: Images, scales: tuple[FilterScale, ...]) -> None:
    least = max(scale.coarsen * scale.width for scale in scales)
    if min(sample.shape[2:]) < least:
        raise ValueError(
            f"images of {sample.shape[3]} x {sample.shape[2]} pixels are too small for random convolutional "
            f"features: use patches of at least {least} pixels"
        )


def _shares(shares: list[float], total: int) -> list[int]:
    """Returns whole numbers in the proportion of `shares` that sum to `total`."""
    edges = np.round(np.cumsum(shares) / np.sum(shares) * total).astype(int)
    return np.diff(edges, prepend=0).tolist()


def _fit_scale(
    images: Tensor, scale: FilterScale, count: int, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    if scale.coarsen > 1:
        coarse = functional.avg_pool2d(images, scale.coarsen)
    else:
        coarse = images
    windows = _windows(coarse.numpy(), scale.width, max(WINDOWS, count), rng)
    centred = windows - windows.mean(0)
    values, vectors = np.linalg.eigh(np.cov(centred.T))
    gain = 1 / np.sqrt(np.maximum(values, 0) + FLOOR * values.mean())
    white = (centred[:count] @ vectors) * gain
    filters = (white / np.linalg.norm(white, axis=1, keepdims=True).clip(1e-9)) * gain @ vectors.T
    response = windows @ filters.T
    filters /= response.std(0)[:, None].clip(1e-9)
    thresholds = (response.mean(0) / response.std(0).clip(1e-9)) + rng.normal(size=count)
    shape = (count, images.shape[1], scale.width, scale.width)
    return filters.reshape(shape).astype(np.float32), thresholds.astype(np.float32)


def _windows(images: Images, width: int, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Cuts windows at random places of random images, (count, band * width * width)."""
    n, _, rows, columns = images.shape
    which = rng.integers(n, size=count)
    y, x = rng.integers(rows - width + 1, size=count), rng.integers(columns - width + 1, size=count)
    views = np.lib.stride_tricks.sliding_window_view(images, (width, width), (2, 3))
    return views[which, :, y, x].reshape(count, -1).astype(np.float64)


def load_rcf(arrays: dict[str, NDArray], bands: tuple[str, ...]) -> RandomConvolutionalFeatures:
    """Rebuilds an encoder from its `arrays`."""
    coarsen = tuple(int(c) for c in arrays["coarsen"])
    return RandomConvolutionalFeatures(
        tuple(bands),
        arrays["mean"],
        arrays["std"],
        tuple(arrays[f"filters{i}"] for i in range(len(coarsen))),
        tuple(arrays[f"thresholds{i}"] for i in range(len(coarsen))),
        coarsen,
    )
