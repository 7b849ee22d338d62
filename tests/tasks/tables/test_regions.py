"""Regions, as users name them: held to shapely, to published areas, and to what a stranger may give."""

import json

import geopandas as gpd
import numpy as np
import pandas as pd
import pyogrio
import pytest
import shapely
from pyproj import Geod, Transformer

from infra.errors import UserError
from tasks.core.earth.grid import GridSpec, Tile, around
from tasks.core.earth.land import is_land, land_km2, land_mask, mask
from tasks.core.earth.plane import Plane
from tasks.core.earth.recurrence import recurrence, recurrence_in
from tasks.core.earth.sampling import draw_even, draw_land, spaced
from tasks.tables.regions import countries, find_region, keep_region, kept_region

KENYA_KM2, FIJI_KM2 = 582_646, 18_272  # the states' own figures
FARMS = [shapely.box(36, -1, 36.5, 0), shapely.Polygon([(37, 0), (39, 0), (38, 2)]), shapely.box(40, -3, 41, -2)]


def write(folder, name, shapes, crs=4326):
    frame = gpd.GeoDataFrame({"n": range(len(shapes))}, geometry=list(shapes), crs=crs)
    path = folder / name
    frame.to_parquet(path) if name.endswith("parquet") else frame.to_file(path)
    return str(path)


def globe(count, seed=0):
    rng = np.random.default_rng(seed)
    return np.column_stack([rng.uniform(-180, 180, count), np.degrees(np.arcsin(rng.uniform(-1, 1, count)))])


def inside(polygons, lonlat):
    """Which places lie in polygons, one by one, without any of our shortcuts."""
    shape = shapely.union_all(polygons)
    shapely.prepare(shape)
    return shapely.intersects_xy(shape, *lonlat.T)


@pytest.mark.parametrize("text", ["KE", "ke", "KEN", "Kenya", "kenya", "Republic of Kenya"])
def test_a_country_by_code_and_name(text):
    region = find_region((text,))
    assert (region.name, region.digest) == ("Kenya", find_region(("KE",)).digest)
    assert region.area_km2 == pytest.approx(KENYA_KM2, rel=0.02)
    np.testing.assert_allclose(region.bounds, (33.9, -4.7, 41.9, 5.0), atol=0.1)


def test_countries_across_180_and_at_the_pole():
    fiji, antarctica = find_region(("FJ",)), find_region(("Antarctica",))
    assert fiji.area_km2 == pytest.approx(FIJI_KM2, rel=0.05)
    west, _, east, _ = fiji.bounds
    assert (west > 170, east < -178) == (True, True)
    assert antarctica.holds(np.array([[0.0, -90.0], [77.0, -89.9], [-180.0, -85.0], [0.0, -60.0]])).tolist() == [
        1,
        1,
        1,
        0,
    ]
    assert shapely.is_valid(countries().geometry.values).all()


def test_several_are_united():
    both = find_region(("KE", "UG"))
    assert both == find_region(("KE,UG",)) == find_region(("Uganda, Kenya",))
    assert both.area_km2 == pytest.approx(sum(find_region((one,)).area_km2 for one in ("KE", "UG")), rel=1e-3)


def test_a_box_also_across_180():
    region = find_region(("170 -20 -170 -10",))
    assert region == find_region(("170,-20,190,-10",)) == find_region(("-190 -20 -170 -10",))
    assert region.bounds == (170, -20, -170, -10)
    assert region.holds(np.array([[179.0, -15.0], [-179.0, -15.0], [0.0, -15.0]])).tolist() == [True, True, False]
    assert shapely.area(shapely.geometry.shape(region.geometry)) == pytest.approx(200)


@pytest.mark.parametrize("name", ["farms.geojson", "farms.gpkg", "farms.shp", "farms.parquet", "farms.shp.zip"])
def test_files_are_what_shapely_says(tmp_path, name):
    region = find_region((write(tmp_path, name, FARMS),))
    lonlat = np.column_stack(
        [np.random.default_rng(0).uniform(35, 42, 20_000), np.random.default_rng(1).uniform(-4, 3, 20_000)]
    )
    np.testing.assert_array_equal(region.holds(lonlat), inside(FARMS, lonlat))
    area = sum(abs(Geod(ellps="sphere", a=6371008.8, b=6371008.8).geometry_area_perimeter(farm)[0]) for farm in FARMS)
    assert region.area_km2 == pytest.approx(area / 1e6, rel=1e-3)


