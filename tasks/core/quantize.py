"""Stores numbers in fewer bits, as int8 codes of a linear scale or as float16, and measures what is lost.

Each block of an embedding, its visual and its location part, has one scale and one offset. So lengths and directions
within a block stay what they were, up to rounding. value = code * scale + offset, as in CF's `scale_factor` and
`add_offset`. Codes are clipped to [-127, 127], so that -128 is free and no value is taken for nodata.

xarray packs by CF too, but with one scale an array, which it does not choose, and without telling what is lost.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

DType = Literal["float32", "float16", "int8"]
CODES = 127  # largest code; codes are clipped to [-CODES, CODES]
NODATA_CODE = -128  # code of no value, beyond the clipped codes
MARGIN = 0.1  # share of a sample's range, added at either end for values beyond the sample
DIGITS = 3  # significant digits of scale and offset: later ones depend on the machine, and a rerun must agree


@dataclass(frozen=True)
class Scale:
    """Linear scale of one block."""

    factor: float
    """Difference between the values of neighbouring codes."""
    offset: float
    """Value of code 0."""

    @classmethod
    def fit(cls, sample: NDArray[np.float32]) -> "Scale":
        """Fits a scale that holds a sample and a margin on either side."""
        low, high = float(sample.min()), float(sample.max())
        offset = _rounded((low + high) / 2)
        reach = max(high - offset, offset - low) * (1 + 2 * MARGIN)
        return cls(_rounded(reach / CODES, up=True) or 1.0, offset)

    def encode(self, values: NDArray[np.float32]) -> NDArray[np.int8]:
        """Returns codes of values, NODATA_CODE where they are NaN; a value beyond the scale gets the nearest code."""
        codes = np.clip(np.rint((values - self.offset) / self.factor), -CODES, CODES)
        return np.where(np.isnan(codes), NODATA_CODE, codes).astype(np.int8)

    def decode(self, codes: NDArray[np.int8]) -> NDArray[np.float32]:
        """Returns the values of codes, NaN where they are NODATA_CODE."""
        values = codes.astype(np.float32) * np.float32(self.factor) + np.float32(self.offset)
        return np.where(codes == NODATA_CODE, np.float32(np.nan), values)


def _rounded(value: float, up: bool = False) -> float:
    """Rounds a value to DIGITS significant digits, to the nearest or, with `up`, upwards."""
    if value == 0:
        return 0.0
    unit = 10.0 ** (np.floor(np.log10(abs(value))) - DIGITS + 1)
    steps = np.ceil(value / unit) if up else np.rint(value / unit)
    return float(f"{steps * unit:.{DIGITS}g}")


def half(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """Returns the values in float16.

    Raises:
        OverflowError: A finite value is too large for float16.
    """
    with np.errstate(over="ignore"):
        found = values.astype(np.float16)
    if np.isinf(found).any():
        largest = np.nanmax(np.abs(values))
        raise OverflowError(f"a value of {largest:g} is beyond float16, whose largest is {np.finfo(np.float16).max:g}")
    return found


def loss(exact: NDArray[np.float32], stored: NDArray[np.float32]) -> dict[str, Any]:
    """Measures what storing vectors (n, d) lost: cosines between exact and stored vectors, and relative errors."""
    exact, stored = exact.astype(np.float64), stored.astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1), np.linalg.norm(stored, axis=1)
    cosines = (exact * stored).sum(1) / np.maximum(lengths[0] * lengths[1], np.finfo(np.float64).tiny)
    errors = np.linalg.norm(exact - stored, axis=1) / np.maximum(lengths[0], np.finfo(np.float64).tiny)
    centred = np.linalg.norm(exact - exact.mean(0)) or 1.0
    return {
        "cosine_mean": _figure(cosines.mean()),
        "cosine_min": _figure(cosines.min()),
        "relative_error_p99": _figure(np.quantile(errors, 0.99)),
        "error_of_variation": _figure(np.linalg.norm(exact - stored) / centred),
    }


def lost_by_dimension(exact: NDArray[np.float32], stored: NDArray[np.float32]) -> NDArray[np.float64]:
    """Returns for each dimension of vectors (n, d) the error as a share of its standard deviation, (d,).

    It is 0 for a constant dimension. Cosines depend on the dimensions that vary most. A probe rescales every dimension,
    so a dimension whose small variation is lost in storage is lost to the probe.
    """
    errors = np.sqrt(np.mean((exact.astype(np.float64) - stored) ** 2, axis=0))
    deviations = exact.std(0, dtype=np.float64)
    return np.divide(errors, deviations, out=np.zeros_like(errors), where=deviations > 0)


def _figure(value: Any) -> float:
    """Rounds to the digits that a rerun reproduces."""
    return round(float(value), 4)
