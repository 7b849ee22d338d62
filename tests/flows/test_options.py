"""Command-line options made from parameter models."""

import pytest
import typer
from pydantic import Field
from typer.testing import CliRunner

from flows.cli_options import build, with_options
from infra.errors import UserError
from tasks.params import AblateParams, Params, PipelineParams, SampleParams


class Inner(Params):
    depth: int = Field(3, ge=1)
    """How deep."""


class Outer(Params):
    share: float = Field(0.5, ge=0, le=1)
    """Which share."""
    bands: tuple[str, ...] = ("B04",)
    """Which bands."""
    inner: Inner = Inner()
    """The inner part."""


@pytest.fixture
def invoke():
    seen = []
    app = typer.Typer()

    def show(place: str, params: Outer) -> None:
        seen.append((place, params))

    app.command()(with_options(Outer, show))

    def run(*args):
        result = CliRunner(env={"COLUMNS": "200"}).invoke(app, list(args))
        return result, seen

    return run


def test_options_reach_the_nested_model(invoke):
    _, seen = invoke("here", "--share", "0.25", "--inner-depth", "7", "--bands", '["B02", "B03"]')
    assert seen == [("here", Outer(share=0.25, bands=("B02", "B03"), inner=Inner(depth=7)))]


def test_a_list_may_come_one_by_one(invoke):
    assert invoke("here", "--bands", "B02", "--bands", "B03")[1] == [("here", Outer(bands=("B02", "B03")))]


@pytest.mark.parametrize("text", ["[B02", '["B02"', "[B02, B03]", "[" * 100_000, " [1,"])
def test_malformed_lists_are_one_sentence(text):
    with pytest.raises(UserError, match=r"--bands '.*' is no JSON .*give a list as"):
        build(Outer, {"bands": [text]})
    with pytest.raises(UserError, match=r"--inner-depth '.*' is no JSON"):
        build(Outer, {"inner_depth": text})


def test_without_options_the_defaults_hold(invoke):
    assert invoke("here")[1] == [("here", Outer())]


def test_help_tells_description_bound_and_default(invoke):
    text = " ".join(invoke("--help")[0].output.split())
    for part in ("--inner-depth", "How deep.", "At least 1.", "Default: 3."):
        assert part in text


def test_a_value_that_does_not_fit_names_the_option():
    with pytest.raises(UserError, match=r"--inner-depth '0': .* greater than or equal to 1"):
        build(Outer, {"inner_depth": "0"})


def test_an_unknown_option_is_refused(invoke):
    assert invoke("here", "--no-such", "1")[0].exit_code == 2


@pytest.mark.parametrize(
    ("preset", "patches", "steps", "batch", "step", "west", "dims", "points"),
    [
        ("trial", 500, 100, 128, 2.0, -180.0, None, 500),
        ("continent", 20_000, 300, 2048, 0.1, -25.0, 64, None),
        ("globe", 100_000, 1000, 8192, 0.25, -180.0, 64, None),
        ("satclip", 100_000, 5500, 8192, 0.5, -180.0, None, None),
    ],
)
def test_a_preset_is_what_the_page_says(preset, patches, steps, batch, step, west, dims, points):
    made = build(PipelineParams, {"preset": preset})
    assert (made.sample.patches, made.train.steps, made.train.batch) == (patches, steps, batch)
    assert (made.publish.step, made.publish.west, made.publish.compact_dims) == (step, west, dims)
    assert made.evaluate.points == build(AblateParams, {"preset": preset}).points == points
    assert made.sample.model_dump() == SampleParams(preset=preset).model_dump()  # by name or not, the same product
    assert preset in str(SampleParams.model_json_schema()["properties"]["preset"])


def test_what_is_given_beside_a_preset_stays():
    default = SampleParams().patches
    given = build(PipelineParams, {"preset": "trial", "sample_patches": str(default), "publish_step": "0.5"})
    assert (given.sample.patches, given.sample.shard_patches, given.publish.step) == (default, 64, 0.5)
