"""Computes the geodesic half of RANGE+ by its spectrum: exact, at a cost that does not grow with the database.

sum_j exp(t (x.x_j - 1)) v_j is a convolution on the sphere, so in spherical harmonics it is a product
(addition theorem; Funk-Hecke): the sum is sum_lm a_l Y_lm(x) M_lm with the moments M_lm = sum_j Y_lm(x_j) v_j
and a_l = 4 pi exp(-t) i_l(t), i_l the modified spherical Bessel function. The moments are computed once. The
moments of parts of a database add.

a_l falls as exp(-l^2 / 2t), so the series is cut where its rest is below TAIL: since |P_l| <= 1, each
weight is off by at most sum_(l >= L) (2l + 1) a_l / 4 pi. At t = 40 that is degree 49, 2,401 terms in place of
one for each image. Where no image is near, the sum itself is small and such an error would matter: `sums`
tells where, and the caller sums directly there.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ive
from torch import Tensor

from tasks.core.encoders.harmonics import spherical_harmonics
from tasks.core.sums import Sums

TAIL = 1e-12  # largest error of one weight
FLOOR = 1e-5  # smallest mean weight that is trusted: the result is off by TAIL / FLOOR = 1e-7 at most
MAX_DEGREE = 96  # above it, at t above about 150, the harmonics cost more than they save
BLOCK = 512  # images whose harmonics are held at a time: 10 MB

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Spectrum:
    """The geodesic kernel's sums over one database, for every place at once."""

    temperature: float
    """t of exp(t (cos - 1))."""
    degree: int
    """L: the harmonics of degrees 0 to L - 1 are kept."""
    images: float
    """Sum of the images' weights: their number where all are 1."""
    moments: Tensor
    """(L * L, v + 1) float64, times a_l: moments of the values, and last of 1, which gives the denominators."""

    @classmethod
    def of(cls, locations: Float, values: Tensor, temperature: float, weights: Tensor | None = None) -> "Spectrum":
        """Sums up a database.

        Args:
            locations: (n, 2) degrees (lon, lat).
            values: (n, v).
            temperature: t, for which `degree_of` must have a degree.
            weights: How much each image counts, (n,); unset, 1.
        """
        degree = degree_of(temperature)
        if degree is None:
            raise ValueError(f"temperature {temperature:g} has no short spectrum: sum over the images directly")
        moments = values.new_zeros(degree * degree, values.shape[1] + 1, dtype=torch.float64)
        for start in range(0, len(locations), BLOCK):
            rows = slice(start, start + BLOCK)
            harmonics = torch.from_numpy(spherical_harmonics(locations[rows], degree)).to(values.device)
            if weights is not None:
                harmonics *= weights[rows].to(harmonics)[:, None]
            moments[:, :-1].addmm_(harmonics.T, values[rows].double())
            moments[:, -1] += harmonics.sum(0)
        factors = np.repeat(_factors(temperature, degree), 2 * np.arange(degree) + 1)
        moments *= torch.from_numpy(factors).to(moments)[:, None]
        total = len(locations) if weights is None else float(weights.double().sum())
        return cls(temperature, degree, total, moments)

    def __add__(self, other: "Spectrum") -> "Spectrum":
        """Returns the spectrum of both databases together."""
        if self.temperature != other.temperature:
            raise ValueError(f"spectra of temperatures {self.temperature:g} and {other.temperature:g} do not add")
        return Spectrum(self.temperature, self.degree, self.images + other.images, self.moments + other.moments)

    def sums(self, lonlat: Float) -> tuple[Sums, NDArray[np.bool_]]:
        """Returns the float64 sums at places (m, 2), and which places are too far from all images to trust, (m,)."""
        found = torch.from_numpy(spherical_harmonics(lonlat, self.degree)).to(self.moments) @ self.moments
        weights = found[:, -1]
        sums = Sums(found[:, :-1], weights, torch.full_like(weights, self.temperature))
        return sums, (weights < FLOOR * self.images).cpu().numpy()

    @property
    def weights(self) -> "Spectrum":
        """Returns the spectrum of the weights alone: a cheap way to tell which places are too far from all images."""
        return Spectrum(self.temperature, self.degree, self.images, self.moments[:, -1:].clone())


def pays(temperature: float, images: int, queries: int | None = None) -> bool:
    """Tells whether a spectrum costs less than summing over the images.

    That is where n m > 2 (n + m) L^2; the factor 2 is the cost of float64.

    Args:
        temperature: t.
        images: n.
        queries: m. Unset: many.
    """
    degree = degree_of(temperature)
    return degree is not None and 2 * degree**2 * (1 / images + (1 / queries if queries else 0)) < 1


def degree_of(temperature: float) -> int | None:
    """Returns the degree at which the series is cut, or None where it is too long to pay."""
    degrees = np.arange(MAX_DEGREE + 200)
    terms = (2 * degrees + 1) * _factors(temperature, len(degrees)) / (4 * np.pi)
    left_out = np.cumsum(terms[::-1])[::-1]
    degree = int((left_out >= TAIL).sum())
    return degree if degree <= MAX_DEGREE else None


def _factors(temperature: float, degree: int) -> Float:
    """Returns a_l of the degrees below `degree`."""
    t = max(temperature, 1e-9)  # at t = 0 the kernel is 1 everywhere; at 1e-9 it is that to the last digit
    return 4 * np.pi * np.sqrt(np.pi / (2 * t)) * ive(np.arange(degree) + 0.5, t)
