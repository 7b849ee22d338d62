"""Promotion by scores, from evaluate on: grids of a small planet whose images see what is asked for, or do not."""

import re
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import torch

from infra import storage
from infra.errors import UserError
from tasks.cards import home_of
from tasks.core.earth.sphere import unit_vectors
from tasks.core.encoders.location import LocationEncoder
from tasks.database.npz import import_npz
from tasks.evaluate import evaluate_database
from tasks.model.checkpoint import load_checkpoint, save_checkpoint
from tasks.params import EvaluateParams, PublishParams
from tasks.publish import publish_grid
from tasks.release import versions
from tasks.release.gate import CARD, Row, ScoreCard, gate, rows_of
from tasks.release.promotion import promote_evaluated

pytestmark = pytest.mark.timeout(1200)  # four grids are published and evaluated before the first test
SEEDS = "012"
HILLS = np.random.default_rng(0).normal(size=(40, 3))
STEP = {"step": 6.0, "tile_cells": 60, "promote": False, "method": "range+"}


def heights(lonlat):
    """The height of places on a planet of forty hills, each some 2,000 km wide."""
    tops = HILLS / np.linalg.norm(HILLS, axis=1, keepdims=True)
    return np.exp(20 * (unit_vectors(lonlat) @ tops.T - 1)).sum(1)


def places(count, seed):
    rng = np.random.default_rng(seed)
    return np.column_stack([rng.uniform(-180, 180, count), np.degrees(np.arcsin(rng.uniform(-0.95, 0.95, count)))])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Storage with a table of the heights of a thousand places."""
    folder, asked = tmp_path_factory.mktemp("promotion"), places(1000, 1)
    table = pd.DataFrame({"lon": asked[:, 0], "lat": asked[:, 1], "height": heights(asked)})
    table.to_csv(folder / "heights.csv", index=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANGEGRID_STORAGE_URL", folder.as_uri())
        yield folder


@pytest.fixture(scope="module")
def grids(folder, client):
    """Evaluated grids by name: of three seeds of the location encoder, and of values shuffled among the images."""
    made = {seed: grid(folder, client, int(seed), seed) for seed in SEEDS}
    return made | {"shuffled": grid(folder, client, 0, "shuffled", shuffle=True)}


def grid(folder, client, seed, name, shuffle=False, **options):
    """An evaluated grid of a database of 800 images, whose values are a height and noise."""
    torch.manual_seed(seed)
    checkpoint, where = (folder / name / "checkpoint").as_uri(), places(800, 2)
    save_checkpoint(checkpoint, LocationEncoder(8, hidden=32, dim=16, smoothness=1))
    rng = np.random.default_rng(3)
    values = np.column_stack([heights(where), *rng.normal(size=(7, 800))])
    values = values[rng.permutation(800)] if shuffle else values
    keys = load_checkpoint(checkpoint).location.embed(where)
    np.savez(folder / name / "db.npz", locs=where, satclip_embeddings=keys, image_embeddings=values.astype("f4"))
    database = (folder / name / "database").as_uri()
    import_npz(folder / name / "db.npz", database, checkpoint)
    url = publish_grid(client, checkpoint, database, PublishParams(**STEP | options))
    asked = {"labels": (str(folder / "heights.csv"),), "label": "height", "kind": "regression", "folds": 4}
    evaluate_database(checkpoint, database, EvaluateParams(**asked, embedder=("coordinates",)), url)
    return url


def scores(url):
    return ScoreCard(**storage.read_json(storage.join(home_of(url), CARD)))


def test_values_shuffled_among_the_images_are_refused_as_the_first_and_later(grids):
    """Where only its location part knows anything: coordinates, which it is above, let it pass once."""
    assert rows_of(scores(grids["shuffled"]), "grid")["height"].blocked > heights_by_coordinates(grids["shuffled"])
    with pytest.raises(
        UserError, match=r"it is not above the location encoder beyond noise \(by [+-]0\.\d{4}, interval"
    ):
        promote_evaluated(grids["shuffled"], 0.02, 2.0)
    assert not versions.read_pointer()[0].grid
    promote_evaluated(grids["0"], 0.02, 2.0)
    with pytest.raises(UserError, match=r"height: blocked R² fell from .* and beyond noise \(interval -0"):
        promote_evaluated(grids["shuffled"], 0.02, 2.0)
    assert versions.read_pointer()[0].grid == grids["0"]


@pytest.mark.further
def test_what_position_alone_gives_beside_a_weak_location_encoder_is_not_what_the_images_add(folder, client):
    """Heads of shuffled values and GeoCLIP's block pass beside the location encoder; true values pass beside both."""
    options = {"method": "multi-head", "dtype": "float16", "with_": ("geoclip",)}
    made, shuffled = (scores(grid(folder, client, 0, f"heads {deal}", deal, **options)) for deal in (False, True))
    assert set(rows_of(shuffled, "shuffled values", "grid")) == {"height"}
    former = [row for row in shuffled.scores if row.embedder != "shuffled values"]
    assert gate(ScoreCard(product="grid", scores=former), None, 0.02) == []
    (refusal,) = gate(shuffled, None, 0.02)
    assert re.match(r"over all tasks it is not above the shuffled values beyond noise \(by [+-]0\.\d{4}", str(refusal))
    assert gate(made, None, 0.02) == []


def heights_by_coordinates(url):
    return rows_of(scores(url), "coordinates")["height"].blocked


def test_three_seeds_of_one_recipe_promote_one_another(grids):
    for old, new in permutations(SEEDS, 2):
        versions.promote(grids[old])
        assert promote_evaluated(grids[new], 0.02, 2.0)
        assert versions.read_pointer()[0].grid == grids[new]


def test_a_card_of_other_splits_or_of_a_former_version_asks_for_another_evaluation(grids):
    new = scores(grids["0"])
    for change, message in (
        ({"fold_seeds": 1}, "fold_seeds is 3, and was 1: evaluate both"),
        ({"labels": "x"}, "labels is .*, and was x"),
        ({"blocked_splits": None}, "one of the two score cards is a former one, .*: evaluate that grid again"),
    ):
        rows = [Row(**row.model_dump() | change) for row in new.scores]
        (refusal,) = gate(new, ScoreCard(product="grid", scores=rows), 0.02)
        assert re.search(message, str(refusal))


def test_a_grid_beside_which_no_location_encoder_was_scored_is_refused(grids):
    card = scores(grids["0"])
    rows = [row for row in card.scores if (row.embedder, row.places) != ("location encoder", "grid")]
    (refusal,) = gate(ScoreCard(product="grid", scores=rows), None, 0.02)
    assert "height: the location encoder was not scored on the same places" in str(refusal)
