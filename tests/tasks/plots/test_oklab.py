"""OKLab: against the values of CSS Color 4, and back by Ottosson's other pair of matrices, from CIE XYZ."""

import numpy as np
import pytest

from tasks.plots.oklab import srgb

XYZ_OF_RGB = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
CONES_OF_XYZ = np.array(
    [
        [0.8189330101, 0.3618667424, -0.1288597137],
        [0.0329845436, 0.9293118715, 0.0361456387],
        [0.0482003018, 0.2643662691, 0.6338517070],
    ]
)
LAB_OF_CONES = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def oklab(rgb):
    """OKLab of sRGB, (..., 3), by way of XYZ."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ XYZ_OF_RGB.T @ CONES_OF_XYZ.T) @ LAB_OF_CONES.T


@pytest.mark.parametrize(
    ("lab", "rgb"),
    [
        ((0.62796, 0.22486, 0.12585), (1, 0, 0)),
        ((0.86644, -0.23389, 0.17950), (0, 1, 0)),
        ((0.45201, -0.03246, -0.31153), (0, 0, 1)),
        ((0.51975, -0.14030, 0.10768), (0, 0.50196, 0)),
        ((0.59987, 0, 0), (0.50196, 0.50196, 0.50196)),
        ((1, 0, 0), (1, 1, 1)),
        ((0, 0, 0), (0, 0, 0)),
    ],
)
def test_colours_are_those_of_css(lab, rgb):
    np.testing.assert_allclose(srgb(np.array([lab]))[0], rgb, atol=2e-3)


def test_colours_come_back():
    rgb = np.random.default_rng(0).random((2000, 3))
    np.testing.assert_allclose(srgb(oklab(rgb)), rgb, atol=4e-3)


def test_what_srgb_cannot_show_loses_chroma_alone_and_no_more_than_it_must():
    rng = np.random.default_rng(0)
    light, hue, chroma = rng.uniform(0.2, 0.95, 500), rng.uniform(-np.pi, np.pi, 500), rng.uniform(0.2, 0.5, 500)
    given = np.column_stack([light, chroma * np.cos(hue), chroma * np.sin(hue)])
    shown = srgb(given)
    assert shown.min() >= 0
    assert shown.max() <= 1
    found = oklab(shown)
    kept = np.hypot(found[:, 1], found[:, 2])
    np.testing.assert_allclose(found[:, 0], light, atol=4e-3)
    np.testing.assert_allclose(np.angle(np.exp(1j * (np.arctan2(found[:, 2], found[:, 1]) - hue))) * kept, 0, atol=4e-3)
    lost = kept < chroma - 0.01
    assert lost.mean() > 0.5
    assert np.minimum(shown[lost].min(1), 1 - shown[lost].max(1)).max() < 0.02