def test_all_layers_of_polygons_count_or_the_one_that_is_named(tmp_path):
    """Each in its own CRS, beside points and a table, which have no area."""
    path, farms = tmp_path / "farms.gpkg", gpd.GeoDataFrame(geometry=FARMS, crs=4326)
    farms.centroid.to_frame("geometry").to_file(path, layer="wells")
    farms[:2].to_file(path, layer="north")
    farms[2:].to_crs(32737).to_file(path, layer="south")
    pyogrio.write_dataframe(pd.DataFrame({"style": ["x"]}), path, layer="layer_styles")
    whole, north, south = (find_region((f"{path}{layer}",)) for layer in ("", "#north", "#south"))
    assert (whole.name, north.name) == ("farms", "north")
    assert north == find_region((write(tmp_path, "two.geojson", FARMS[:2]),))
    assert south.area_km2 == pytest.approx(find_region((write(tmp_path, "one.geojson", FARMS[2:]),)).area_km2, rel=1e-4)
    assert whole.area_km2 == pytest.approx(north.area_km2 + south.area_km2, rel=1e-6)
    with pytest.raises(UserError, match="no such layer among wells, north, south"):
        find_region((f"{path}#east",))
    with pytest.raises(UserError, match="have no area"):
        find_region((f"{path}#wells",))


def test_a_projected_file_is_transformed(tmp_path):
    utm = [shapely.box(200_000, 9_900_000, 300_000, 9_950_000)]
    region = find_region((write(tmp_path, "utm.gpkg", utm, crs=32737),))
    lon, lat = Transformer.from_crs(32737, 4326, always_xy=True).transform(
        [201_000, 299_000, 310_000], [9_901_000, 9_949_000, 9_920_000]
    )
    assert region.holds(np.column_stack([lon, lat])).tolist() == [True, True, False]
    assert region.area_km2 == pytest.approx(5000, rel=0.01)


def test_a_cap_with_a_hole_around_the_pole(tmp_path):
    """Of EPSG:3413, which is centred on the pole: places are told by their distance from it there."""
    cap = shapely.Point(0, 0).buffer(2e6).difference(shapely.Point(1e6, 0).buffer(5e5))
    region = find_region((write(tmp_path, "cap.gpkg", [cap], crs=3413),))
    lonlat = globe(200_000)
    lonlat = lonlat[lonlat[:, 1] > 60]
    xy = np.column_stack(Transformer.from_crs(4326, 3413, always_xy=True).transform(*lonlat.T))
    clear = np.abs(shapely.distance(shapely.boundary(cap), shapely.points(xy))) > 1000
    np.testing.assert_array_equal(region.holds(lonlat)[clear], shapely.intersects_xy(cap, *xy.T)[clear])
    assert region.holds(np.array([[0.0, 90.0]]))[0]


def test_polygons_that_jump_at_180_and_go_beyond(tmp_path):
    """One polygon in four ways of writing it."""
    ways = [
        [(170, -20), (-170, -20), (-170, -10), (170, -10)],
        [(170, -20), (190, -20), (190, -10), (170, -10)],
        [(-190, -20), (-170, -20), (-170, -10), (-190, -10)],
    ]
    hole = shapely.box(178, -16, 182, -14).exterior.coords
    for number, way in enumerate(ways):
        shift = -360 if way[0][0] == -190 else 0
        shape = shapely.Polygon(way, [[(x + shift, y) for x, y in hole]])
        region = find_region((write(tmp_path, f"{number}.geojson", [shape]),))
        found = region.holds(np.array([[175.0, -15.0], [-175.0, -15.0], [179.0, -15.0], [-179.0, -15.0], [0.0, -15.0]]))
        assert found.tolist() == [True, True, False, False, False]


def test_a_buffer_is_a_distance_on_the_globe():
    region, wide = find_region(("FJ",)), find_region(("FJ",), 100)
    lonlat = np.column_stack(
        [np.random.default_rng(0).uniform(170, 188, 3000), np.random.default_rng(1).uniform(-25, -10, 3000)]
    )
    edge = np.concatenate([shapely.get_coordinates(shapely.segmentize(p, 0.05)) for p in region.polygons])
    geod = Geod(ellps="WGS84")
    away = np.array([geod.inv(np.full(len(edge), x), np.full(len(edge), y), *edge.T)[2].min() for x, y in lonlat[:100]])
    told = wide.holds(lonlat[:100])
    assert told[(away < 99e3)].all()
    assert not told[(away > 101e3) & ~region.holds(lonlat[:100])].any()


