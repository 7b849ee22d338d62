"""Catalogs in files: stac-geoparquet in the forms that its specification leaves open, JSON in its forms, on the web."""

import json

import geopandas as gpd
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rustac
import shapely
from stac_geoparquet.arrow import parse_stac_items_to_arrow, stac_table_to_items

from infra.errors import CatalogUnavailable, UserError
from infra.stac import files as stac_files
from infra.stac.catalogs import Catalog, collection_title, search
from tests import providers
from tests.infra.stac.stac_server import PLACE, StacServer, made

YEAR = "2021-01-01/2021-12-31"
HALVES = shapely.MultiPolygon([shapely.box(1.5, 44, 2, 45), shapely.box(2, 44, 2.5, 45)])


def items(count=5):
    """Items with a box, of which the last has other assets, and the third tells no cloud cover."""
    found = [one | {"bbox": [1.5, 44.0, 2.5, 45.0]} for one in made(count)]
    found[-1] = found[-1] | {"assets": {"SCL": {"href": "https://archive.example/SCL.tif", "gsd": 20}}}
    found[2]["properties"]["eo:cloud_cover"] = None
    return found


def table(features=None):
    return parse_stac_items_to_arrow(features or items()).read_all()


def replaced(column, values):
    whole = table()
    return whole.set_column(whole.schema.get_field_index(column), column, values(whole[column]))


def without(*names):
    whole = table()
    return whole.drop_columns([name for name in names if name in whole.column_names])


def nested():
    """Properties as a struct."""
    whole, top = table(), {*stac_files.TOP, "geometry"}
    flat = [name for name in whole.column_names if name not in top]
    struct = pa.StructArray.from_arrays([whole[name].combine_chunks() for name in flat], flat)
    return whole.drop_columns(flat).append_column("properties", struct)


def native():
    """The geometry in GeoArrow's own layout, known by the field alone."""
    shapes = gpd.GeoDataFrame(geometry=[shapely.box(1.5, 44, 2.5, 45)] * 5, crs=4326)
    arrow = pa.table(shapes.to_arrow(index=False, geometry_encoding="geoarrow"))
    return table().drop_columns(["geometry"]).append_column(arrow.schema.field("geometry"), arrow["geometry"])


TABLES = {
    "as the library writes it": table,
    "nested properties": nested,
    "GeoArrow": native,
    "large binary geometry": lambda: replaced("geometry", lambda c: c.cast(pa.large_binary())),
    "dictionaries": lambda: replaced("collection", lambda c: c.dictionary_encode()),
    "no collections": lambda: without("collection"),
    "null collections": lambda: replaced("collection", lambda c: pa.nulls(5, pa.string())),
    "no type, no version": lambda: without("type", "stac_version"),
    "no box, no links, no extensions": lambda: without("bbox", "links", "stac_extensions"),
    "boxes as lists": lambda: replaced("bbox", lambda c: pa.array([[1.5, 44.0, 2.5, 45.0]] * 5)),
    "times as text": lambda: replaced("datetime", lambda c: pa.array([i["properties"]["datetime"] for i in items()])),
    "times in nanoseconds": lambda: replaced("datetime", lambda c: c.cast(pa.timestamp("ns", "Europe/Rome"))),
    "times without zone": lambda: replaced("datetime", lambda c: c.cast(pa.timestamp("us"))),
    "cloud cover NaN": lambda: replaced("eo:cloud_cover", lambda c: pa.array([5, 5, float("nan"), 5, 5])),
}


@pytest.fixture(params=["whole", "in parts"])
def way(request, monkeypatch):
    """Small files are read whole, unless one byte is too large."""
    if request.param == "in parts":
        monkeypatch.setattr(stac_files, "WHOLE", 1)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", TABLES)
def test_stac_geoparquet_is_read_as_it_comes(tmp_path, name):
    path = tmp_path / "items.parquet"
    pq.write_table(TABLES[name](), path, row_group_size=2)
    catalog = Catalog(str(path), "s2")
    assert collection_title(catalog) == ""
    found = search(catalog, YEAR, PLACE, 60.0)
    assert [i.id for i in found] == [i["id"] for i in items()]
    assert [i.datetime.isoformat().replace("+00:00", "Z") for i in found] == [
        i["properties"]["datetime"] for i in items()
    ]
    assert [list(i.assets) for i in found] == [["B04"]] * 4 + [["SCL"]]
    assert found[2].properties["eo:cloud_cover"] is None


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("encoding", ["WKB", "geoarrow"])
def test_footprints_of_several_parts(tmp_path, encoding):
    """As GeoPandas writes them."""
    rows = table().drop_columns(["geometry"]).to_pandas()
    gpd.GeoDataFrame(rows, geometry=[HALVES] * 5, crs=4326).to_parquet(
        tmp_path / "a.parquet", geometry_encoding=encoding
    )
    found = search(Catalog(str(tmp_path / "a.parquet"), "s2"), YEAR, PLACE, 60.0)
    assert len(found) == 5
    assert shapely.equals(shapely.geometry.shape(found[0].geometry), HALVES)


