"""Runs other projects' location encoders from their published weights, in plain PyTorch without their code.

- SINR (Cole et al. 2023, arXiv 2306.02564): sine and cosine of the scaled coordinates, a linear layer, residual layers
  of two. Only models whose inputs are coordinates alone.
- CSP (Mai et al. 2023, arXiv 2305.01118): `gridcell` waves of the degrees, then a network with layer norms.

Layouts as in the repositories elijahcole/sinr and gengchenmai/csp.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tasks.core.encoders.encodings import waves

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "leakyrelu": lambda x: functional.leaky_relu(x, 0.2),
    "relu": functional.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": functional.gelu,
}
SINR_INPUTS = 4  # inputs of a SINR for coordinates alone; one with bioclimatic layers has more


@torch.no_grad()
def embed_sinr(weights: Mapping[str, Tensor], lonlat: NDArray[np.float64]) -> NDArray[np.float32]:
    """Embeds places by SINR.

    Args:
        weights: State of the model: `feats.0`, then `feats.N.w1` and `w2`.
        lonlat: (n, 2) in degrees.

    Raises:
        ValueError: The model takes more than coordinates.
    """
    inputs = weights["feats.0.weight"].shape[1]
    if inputs != SINR_INPUTS:
        raise ValueError(
            f"this SINR has {inputs} inputs, environmental ones too: only those of coordinates alone serve"
        )
    angles = torch.from_numpy(np.pi * lonlat / [180, 90]).to(weights["feats.0.weight"])
    x = functional.relu(_linear(weights, "feats.0", torch.cat([angles.sin(), angles.cos()], dim=1)))
    for i in range(2, 2 + sum(name.endswith(".w1.weight") for name in weights)):
        inner = functional.relu(_linear(weights, f"feats.{i}.w1", x))
        x = x + functional.relu(_linear(weights, f"feats.{i}.w2", inner))
    return x.float().numpy()


@torch.no_grad()
def embed_csp(
    weights: Mapping[str, Tensor], settings: Mapping[str, Any], lonlat: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Embeds places by CSP.

    Args:
        weights: State of the network: `layers.N.linear` and, where it has them, `layers.N.layernorm`.
        settings: Parameters in the checkpoint.
        lonlat: (n, 2) in degrees.

    Raises:
        ValueError: The encoding or the activation is not supported.
    """
    if settings["spa_enc_type"] != "gridcell" or settings.get("freq_init", "geometric") != "geometric":
        raise ValueError(f"this CSP encodes by {settings['spa_enc_type']!r}: only gridcell with geometric waves serves")
    if settings["spa_f_act"] not in ACTIVATIONS:
        raise ValueError(f"this CSP's activation {settings['spa_f_act']!r} is none of {', '.join(ACTIVATIONS)}")
    act = ACTIVATIONS[settings["spa_f_act"]]
    encoded = waves(lonlat, settings["frequency_num"], settings["min_radius"], settings["max_radius"])
    x = torch.from_numpy(encoded.reshape(len(lonlat), -1)).to(weights["layers.0.linear.weight"])
    last = sum(name.endswith("linear.weight") for name in weights) - 1
    for i in range(last + 1):
        y = act(_linear(weights, f"layers.{i}.linear", x))
        if settings.get("skip_connection") and i < last and y.shape == x.shape:
            y = y + x
        x = _normalised(weights, f"layers.{i}.layernorm", y)
    return x.float().numpy()


def _linear(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _normalised(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    if f"{name}.weight" not in weights:
        return x
    return functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])
