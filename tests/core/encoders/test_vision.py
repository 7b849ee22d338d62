"""The towers against timm, with random weights: same names, same shapes, same numbers."""

import sys
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

import pytest
import torch

from tasks.core.encoders import vision
from tasks.core.encoders.registry import TOWERS

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


def fill(network):
    """Weights that anybody can make again: a wave of each tensor's own length, small differences of layer norms too."""
    with torch.no_grad():
        for name, value in network.named_parameters():
            steps = torch.arange(value.numel(), dtype=torch.float64) + len(name)
            value.copy_((torch.sin(steps * 1.7) * 0.02).reshape(value.shape) + (name.endswith("norm.weight")))


def pictures(channels, size):
    """Two images, nearly uniform, so that the epsilon of layer norms tells."""
    steps = torch.arange(2 * channels * size * size, dtype=torch.float64)
    return (0.5 + 0.3 * torch.cos(steps * 0.37)).float().reshape(2, channels, size, size)


SMALL = {"dim": 32, "depth": 2, "heads": 4, "patch": 8}
# By rshf 0.2.2's own code: python -m tests.oracles.satmae
RGB = [[-1.721125, 0.221911, 1.078075, -0.864684, 0.49949, -0.270524],
       [-1.683864, 0.212851, 1.053342, -0.832755, 0.494371, -0.245268]]  # fmt: skip
MANY = [[-0.797864, 0.413113, 0.142213, -0.951407, 1.549672, -0.572456],
        [-0.802028, 0.424311, 0.1384, -0.960108, 1.557671, -0.570949]]  # fmt: skip


def features(network, channels, size):
    fill(network)
    with torch.no_grad():
        return network.eval()(pictures(channels, size))[:, :6]


def test_satmae_is_rshfs_with_its_epsilon():
    """The epsilon tells: with timm's the numbers are others."""
    shape = {"size": 32, "mean": True, **SMALL}
    ours = vision.VisionTransformer(3, **shape, epsilon=vision.RSHF_EPSILON)
    torch.testing.assert_close(features(ours, 3, 32), torch.tensor(RGB), rtol=0, atol=2e-6)
    other = features(vision.VisionTransformer(3, **shape), 3, 32)
    assert (other - torch.tensor(RGB)).abs().max() > 1e-4


def test_satmae_of_many_bands_is_rshfs():
    with torch.device("meta"):
        published = TOWERS["satmae-sentinel2"].network(10)
    assert published.pos_embed.shape == (1, 145, 768)  # 12 x 12 squares of 8 pixels
    ours = vision.GroupedVisionTransformer(published.groups, **SMALL, size=16, group_dim=8)
    torch.testing.assert_close(features(ours, 10, 16), torch.tensor(MANY), rtol=0, atol=2e-6)
