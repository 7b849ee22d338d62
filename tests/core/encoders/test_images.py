"""Random convolutional features against a plain loop, and their treatment of nodata."""

import numpy as np
import pytest

from tasks.core.encoders.images import standardise
from tasks.core.encoders.rcf import fit_rcf
from tasks.core.encoders.registry import fit_encoder, load_encoder

BANDS = ("red", "nir")


@pytest.fixture(scope="module")
def sample():
    return np.random.default_rng(0).uniform(0, 1, (40, 2, 18, 16)).astype(np.float32) ** 2


@pytest.fixture(scope="module")
def encoder(sample):
    return fit_rcf(sample, BANDS, dim=32, seed=1)


def by_loops(encoder, image):
    scaled = (image.astype("f8") - encoder.mean[:, None, None]) / encoder.std[:, None, None]
    features = []
    for filters, thresholds, coarsen in zip(encoder.filters, encoder.thresholds, encoder.coarsen, strict=True):
        rows, columns = scaled.shape[1] // coarsen, scaled.shape[2] // coarsen
        whole = scaled[:, : rows * coarsen, : columns * coarsen]
        coarse = whole.reshape(len(scaled), rows, coarsen, columns, coarsen).mean((2, 4))
        width = filters.shape[-1]
        windows = np.lib.stride_tricks.sliding_window_view(coarse, (width, width), (1, 2))
        response = np.einsum("bijyx,fbyx->fij", windows, filters) - thresholds[:, None, None]
        features += [np.maximum(response, 0).mean((1, 2)), np.maximum(-response, 0).mean((1, 2))]
    return np.concatenate(features)


def test_features_are_those_of_a_plain_loop(encoder, sample):
    expected = np.stack([by_loops(encoder, image) for image in sample[:5]])
    np.testing.assert_allclose(encoder.encode(sample[:5]), expected, rtol=1e-4, atol=1e-5)


def test_an_image_alone_gives_what_it_gives_among_others(encoder, sample):
    np.testing.assert_allclose(encoder.encode(sample)[-1:], encoder.encode(sample[-1:]), rtol=1e-5, atol=1e-6)


def test_same_seed_same_encoder_other_seed_other(sample):
    first, again, other = (fit_rcf(sample, BANDS, 32, seed) for seed in (1, 1, 2))
    for name, array in first.arrays().items():
        np.testing.assert_array_equal(array, again.arrays()[name])
    assert not np.array_equal(first.filters[0], other.filters[0])


def test_arrays_restore_the_encoder(encoder, sample):
    restored = load_encoder("rcf", encoder.arrays(), BANDS)
    assert restored.dim == encoder.dim == 32
    np.testing.assert_array_equal(restored.encode(sample), encoder.encode(sample))


def test_nodata_takes_the_mean_of_its_image_and_band(sample):
    image = sample[:1].copy()
    image[0, 0, :3] = np.nan
    filled = image.copy()
    filled[0, 0, :3] = np.nanmean(image[0, 0])
    mean, std = np.zeros(2, "f4"), np.ones(2, "f4")
    np.testing.assert_allclose(standardise(image, mean, std), filled, rtol=1e-6)


def test_an_image_without_data_is_still_finite(encoder):
    assert np.isfinite(encoder.encode(np.full((1, 2, 18, 16), np.nan, "f4"))).all()


def test_refuses_other_bands_small_images_and_unknown_names(encoder, sample):
    with pytest.raises(ValueError, match="bands red, nir"):
        encoder.encode(sample[:, :1])
    with pytest.raises(ValueError, match="at least 12 pixels"):
        fit_rcf(sample[..., :8, :8], BANDS, 32)
    with pytest.raises(ValueError, match="use one of rcf"):
        fit_encoder("vit", sample, BANDS, 32, 0)
