"""Defines what an image encoder is: reflectance in, one vector per image out.

An encoder states its bands, its resolution and its normalisation.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.float32]


class ImageEncoder(Protocol):
    """An encoder of images with stated bands."""

    @property
    def name(self) -> str:
        """Returns the name that it is registered under."""

    @property
    def bands(self) -> tuple[str, ...]:
        """Returns the bands that it takes, in order."""

    @property
    def dim(self) -> int:
        """Returns the length of a feature vector."""

    @property
    def resolution_m(self) -> float | None:
        """Returns the pixel size in metres that it was trained on; None: any."""

    @property
    def normalisation(self) -> str:
        """Tells in words what it does to reflectance and to nodata."""

    def encode(self, reflectance: Images) -> NDArray[np.float32]:
        """Encodes (n, band, y, x) reflectance in 0 to 1, NaN for nodata, as (n, dim)."""

    def arrays(self) -> dict[str, NDArray]:
        """Returns everything that was fitted, by name, for storage."""


def take_bands(images: Images, has: tuple[str, ...], wants: tuple[str, ...]) -> Images:
    """Returns the bands of images that an encoder takes, in its order.

    Raises:
        ValueError: The images lack a band.
    """
    missing = [band for band in wants if band not in has]
    if missing:
        raise ValueError(
            f"the images have the bands {', '.join(has)} and the encoder takes {', '.join(wants)}: sample patches "
            f"with {', '.join(missing)}, or use another encoder"
        )
    if wants == has:
        return images
    return images[:, [has.index(band) for band in wants]]


def check_images(images: Images, bands: tuple[str, ...]) -> None:
    """Refuses images that are not (n, band, y, x) with these bands."""
    if images.ndim != 4 or images.shape[1] != len(bands):
        raise ValueError(
            f"images have shape {images.shape}: this encoder takes (n, {len(bands)}, y, x) with the bands "
            f"{', '.join(bands)}"
        )


def standardise(images: Images, mean: NDArray, std: NDArray) -> Images:
    """Scales bands to mean 0 and standard deviation 1, and fills nodata.

    Nodata gets the mean of its image and band, or 0 where the whole band is nodata.
    """
    scaled = ((images - mean[:, None, None]) / std[:, None, None]).astype(np.float32)
    missing = ~np.isfinite(scaled)
    if missing.any():
        kept = np.where(missing, 0, scaled)
        count = np.maximum((~missing).sum((2, 3), keepdims=True), 1)
        scaled = np.where(missing, kept.sum((2, 3), keepdims=True) / count, scaled).astype(np.float32)
    return scaled
