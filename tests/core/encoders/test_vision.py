"""The towers against timm, with random weights: same names, same shapes, same numbers."""

import sys
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

import pytest
import torch

from tasks.core.encoders import vision

TORCHVISION = ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets", ".utils", ".models")
PAIRS = {
    "vit_small_patch16_224": vision.vit_small,
    "resnet18": vision.resnet18,
    "resnet50": vision.resnet50,
}


@pytest.fixture(scope="module")
def timm():
    """timm without torchvision: its models use none of it, but its transforms import it."""
    with pytest.MonkeyPatch.context() as patch:
        for part in TORCHVISION:
            module = MagicMock(__spec__=ModuleSpec(f"torchvision{part}", None), __path__=[])
            patch.setitem(sys.modules, f"torchvision{part}", module)
        patch.setattr(sys.modules["torchvision.ops.misc"], "FrozenBatchNorm2d", type("Frozen", (torch.nn.Module,), {}))
        patch.setattr(sys.modules["torchvision.datasets"], "ImageFolder", object)
        yield pytest.importorskip("timm", reason="timm, the reference, is not installed: see data-packages.txt")


def roughened(network):
    """Random weights everywhere, the statistics of batch norms too."""
    torch.manual_seed(0)
    for name, value in network.state_dict().items():
        if value.is_floating_point() and value.ndim < 2:
            value.uniform_(0.5, 1.5) if name.endswith(("weight", "var")) else value.normal_(0, 0.2)
    return network.eval()


def agree(reference, network, channels):
    network.eval().load_state_dict(reference.state_dict())
    images = torch.rand(2, channels, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(network(images), reference(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PAIRS)
def test_satclips_towers_are_timms(timm, name):
    agree(roughened(timm.create_model(name, in_chans=13, num_classes=0)), PAIRS[name](13), 13)


def test_a_mean_of_tokens_is_timms(timm):
    """SatMAE's encoder: normalised tokens, then their mean without the class token."""
    shape = {"embed_dim": 64, "depth": 2, "num_heads": 4}
    reference = timm.models.VisionTransformer(**shape, num_classes=0, global_pool="avg", fc_norm=False)
    agree(roughened(reference), vision.VisionTransformer(3, dim=64, depth=2, heads=4, mean=True), 3)


def test_satmaes_names_and_shapes_are_timms(timm):
    with torch.device("meta"):
        reference = timm.create_model("vit_large_patch16_224", num_classes=0).state_dict()
        ours = vision.vit_large_mean(3).state_dict()
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in reference.items()}
