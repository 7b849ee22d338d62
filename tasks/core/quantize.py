"""Fewer bits per number: int8 codes of a linear scale, float16 with its overflow refused, and what both lose.

A block of an embedding (its visual or its location part) has one scale and one offset, so that lengths and directions
within a block stay what they were, up to rounding: value = code * scale + offset, as CF's `scale_factor` and
`add_offset` mean it. Codes are clipped to [-127, 127] first: so -128 is free, and no value is ever taken for nodata.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

DType = Literal["float32", "float16", "int8"]
CODES = 127  # the largest code; codes are clipped to [-CODES, CODES]
NODATA = -128
MARGIN = 0.1  # of the range that a sample shows, added at either end for what it does not show
DIGITS = 3  # of scale and offset: the last bits of a sample depend on the machine, and a rerun is to find the same


@dataclass(frozen=True)
class Scale:
    """The linear scale of one block."""

    factor: float
    """Step between codes."""
    offset: float
    """Value of code 0."""

    @classmethod
    def fit(cls, sample: NDArray[np.float32]) -> "Scale":
        """The scale that holds a sample and a margin on either side."""
        low, high = float(sample.min()), float(sample.max())
        offset = _rounded((low + high) / 2)
        reach = max(high - offset, offset - low) * (1 + 2 * MARGIN)
        return cls(_rounded(reach / CODES, up=True) or 1.0, offset)

    def encode(self, values: NDArray[np.float32]) -> NDArray[np.int8]:
        """Codes of values, NODATA where they are NaN; a value beyond the scale gets the nearest code."""
        codes = np.clip(np.rint((values - self.offset) / self.factor), -CODES, CODES)
        return np.where(np.isnan(codes), NODATA, codes).astype(np.int8)

    def decode(self, codes: NDArray[np.int8]) -> NDArray[np.float32]:
        """Values of codes, NaN where they are NODATA."""
        values = codes.astype(np.float32) * np.float32(self.factor) + np.float32(self.offset)
        return np.where(codes == NODATA, np.float32(np.nan), values)


def _rounded(value: float, up: bool = False) -> float:
    """The value to DIGITS significant digits, to the nearest or away from zero."""
    if value == 0:
        return 0.0
    unit = 10.0 ** (np.floor(np.log10(abs(value))) - DIGITS + 1)
    steps = np.ceil(value / unit) if up else np.rint(value / unit)
    return float(f"{steps * unit:.{DIGITS}g}")


def half(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """The values in float16.

    Raises:
        OverflowError: A finite value is too large for it.
    """
    with np.errstate(over="ignore"):
        found = values.astype(np.float16)
    if np.isinf(found).any():
        largest = np.nanmax(np.abs(values))
        raise OverflowError(f"a value of {largest:g} is beyond float16, whose largest is {np.finfo(np.float16).max:g}")
    return found


def loss(exact: NDArray[np.float32], stored: NDArray[np.float32]) -> dict[str, Any]:
    """What storing vectors (n, d) lost: cosines between them and what comes back, and relative errors."""
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
    """Of each dimension of vectors (n, d), the error as a share of its deviation, (d,); 0 where it has none.

    Cosines are decided by the dimensions that vary most; a probe standardises all, and a dimension that storage made
    one number is lost to it however small it was.
    """
    errors = np.sqrt(np.mean((exact.astype(np.float64) - stored) ** 2, axis=0))
    deviations = exact.std(0, dtype=np.float64)
    return np.divide(errors, deviations, out=np.zeros_like(errors), where=deviations > 0)


def _figure(value: Any) -> float:
    """Digits that the next run finds again."""
    return round(float(value), 4)
