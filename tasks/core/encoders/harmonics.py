"""Computes real spherical harmonics of places on Earth, the fixed features below the location encoder.

Feature `l*l + l + m` is the harmonic of degree l and order m: cos(m phi) for m > 0, sin(|m| phi) for m < 0,
without the Condon-Shortley sign, of phi = radians(lon + 180) and theta = radians(lat + 90). So degree L gives
L * L features of the degrees 0 to L - 1. Colatitude runs from the south pole: cos(theta) = -sin(lat).

Two bases:

- `orthonormal`: the integral of a product over the sphere is 1 or 0. Used for all new training.
- `analytic`: the basis that the published SatCLIP weights expect. Its m = 0 terms are pi times too large: they were
  generated with sqrt((2l+1)/4*pi) in place of sqrt((2l+1)/(4*pi)). And its Legendre functions are polynomials
  whose coefficients were printed with 15 digits: their terms cancel towards the poles, where at degree 40 the
  value is off by up to 8 %. Weights trained on these features need them with that error, so it is
  reproduced: the same coefficients, the same order of operations. It is of no use above degree 50.

No library has both: scipy's are the oracle of the tests, and the published weights need their own error.
"""

# ruff: noqa: E741  (l is the name of a degree in every text on harmonics)
import math
from collections.abc import Callable
from decimal import ROUND_HALF_UP, Decimal, localcontext
from fractions import Fraction
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

Basis = Literal["orthonormal", "analytic"]
BASES: tuple[Basis, ...] = ("orthonormal", "analytic")

BLOCK = 512  # places computed at a time: at degree 40 their features, 6.5 MB, stay near the cache

Float = NDArray[np.float64]


def spherical_harmonics(lonlat: NDArray, degree: int, basis: Basis = "orthonormal") -> Float:
    """Returns all harmonics below `degree` at each place.

    Args:
        lonlat: (n, 2) longitude and latitude in degrees.
        degree: L; the highest degree of a harmonic is L - 1.
        basis: `orthonormal`, or `analytic` for imported SatCLIP weights.

    Returns:
        (n, L * L) float64, in Fortran order: a feature of all places is contiguous.

    Raises:
        ValueError: A latitude is beyond a pole, a coordinate is not finite, or the basis is unknown.
    """
    points = checked(lonlat)
    if basis not in BASES:
        raise ValueError(f"the harmonic basis {basis!r} is unknown: use one of {', '.join(BASES)}")
    out = np.empty((degree * degree, len(points)))
    part = legendre_by_basis(points[:, 1], degree, basis)
    for start in range(0, len(points), BLOCK):
        block = slice(start, start + BLOCK)
        cos, sin = longitude_part(points[block, 0], degree)
        _fill(out[:, block], part(block), cos, sin)
    return out.T


def legendre_by_basis(lat: Float, degree: int, basis: Basis) -> Callable[[slice], list[Float]]:
    """Returns a function from a block of places to their Legendre functions."""
    if basis == "orthonormal":
        return lambda block: legendre(lat[block], degree)
    powers = _powers(lat, degree)
    return lambda block: analytic_legendre(powers[:, block], degree)


def checked(lonlat: NDArray) -> Float:
    """Returns the places as float64 (n, 2), after checking that they are on Earth."""
    points = np.asarray(lonlat, np.float64)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"places have shape {points.shape}: give (n, 2) of longitude, latitude in degrees")
    wrong = ~np.isfinite(points).all(1) | (np.abs(points[:, 1]) > 90)
    if wrong.any():
        lon, lat = points[wrong][0]
        raise ValueError(
            f"longitude {lon:g}, latitude {lat:g} is not a place: give (longitude, latitude) in degrees, "
            "latitudes within -90 and 90"
        )
    return points


def longitude_part(lon: Float, degree: int) -> tuple[Float, Float]:
    """Returns cos(m phi) and sin(m phi) of the orders 0 to degree - 1, each (degree, n), by rotation."""
    phi = np.radians(np.mod(lon, 360.0) - 180.0)  # lon + 180 in -180..180, where sine is most exact
    step_cos, step_sin = np.cos(phi), np.sin(phi)
    cos, sin = np.empty((degree, len(lon))), np.empty((degree, len(lon)))
    cos[0], sin[0] = 1.0, 0.0
    for m in range(1, degree):
        cos[m] = cos[m - 1] * step_cos - sin[m - 1] * step_sin
        sin[m] = sin[m - 1] * step_cos + cos[m - 1] * step_sin
    return cos, sin


