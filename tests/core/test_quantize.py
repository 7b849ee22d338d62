"""Fewer bits per number: against numpy, by properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tasks.core.quantize import NODATA_CODE, Scale, half, loss

VALUES = hnp.arrays(np.float32, (7, 3), elements=st.floats(-1000, 1000, width=32))


@given(VALUES)
def test_what_a_scale_was_fitted_on_comes_back_to_half_a_step(values):
    scale = Scale.fit(values)
    codes = scale.encode(values)
    assert codes.dtype == np.int8
    assert codes.min() >= -127
    assert np.abs(scale.decode(codes) - values).max() <= scale.factor / 2 * 1.0001 + 1e-6 * np.abs(values).max()


@given(VALUES, st.floats(-1e6, 1e6, width=32))
def test_no_value_is_taken_for_nodata(values, other):
    scale = Scale.fit(values)
    codes = scale.encode(np.array([other, np.nan], np.float32))
    assert codes[0] != NODATA_CODE
    assert codes[1] == NODATA_CODE
    assert np.isnan(scale.decode(codes)).tolist() == [False, True]


def test_the_last_bits_of_a_sample_do_not_move_a_scale():
    sample = np.random.default_rng(0).normal(3, 2, 1000).astype(np.float32)
    assert Scale.fit(sample) == Scale.fit(np.nextafter(sample, np.float32(np.inf)))


def test_float16_refuses_what_it_cannot_hold():
    np.testing.assert_array_equal(half(np.array([1.5, np.nan], np.float32)), np.array([1.5, np.nan], np.float16))
    with pytest.raises(OverflowError, match=r"a value of 70000 .* whose largest is 65504"):
        half(np.array([-70000, np.nan], np.float32))


def test_the_loss_is_that_of_the_vectors():
    exact = np.array([[1, 0], [0, 2]], np.float32)
    found = loss(exact, np.array([[1, 0], [2, 2]], np.float32))
    assert found["cosine_min"] == pytest.approx(np.sqrt(0.5), abs=1e-4)
    assert found["cosine_mean"] == pytest.approx((1 + np.sqrt(0.5)) / 2, abs=1e-4)
    assert found["relative_error_p99"] == pytest.approx(0.99)
    assert found["error_of_variation"] == pytest.approx(2 / np.sqrt(2 * (0.25 + 1)), abs=1e-4)
