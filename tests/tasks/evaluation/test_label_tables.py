"""Tables of labels: the paper's, any other, polygons, and what is wrong with them."""

import json

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
import torch
from shapely.geometry import MultiPoint, Point, box
from sklearn.linear_model import RidgeClassifierCV
from sklearn.preprocessing import MinMaxScaler

from infra import storage
from infra.errors import UserError
from tasks.evaluate import evaluate_database
from tasks.evaluation.embedders import embedders
from tasks.evaluation.label_tables import PAPER, draw_in_polygons, label_sets, read_labels
from tasks.evaluation.scoring import score_all
from tasks.params import EvaluateParams
from tasks.tables.regions import countries, find_region

COUNT = 80


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    return pd.DataFrame({"lon": rng.uniform(-170, 170, COUNT), "lat": rng.uniform(-80, 80, COUNT)})


def read(*sources, **params):
    return read_labels(EvaluateParams(labels=tuple(map(str, sources)), **params))


def frame(rows, columns):
    lon, lat = columns.lonlat
    values = np.arange(COUNT) if columns.kind == "regression" else [f"c{i % 4}" for i in range(COUNT)]
    return pd.DataFrame({lon: rows["lon"], lat: rows["lat"], columns.label: values})


@pytest.mark.parametrize("columns", PAPER, ids=lambda columns: columns.name)
def test_the_papers_tables_are_recognised(rows, tmp_path, columns):
    frame(rows, columns).to_csv(tmp_path / "table.csv", index=False)
    (found,) = read(tmp_path / "table.csv")
    assert (found.name, found.kind, found.block_degrees) == (columns.name, columns.kind, columns.block_degrees)
    np.testing.assert_allclose(found.lonlat, rows)
    if columns.name == "population":
        np.testing.assert_allclose(found.labels, np.log(1 + np.arange(COUNT)))


def test_housing_is_not_taken_for_population(rows, tmp_path):
    table = frame(rows, PAPER[6]).assign(population=1.0)
    table.to_csv(tmp_path / "housing.csv", index=False)
    assert [labels.name for labels in read(tmp_path / "housing.csv")] == ["housing"]


def test_one_table_has_two_tasks(rows, tmp_path):
    table = frame(rows, PAPER[0]).assign(ECO_NAME=[f"e{i % 9}" for i in range(COUNT)])
    table.loc[3, "ECO_NAME"] = None
    table.to_parquet(tmp_path / "eco.parquet")
    biome, ecoregion = read(tmp_path / "eco.parquet")
    assert (biome.name, len(biome.labels), ecoregion.name, len(ecoregion.labels)) == ("biome", 80, "ecoregion", 79)


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
def test_any_column_is_taken_by_name(rows, tmp_path, suffix):
    table = rows.rename(columns={"lon": "LNG", "lat": "Latitude"}).assign(yield_=np.arange(COUNT, dtype="f8"))
    path = tmp_path / f"crops{suffix}"
    table.to_parquet(path) if suffix == ".parquet" else table.to_csv(path, index=False)
    (found,) = read(path, label="yield_", kind="regression")
    np.testing.assert_array_equal(found.labels, np.arange(COUNT))
    (classes,) = read(path, label="yield_", kind="classification", points=None)
    assert classes.kind == "classification"


def test_a_draw_keeps_the_order_and_the_seed(tmp_path):
    table = pd.DataFrame({"lon": np.linspace(0, 9, 900), "lat": 0.0, "elevation": np.arange(900.0)})
    table.to_csv(tmp_path / "e.csv", index=False)
    (first,), (again,) = (read(tmp_path / "e.csv", points=200) for _ in range(2))
    assert len(first.labels) == 200
    assert (np.diff(first.labels) > 0).all()
    np.testing.assert_array_equal(first.labels, again.labels)


SQUARES = gpd.GeoDataFrame(
    {"BIOME_NAME": ["wet", "dry"]}, geometry=[box(0, 0, 10, 10), box(10, 0, 30, 10)], crs="EPSG:4326"
)


