"""Prints features by rshf's SatMAE of small sizes, with weights by `waves`: what `test_vision.py` compares ours with.

    python -m tests.oracles.satmae RSHF     # the folder rshf of the unpacked wheel rshf 0.2.2; timm 1.0.31

torchvision, transformers and huggingface_hub are not needed by what runs here, and are left out by empty modules.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest.mock import MagicMock

import torch
from torch import nn

from tests.core.encoders.test_vision import TORCHVISION, fill, pictures

RGB = {"embed_dim": 32, "depth": 2, "num_heads": 4, "img_size": 32, "patch_size": 8, "in_chans": 3, "mlp_ratio": 4,
       "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, "norm_pix_loss": False}  # fmt: skip
MANY = RGB | {"img_size": 16, "in_chans": 10, "channel_groups": ((0, 1, 2, 6), (3, 4, 5, 7), (8, 9)),
              "channel_embed": 8, "decoder_channel_embed": 4}  # fmt: skip


def main(folder: str) -> None:
    """Prints the mean of the tokens of two images, for both encoders."""
    for part in TORCHVISION:
        sys.modules[f"torchvision{part}"] = MagicMock(__spec__=ModuleSpec(f"torchvision{part}", None), __path__=[])
    sys.modules["torchvision.ops.misc"].FrozenBatchNorm2d = type("Frozen", (nn.Module,), {})
    sys.modules["torchvision.datasets"].ImageFolder = object
    sys.modules["huggingface_hub"] = MagicMock(PyTorchModelHubMixin=type("Mixin", (), {}))
    sys.modules["transformers"] = MagicMock(PretrainedConfig=type("Config", (), {}))
    spec = importlib.util.spec_from_file_location("satmae", Path(folder, "satmae", "model.py"))
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    rgb = type("Config", (), RGB)()
    for model, channels, size in (
        (theirs.MaskedAutoencoderViT(rgb), 3, 32),
        (theirs.MaskedAutoencoderGroupChannelViT(MANY), 10, 16),
    ):
        fill(model)
        with torch.no_grad():
            tokens, _, _ = model.eval().forward_encoder(pictures(channels, size), mask_ratio=0.0)
        print([[round(v, 6) for v in row] for row in tokens[:, 1:].mean(1)[:, :6].tolist()])


if __name__ == "__main__":
    main(sys.argv[1])
