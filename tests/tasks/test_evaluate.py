"""The evaluation of a small database: what it stores, what it refuses, and what its figures say."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from scipy.stats import spearmanr, t
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from typer.testing import CliRunner

from flows.cli import app
from flows.evaluate import evaluate
from infra import clusters, storage
from infra.errors import UserError
from tasks.ablate import ablate_database, int8
from tasks.artifacts import slugs
from tasks.core.earth.grid import GridSpec
from tasks.core.earth.sphere import EARTH_RADIUS_KM, unit_vectors
from tasks.core.encoders.location import LocationEncoder
from tasks.core.probes import block_of, random_split, score
from tasks.core.quantize import Scale
from tasks.core.retrieval import embed
from tasks.database.heads import index_of
from tasks.database.npz import import_npz
from tasks.database.store import open_database
from tasks.evaluate import evaluate_database
from tasks.evaluation.embedders import embedders
from tasks.evaluation.failures import losses, where_it_fails
from tasks.evaluation.label_tables import read_labels
from tasks.grid.companion import publish_companion
from tasks.grid.store import Content, create, template, write_tile
from tasks.model.checkpoint import load_checkpoint, save_checkpoint
from tasks.params import AblateParams, EmbedParams, EvaluateParams
from tasks.release.gate import ScoreCard, gate
from tests.core.test_retrieval import database

COUNT = 400
QUICK = {"embedder": ("coordinates", "wrap", "satclip", "location encoder", "RANGE+"), "folds": 3}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A checkpoint, its database, and a table whose label is how far east a place is of Greenwich."""
    folder = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    save_checkpoint((folder / "checkpoint").as_uri(), LocationEncoder(6, hidden=16, dim=16, smoothness=1))
    keys, values, where = database(300)
    np.savez(folder / "db.npz", locs=where, satclip_embeddings=keys, image_embeddings=values)
    import_npz(folder / "db.npz", (folder / "database").as_uri(), (folder / "checkpoint").as_uri())
    rng = np.random.default_rng(0)
    lon, lat = rng.uniform(-170, 170, COUNT), rng.uniform(-60, 70, COUNT)
    east = np.cos(np.radians(lon)) + 0.05 * rng.normal(size=COUNT)
    pd.DataFrame({"lon": lon, "lat": lat, "east": east}).to_csv(folder / "east.csv", index=False)
    return folder


@pytest.fixture
def products(home, tmp_path, monkeypatch):
    """URLs of checkpoint and database, and the table; reports go to a place of their own."""
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", (tmp_path / "out").as_uri())
    return (home / "checkpoint").as_uri(), (home / "database").as_uri(), str(home / "east.csv")


def params(table, **changes):
    return EvaluateParams(**{"labels": (table,), "label": "east", "kind": "regression", **QUICK, **changes})


def read(url, name):
    return json.loads(storage.read(storage.join(url, name)))


def test_the_report_and_the_score_card(products):
    checkpoint, images, table = products
    url = evaluate_database(checkpoint, images, params(table, repeats=2))
    card = read(url, "scorecard.json")
    assert card["product"] == "RANGE+"
    rows = {row["embedder"]: row for row in card["scores"]}
    assert list(rows) == ["coordinates", "wrap", "SatCLIP", "location encoder", "RANGE+"]
    assert rows["wrap"]["blocked"] > 0.95 > 0.5 > rows["coordinates"]["blocked"]
    assert rows["wrap"]["random_std"] > 0
    assert rows["SatCLIP"]["note"] == "weights not given"
    assert rows["SatCLIP"]["blocked"] is None
    assert rows["wrap"]["n"] == COUNT
    assert read(url, "scores.json") == card["scores"]
    assert "| SatCLIP | weights not given |" in storage.read(storage.join(url, "scores.md")).decode()
    there = storage.names(url)
    assert {"scores.csv", "scores.png", "failures.csv", "failures.md", "bias.png", "errors-east.png"} <= set(there)
    assert set(card["geographic_bias"]) == {"east"}
    refusals = gate(ScoreCard(**card), None, 0.02)
    assert [r.task for r in refusals] == ([] if rows["RANGE+"]["verdict"] == "above" else [""])