BAD = {
    "crossing": ([shapely.Polygon([(36, 0), (38, 2), (38, 0), (36, 2)])], 4326, "crosses itself"),
    "sea": ([shapely.box(-30, 0, -29, 1)], 4326, "no land"),
    "swapped": ([shapely.box(-41, 100, -40, 101)], 4326, "may be swapped"),
    "swapped to sea": ([shapely.box(-0.6, 35, -0.1, 36), shapely.box(-40, 20, -39, 25)], 4326, None),
    "points": ([shapely.Point(36, 0)], 4326, "polygons alone"),
    "mixed": ([shapely.box(36, 0, 37, 1), shapely.Point(36, 0)], 4326, "polygons alone"),
    "metres": ([shapely.box(4e5, 5e6, 5e5, 6e6)], 4326, "metres of a projection"),
    "unknown": ([shapely.box(36, 0, 37, 1)], None, "coordinate reference system"),
    "empty": ([], 4326, "empty"),
}


@pytest.mark.parametrize("name", [name for name, (*_, told) in BAD.items() if told])
def test_what_is_no_region_is_refused_in_a_sentence(tmp_path, name):
    shapes, crs, told = BAD[name]
    with pytest.raises(UserError, match=told):
        find_region((write(tmp_path, "bad.gpkg" if crs is None else "bad.parquet", shapes, crs),))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Kenia", "did you mean Kenya"),
        ("XX", "no country"),
        ("0 0 1 1", "no land"),
        ("34 6 42 -5", "south below north"),
        ("34 -95 42 5", "latitudes beyond 90"),
        ("34 -5 400 5", "no box on the globe"),
        ("-5 134 5 142", "latitudes beyond 90"),
        ("nothing.geojson", "there is no region"),
        ("s3://", None),
    ],
)
def test_texts_that_name_no_region(text, told):
    if told:
        with pytest.raises(UserError, match=told):
            find_region((text,))


def test_swapped_polygons_are_told_by_where_they_lie(tmp_path):
    """A box of Kenya's, with latitude first, is in the sea of the Gulf of Guinea."""
    kenya = shapely.box(36.5, -4, 37.5, -3)
    swapped = shapely.transform(kenya, lambda xy: xy[:, ::-1] - [0, 36])  # lon -4 to -3, lat 0.5 to 1.5
    assert not is_land(np.array([[-3.5, 1.0]]))[0]
    source = write(tmp_path, "swapped.geojson", [shapely.box(*swapped.bounds)])
    with pytest.raises(UserError, match="no land"):
        find_region((source,))
    beyond = write(tmp_path, "beyond.geojson", [shapely.box(-24, 132, -23, 134)])  # of Australia
    with pytest.raises(UserError, match="the other way round they lie in Australia"):
        find_region((beyond,))


def test_a_changed_file_is_another_region(tmp_path):
    source = write(tmp_path, "farms.geojson", FARMS)
    before = find_region((source,))
    write(tmp_path, "farms.geojson", FARMS[:2])
    assert find_region((source,)) != before


def test_a_kept_region_is_the_same(tmp_path):
    region = find_region(("FJ", "KE"))
    keep_region(tmp_path.as_uri(), region)
    assert find_region((f"{tmp_path}/region.parquet",)) == region
    assert (kept_region(tmp_path.as_uri()), kept_region(tmp_path.as_uri()).name) == (region, "Fiji, Kenya")
    assert gpd.read_parquet(tmp_path / "region.parquet").crs == 4326
    with pytest.raises(UserError, match="copy its whole directory"):
        kept_region(f"{tmp_path.as_uri()}/nowhere")


# Places


def test_points_in_a_box_are_those_of_the_whole_sequence():
    rng = np.random.default_rng(0)
    shift = rng.integers(0, 2**64, 2, dtype=np.uint64)
    for _ in range(60):
        start, count = int(rng.integers(0, 10**9)), int(10 ** rng.uniform(0, 5))
        (wide, high), left = 10 ** rng.uniform(-4, 0, 2), rng.uniform()
        low = rng.uniform(0, 1 - high)
        points = recurrence(start, count, shift)
        wanted = ((points[:, 0] - left) % 1 < wide) & (points[:, 1] >= low) & (points[:, 1] < low + high)
        np.testing.assert_array_equal(
            recurrence_in(start, count, shift, (left, low, left + wide, low + high)), points[wanted]
        )


@pytest.mark.parametrize("texts", [("KE",), ("FJ",), ("RU",)])
def test_a_region_has_the_places_of_the_world(texts):
    region, world = find_region(texts), draw_even(30_000, 3)
    here = world[region.holds(world)]
    assert len(here)
    np.testing.assert_array_equal(draw_even(len(here), 3, region=region), here)


