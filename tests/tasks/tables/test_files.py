"""Tables of points as people have them: the same places whatever the format, and one sentence for what is none.

The oracle is pandas' and geopandas' own reading of what they wrote.
"""

import gzip
from decimal import Decimal

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
from shapely.geometry import MultiPoint, Point

from infra import storage
from infra.errors import UserError
from tasks.patches.places import read_points
from tasks.tables import files
from tasks.tables.points import check_points, open_points, rows_of

LONLAT = np.array([[2.35, 48.86], [-70.5, -33.25], [179.999, 0.0], [200.0, 10.0], [-180.0, -79.5]])
NAMES = ["Zürich, a", "b", 'c "d"', "", "e\nf"]


def read(path, lon=None, lat=None, size=2):
    """The places of a table, and its columns, read in batches."""
    with open_points(path, lon, lat) as (table, place):
        count = check_points(table, place)
        rows, lonlat = zip(*rows_of(table, place, size), strict=True)
    assert [len(part) for part in rows][:-1] == [size] * (len(rows) - 1)
    whole = pa.concat_tables(rows)
    assert count == len(whole)
    return np.concatenate(lonlat), whole


def frame(lon="lon", lat="lat"):
    return pd.DataFrame({"name": NAMES, lon: LONLAT[:, 0], lat: LONLAT[:, 1]})


HEADERS = [
    ("lon", "lat"),
    ("LON", "LAT"),
    ("longitude", "latitude"),
    ("Longitude (deg)", "Latitude (deg)"),
    (" lng ", " lat "),
    ("long", "lat"),
    ("x", "y"),
    ("X", "Y"),
    ("decimalLongitude", "decimalLatitude"),
    ("lon_dd", "lat_dd"),
]


@pytest.mark.parametrize("header", HEADERS, ids=str)
def test_columns_are_found_by_their_names(tmp_path, header):
    frame(*header).to_csv(tmp_path / "p.csv", index=False)
    lonlat, rows = read(tmp_path / "p.csv")
    np.testing.assert_array_equal(lonlat, LONLAT)
    assert rows.column_names == ["name", *header]
    assert rows["name"].to_pylist() == NAMES


