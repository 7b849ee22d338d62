"""How well places cover the land, by `--places`: `python -m tests.benchmarks.places`.

Distance of land (random places of another seed) to the nearest place, and how well the nearest place's image stands
for one's own: the share of the variance of Blue Marble's colours (B02, B03, B04, and B08 in summer; means over a patch)
that it explains, the mean over bands. No model has a part in either.
"""

from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from infra.sandbox import bluemarble
from tasks.core.earth.sampling import draw_even, draw_land
from tasks.core.earth.sphere import EARTH_RADIUS_KM, KM_PER_DEGREE, unit_vectors

DRAWS = {"area": draw_land, "even": draw_even}
OTHER_SEED = 1_000_000  # of the land places that are asked for
NORTH = bluemarble.HEIGHT / bluemarble.PER_DEGREE / 2


def nearest(places: NDArray[np.float64], asked: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Kilometres to the nearest place, and which it is."""
    chord, which = cKDTree(unit_vectors(places)).query(unit_vectors(asked))
    return 2 * EARTH_RADIUS_KM * np.arcsin(chord / 2), which


def colours(lonlat: NDArray[np.float64], side_km: float, surface: NDArray[np.uint16]) -> NDArray[np.float64]:
    """Mean of each band of the surface (band, lat, lon) in a square around each place, (n, band)."""
    half = side_km / 2 / KM_PER_DEGREE * bluemarble.PER_DEGREE
    found = []
    for lon, lat in lonlat:
        row, column = (NORTH - lat) * bluemarble.PER_DEGREE, (lon + 180) * bluemarble.PER_DEGREE
        width = half / np.cos(np.radians(lat))
        rows = np.arange(max(0, int(row - half)), min(bluemarble.HEIGHT, int(row + half) + 1))
        columns = np.arange(int(column - width), int(column + width) + 1) % bluemarble.WIDTH
        found.append(surface[:, rows[0] : rows[-1] + 1].take(columns, axis=2).mean((1, 2)))
    return np.array(found)


def explained(found: NDArray[np.float64], true: NDArray[np.float64]) -> float:
    """Share of the variance explained, the mean over bands."""
    return float((1 - ((found - true) ** 2).mean(0) / true.var(0)).mean())


def main(
    patches: int = 10_000,
    seeds: Annotated[tuple[int, int, int], typer.Option(help="of the places")] = (0, 1, 2),
    side_km: float = 160,
    asked: int = 20_000,
) -> None:
    """Prints the table."""
    surface = bluemarble.source()[:4]
    print(f"{patches:,} places, {asked:,} places of land, patches of {side_km:g} km")
    print(f"{'places':<8}{'seed':>5}{'mean km':>9}{'95 % km':>9}{'variance explained':>20}")
    for seed in seeds:
        held_out = draw_land(asked, OTHER_SEED + seed)
        true = colours(held_out, side_km, surface)
        for name, draw in DRAWS.items():
            places = draw(patches, seed)
            km, which = nearest(places, held_out)
            share = explained(colours(places, side_km, surface)[which], true)
            print(f"{name:<8}{seed:>5}{km.mean():9.1f}{np.percentile(km, 95):9.1f}{share:20.4f}", flush=True)


if __name__ == "__main__":
    typer.run(main)