def test_scores_are_means_over_folds_and_seeds_and_differ_from_the_reference_by_a_corrected_interval(products):
    """By scikit-learn's probe on scikit-learn's folds, and the t-test of the corrected variance."""
    checkpoint, images, path = products
    options = params(path, fold_seeds=2, repeats=3, reference="WRAP")
    card = read(evaluate_database(checkpoint, images, options), "scorecard.json")
    rows, table = {row["embedder"]: row for row in card["scores"]}, pd.read_csv(path)
    assert (rows["wrap"]["verdict"], rows["wrap"]["difference"]) == ("", None)
    block = (table["lon"] + 180) // 10 * 1000 + (table["lat"] + 90) // 10
    places, scores = table[["lon", "lat"]].to_numpy("f4"), []
    for seed in (42, 43):
        for train, test in GroupKFold(3, shuffle=True, random_state=seed).split(places, groups=block):
            probe = make_pipeline(MinMaxScaler(), RidgeCV((0.1, 1, 10), cv=3))
            scores.append(probe.fit(places[train], table["east"][train]).score(places[test], table["east"][test]))
    row = rows["coordinates"]
    assert row["blocked_splits"] == pytest.approx(scores, abs=2e-6)
    assert (row["blocked"], row["blocked_std"]) == pytest.approx((np.mean(scores), np.std(scores, ddof=1)), abs=1e-4)
    assert len(row["random_splits"]) == 3
    found = np.subtract(scores, rows["wrap"]["blocked_splits"])
    half = t.ppf(0.975, 5) * np.sqrt((1 / 6 + 1 / 2) * np.var(found, ddof=1))
    assert row["difference"] == pytest.approx(found.mean(), abs=1e-4)
    assert row["difference_high"] - row["difference_low"] == pytest.approx(2 * half, abs=2e-4)
    assert row["verdict"] == "below"


def test_what_is_best_beyond_noise_is_bold(products, tmp_path):
    """And of labels that are noise, nothing is."""
    url = evaluate_database(*products[:2], params(products[2], embedder=("coordinates", "wrap", "unit vectors")))
    text = storage.read(storage.join(url, "scores.md")).decode()
    rows = {row["embedder"]: row for row in read(url, "scores.json")}
    assert {name: (row["verdict"], row["best"]) for name, row in rows.items()} == {
        "coordinates": ("", False), "wrap": ("above", True), "unit vectors": ("above", False),
    }  # fmt: skip
    assert re.search(r"^\| wrap \| \*\*[\d.]+ / [\d.]+ ± [\d.]+\*\* ▲ \|$", text, re.M), text
    assert re.search(r"^\| unit vectors \| [\d.]+ / [\d.]+ ± [\d.]+ ▲ \|$", text, re.M), text
    assert re.search(r"^\| wrap \| \+\d\.\d{3} \(\+\d\.\d{3} to \+\d\.\d{3}\) ▲ \|$", text, re.M), text
    assert "over 9 splits, 3 folds of blocks dealt 3 times" in text
    table = pd.read_csv(products[2])
    table["east"] = np.random.default_rng(1).normal(size=len(table))
    table.to_csv(tmp_path / "noise.csv", index=False)
    url = evaluate_database(*products[:2], params(str(tmp_path / "noise.csv")))
    assert not any(row["best"] or row["verdict"] == "above" for row in read(url, "scores.json"))
    assert "**" not in storage.read(storage.join(url, "scores.md")).decode()


@pytest.mark.parametrize("reference", ["geoclip", "SatCLIP", "nobody"])
def test_a_reference_that_is_not_scored_is_refused(products, reference):
    with pytest.raises(UserError, match=f"the reference '{reference}' is not scored: name one of coord"):
        evaluate_database(*products[:2], params(products[2], reference=reference))