@pytest.mark.parametrize("name", ["b.geojson", "b.shp", "b.shp.zip", "b.parquet"])
def test_places_are_drawn_in_polygons_by_area(tmp_path, name):
    path = tmp_path / name
    mercator = SQUARES.to_crs(3857)
    mercator.to_parquet(path) if name == "b.parquet" else mercator.to_file(path)
    (found,) = read(path, points=3000)
    assert (found.name, len(found.labels)) == ("biome", 3000)
    assert ((found.lonlat[:, 0] < 10) == (found.labels == "wet")).all()
    assert np.mean(found.labels == "dry") == pytest.approx(2 / 3, abs=0.03)


def test_points_of_a_geometry_are_taken_as_they_are(rows, tmp_path):
    geometry = gpd.points_from_xy(rows["lon"], rows["lat"], crs="EPSG:4326")
    gpd.GeoDataFrame({"soil": ["a", "b"] * 40}, geometry=geometry).to_parquet(tmp_path / "soil.parquet")
    (found,) = read(tmp_path / "soil.parquet", label="soil", kind="classification")
    np.testing.assert_allclose(found.lonlat, rows)


@pytest.mark.parametrize("name", ["soil.parquet", "soil.geojson", "soil.gpkg"])
@pytest.mark.parametrize("missing", [None, Point()], ids=["null", "empty"])
def test_a_row_without_geometry_or_label_moves_no_other(rows, tmp_path, name, missing):
    """Each label is a function of its own place, so that any shift shows in every row after it."""
    geometry = list(gpd.points_from_xy(rows["lon"], rows["lat"]))
    geometry[0] = geometry[41] = missing
    labels = rows["lon"].round(6)
    labels[7] = None
    table = gpd.GeoDataFrame({"east": labels}, geometry=geometry, crs="EPSG:4326")
    table.to_parquet(tmp_path / name) if name.endswith("parquet") else table.to_file(tmp_path / name)
    (found,) = read(tmp_path / name, label="east", kind="regression")
    np.testing.assert_allclose(found.labels, found.lonlat[:, 0], atol=1e-5)
    np.testing.assert_allclose(found.lonlat, rows.drop([0, 7, 41]), atol=1e-5)


def test_a_row_without_geometry_moves_no_polygon(tmp_path):
    shapes = pd.concat([gpd.GeoDataFrame({"BIOME_NAME": ["lost"]}, geometry=[None], crs="EPSG:4326"), SQUARES])
    shapes.to_parquet(tmp_path / "b.parquet")
    (found,) = read(tmp_path / "b.parquet", points=500)
    assert ((found.lonlat[:, 0] < 10) == (found.labels == "wet")).all()


def test_each_of_several_points_has_their_label(rows, tmp_path):
    geometry = [MultiPoint([(lon, lat), (lon + 1, lat)]) for lon, lat in rows.to_numpy()]
    gpd.GeoDataFrame({"row": range(COUNT)}, geometry=geometry, crs="EPSG:4326").to_parquet(tmp_path / "p.parquet")
    (found,) = read(tmp_path / "p.parquet", label="row", kind="regression")
    np.testing.assert_array_equal(found.labels, np.repeat(np.arange(COUNT), 2))
    np.testing.assert_allclose(found.lonlat[::2], rows)


def test_a_mixture_of_points_and_polygons_is_refused(tmp_path):
    mixed = gpd.GeoDataFrame({"a": range(2)}, geometry=[Point(1, 2), box(0, 0, 1, 1)], crs="EPSG:4326")
    mixed.to_parquet(tmp_path / "p.parquet")
    with pytest.raises(UserError, match="geometries of Point, Polygon: give points alone, or polygons alone"):
        read(tmp_path / "p.parquet", label="a", kind="regression")