def legendre(lat: Float, degree: int) -> list[Float]:
    """Returns the normalised Legendre functions: for each l below `degree`, (l + 1, n) of the orders 0 to l.

    By the forward column recurrence, over all orders at once. The factor sqrt(2) of orders above 0 is included.
    """
    x, s = -np.sin(np.radians(lat)), np.cos(np.radians(lat))
    up, back, diagonal = _coefficients(degree)
    below = [np.full((1, len(lat)), np.sqrt(1 / (4 * np.pi)))]
    for l in range(1, degree):
        row = np.empty((l + 1, len(lat)))
        np.multiply(below[-1] * x, up[l, :l, None], out=row[:l])
        if l > 1:
            row[: l - 1] -= back[l, : l - 1, None] * below[-2]
        row[l] = diagonal[l] * s * below[-1][l - 1]
        below.append(row)
    return below


@lru_cache(maxsize=8)
def _coefficients(degree: int) -> tuple[Float, Float, Float]:
    """Returns the factors of P(l, m) = up x P(l-1, m) - back P(l-2, m) and P(l, l) = diagonal sin P(l-1, l-1)."""
    l = np.arange(degree, dtype=np.float64)[:, None]
    m = np.arange(degree, dtype=np.float64)[None, :]
    inside = m < l
    gap = np.where(inside, l * l - m * m, 1)
    up = np.where(inside, np.sqrt((4 * l * l - 1) * inside / gap), 0)
    last = np.where(inside, ((l - 1) ** 2 - m * m) * (2 * l + 1) / np.where(l > 1, 2 * l - 3, 1) / gap, 0)
    diagonal = np.sqrt((2 * l[:, 0] + 1) / np.maximum(2 * l[:, 0], 1))
    if degree > 1:
        diagonal[1] *= np.sqrt(2)  # the sqrt(2) of every order above 0 enters once, at (1, 1)
    return up, np.sqrt(np.maximum(last, 0)), diagonal


def _powers(lat: Float, degree: int) -> Float:
    """Returns cos(theta) to the powers 0 to degree - 1, (degree, n).

    By torch, as the published features: a last bit here is 1e-2 in a sum of terms of 1e14 that cancel.
    """
    x = torch.cos(torch.deg2rad(torch.from_numpy(np.ascontiguousarray(lat)) + 90))
    return torch.stack([x**k for k in range(max(degree, 2))]).numpy()


def analytic_legendre(powers: Float, degree: int) -> list[Float]:
    """Returns the Legendre functions of the `analytic` basis, as `legendre` does, from powers of cos(theta)."""
    sines = np.sqrt(1 - powers[1:2] * powers[1:2]) ** np.arange(degree)[:, None]
    rows = []
    for l, (scale, terms) in enumerate(_printed(degree)):
        row = terms[0][:, None] * powers[l::-1]
        for j, factors in enumerate(terms[1:], start=1):
            row[: len(factors)] += factors[:, None] * powers[l - 2 * j :: -1]
        rows.append(scale[:, None] * sines[: l + 1] * row)
    return rows


@lru_cache(maxsize=4)
def _printed(degree: int) -> list[tuple[Float, list[Float]]]:
    """Returns for each l the factors of the orders 0 to l, and of the falling powers, to 15 digits."""
    return [_printed_degree(l) for l in range(degree)]


def _printed_degree(l: int) -> tuple[Float, list[Float]]:
    scale = np.array([1.0, *(_digits(_norm(l, m)) for m in range(1, l + 1))])
    terms = [np.array([_term(l, m, j) for m in range(l - 2 * j + 1)]) for j in range(l // 2 + 1)]
    return scale, terms


def _term(l: int, m: int, j: int) -> float:
    factor = _derivative(l, m, j)
    if m > 0:
        return _digits(factor)
    return _digits(math.sqrt(math.pi) * math.sqrt(2 * l + 1) * factor / 2)  # pi should be in the denominator


def _norm(l: int, m: int) -> float:
    ratio = Fraction(math.factorial(l - m), math.factorial(l + m))
    with localcontext(prec=50):
        exact = Decimal(ratio.numerator) / Decimal(ratio.denominator) * (2 * l + 1) / (2 * Decimal(math.pi))
        return float(exact.sqrt())


def _derivative(l: int, m: int, j: int) -> float:
    """Returns the factor of x^(l - m - 2j) in the m-th derivative of the Legendre polynomial of degree l."""
    power = l - 2 * j
    whole = math.comb(l, j) * math.comb(2 * (l - j), l) * math.perm(power, m)
    return float(Fraction((-1) ** j * whole, 2**l))


def _digits(value: float) -> float:
    """Rounds a value as it is printed with 15 digits, halves away from zero."""
    with localcontext(prec=15, rounding=ROUND_HALF_UP):
        return float(+Decimal(value))


def _fill(out: Float, latitude: list[Float], cos: Float, sin: Float) -> None:
    for l, row in enumerate(latitude):
        middle = l * l + l
        np.multiply(row, cos[: l + 1], out=out[middle : middle + l + 1])
        np.multiply(row[:0:-1], sin[l:0:-1], out=out[l * l : middle])