def soft(logits):
    raised = np.exp(logits - logits.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


def test_evidence_is_compared_with_the_error(products):
    """By brute force: the weights of RANGE+, the errors of scikit-learn's probe, and the ranks of both."""
    checkpoint, images, table = products
    url = evaluate_database(checkpoint, images, params(table, embedder=("RANGE+",)))
    found = {row["signal"]: row["spearman"] for row in read(url, "scorecard.json")["uncertainty"]["signals"]}
    data, labels = open_database(images), pd.read_csv(table)
    lonlat, east = labels[["lon", "lat"]].to_numpy(), labels["east"].to_numpy()
    queries = load_checkpoint(checkpoint).location.embed(lonlat)
    cosines = unit_vectors(lonlat) @ unit_vectors(data.locations).T
    weights = soft(12 * queries @ data.keys.T) / 2 + soft(40 * cosines) / 2
    vectors, error = np.hstack([weights @ data.values, queries]), np.empty(COUNT)
    splitter = GroupKFold(3, shuffle=True, random_state=42)
    for train, test in splitter.split(lonlat, groups=block_of(lonlat, 10)):
        probe = make_pipeline(MinMaxScaler(), RidgeCV(alphas=[0.1, 1, 10], cv=3)).fit(vectors[train], east[train])
        error[test] = np.abs(probe.predict(vectors[test]) - east[test])
    layers = {
        "effective_images": np.exp(-(weights * np.log(weights)).sum(1)),
        "largest_weight": weights.max(1),
        "distance_km": -cosines.max(1),
    }
    assert set(found) == {"feature distance", "km to labels", *layers}
    for name, layer in layers.items():
        assert found[name] == pytest.approx(spearmanr(layer, error).statistic, abs=2e-3), name


@pytest.mark.parametrize("product", ["multi-head", "location encoder"])
def test_each_product_of_ours_has_its_own_evidence(products, product):
    checkpoint, images, table = products
    url = evaluate_database(checkpoint, images, params(table, embedder=(product,)))
    there = {"feature distance", "km to labels", "distance_km"}
    if product == "multi-head":
        there |= {"effective_images", "largest_weight"}
    assert set(pd.read_csv(storage.join(url, "signals.csv"))["signal"]) == there


def test_shuffled_values_are_multi_head_of_a_database_that_has_each_value_at_another_image(products, home, tmp_path):
    """By a database that is stored so, with the heads that the true one chooses."""
    checkpoint, images, _ = products
    lonlat = np.random.default_rng(3).uniform([-180, -90], [180, 90], (20, 2))
    (found,) = embedders(checkpoint, images, None, EvaluateParams(embedder=("Shuffled values",)))
    with np.load(home / "db.npz") as file:
        dealt = file["image_embeddings"][np.random.default_rng(0).permutation(300)]
        np.savez(tmp_path / "dealt.npz", **dict(file) | {"image_embeddings": dealt})
    import_npz(tmp_path / "dealt.npz", (tmp_path / "dealt").as_uri(), checkpoint)
    encoder, data = load_checkpoint(checkpoint).location, open_database(images)
    params = index_of(encoder, data, EmbedParams())[1]
    index = index_of(encoder, open_database((tmp_path / "dealt").as_uri()), params)[0]
    expected = embed(encoder, index, lonlat, params.retrieval)
    assert found.name == "shuffled values"
    np.testing.assert_allclose(found.embed(lonlat), expected, rtol=1e-4, atol=1e-5)
    (true,) = embedders(checkpoint, images, None, EvaluateParams(embedder=("multi-head",)))
    assert np.array_equal(true.embed(lonlat)[:, -16:], expected[:, -16:])  # the location part
    assert np.abs(true.embed(lonlat) - expected).max() > 0.1


def test_labels_of_any_name_are_evaluated_in_a_run(products, prefect, tmp_path):
    """Names of files and artifact keys are made of the column's: in a run, where Prefect checks them."""
    table = pd.read_csv(products[2]).rename(columns={"east": "Höhe | m"})
    table.to_csv(tmp_path / "height.csv", index=False)
    url = evaluate(None, None, params(str(tmp_path / "height.csv"), label="Höhe | m", embedder=("wrap",)))
    assert [name for name in storage.names(url) if name.startswith("errors-")] == ["errors-hohe-m.png"]
    header = storage.read(storage.join(url, "scores.md")).decode().splitlines()[0]
    assert header.startswith("| random / blocked | Höhe \\| m (")


def test_names_that_come_to_the_same_are_told_apart():
    found = slugs(["climate zone", "a b", "a-b", "Höhe", "高度", "x" * 300, "..", "a/b\n"])
    assert (found["climate zone"], found["Höhe"]) == ("climate-zone", "hohe")
    assert len(set(found.values())) == 8
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9-]{0,80}", slug) for slug in found.values())


