"""Runs GeoCLIP's location encoder (Vivanco Cepeda et al. 2023, arXiv 2309.16020) from the weights in its wheel.

Random Fourier features of the Equal Earth plane at three scales, each through a network of its own; the three sum up.
Plain PyTorch, since the package itself imports an image tower; a test holds it to the package's.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from infra.packages import data_file
from tasks.core.earth.sphere import equal_earth

UNIT = 66.50336 / 180  # factor of GeoCLIP's Equal Earth coordinates
WEIGHTS = "geoclip/model/weights/location_encoder_weights.pth"  # file in the package
DIM = 512  # length of a vector
LAYERS = ("capsule.1", "capsule.3", "capsule.5")


def embed_geoclip(lonlat: NDArray[np.float64], batch: int = 4096) -> NDArray[np.float32]:
    """Embeds (n, 2) places in degrees (lon, lat) by GeoCLIP, (n, DIM); GeoCLIP itself takes (lat, lon)."""
    weights = torch.load(data_file("geoclip", WEIGHTS), weights_only=True)
    plane = torch.from_numpy(np.column_stack(equal_earth(*lonlat.T)) * UNIT).float()
    with torch.no_grad():
        return torch.cat([_embed(weights, part) for part in plane.split(batch)]).numpy()


def _embed(weights: Mapping[str, Tensor], plane: Tensor) -> Tensor:
    return torch.stack([_scale(weights, f"LocEnc{i}.", plane) for i in range(3)]).sum(0)


def _scale(weights: Mapping[str, Tensor], prefix: str, plane: Tensor) -> Tensor:
    angles = 2 * math.pi * plane @ weights[f"{prefix}capsule.0.b"].T
    x = torch.cat([angles.cos(), angles.sin()], dim=1)
    for layer in LAYERS:
        x = functional.relu(_linear(weights, prefix + layer, x))
    return _linear(weights, f"{prefix}head.0", x)


def _linear(weights: Mapping[str, Tensor], layer: str, x: Tensor) -> Tensor:
    return functional.linear(x, weights[f"{layer}.weight"], weights[f"{layer}.bias"])
