"""An image encoder of a user's own, for the tests of encoders by dotted name."""

import torch

from tasks.core.encoders.registry import TorchEncoder, image_encoder_builder


@image_encoder_builder
def build(arrays, bands):
    """The mean of each of two bands, times a weight."""
    module = torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.Flatten(), torch.nn.Linear(2, 2, bias=False))
    module.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    return TorchEncoder("tests.core.encoders.my_encoder:build", module, ("B04", "B02"), 2, size=16)


@image_encoder_builder
def misnamed(arrays, bands):
    """Calls itself by another name."""
    return build(arrays, bands)


def unmarked(arrays, bands):
    """Does not say that it builds encoders."""
    raise AssertionError("this must not run")
