"""Holds the presets: sets of parameters under one name, for the steps that have the fields.

The numbers of patches are those that a try, a continent and the paper's S2-100K take; the rest follows from them.
`satclip` is what SatCLIP's published code does, as far as it is a parameter here: `docs/model.md` tells what is not.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic_core import to_jsonable_python

Preset = Literal["trial", "continent", "globe", "satclip"]

EUROPE = {"west": -25.0, "south": 34.0, "east": 45.0, "north": 72.0}
PRESETS: dict[Preset, dict[str, dict[str, Any]]] = {
    "trial": {
        "SampleParams": {"patches": 500, "shard_patches": 64, "patch_pixels": 64},
        "TrainParams": {"batch": 128, "steps": 100},
        "PublishParams": {"step": 2.0},
        "EvaluateParams": {"points": 500, "folds": 2},
    },
    "continent": {
        "SampleParams": {"patches": 20_000, "south": EUROPE["south"], "north": EUROPE["north"]},
        "TrainParams": {"batch": 2048, "steps": 300},
        "PublishParams": {**EUROPE, "step": 0.1, "compact_dims": 64},
    },
    "globe": {
        "SampleParams": {"patches": 100_000},
        "TrainParams": {"batch": 8192, "steps": 1000, "patience": 5},
        "PublishParams": {"step": 0.25, "compact_dims": 64},
    },
    "satclip": {
        "SampleParams": {
            "patches": 100_000,
            "places": "tile",
            "datetime": "2021-01-01/2023-05-17",
            "max_cloud_percent": 20.0,
        },
        "TrainParams": {
            "degree": 40,
            "smoothness": 0.0,
            "dropout": 0.5,
            "jitter_degrees": 0.005,
            "views": 8,
            "lr": 1e-4,
            "batch": 8192,
            "steps": 5500,
        },
    },
}


def laid_under(
    name: Preset, models: Sequence[str], given: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns a model's values, with those of a preset wherever a value is the default or not given.

    Forms send defaults too, so a default counts as not given.

    Args:
        name: The preset.
        models: Names of the parameter model and of its base classes.
        given: The values so far, by field.
        defaults: Default values, by field.
    """
    offered = next((PRESETS[name][model] for model in models if model in PRESETS.get(name, {})), {})
    own = EUROPE.keys() if given.get("region") else ()  # which has edges of its own
    left = {
        field: value
        for field, value in offered.items()
        if field not in own
        if field not in given or to_jsonable_python(given[field]) == to_jsonable_python(defaults[field])
    }
    return {**given, **left}
