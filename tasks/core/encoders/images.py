"""What an image encoder is: reflectance in, one vector per image out.

An encoder states its bands, its resolution and what it does to the numbers.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.float32]


class ImageEncoder(Protocol):
    """Encodes images of stated bands."""

    @property
    def name(self) -> str:
        """Under which it is registered."""

    @property
    def bands(self) -> tuple[str, ...]:
        """The bands it takes, in order."""

    @property
    def dim(self) -> int:
        """Length of a feature vector."""

    @property
    def resolution_m(self) -> float | None:
        """Pixel size in metres that it was made for; none: any."""

    @property
    def normalisation(self) -> str:
        """What it does to reflectance and to nodata, in words."""

    def encode(self, reflectance: Images) -> NDArray[np.float32]:
        """(n, band, y, x) reflectance in 0..1, NaN where there is none, to (n, dim)."""

    def arrays(self) -> dict[str, NDArray]:
        """Everything that was fitted, by name, for storage."""


def take_bands(images: Images, has: tuple[str, ...], wants: tuple[str, ...]) -> Images:
    """The bands that an encoder wants, by name and in its order.

    Raises:
        ValueError: One is missing.
    """
    missing = [band for band in wants if band not in has]
    if missing:
        raise ValueError(
            f"the images have the bands {', '.join(has)} and the encoder takes {', '.join(wants)}: sample patches "
            f"with {', '.join(missing)}, or use another encoder"
        )
    return images if wants == has else images[:, [has.index(band) for band in wants]]


def check_images(images: Images, bands: tuple[str, ...]) -> None:
    """Refuses what is no (n, band, y, x) of these bands."""
    if images.ndim != 4 or images.shape[1] != len(bands):
        raise ValueError(
            f"images have shape {images.shape}: this encoder takes (n, {len(bands)}, y, x) with the bands "
            f"{', '.join(bands)}"
        )


def standardise(images: Images, mean: NDArray, std: NDArray) -> Images:
    """Bands to mean 0 and standard deviation 1; nodata to the mean of its image and band, else to 0."""
    scaled = ((images - mean[:, None, None]) / std[:, None, None]).astype(np.float32)
    missing = ~np.isfinite(scaled)
    if missing.any():
        kept = np.where(missing, 0, scaled)
        count = np.maximum((~missing).sum((2, 3), keepdims=True), 1)
        scaled = np.where(missing, kept.sum((2, 3), keepdims=True) / count, scaled).astype(np.float32)
    return scaled