def test_spacing_is_told_by_the_distance_of_places():
    """Places a km apart in a square lattice have 1 km² each; those of the sequence are about as far apart."""
    region = find_region(("KE",))
    count = spaced(20, -80, 84, region)
    assert count == pytest.approx(land_km2(-90, 90, region) / 400, abs=1)
    places = draw_even(count, 0, region=region)
    tree = shapely.STRtree(shapely.points(places * [np.cos(np.radians(places[:, 1])).mean(), 1] * 111.2))
    _, km = tree.query_nearest(tree.geometries, exclusive=True, return_distance=True, all_matches=False)
    assert 12 < km.mean() < 20
    assert inside(region.polygons, places).all()


def test_land_between_limits_is_the_mask_by_area():
    lat = np.radians(np.linspace(-90, 90, 2161))
    area = 6371.0088**2 * np.diff(np.sin(lat)) * np.radians(1 / 12)
    assert land_km2(-90, 90) == pytest.approx((mask() * area[:, None]).sum(), rel=1e-9)
    assert spaced(100, -80, 84, None) == pytest.approx(land_km2(-80, 84) / 1e4, abs=1)


def test_independent_places_are_in_the_region():
    region = find_region(("KE",))
    places = draw_land(3000, 0, region=region)
    assert inside(region.polygons, places).all()
    assert is_land(places).all()


# Cells


@pytest.mark.parametrize("texts", [("KE",), ("170 -20 -170 -10", "FJ")])
def test_cells_are_those_that_overlap(texts):
    """Cell by cell against shapely's intersections with an area."""
    region = find_region(texts)
    spec = GridSpec(0.5, 20, around(region, Plane(), 0.5), region=region)
    found, (x, y) = land_mask(spec), spec.edges
    left, up = (part.ravel() for part in np.meshgrid(x[:-1], y[:-1]))
    boxes = shapely.box(left, up - 0.5, left + 0.5, up)
    shape = shapely.union_all(region.polygons)
    both = shapely.union_all([shape, shapely.affinity.translate(shape, 360)])
    overlap = shapely.area(shapely.intersection(boxes, both)).reshape(found.shape) > 1e-9
    np.testing.assert_array_equal(found, overlap & land_mask(GridSpec(0.5, 20, spec.box)))
    assert found.any()


def test_cells_of_a_plane_and_by_their_centres():
    region = find_region(("KE",))
    plane = region.plane
    spec = GridSpec(50_000, 20, around(region, plane, 50_000, 1), plane.name, region=region)
    assert not any(count % 2 for count in spec.shape)
    centres = spec.lonlat(Tile(0, 0, *spec.shape))
    within = region.holds(centres.reshape(-1, 2)).reshape(spec.shape)
    found, land = land_mask(spec), land_mask(GridSpec(50_000, 20, spec.box, plane.name))
    assert not (within & land & ~found).any()
    assert found.sum() * 2500 == pytest.approx(KENYA_KM2, rel=0.25)  # with the cells at its edge whole
    by_centre = land_mask(GridSpec(50_000, 20, spec.box, plane.name, "centre", region))
    np.testing.assert_array_equal(by_centre, within & is_land(centres))


def test_the_plane_is_the_zone_or_equal_in_area():
    assert find_region(("36 -1 38 1",)).plane.name in ("EPSG:32637", "EPSG:32737")
    kenya = find_region(("KE",)).plane
    assert (kenya.definition.to_cf()["grid_mapping_name"], kenya.unit) == ("lambert_azimuthal_equal_area", "m")


@pytest.mark.further
def test_a_region_of_many_polygons_is_read_in_bounded_memory(tmp_path):
    """3,000 rings of 667 vertices, two million in all: places and cells of them, against their circles."""
    rng = np.random.default_rng(0)
    lon, lat = rng.uniform(-10, 40, 3000), rng.uniform(-20, 30, 3000)
    angle = np.linspace(0, 2 * np.pi, 667)
    rings = np.stack([lon[:, None] + 0.05 * np.cos(angle), lat[:, None] + 0.05 * np.sin(angle)], axis=-1)
    region = find_region((write(tmp_path, "many.parquet", shapely.polygons(rings)),))
    lonlat = np.column_stack([rng.uniform(-10, 40, 10_000), rng.uniform(-20, 30, 10_000)])
    near = shapely.STRtree(shapely.points(lon, lat)).query_nearest(
        shapely.points(lonlat), return_distance=True, all_matches=False
    )[1]
    clear = np.abs(near - 0.05) > 1e-5
    np.testing.assert_array_equal(region.holds(lonlat)[clear], (near < 0.05)[clear])
    assert len(json.dumps(region.geometry)) < 1_000_000