def test_a_table_comes_from_the_object_store_and_from_the_web(sandbox, rows):
    url = storage.join(sandbox.environment()["RANGEGRID_STORAGE_URL"], "labels/elevation.csv")
    storage.write(url, rows.assign(elevation=1.0 * np.arange(COUNT)).to_csv(index=False).encode())
    for source in (url, storage.presigned(url)):
        (found,) = read(source)
        np.testing.assert_array_equal(found.labels, np.arange(COUNT))
    with pytest.raises(UserError, match="there is no table"):
        read(storage.presigned(url.replace("elevation.csv", "gone.csv")))


GOOD = "lon,lat,elevation\n" + "".join(f"{i},{i},{i}\n" for i in range(60))
BAD = {
    "few.csv": ("lon,lat,elevation\n1,2,3\n", {}, "has 1 labels with a place: a probe needs at least 50"),
    "same.csv": ("lon,lat,elevation\n" + "1,2,3\n" * 60, {}, "has one value alone"),
    "text.csv": (GOOD.replace(",7\n", ",high\n"), {}, "is not of numbers"),
    "other.csv": (
        GOOD.replace("elevation", "height"),
        {},
        "none of the paper's tasks among its columns lon, lat, height",
    ),
    "column.csv": (GOOD, {"label": "soil", "kind": "regression"}, "no column 'soil' among lon, lat, elevation"),
    "where.csv": (GOOD.replace("lat", "phi"), {"label": "elevation", "kind": "regression"}, "name one with --lat"),
    "swapped.csv": (GOOD.replace("9,9,9", "9,99,9"), {}, "is at lon 9, lat 99: name the columns in degrees"),
    "broken.parquet": (GOOD, {}, "cannot be read as a table of labels"),
    "table.xlsx": (GOOD, {}, "is of no kind that can be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tables_are_refused(tmp_path, name):
    text, params, message = BAD[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name, **params)


def test_a_table_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no table"):
        read(tmp_path / "gone.csv")


def ecoregions(folder, rows):
    """The paper's two files: train and val, with labels of two tasks, some missing; pandas' join of them."""
    table = pd.DataFrame({"X": rows["lon"], "Y": rows["lat"]})
    table["BIOME_NAME"] = [f"b{i % 3}" for i in range(COUNT)]
    table["ECO_NAME"] = [f"e{i % 2}" for i in range(COUNT)]
    table.loc[[3, 60], "ECO_NAME"] = None
    table[:50].to_csv(folder / "ecoregion_train.csv", index=False)
    table[50:].to_csv(folder / "ecoregion_val.csv", index=False)
    return folder / "ecoregion_train.csv", folder / "ecoregion_val.csv"


def test_two_tables_of_one_task_are_one_in_the_order_given(rows, tmp_path, caplog):
    """Against the paper's loader: concat, dropna, then PyTorch's random_split with seed 42."""
    caplog.set_level("INFO")
    files = ecoregions(tmp_path, rows)
    whole = pd.concat([pd.read_csv(file) for file in files]).dropna(subset=["ECO_NAME"]).reset_index(drop=True)
    biome, ecoregion = read(*files)
    assert (biome.name, len(biome.labels), ecoregion.name) == ("biome", COUNT, "ecoregion")
    np.testing.assert_array_equal(ecoregion.labels, whole["ECO_NAME"])
    np.testing.assert_allclose(ecoregion.lonlat, whole[["X", "Y"]])
    assert "ecoregion: the rows of " in caplog.text
    train, _ = torch.utils.data.random_split(range(len(whole)), [0.8, 0.2], torch.Generator().manual_seed(42))
    (_, trial) = evaluated(files, tmp_path)
    np.testing.assert_array_equal(trial.random[0].train, train.indices)


def evaluated(files, folder, **params):
    params = EvaluateParams(labels=tuple(map(str, files)), embedder=("coordinates",), folds=2, fold_seeds=1, **params)
    return score_all(read_labels(params), embedders(None, None, None, params), params, lambda *_: None).trials


@pytest.mark.parametrize("order", [1, -1])
def test_land_and_ocean_keep_their_own_split(tmp_path, order, monkeypatch):
    """The score is scikit-learn's of the first file's probe on the second, whatever the order of the options."""
    rng = np.random.default_rng(1)
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", tmp_path.as_uri())
    table = pd.DataFrame({"lon": rng.uniform(-180, 180, 500), "lat": rng.uniform(-90, 90, 500)})
    table["land"] = (table["lon"] + 40 * rng.normal(size=500) > 0).astype(int)
    files = [tmp_path / "land_ocean_train.csv", tmp_path / "land_ocean_test.csv"]
    for file, part in zip(files, (table[:320], table[320:]), strict=True):
        part.to_csv(file, index=False)
    train, test = (pd.read_csv(file) for file in files)
    scaler = MinMaxScaler().fit(train[["lon", "lat"]])
    probe = RidgeClassifierCV(alphas=(0.1, 1.0, 10.0), cv=10)
    probe.fit(scaler.transform(train[["lon", "lat"]]), train["land"])
    expected = probe.score(scaler.transform(test[["lon", "lat"]]), test["land"])
    params = EvaluateParams(labels=tuple(map(str, files[::order])), embedder=("coordinates",), folds=2, fold_seeds=1)
    (score,) = json.loads(storage.read(f"{evaluate_database(None, None, params)}/scores.json"))
    assert (score["task"], score["own_split"]) == ("ocean", True)
    assert score["random_splits"] == pytest.approx([expected], abs=1e-6)
    alone = read(files[0])[0]
    assert alone.scored is None  # one table has no split


def test_a_column_tells_the_split(rows, tmp_path):
    table = rows.assign(elevation=np.arange(float(COUNT)), part=["train", "Val", "test", "train"] * 20)
    table.to_csv(tmp_path / "e.csv", index=False)
    (trial,) = evaluated([tmp_path / "e.csv"], tmp_path, split="part", repeats=2)
    np.testing.assert_array_equal(trial.random[0].test, np.flatnonzero(table["part"] != "train"))
    assert len(trial.random) == 2
    table["part"] = "train"
    table.to_csv(tmp_path / "t.csv", index=False)
    for name, part, message in (
        ("t", "part", "no rows to score"),
        ("t", "lat", "write train"),
        ("t", "no", "no column"),
    ):
        with pytest.raises(UserError, match=message):
            read(tmp_path / f"{name}.csv", split=part)
    with pytest.raises(UserError, match="only table of 'elevation'"):
        read(tmp_path / "e.csv", split="files")


def test_tables_that_are_no_parts_of_one_are_refused(rows, tmp_path):
    rows.assign(country="NL").to_csv(tmp_path / "a.csv", index=False)
    rows.assign(country=7).to_csv(tmp_path / "b.csv", index=False)
    with pytest.raises(UserError, match="texts and numbers in their columns 'country'"):
        read(tmp_path / "a.csv", tmp_path / "b.csv")
    with pytest.raises(UserError, match="named twice"):
        read(tmp_path / "a.csv", tmp_path / "." / "a.csv")


def test_polygons_too_small_to_be_hit_are_refused(monkeypatch):
    monkeypatch.setattr("tasks.evaluation.label_tables.TRIES", 1)
    specks = gpd.GeoDataFrame(geometry=[box(0, 0, 1e-9, 1e-9), box(90, 50, 90 + 1e-9, 50 + 1e-9)], crs="EPSG:4326")
    with pytest.raises(UserError, match="polygons so small"):
        draw_in_polygons(specks, 10, 0, "specks.geojson")


def test_labels_are_cut_to_a_region_with_smaller_blocks(rows, tmp_path, caplog):
    table = pd.DataFrame({"lon": np.linspace(-10, 50, 4000), "lat": np.tile(np.linspace(-6, 6, 40), 100)})
    table["elevation"] = np.arange(4000.0)
    table.to_csv(tmp_path / "e.csv", index=False)
    caplog.set_level("INFO")
    (found,) = label_sets(EvaluateParams(labels=(str(tmp_path / "e.csv"),), region=("KE",)))
    kenya = countries().set_index("iso2").geometry["KE"]
    inside = shapely.intersects_xy(kenya, table.lon, table.lat)
    np.testing.assert_array_equal(found.labels, table.elevation[inside])
    assert found.block_degrees == 0.9  # 50 blocks of 582,646 km² are 108 km wide: 0.97 degrees
    assert "Kenya: blocks of 0.9 degrees are held out, for 5 folds" in caplog.text
    (given,) = label_sets(EvaluateParams(labels=(str(tmp_path / "e.csv"),), region=("KE",), block_degrees=2))
    assert given.block_degrees == 2


def test_the_demos_labels_are_drawn_in_a_region(caplog):
    sets = label_sets(EvaluateParams(region=("KE",), points=300, folds=3))
    kenya = countries().set_index("iso2").geometry["KE"]
    assert {"climate zone", "elevation", "temperature"} <= {labels.name for labels in sets}
    for labels in sets:
        assert shapely.intersects_xy(kenya, *labels.lonlat.T).all()
        assert len(set(labels.labels)) > 1
    assert "left out" in caplog.text or "country" in {labels.name for labels in sets}


@pytest.mark.further
def test_a_spacing_is_a_number_of_labelled_places(tmp_path, monkeypatch):
    """By the area of the country, nearly all of it land; a report by that number is the same one."""
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", tmp_path.as_uri())
    asked = {"embedder": ("coordinates",), "region": ("KE",), "folds": 3}
    by_spacing = evaluate_database(None, None, EvaluateParams(spacing_km=40, **asked))
    made_of = storage.read_json(storage.join(by_spacing, "card.json"))["made_of"]
    assert made_of["points"] == pytest.approx(582_646 / 40**2, rel=0.03)
    assert "spacing_km" not in made_of
    assert evaluate_database(None, None, EvaluateParams(points=made_of["points"], **asked)) == by_spacing
    scores = pd.read_csv(storage.join(by_spacing, "scores.csv"))
    assert scores["n"].max() == made_of["points"]
    for spacing in (100, 0.5):
        with pytest.raises(UserError, match="another --spacing-km"):
            evaluate_database(None, None, EvaluateParams(spacing_km=spacing, **asked))
    with pytest.raises(UserError, match="no land between -60 and 90"):
        evaluate_database(None, None, EvaluateParams(spacing_km=50, **asked | {"region": ("0 -80 10 -75",)}))


def test_a_region_is_evaluated(tmp_path, monkeypatch):
    """Whole: the report is another one than that of everywhere, and is found again by another name of the region."""
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", tmp_path.as_uri())
    asked = {"embedder": ("coordinates",), "points": 300, "folds": 3}
    urls = [
        evaluate_database(None, None, EvaluateParams(region=texts, **asked)) for texts in (("KE",), ("Kenya",), ("UG",))
    ]
    assert urls[0] == urls[1] != urls[2]
    scores = pd.read_csv(storage.join(urls[0], "scores.csv"))
    assert scores.blocked.notna().any()
    assert storage.read_json(storage.join(urls[0], "card.json"))["made_of"]["region"] == find_region(("KE",)).digest


def test_the_papers_columns_and_housing_are_scored_by_one_call(rows, tmp_path, monkeypatch):
    """The labels of docs/paper.md in files of the published names and layouts: seven tasks of seven files."""
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", tmp_path.as_uri())
    files = list(ecoregions(tmp_path, rows))
    names = {"country": "country", "temperature": "temp", "elevation": "elevation", "population": "population"}
    for columns in PAPER[2:7]:
        files.append(tmp_path / f"{names.get(columns.name, 'housing')}.csv")
        frame(rows, columns).to_csv(files[-1], index=False)
    params = EvaluateParams(labels=tuple(map(str, files)), embedder=("coordinates", "wrap"), folds=2, fold_seeds=1)
    found = json.loads(storage.read(f"{evaluate_database(None, None, params)}/scores.json"))
    assert list(dict.fromkeys(row["task"] for row in found)) == [columns.name for columns in PAPER[:7]]
    assert all(row["random"] is not None and row["blocked"] is not None for row in found)
    assert {row["n"] for row in found} == {COUNT, COUNT - 2}
