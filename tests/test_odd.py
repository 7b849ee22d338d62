"""The harness of `make odd` drives each pair, finds what is planted, and tells the command that repeats it."""

import itertools
import json
import re
import shlex
import signal
from pathlib import Path

import pytest

from infra.errors import UserError
from tests import small_pipeline
from tests.odd import Harness, Pairs, command, drive, odd_values
from tests.small_pipeline import refused_early

FAULT = {"embed.k": "1", "embed.evidence": "true"}  # a pair: neither value is wrong alone


def planted(case, paths):
    """In place of the pipeline: a pair that fails, and one option each that is refused early, late, and never ends."""
    if not case:
        Path(paths["BASE"]).write_text(json.dumps({"publish": "grid", "encode": "database"}))
    elif case.items() >= FAULT.items():
        raise ZeroDivisionError("planted")
    elif case.get("embed.precision") == "float64":
        raise UserError("precision is refused")
    elif "train.lr" in case:
        with refused_early(paths):
            Path(paths["HOME"], "half").touch()
            raise UserError("too late")
    elif case.keys() & {"train.steps", "train.dropout"}:
        signal.raise_signal(signal.SIGXCPU)


@pytest.fixture
def harness(tmp_path):
    return Harness(tmp_path, planted, start="fork")


def test_a_planted_fault_is_found_and_its_command_repeats_it(harness, capsys):
    assert drive(harness, seed=3, minutes=60, only=r"^embed\.(k|evidence)$") > 0
    told = capsys.readouterr().out
    assert re.search(r"seed 3: (\d+) of \1 pairs", told)
    line = next(line for line in told.splitlines() if line.startswith("FINDING"))
    case = json.loads(shlex.split(line)[-1])
    assert case == FAULT, "not shrunk to what it needs"
    assert line == f"FINDING: {command(case)}"
    assert "ZeroDivisionError: planted" in harness.play(case)
    assert not any(harness.play({name: text}) != "right" for name, text in FAULT.items())


def test_refusals_that_are_late_and_what_never_ends_are_findings(harness):
    assert harness.play({"embed.precision": "float64"}) == "refused: precision is refused"
    assert harness.play({"publish.step": "7"}).startswith("refused: --publish")
    assert "refused when" in harness.play({"train.lr": "0.1"})
    assert harness.play({"train.steps": "9"}) == "long: work of train.steps"
    assert harness.play({"train.dropout": "0.1"}).startswith("ENDED by exit code -24")


def test_every_pair_is_driven_though_values_are_refused():
    """One is refused in company, so that its pairs must be driven alone; one always, which has no pairs then."""
    values = [(f"o{i}", text) for i in range(8) for text in "abx"]
    seen = set()

    def play(case):
        if case.get("o5") == "x" or (len(case) > 2 and case.get("o3") == "x"):
            return "refused: x"
        seen.update(frozenset(two) for two in itertools.combinations(case.items(), 2))
        return "right"

    played = list(Pairs(values, seed=1).play(play))
    pairs = {frozenset(two) for two in itertools.combinations(values, 2) if two[0][0] != two[1][0]}
    assert pairs - seen == {pair for pair in pairs if ("o5", "x") in pair}
    assert len(played) < len(pairs) / 2, "hardly better than each pair alone"
    assert played == list(Pairs(values, seed=1).play(play)), "not a function of its seed"


def test_odd_values_of_every_option():
    options = small_pipeline.options()
    asked = {"sample.seed", "train.encoder_dim", "gate_margin", "embed.k", "ablate.steps", "prune.keep"}
    assert asked <= options.keys()
    seeds = odd_values("sample.seed", options["sample.seed"])
    assert seeds[:9] == ["-1", "0", "1", "2", "3", "7", "4294967294", "4294967295", "4294967296"]
    assert {"0.0", "-0.0", "5e-324", "0.9999999999999999", "1.0"} <= set(
        odd_values("embed.beta", options["embed.beta"])
    )
    assert all(odd_values(name, schema) for name, schema in options.items())