WRITERS = {
    "semicolons.csv": lambda table, path: table.to_csv(path, index=False, sep=";"),
    "commas.csv": lambda table, path: table.to_csv(path, index=False, sep=";", decimal=","),
    "quoted.csv": lambda table, path: table.to_csv(path, index=False, decimal=",", quoting=1),
    "TABS.TSV": lambda table, path: table.to_csv(path, index=False, sep="\t"),
    "tabs.txt": lambda table, path: table.to_csv(path, index=False, sep="\t"),
    "bars.csv": lambda table, path: table.to_csv(path, index=False, sep="|"),
    "tabs and commas.tab": lambda table, path: table.to_csv(path, index=False, sep="\t", decimal=","),
    "excel.CSV": lambda table, path: path.write_text("sep=;\n" + table.to_csv(index=False, sep=";")),
    "bom.csv": lambda table, path: table.to_csv(path, index=False, encoding="utf-8-sig"),
    "packed.csv.gz": lambda table, path: table.to_csv(path, index=False),
    "windows.csv": lambda table, path: table.to_csv(path, index=False, lineterminator="\r\n"),
    "p.parquet": lambda table, path: table.to_parquet(path),
    "P.Parquet": lambda table, path: table.to_parquet(path, row_group_size=2),
    "text.parquet": lambda table, path: table.astype({"lon": str, "lat": str}).to_parquet(path),
    "floats.parquet": lambda table, path: table.astype({"lat": "float32"}).to_parquet(path),
    "decimals.parquet": lambda table, path: table.assign(lon=table["lon"].map(lambda x: Decimal(str(x)))).to_parquet(
        path
    ),
    "kinds.parquet": lambda table, path: table.astype({"lon": "category"}).to_parquet(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_writing_of_a_table_is_the_same_table(tmp_path, name):
    WRITERS[name](frame(), tmp_path / name)
    lonlat, rows = read(tmp_path / name)
    np.testing.assert_allclose(lonlat, LONLAT, atol=1e-5 if name == "floats.parquet" else 0)
    assert rows["name"].to_pylist() == NAMES
    if name.lower().endswith(("csv", "tsv", "tab", "txt", "gz")):
        np.testing.assert_array_equal(rows["lon"], LONLAT[:, 0])  # numbers again, in the output


def test_whole_numbers_are_places_too(tmp_path):
    pd.DataFrame({"lat": np.array([1, -2], "int8"), "lon": np.array([3, 200], "uint16")}).to_parquet(
        tmp_path / "p.parquet"
    )
    np.testing.assert_array_equal(read(tmp_path / "p.parquet")[0], [[3, 1], [200, -2]])


@pytest.mark.parametrize("crs", [4326, 3857, 3035, 32631])
@pytest.mark.parametrize("name", ["p.parquet", "p.gpkg", "p.geojson", "p.shp.zip"])
def test_a_geometry_is_read_in_its_own_crs(tmp_path, name, crs):
    places = np.array([[2.35, 48.86], [5.0, 51.25], [3.5, 50.0]])
    table = gpd.GeoDataFrame({"name": list("abc")}, geometry=gpd.points_from_xy(*places.T), crs=4326).to_crs(crs)
    if name.endswith("geojson") and crs != 4326:
        pytest.skip("GeoJSON has one CRS")
    table.to_parquet(tmp_path / name) if name.endswith("parquet") else table.to_file(tmp_path / name)
    lonlat, rows = read(tmp_path / name)
    np.testing.assert_allclose(lonlat, places, atol=1e-8)
    pa.parquet.write_table(rows, tmp_path / "out.parquet")
    again = gpd.read_parquet(tmp_path / "out.parquet")  # what is written is a GeoParquet still
    np.testing.assert_allclose(again.to_crs(4326).get_coordinates(), places, atol=1e-8)
    assert again["name"].tolist() == list("abc")


def test_of_several_layers_one_is_named(tmp_path):
    table = gpd.GeoDataFrame({"name": NAMES}, geometry=gpd.points_from_xy(*LONLAT.T), crs=4326)
    table[:1].to_file(tmp_path / "p.gpkg", layer="first")
    table.to_file(tmp_path / "p.gpkg", layer="second")
    with pytest.raises(UserError, match=r"the layers first, second: name one, as .*p\.gpkg#first"):
        read(tmp_path / "p.gpkg")
    lonlat, rows = read(f"{tmp_path / 'p.gpkg'}#second")
    np.testing.assert_allclose(lonlat, LONLAT)
    assert rows["name"].to_pylist() == list(NAMES)


def test_other_encodings_of_a_geometry(tmp_path):
    points = gpd.GeoSeries.from_xy(*LONLAT.T, crs=4326)
    texts = {"wkt": points.to_wkt(), "ewkt": "SRID=4326;" + points.to_wkt(), "hex": points.to_wkb(hex=True)}
    for name, column in texts.items():
        pd.DataFrame({"name": NAMES, "geom": column}).to_csv(tmp_path / f"{name}.csv", index=False)
        np.testing.assert_allclose(read(tmp_path / f"{name}.csv")[0], LONLAT)
    gpd.GeoDataFrame({"name": NAMES}, geometry=points).to_parquet(
        tmp_path / "native.parquet", geometry_encoding="geoarrow", schema_version="1.1.0"
    )
    np.testing.assert_allclose(read(tmp_path / "native.parquet")[0], LONLAT)
    single = gpd.GeoDataFrame(geometry=[MultiPoint([xy]) for xy in LONLAT], crs=4326)
    single.to_parquet(tmp_path / "single.parquet")
    np.testing.assert_allclose(read(tmp_path / "single.parquet")[0], LONLAT)


def test_degrees_are_taken_before_a_geometry_and_metres_after(tmp_path):
    table = frame().assign(x=LONLAT[:, 0] * 1e5, y=LONLAT[:, 1] * 1e5)
    table.to_csv(tmp_path / "both.csv", index=False)
    np.testing.assert_array_equal(read(tmp_path / "both.csv")[0], LONLAT)
    points = gpd.points_from_xy(*LONLAT[:3].T, crs=4326).to_crs(3857)
    gpd.GeoDataFrame(table[["x", "y"]][:3], geometry=points).to_parquet(tmp_path / "geo.parquet")
    np.testing.assert_allclose(read(tmp_path / "geo.parquet")[0], LONLAT[:3], atol=1e-8)


def test_columns_may_be_named(tmp_path):
    table = frame().assign(start_lon=0.0, longitude=1.0, latitude=2.0)
    table.to_csv(tmp_path / "p.csv", index=False)
    np.testing.assert_array_equal(read(tmp_path / "p.csv")[0], LONLAT)  # our own names win
    np.testing.assert_array_equal(read(tmp_path / "p.csv", "start_lon", "latitude")[0], [[0.0, 2.0]] * 5)


def test_a_column_may_change_its_mind_after_the_first_block(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK", 256)
    ids = [*range(60), 2.5, "x"]
    table = pd.DataFrame({"id": ids, "late": [None] * 61 + ["words"], "lon": 1.5, "when": ["2021-01-01"] * 61 + ["?"]})
    table["lat"] = np.arange(62.0)
    table.to_csv(tmp_path / "p.csv", index=False)
    lonlat, rows = read(tmp_path / "p.csv", size=7)
    np.testing.assert_array_equal(lonlat[:, 1], np.arange(62))
    assert rows["id"].to_pylist() == list(map(str, ids))
    assert rows["late"].to_pylist()[-1] == "words"


MANY = 300_000


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
def test_memory_does_not_grow_with_a_table(tmp_path, monkeypatch, suffix):
    """Arrow's own count of what its readers hold, and no more than some blocks are ever held."""
    monkeypatch.setattr(files, "BLOCK", 1 << 20)
    table = pd.DataFrame({"lon": np.linspace(-180, 180, MANY), "lat": 1.0, "text": "a long text" * 12})
    path = tmp_path / f"p{suffix}"
    table.to_parquet(path, row_group_size=10_000) if suffix == ".parquet" else table.to_csv(path, index=False)
    with open_points(path) as (opened, place):
        held = [pa.total_allocated_bytes() for _ in rows_of(opened, place, 4096)]
    assert len(held) == -(-MANY // 4096)
    assert max(held) - min(held) < 16 << 20 < pa.Table.from_pandas(table).nbytes / 2


@pytest.mark.parametrize("kind", ["file", "s3", "https"])
def test_a_table_comes_from_anywhere(sandbox, tmp_path, monkeypatch, kind):
    """By URL and by every way to write a path; the web's address is one that S3 signed."""
    url = (tmp_path / "a space" / "pö%20#ints.csv").as_uri()
    if kind != "file":
        url = storage.join(sandbox.environment()["RANGEGRID_STORAGE_URL"], "tables/a space/points.csv")
    storage.write(url, frame().to_csv(index=False).encode())
    places = [storage.presigned(url) if kind == "https" else url]
    if kind == "file":
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        monkeypatch.setenv("HOME", str(tmp_path))
        places += ["../a space/pö%20#ints.csv", "~/a space/pö%20#ints.csv", str(tmp_path / "a space/pö%20#ints.csv")]
    for place in places:
        np.testing.assert_array_equal(read(place)[0], LONLAT)


BAD = {
    "utf16.csv": ("lon,lat\n1,2\n".encode("utf-16"), "it is UTF-16: save it as UTF-8"),
    "utf16be.csv": ("lon,lat\n1,2\n".encode("utf-16-be"), "has a NUL byte at 0"),
    "nul.csv": (b"lon,lat\n1,2\n" * 9000 + b"1,\x002\n", "has a NUL byte at 108,002"),
    "latin.csv": ("lon,lat,name\n1,2,Zürich\n".encode("latin-1"), "no UTF-8"),
    "packed.csv": (b"\x1f\x8b\x08", "cannot be read"),
    "truncated.csv.gz": (gzip.compress(b"lon,lat\n" + bytes(range(48, 58)) * 999)[:-9], "cannot be read"),
    "empty.csv": (b"", "it is empty"),
    "blank.csv": (b"\n\n", "it is empty"),
    "header.csv": (b"lon,lat", "has no points"),
    "numbers.csv": (b"2.5,48.9\n3.5,50.1\n", "give it a header"),
    "swapped.csv": (b"lon,lat\n1,2\n48.9,102.3\n", "no place in row 2.*may be swapped"),
    "metres.csv": (b"x,y\n261000.5,6250000.1\n", "metres of a projection"),
    "text.csv": (b"lon,lat\n1,2\n3,north\n", "row 2: lat 'north' is no number"),
    "sexagesimal.csv": ("lon,lat\n2°21'E,48°51'N\n".encode(), "give decimal degrees"),
    "missing.csv": (b"lon,lat\n1,2\n,\n", "no place in row 2: lon nan.*Leave out rows without a place"),
    "infinite.csv": (b"lon,lat\n1,inf\n", "no place in row 1"),
    "two.csv": (b"longitude,lng,lat\n1,2,3\n", "has columns longitude and lng .* name one with --lon"),
    "twice.csv": (b"lon,lat,a,a\n1,2,3,4\n", "has 2 columns 'a'"),
    "unnamed.csv": (b"lon,lat,,\n1,2,,\n", "has 2 columns without a name"),
    "ragged.csv": (b"lon,lat\n1,2\n1,2,3\n", "Expected 2 columns, got 3"),
    "secretly.csv": (b"PAR1xxxx", "by its content it is Parquet"),
    "secretly.parquet": (b"lon,lat\n1,2\n", "by its content it is no Parquet"),
    "broken.parquet": (b"PAR1 and no more", "cannot be read"),
    "broken.geojson": (b"{", "cannot be read"),
    "records.json": (b'[{"lon": 1, "lat": 2}]', "is no GeoJSON, nor another format of features"),
    "points.xlsx": (b"PK", "is of no kind that can be read"),
    "points.shp": (b"no shape", "cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_table_of_points_is_one_sentence(tmp_path, name):
    data, message = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"(?s){name}.*{message}"):
        read(tmp_path / name)
    with pytest.raises(UserError, match=f"(?s){name}.*{message}"):
        read_points(str(tmp_path / name))  # the sample's own way in


PARQUETS = {
    "bools": (pa.table({"lon": [True], "lat": [1.0]}), "has bool in its column 'lon': give numbers"),
    "lists": (pa.table({"lon": [[1.0]], "lat": [1.0]}), "has list.* in its column 'lon'"),
    "none": (pa.table({"lon": pa.array([], pa.float64()), "lat": pa.array([], pa.float64())}), "has no points"),
}


@pytest.mark.parametrize("name", PARQUETS)
def test_what_a_parquet_may_hold_and_is_no_place(tmp_path, name):
    table, message = PARQUETS[name]
    pa.parquet.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(UserError, match=message):
        read(tmp_path / "p.parquet")


SHAPES = {
    "polygon": ([Point(1, 2), Point(1, 2).buffer(1)], 4326, "a Polygon in row 2, which is no one place"),
    "points": ([MultiPoint([(1, 2), (3, 4)])], 4326, r"a MultiPoint in row 1.*explode\(\)"),
    "null": ([Point(1, 2), None], 4326, "no place in row 2"),
    "empty": ([Point()], 4326, "no place in row 1"),
    "nowhere": ([Point(1, 2)], None, "does not say its coordinate reference system"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_geometries_that_are_no_points_are_refused(tmp_path, name):
    shapes, crs, message = SHAPES[name]
    gpd.GeoDataFrame(geometry=gpd.GeoSeries(shapes), crs=crs).to_parquet(tmp_path / "p.parquet")
    with pytest.raises(UserError, match=message):
        read(tmp_path / "p.parquet")


def test_the_samples_points_lie_where_its_grid_is(tmp_path):
    frame().to_csv(tmp_path / "p.csv", index=False, sep=";", decimal=",")
    found = read_points(str(tmp_path / "p.csv"))
    np.testing.assert_array_equal(found, np.where(LONLAT > 180, LONLAT - 360, LONLAT))
    (tmp_path / "south.csv").write_text("lon,lat\n0,0\n0,-81\n")
    with pytest.raises(UserError, match=r"row 2: lon 0\.0, lat -81\.0 is outside"):
        read_points(str(tmp_path / "south.csv"))
