"""Charts: what is drawn is what was given."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from tasks.plots import charts
from tasks.plots.charts import kernel_chart

HEADS = [
    {"kind": "semantic", "at": [2, 12, 40], "one_out": [0.1, 0.7, 0.6], "block_out": [0.2, 0.6, 0.5]},
    {"kind": "geodesic", "at": (10, 1000), "one_out": (0.3, 0.8), "block_out": (0.2, -0.7)},
    {"kind": "nearest", "at": [1, 16, 256], "one_out": [0.8, 0.7, 0.4], "block_out": [0.5, 0.6, 0.3]},
]
CHOSEN = {"semantic": 12.0, "geodesic": 1000.0, "nearest": 16.0}


@pytest.fixture
def figure(monkeypatch):
    """The figure of a chart of kernels."""
    kept, real = [], charts.png
    monkeypatch.setattr(charts, "png", lambda figure: kept.append(figure) or real(figure))
    drawn = kernel_chart([head | {"chosen": f"{head['kind']}:{CHOSEN[head['kind']]:g}"} for head in HEADS], "a", "b")
    assert Image.open(BytesIO(drawn)).width > 1000
    return kept[0]


def test_curves_of_heads_are_those_of_the_card_and_tell_what_was_chosen(figure):
    assert len(figure.axes) == len(HEADS)
    for axes, head in zip(figure.axes, HEADS, strict=True):
        curves = {line.get_label(): line.get_xydata() for line in axes.lines if not line.get_label().startswith("_")}
        np.testing.assert_array_equal(curves["one image left out"], np.column_stack([head["at"], head["one_out"]]))
        blocks = curves["10-degree blocks left out"]
        np.testing.assert_array_equal(blocks, np.column_stack([head["at"], head["block_out"]]))
        (chosen,) = (line.get_xdata() for line in axes.lines if line.get_label().startswith("_"))
        assert set(chosen) == {CHOSEN[head["kind"]]}
        assert axes.get_xscale() == "log"
        assert axes.get_ylim() == (-0.5, 1)
    geodesic = figure.axes[1].get_title("right")
    assert geodesic == "chosen: 1000, 474 km wide"  # 2 arccos(1 - ln 2 / 1000) x 6371 km
