"""Values that no step can compute are refused by the forms and the command line, before any work."""

import numpy as np
import pytest
from pydantic import ValidationError

from flows.cli_options import build
from infra.errors import UserError
from tasks.core.encoders.rcf import fit_rcf
from tasks.params import (
    RCF_PIXELS,
    AblateParams,
    EmbedParams,
    EncoderParams,
    EvaluateParams,
    PipelineParams,
    PublishParams,
    SampleParams,
    TrainParams,
)

SCORED = {"labels": ["x.csv"], "label": "x"}


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        (SampleParams, {"resolution_m": "inf"}, "--resolution-m 'inf': Input should be a finite number"),
        (SampleParams, {"resolution_m": "1e-300"}, "greater than or equal to 0.1"),
        (SampleParams, {"south": "50", "north": "50"}, "south 50 is not below north 50"),
        (SampleParams, {"seed": str(2**32)}, "less than or equal to 4294967295"),
        (EncoderParams, {"seed": "-1"}, "greater than or equal to 0"),
        (TrainParams, {"save_every": str(2**63)}, "less than or equal to 1000000"),
        (PublishParams, {"step": "5e-324"}, "inf cells of the box, more than 4,294,967,296"),
        (PublishParams, {"step": "0.001"}, "6.48e\\+10 cells of the box"),
        (PublishParams, {"step": "1e-7"}, "6.48e\\+18 cells of the box"),
        (PublishParams, {"step": "0.0071"}, "does not divide the box of 360 x 180 degree: use a step of 0.006"),
        (PublishParams, {"tile_cells": "30"}, r"tile size 30 is not a multiple .* Use 20 or 40"),
        (PublishParams, {"parent": ""}, "at least 1 character"),
        (EmbedParams, {"device": "cuda:٣"}, "should match pattern"),
        (EvaluateParams, {"labels": [""]}, "--labels '': String should have at least 1 character"),
        (EvaluateParams, {"kind": "regression"}, "are of a label"),
        (EvaluateParams, {**SCORED, "kind": "classification", "log1p": "true"}, "log1p is of numbers"),
        (EvaluateParams, {**SCORED, "kind": "regression", "lon": "a", "lat": "a"}, "a cannot have both"),
        (AblateParams, {"steps": ["nan"]}, "finite number"),
    ],
)
def test_text_of_the_command_line(model, values, message):
    with pytest.raises(UserError, match=message):
        build(model, values)


@pytest.mark.parametrize(("model", "values"), [(EmbedParams, {"k": True}), (AblateParams, {"steps": [1, True]})])
def test_true_is_no_number_of_a_form(model, values):
    with pytest.raises(ValidationError, match="true and false are for what is switched on or off"):
        model.model_validate(values)


def test_the_finest_grid_that_is_counted():
    assert PublishParams(step=0.01, tile_cells=60).spec.shape == (18_000, 36_000)


@pytest.mark.parametrize(("side", "views", "least"), [("11", "8", 12), ("15", "9", 16)])
def test_patches_too_small_for_their_encoder_are_refused_before_they_are_sampled(side, views, least):
    values = {"sample_patch_pixels": side, "train_views": views, "sample_patches": "20", "train_batch": "8"}
    with pytest.raises(UserError, match=rf"needs patches of {least} x {least} .* have {side} x {side}: raise"):
        build(PipelineParams, values)
    build(PipelineParams, {**values, "sample_patch_pixels": str(least)})
    build(PipelineParams, {**values, "train_encoder_name": "satmae"})


def test_the_smallest_image_is_what_the_encoder_says():
    def noise(side):
        return np.random.default_rng(0).random((8, 1, side, side), np.float32)

    with pytest.raises(ValueError, match=f"at least {RCF_PIXELS} pixels"):
        fit_rcf(noise(RCF_PIXELS - 1), ("B02",), 8)
    assert fit_rcf(noise(RCF_PIXELS), ("B02",), 8).encode(noise(RCF_PIXELS)).shape == (8, 8)


def test_a_region_has_edges_of_its_own_in_a_preset():
    """The rest of the preset stays; an edge that is given stays too."""
    kenya = {"preset": "continent", "region": ("KE",)}
    whole = PipelineParams(**kenya)
    for params in (PublishParams(**kenya), whole.publish, whole.in_region().publish):
        assert (params.is_open, params.step, params.compact_dims) == (True, 0.1, 64)
    for sample in (SampleParams(**kenya), whole.sample):
        assert (sample.south, sample.north, sample.patches) == (-80, 84, 20_000)
    assert whole.evaluate.region == ("KE",)
    assert PublishParams(**kenya, west=30, south=-10, east=50, north=10).box == (30, -10, 50, 10)
    assert PipelineParams(preset="continent").publish.box == (-25, 34, 45, 72)
