"""Converts colours of OKLab, where equal steps look equally large, to sRGB.

Source: Björn Ottosson, "A perceptual color space for image processing" (2020), bottosson.github.io/posts/oklab; the two
matrices are his. It is a dozen lines; libraries that have it (colour-science, coloraide) are for much more than maps.
"""

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]

CONES_OF_RGB = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
LAB_OF_CONES = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
HALVINGS = 12  # of the chroma of what sRGB cannot show: to 1/4096 of it
ROUNDING = 1e-4  # linear, beyond 0 and 1, of what still counts as within sRGB: a third of a step of 8 bits


def srgb(lab: Float) -> Float:
    """Returns colours as sRGB in 0 to 1; of one that sRGB has not, the same lightness and hue with less chroma.

    Args:
        lab: (n, 3): lightness in 0 to 1, and the two coordinates of hue and chroma.
    """
    beyond = ~_is_within(lab)
    shown = lab.astype(np.float64)
    shown[beyond] = _paler(shown[beyond])
    linear = np.clip(_linear(shown), 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _paler(lab: Float) -> Float:
    """Returns colours with as much of their chroma as sRGB can show."""
    shares = np.zeros((len(lab), 1))
    for step in 0.5 ** np.arange(1, HALVINGS + 1):
        tried = shares + step
        shares = np.where(_is_within(_faded(lab, tried))[:, None], tried, shares)
    return _faded(lab, shares)


def _faded(lab: Float, shares: Float) -> Float:
    """Returns colours with a share of their chroma."""
    return np.concatenate([lab[:, :1], shares * lab[:, 1:]], axis=1)


def _is_within(lab: Float) -> NDArray[np.bool_]:
    linear = _linear(lab)
    return np.all((linear >= -ROUNDING) & (linear <= 1 + ROUNDING), axis=-1)


def _linear(lab: Float) -> Float:
    """Returns colours as linear sRGB, also beyond 0 and 1."""
    return (lab @ np.linalg.inv(LAB_OF_CONES).T) ** 3 @ np.linalg.inv(CONES_OF_RGB).T
