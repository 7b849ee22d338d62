"""Holds soft selections before their division, as sums: the sums of disjoint parts of a database add.

Sums that are kept serve any beta, and can be updated when images come and go, with work in proportion to the change.
They are kept *scaled*: `shift` is the log of the largest total weight since the sums were retrieved, and `denominator`
is the share of that weight that is left. Rounding errors are relative to exp(shift). So where little weight is left,
the difference of large numbers has few correct digits, and such places are retrieved anew.
"""

from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tasks.core.methods import Method

KEPT = 0.05  # smallest share of a place's weight left, for its sums to be updated: float32's 1e-7 becomes 1e-7 / 0.05


@dataclass(frozen=True)
class Sums:
    """A soft selection before its division; the sums of disjoint parts of a database add."""

    numerator: Tensor
    """(m, v) sums of weight times value."""
    denominator: Tensor
    """(m,) sums of weights."""
    shift: Tensor
    """(m,) weights are exp(logit - shift)."""

    def __add__(self, other: "Sums") -> "Sums":
        return self._with(other, 1)

    def __sub__(self, other: "Sums") -> "Sums":
        return self._with(other, -1)

    def _with(self, other: "Sums", sign: int) -> "Sums":
        shift = torch.maximum(self.shift, other.shift)
        ours, theirs = torch.exp(self.shift - shift), sign * torch.exp(other.shift - shift)
        numerator = ours[:, None] * self.numerator + theirs[:, None] * other.numerator
        return Sums(numerator, ours * self.denominator + theirs * other.denominator, shift)

    @property
    def mean(self) -> Tensor:
        """Returns the selection, (m, v)."""
        return self.numerator / self.denominator[:, None]

    def scaled(self, least: float = 0.0) -> "Sums":
        """Returns the same sums in float64 with denominators of 1; a denominator below `least` is divided by `least`.

        The shift is rounded to a float32 number first, so that storing it as float32 loses nothing.
        """
        shift = self.shift.double()
        new = (shift + self.denominator.double().clamp(min=least).log()).float().double()
        factor = torch.exp(shift - new)
        return Sums(self.numerator.double() * factor[:, None], self.denominator.double() * factor, new)

    def replaced(self, where: NDArray[np.bool_], by: "Sums") -> "Sums":
        """Returns these sums with those of `by` at some places, (m,) true."""
        there = torch.from_numpy(where)
        return Sums(*(_replaced(a, there, b) for a, b in zip(self._parts, by._parts, strict=True)))

    @property
    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.numerator, self.denominator, self.shift


def _replaced(old: Tensor, where: Tensor, new: Tensor) -> Tensor:
    old = old.clone()
    old[where] = new.to(old)
    return old


@dataclass(frozen=True)
class Selections:
    """The soft selections of a retrieval method, one of each head, before they are mixed or set side by side."""

    sums: tuple[Sums, ...]
    """In the order of the method's heads."""

    def __add__(self, other: "Selections") -> "Selections":
        return Selections(tuple(a + b for a, b in zip(self.sums, other.sums, strict=True)))

    def __sub__(self, other: "Selections") -> "Selections":
        return Selections(tuple(a - b for a, b in zip(self.sums, other.sums, strict=True)))

    def visual(self, method: Method) -> NDArray[np.float32]:
        """Returns the visual part of the embedding, (m, v) mixed, or (m, heads * v) side by side."""
        if method.is_side_by_side:
            return torch.cat([sums.mean.float() for sums in self.sums], 1).cpu().numpy()
        return self.mix(method.beta)

    def mix(self, beta: float) -> NDArray[np.float32]:
        """Returns the visual part of RANGE+ for one beta, or of RANGE, (m, v)."""
        if len(self.sums) == 1:
            return self.sums[0].mean.float().cpu().numpy()
        semantic, geodesic = (sums.mean for sums in self.sums)
        return torch.lerp(geodesic, semantic.to(geodesic), beta).float().cpu().numpy()

    def scaled(self, least: float = 0.0) -> "Selections":
        """Returns the selections scaled."""
        return Selections(tuple(sums.scaled(least) for sums in self.sums))

    def replaced(self, where: NDArray[np.bool_], by: "Selections") -> "Selections":
        """Returns these selections with those of `by` at some places, (m,) true."""
        return Selections(tuple(a.replaced(where, b) for a, b in zip(self.sums, by.sums, strict=True)))

    def pack(self) -> NDArray[np.float32]:
        """Returns one array to store, (m, heads * (v + 2)): numerators, denominator and shift of each head.

        The selections must be `scaled`.
        """
        columns = [c for s in self.sums for c in (s.numerator, s.denominator[:, None], s.shift[:, None])]
        return torch.cat([c.float().cpu() for c in columns], 1).numpy()

    @classmethod
    def unpack(cls, kept: NDArray[np.float32], heads: int) -> "Selections":
        """Returns what `pack` stored of so many heads."""
        parts = torch.from_numpy(kept).double().chunk(heads, 1)
        return cls(tuple(Sums(part[:, :-2], part[:, -2], part[:, -1]) for part in parts))


def updated(
    before: Selections, added: Selections | None, removed: Selections | None
) -> tuple[Selections, NDArray[np.bool_]]:
    """Updates the sums of some places after images were added and removed, with work in proportion to the change.

    Args:
        before: Sums over the former database, as `scaled` or an earlier update made them.
        added: Sums over the images that were added; None for no images.
        removed: Sums over the images that were removed; None for no images.

    Returns:
        The sums over the new database, and which places to retrieve anew, (m,): those that lost nearly all of the
        largest weight that they had.
    """
    after = before if added is None else before + added.scaled()
    after = after if removed is None else after - removed.scaled()
    lost = [sums.denominator < KEPT for sums in after.sums]
    return after.scaled(1.0), reduce(torch.logical_or, lost).cpu().numpy()