def stripped(value):
    """Without the nulls that the library leaves in links."""
    if isinstance(value, dict):
        return {k: stripped(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [stripped(each) for each in value]
    return value


def check_features(path):
    """Rows as features, against stac-geoparquet's own; it adds empty fractions to times."""
    ours = stac_files.open_file(str(path)).at(np.ones(pq.read_metadata(path).num_rows, bool))
    for one, other in zip(ours, stac_table_to_items(pq.read_table(path)), strict=True):
        mine, theirs = json.loads(json.dumps(stripped(one))), json.loads(json.dumps(stripped(other)))
        assert mine["properties"].pop("datetime")[:19] == theirs["properties"].pop("datetime")[:19]
        assert mine == {"stac_extensions": [], "links": []} | theirs


def test_a_rows_feature_is_what_stac_geoparquet_makes_of_it(tmp_path):
    pq.write_table(table(), tmp_path / "items.parquet")
    check_features(tmp_path / "items.parquet")


def test_an_archives_rows_are_what_stac_geoparquet_makes_of_them(tmp_path):
    pq.write_table(table(providers.month()[:20]), tmp_path / "items.parquet")
    check_features(tmp_path / "items.parquet")


def test_recorded_rows_are_what_stac_geoparquet_makes_of_them(fixtures_dir):
    check_features(fixtures_dir / "stac_items/rustac/100-sentinel-2-items.parquet")


def test_what_rustac_writes(tmp_path):
    rustac.write_sync(str(tmp_path / "items.parquet"), items())
    assert len(search(Catalog(str(tmp_path / "items.parquet"), "s2"), YEAR, PLACE, 60.0)) == 5


LINES = {
    "items.json": json.dumps({"type": "FeatureCollection", "features": made(3)}),
    "items.geojson": json.dumps({"features": made(3), "links": None}),
    "items.ndjson": "\n".join(json.dumps(one) for one in made(3)) + "\n",
    "items.jsonl": "\n\n".join(json.dumps(one) for one in made(3)),
    "lines.json": "\r\n".join(json.dumps(one) for one in made(3)),
    "bom.json": "\ufeff" + json.dumps({"features": made(3)}),
}


@pytest.mark.parametrize("name", LINES)
def test_json_in_its_forms(tmp_path, name):
    (tmp_path / name).write_text(LINES[name], encoding="utf-8")
    assert len(search(Catalog(str(tmp_path / name), "s2"), YEAR, PLACE, 60.0)) == 3


def test_a_single_item_is_a_collection_of_one(tmp_path):
    (tmp_path / "item.json").write_text(json.dumps(made(1)[0]))
    assert len(search(Catalog(str(tmp_path / "item.json"), "s2"), YEAR, PLACE, 60.0)) == 1


NONE = {
    "static.json": (json.dumps({"type": "Catalog", "links": []}).encode(), "a static STAC catalog"),
    "empty.ndjson": (b"", "is no catalog"),
    "half.ndjson": (b'{"id": 1}\n{"id"', "is no catalog"),
    "columns.parquet": (None, "is no catalog"),
}


@pytest.mark.parametrize("name", NONE)
def test_what_holds_no_items_is_one_sentence(tmp_path, name):
    content, reason = NONE[name]
    if content is None:
        pq.write_table(without("geometry"), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reason):
        search(Catalog(str(tmp_path / name), "s2"), YEAR, PLACE, 60.0)


# On the web


class FileServer(StacServer):
    """Serves `files`, by path, and no API."""

    def __init__(self, files, validators=None):
        super().__init__([])
        self.files, self.validators = files, validators or {}

    def answer(self, method, path, query):
        self.paths.append((method, path))
        if path not in self.files:
            return 404, {}, b""
        content = self.files[path]
        return content if isinstance(content, tuple) else (200, self.validators, content)


def parquet():
    pq.write_table(table(), sink := pa.BufferOutputStream())
    return sink.getvalue().to_pybytes()


def test_a_file_of_the_web_is_a_catalog(monkeypatch):
    """Whatever its query; relative hrefs are beside it, and no file of this machine is reached."""
    features = made(2)
    features[0]["assets"] = {"B04": {"href": "scene/B04.tif"}, "B03": {"href": "file:///etc/passwd"}}
    with FileServer(
        {"/a/items.json": json.dumps({"features": features}).encode(), "/a/i.parquet": parquet()}
    ) as server:
        found = search(Catalog(f"{server.url}/a/items.json?sig=secret", "s2"), YEAR, PLACE, 60.0)
        assert found[0].assets["B04"].href == f"{server.url}/a/scene/B04.tif"
        assert list(found[0].assets) == ["B04"]
        assert len(search(Catalog(f"{server.url}/a/i.parquet", "s2"), YEAR, PLACE, 60.0)) == 5
        with pytest.raises(CatalogUnavailable, match="HTTP status 404") as caught:
            search(Catalog(f"{server.url}/none.json?sig=secret", "s2"), YEAR, PLACE, 60.0)
        assert "secret" not in str(caught.value)


def test_a_file_of_the_web_is_read_anew_when_it_changes():
    with FileServer({"/items.json": json.dumps({"features": made(2)}).encode()}, {"ETag": "1"}) as server:
        catalog = Catalog(f"{server.url}/items.json", "s2")
        assert len(search(catalog, YEAR, PLACE, 60.0)) == 2
        assert len(search(catalog, YEAR, PLACE, 60.0)) == 2
        assert server.paths.count(("GET", "/items.json")) == 1
        server.files["/items.json"], server.validators["ETag"] = json.dumps({"features": made(3)}).encode(), "2"
        assert len(search(catalog, YEAR, PLACE, 60.0)) == 3


def test_a_redirected_file_is_held_to_the_allowed_hosts(monkeypatch):
    with FileServer({"/items.json": json.dumps({"features": made(2)}).encode()}) as theirs:
        target = theirs.url.replace("127.0.0.1", "localhost") + "/items.json"
        with FileServer({"/items.json": (302, {"Location": target}, b"")}) as server:
            monkeypatch.setenv("RANGEGRID_ASSET_HOSTS", '["archive.example"]')
            with pytest.raises(UserError, match="leads to localhost"):
                search(Catalog(f"{server.url}/items.json", "s2"), YEAR, PLACE, 60.0)
            assert theirs.paths == []
