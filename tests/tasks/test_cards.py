"""Cards of products, as the commands read them: of former versions, damaged ones, and ones with more than we know."""

import json

import pytest
from typer.testing import CliRunner

from flows.cli import app
from infra import storage
from infra.errors import UserError
from tasks.cards import fingerprint

SPACE = {"kind": "checkpoint", "fingerprint": "123456789abc", "architecture": {"degree": 4, "dim": 16}}
IMAGES = {"kind": "database", "checkpoint": "123456789abc", "images": 9, "key_dim": 16, "value_dim": 8}
FORMER = {"step_degrees": 2.0, "tile_cells": 60, "parent": "abc"}  # of the first grids: a step of another name


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", tmp_path.as_uri())
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    return tmp_path.as_uri()


def run(*arguments):
    return json.loads(CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).stdout)


def put(url, card):
    storage.write_json(storage.join(url, "card.json"), card)
    return url


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (b'{"kind": "datab', r"the card at .* is damaged \(Unterminated string"),
        (b"[1, 2]", "the card at .* is damaged or foreign .*: make the product again"),
        (b'{"kind": "patches"}', "holds 'patches', not 'database': give the URL of a database"),
        (json.dumps({**IMAGES, "fingerprint": "1", "images": "many"}).encode(), r"damaged or foreign \(images: "),
        (json.dumps(IMAGES).encode(), r"damaged or foreign \(fingerprint: Field required\)"),
        (None, "there is no finished database at .*: give the URL that the step printed"),
    ],
)
def test_a_card_that_is_none_is_refused_in_a_sentence(home, stored, message):
    space, database = put(f"{home}/space", SPACE), f"{home}/database"
    if stored:
        storage.write(f"{database}/card.json", stored)
    with pytest.raises(UserError, match=message):
        CliRunner().invoke(app, ["publish", space, database], catch_exceptions=False)


def test_cards_of_the_first_version_are_listed_with_what_they_are_made_of(home):
    """Theirs have no line, no dims, no checkpoint, and the step by another name; null stands for nothing."""
    parent = put(f"{home}/grids/abc", {"kind": "grid", "fingerprint": "abc", "made_of": {"parent": None}})
    storage.write_json(f"{parent}/grid.zarr/zarr.json", {"attributes": {}})
    name = fingerprint(FORMER)
    put(f"{home}/grids/{name}", {"kind": "grid", "fingerprint": name, "made_of": FORMER, "line": None, "new": [1]})
    found = {row["fingerprint"]: row for row in run("grid", "list")}
    assert (found[name]["step"], found[name]["box"], found[name]["dims"]) == (2.0, "globe", None)
    assert {row["resolution_km"] for row in found.values()} == {None}
    assert (found[name]["line"], found["abc"]["line"]) == ("epsg4326-2-float32", "epsg4326-0.5-float32")
    assert {row["product"]: row["made_of"] for row in run("ls")}[f"grids/{name}"] == ["grids/abc"]


def test_a_foreign_card_is_listed_and_claims_nothing(home):
    """A prune keeps it: no step of ours makes it again."""
    put(f"{home}/databases/theirs", {"kind": "pictures", "fingerprint": "f", "patches": "p", "made_of": None})
    patches = put(f"{home}/patches/p", {"kind": "patches", "fingerprint": "p"})
    found = {row["product"]: row for row in run("ls")}
    assert (found["databases/theirs"]["fingerprint"], found["databases/theirs"]["made_of"]) == ("f", [])
    assert found["databases/theirs"]["state"] == "finished"
    assert storage.exists(f"{patches}/card.json")
    assert run("prune", "--keep", "1") == []
