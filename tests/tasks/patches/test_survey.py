"""What a survey counts, from a catalog in a file, against counts by hand."""

import json
import re
from pathlib import Path

import pytest
import shapely
from typer.testing import CliRunner

from flows.cli import app
from infra import clusters
from infra.errors import UserError
from tests.infra.stac.stac_server import item

WEST, EAST = shapely.box(1, 44, 3, 46), shapely.box(8, 44, 10, 46)  # in the cells 31T and 32T
PLACES = {"west": (2.0, 45.0), "rim": (2.999, 45.0), "east": (9.0, 45.0), "sea": (5.0, 42.5)}


def scene(day, area, sensed="101611", cloud=5.0, baseline="0510", satellite="A"):
    """An item of one acquisition, named as its product is."""
    stamp = day.replace("-", "")
    name = f"S2{satellite}_MSIL2A_{stamp}T{sensed}_N{baseline}_R065_T31TQM_{stamp}T150511"
    return item(name, f"{day}T10:16:11Z", area=area, **{"eo:cloud_cover": cloud})


SCENES = [
    *[scene(day, WEST) for day in ("2021-01-05", "2021-01-15", "2021-03-02")],
    scene("2021-01-05", WEST, baseline="0300"),  # an older processing of the first
    scene("2021-02-07", WEST, cloud=80.0),
    scene("2022-01-07", WEST),  # of another year
    item("untold", "2021-02-08T10:00:00Z", area=WEST),  # nothing tells its offset
    scene("2021-03-09", EAST, satellite="B"),
]


@pytest.fixture
def catalog(tmp_path, monkeypatch):
    """A catalog of scenes in a file, and a table of places."""
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", (tmp_path / "store").as_uri())
    monkeypatch.setenv("RANGEGRID_STAC_URL", str(tmp_path / "items.json"))
    monkeypatch.setenv("RANGEGRID_COLLECTION", "s2")
    rows = ["lon,lat", *(f"{lon},{lat}" for lon, lat in PLACES.values())]
    (tmp_path / "places.csv").write_text("\n".join(rows))

    def write(scenes):
        (tmp_path / "items.json").write_text(json.dumps({"features": scenes}))

    write(SCENES)
    return write


@pytest.fixture
def survey(tmp_path):
    """Runs the command; returns what it stored, and what it printed."""

    def run(*options, patches=4):
        args = ["sample", "survey", "--places", "list", "--source", str(tmp_path / "places.csv")]
        args += ["--patches", str(patches), "--datetime", "2021-01/2021-03", *options]
        with clusters.connect("threads", 2):
            ran = CliRunner().invoke(app, args, catch_exceptions=False)
        home = Path(ran.stdout.split()[-1].removeprefix("file://"))
        return json.loads((home / "survey.json").read_text()), ran.stdout, home

    return run


def test_scenes_are_counted_by_cell_and_month(catalog, survey):
    found, printed, home = survey()
    assert found["months"] == {"2021-01": [2, 1], "2021-02": [0, 2], "2021-03": [2, 0]}  # scenes, cells without
    assert (found["places"], found["cells"], found["none"], found["few"]) == (4, 2, 2, 1)  # rim: its patch is cut
    assert (home / "scenes.csv").read_text().split() == ["cell,2021-01,2021-02,2021-03", "31T,2,0,1", "32T,0,0,1"]
    assert "2 of 4 places of the plan have no scene" in printed
    assert "3 of 4 places of the plan have fewer than 3 scenes" in printed
    assert "| 2021-02 | 0 | 2 |" in printed
    for name in ("survey.png", "calendar.png"):
        assert (home / name).read_bytes().startswith(b"\x89PNG")


def test_the_options_of_a_sample_decide_what_counts(catalog, survey):
    wider, _, _ = survey("--max-cloud-percent", "90")
    assert wider["months"]["2021-02"] == [1, 1]
    seasons, _, _ = survey("--scene", "seasons", patches=8)  # the first two places, each in four seasons
    assert seasons["none"] == 8 - 2  # the west has two of winter and one of spring, the rim none


def test_a_survey_goes_on_and_asks_again_only_when_told(catalog, survey):
    found, _, home = survey()
    catalog([*SCENES, scene("2021-02-17", WEST), scene("2021-02-18", EAST)])
    assert survey()[0] == found
    (home / "survey.json").unlink()
    (east,) = [path for path in (home / "months" / "0").iterdir() if int(path.stem) == 31 * 20 + 15]
    east.unlink()
    again, _, _ = survey()
    assert again["months"]["2021-02"] == [1, 1]  # of the east, which was left to ask
    anew, _, _ = survey("--anew")
    assert anew["months"]["2021-02"] == [2, 0]


def test_a_survey_of_a_region(catalog, survey, tmp_path):
    args = ["sample", "survey", "--region", "1 44 3 46", "--patches", "5", "--datetime", "2021"]
    with clusters.connect("threads", 2):
        ran = CliRunner().invoke(app, args, catch_exceptions=False)
    assert re.match(r"5 places in 1 cells", ran.stdout)
    assert len(re.findall(r"\| 2021-\d\d \|", ran.stdout)) == 12
    with pytest.raises(UserError, match="no time window"):
        survey("--datetime", "never")