def test_a_second_evaluation_finds_the_first_and_other_labels_make_a_new_one(products, tmp_path):
    checkpoint, images, table = products
    url = evaluate_database(checkpoint, images, params(table))
    assert evaluate_database(checkpoint, images, params(table)) == url
    changed = pd.read_csv(table)
    changed.loc[0, "east"] += 1
    path = str(tmp_path / "east.csv")
    pd.read_csv(table).to_csv(path, index=False)
    assert evaluate_database(checkpoint, images, params(path)) == url  # the same labels, read from elsewhere
    changed.to_csv(path, index=False)
    assert evaluate_database(checkpoint, images, params(path)) != url


def test_a_grid_beside_which_nothing_can_be_written_is_refused_before_any_work(products, tmp_path, monkeypatch):
    """Of nothing but a label table that is not there, which would be told first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(UserError, match=r"no score card .* beside https://host/grid\.zarr: score it by --embedder"):
        evaluate_database(*products[:2], params("gone.csv"), "https://host/grid.zarr")
    with pytest.raises(UserError, match="Not a directory"):
        evaluate_database(*products[:2], params("gone.csv"), "file/grids/grid.zarr")


def test_a_grid_gets_its_card_and_is_scored_with_the_location_encoder_on_the_places_that_it_holds(products, tmp_path):
    checkpoint, images, table = products
    url, spec = (tmp_path / "grids/one/grid.zarr").as_uri(), GridSpec(10, 20)
    create(url, spec, template(spec, Content(2, 2), {}))
    for tile in spec.tiles():
        vectors = np.moveaxis(unit_vectors(spec.lonlat(tile).reshape(-1, 2)).reshape(tile.rows, tile.columns, 3), 2, 0)
        vectors = np.concatenate([vectors, vectors[:1]]).astype(np.float32)
        vectors[:, spec.lonlat(tile)[..., 1] > 50] = np.nan
        write_tile(url, tile, vectors)
    report = evaluate_database(checkpoint, images, params(table), url)
    card = read((tmp_path / "grids/one").as_uri(), "scorecard.json")
    assert card == read(report, "scorecard.json")
    assert card["product"] == "grid"
    beyond = int((pd.read_csv(table)["lat"] > 50).sum())
    rows = {(row["places"], row["embedder"]): row for row in card["scores"]}
    counts = {key: (row["n"], row["left_out"]) for key, row in rows.items()}
    everywhere = ["coordinates", "wrap", "SatCLIP", "location encoder", "RANGE+"]
    assert counts == dict.fromkeys((("all", name) for name in everywhere), (COUNT, 0)) | dict.fromkeys(
        (("grid", name) for name in ("location encoder", "coordinates", "grid")), (COUNT - beyond, beyond)
    )
    assert rows["grid", "grid"]["verdict"] == "above"
    without = evaluate_database(checkpoint, images, params(table))
    assert [row for row in card["scores"] if row["places"] == "all"] == read(without, "scores.json")
    alone = evaluate_database(None, None, params(table, embedder=("wrap", url)))
    assert read(alone, "scorecard.json")["product"] == url
    few = evaluate_database(checkpoint, images, params(table, embedder=("wrap",)), url)
    compared = {row["embedder"]: row for row in read(few, "scores.json") if row["places"] == "grid"}
    assert list(compared) == ["location encoder", "coordinates", "wrap", "grid"]
    assert compared["location encoder"]["blocked_splits"] == rows["grid", "location encoder"]["blocked_splits"]
    beside = params(table, embedder=("wrap", f"former={url}"), reference="former")
    told = read(evaluate_database(checkpoint, images, beside, url), "scores.json")
    found = {(row["places"], row["embedder"]): (row["reference"], row["difference"], row["verdict"]) for row in told}
    assert found["all", "wrap"] == ("wrap", None, "")  # which has no grid to be compared with
    assert found["former, grid", "grid"] == ("former", 0.0, "level")
    assert found["former, grid", "location encoder"][::2] == ("former", "below")


def test_the_card_of_a_grid_tells_what_its_dtype_costs_each_task(products, tmp_path):
    """By vectors at the places themselves: in float32 they are RANGE+, and three codes a number leave less of them."""
    checkpoint, images, table = products
    card = read(images, "card.json")
    url, spec = (tmp_path / "grids/one/grid.zarr").as_uri(), GridSpec(10, 20)
    scales = {"visual": Scale(0.6, 0.0), "location": Scale(0.6, 0.0)}
    about = {"rangegrid:made_of": {"method": "range+", "beta": 0.5}}
    create(url, spec, template(spec, Content(card["value_dim"], card["key_dim"], "int8", scales), about))
    for tile in spec.tiles():
        write_tile(url, tile, np.ones((card["value_dim"] + card["key_dim"], tile.rows, tile.columns), np.float32))
    evaluate_database(checkpoint, images, params(table, embedder=("range+",)), url)
    found = read((tmp_path / "grids/one").as_uri(), "scorecard.json")
    rows = {row["embedder"]: row for row in found["scores"]}
    (cost,) = found["dtype_costs"]
    assert (cost["task"], cost["dtype"]) == (rows["RANGE+"]["task"], "int8")
    for split in ("random", "blocked"):
        assert cost[split]["float32"] == pytest.approx(rows["RANGE+"][split], abs=1e-3)
        assert cost[split]["stored"] == rows["grid's vectors, int8"][split] < cost[split]["float32"] - 0.05


def test_a_compact_product_is_scored_as_a_grid_with_a_card_of_its_own(products, tmp_path):
    """Its cells by its codes and scales, read by xarray; and what they cost at the places themselves, by its axes."""
    checkpoint, images, table = products
    card = read(images, "card.json")
    url, spec = (tmp_path / "grids/one/grid.zarr").as_uri(), GridSpec(10, 20)
    about = {"rangegrid:made_of": {"method": "range+", "beta": 0.5}}
    create(url, spec, template(spec, Content(card["value_dim"], card["key_dim"]), about))
    range_plus = embedders(checkpoint, images, None, params(table, embedder=("range+",)))[0].embed
    for tile in spec.tiles():
        vectors = range_plus(spec.lonlat(tile).reshape(-1, 2)).reshape(tile.rows, tile.columns, -1)
        write_tile(url, tile, np.moveaxis(vectors, 2, 0))
    with clusters.connect("threads", 1) as client:
        compact = publish_companion(client, url)
    (labels,), opened = read_labels(params(table)), xr.open_zarr(compact, zarr_format=3)
    evaluate_database(checkpoint, images, params(table, embedder=("range+",)), compact)
    assert not (tmp_path / "grids/one/scorecard.json").exists()  # the gate's, of the grid itself
    found = read((tmp_path / "grids/one").as_uri(), "compact-scorecard.json")
    scores = {(row["places"], row["embedder"]): row["random"] for row in found["scores"]}

    def expected(vectors):
        return score(vectors.astype(np.float32), labels.labels, labels.kind, random_split(len(labels.labels)))

    at = {"lon": xr.DataArray(labels.lonlat[:, 0], dims="p"), "lat": xr.DataArray(labels.lonlat[:, 1], dims="p")}
    cells = (opened.embedding * opened.scale).sel(at, method="nearest").values.T
    assert scores["grid", "grid"] == pytest.approx(expected(cells), abs=2e-3)
    exact, scale = range_plus(labels.lonlat), opened.scale.values
    codes = np.clip(np.rint((exact - opened["mean"].values) @ opened.axes.values / scale), -127, 127)
    (cost,) = found["dtype_costs"]
    assert cost["random"]["stored"] == pytest.approx(expected(codes * scale), abs=2e-3)
    assert cost["random"]["float32"] == pytest.approx(scores["all", "RANGE+"], abs=1e-3)


def test_losses_add_up_to_the_score_and_distances_are_the_brute_force(products):
    from tasks.evaluation.label_tables import read_labels
    from tasks.evaluation.scoring import score_all

    options = params(products[2], embedder=("coordinates",))
    scored = score_all(read_labels(options), embedders(None, None, None, options), options, lambda _: None)
    (made,) = scored.trials
    said = scored.predicted["coordinates", "east"]
    assert 1 - losses(made, said).mean() == pytest.approx(r2_score(made.labels.labels, said))
    where = np.array([[0.0, 0.0], [100.0, 40.0]])

    def nearest(lonlat):
        return EARTH_RADIUS_KM * np.arccos(unit_vectors(lonlat) @ unit_vectors(where).T).min(1)

    table = where_it_fails(scored, "coordinates", nearest)
    assert set(table["by"]) == {"continent", "latitude", "distance to the nearest image"}
    bands = table[table["by"] == "latitude"].set_index("group")
    north = losses(made, said)[(made.labels.lonlat[:, 1] > 0) & (made.labels.lonlat[:, 1] <= 30)]
    assert bands.loc["0 to 30°", "score"] == pytest.approx(1 - north.mean())
    assert bands.loc["0 to 30°", "n"] == len(north)


@pytest.mark.parametrize(
    ("choice", "options", "expected"),
    [
        ("strategy", {}, ["no retrieval", "top-1", "top-10", "RANGE", "RANGE+"]),
        ("k", {"steps": (1, 5, 900)}, ["1", "5", "300"]),
        ("temperature", {"steps": (1, 15)}, ["1", "15"]),
        ("beta", {"steps": (0, 1)}, ["0", "1"]),
        ("size", {"steps": (50, 900)}, ["50", "300"]),
        ("variants", {}, ["full", "int8", "8 components", "8 components, int8"]),
    ],
)
def test_ablations(products, choice, options, expected):
    checkpoint, images, table = products
    options = AblateParams(**params(table, embedder=()).model_dump() | options)
    url = ablate_database(choice, checkpoint, images, options)
    assert set(storage.names(url)) == {"ablation.json", "ablation.md", "ablation.csv", "ablation.png", "card.json"}
    rows = read(url, "ablation.json")
    assert [row["embedder"] for row in rows] == expected
    if choice == "variants":
        full, codes, *_ = (row["blocked"] for row in rows)
        assert codes == pytest.approx(full, abs=0.02)


def test_values_need_another_database(products, home, tmp_path):
    checkpoint, images, table = products
    with pytest.raises(UserError, match="make others with `rangegrid encode"):
        ablate_database("values", checkpoint, images, AblateParams(**params(table).model_dump()))
    with np.load(home / "db.npz") as file:
        np.savez(tmp_path / "other.npz", **dict(file) | {"image_embeddings": file["image_embeddings"][:, :3]})
    import_npz(tmp_path / "other.npz", (tmp_path / "other").as_uri(), checkpoint)
    options = AblateParams(**params(table).model_dump() | {"databases": ((tmp_path / "other").as_uri(),)})
    url = ablate_database("values", checkpoint, images, options)
    assert [row["dims"] for row in read(url, "ablation.json")] == [8 + 16, 3 + 16]


def test_int8_keeps_255_levels_of_each_part():
    visual, location = np.random.default_rng(0).normal(size=(2, 100, 5)).astype(np.float32)
    found = int8(np.concatenate([visual * 100, location], axis=1), 5)
    for part, back in ((visual * 100, found[:, :5]), (location, found[:, 5:])):
        assert np.abs(back - part).max() < np.abs(part).max() / 180
        assert 50 < len(np.unique(back)) <= 255


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_degrees": 90.0, "folds": 9}, "too few for 9 folds: use smaller blocks, by --block-degrees"),
        ({"kind": "classification"}, "commonest class has 1 places to train on"),
    ],
)
def test_what_cannot_be_split_is_refused(products, changes, message):
    with pytest.raises(UserError, match=message):
        evaluate_database(None, None, params(products[2], embedder=("wrap",), **changes))


def test_a_checkpoint_alone_is_refused(products):
    with pytest.raises(UserError, match="give both, or neither"):
        evaluate_database(products[0], None, params(products[2]))


def test_the_command(products, prefect, tmp_path):
    labels = ["--labels", products[2], "--label", "east", "--kind", "regression"]
    others = ["--embedder", "wrap", "--embedder", "csp", "--json", str(tmp_path / "card.json")]
    ran = CliRunner().invoke(app, ["evaluate", *labels, *others])
    assert ran.exit_code == 0, ran.output
    assert "| CSP | weights not given |" in ran.stdout
    card = json.loads((tmp_path / "card.json").read_text())
    assert [row["embedder"] for row in card["scores"]] == ["wrap", "CSP"]
    ran = CliRunner().invoke(app, ["ablate", "beta", *products[:2], *labels, "--steps", "0", "--steps", "1"])
    assert ran.exit_code == 0, ran.output
    assert "| 1 |" in ran.stdout
    assert CliRunner().invoke(app, ["ablate", "colour", *products[:2]]).exit_code == 2
