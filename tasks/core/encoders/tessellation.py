"""Defines a location encoder that adapts to places: learnable sites on the sphere, and tokens that all of them share.

After Tessellating the Earth (TTE; Cher, Iqbal, Xing, Wei and Jacobs 2026, arXiv 2606.27514), in our own words. Theirs
are the sites that move in training, their soft assignment by a sharpness of each, a vector of each site, the attention
to shared tokens mixed half and half with it, and the residual network above. `docs/model.md` tells what is ours.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from tasks.core.earth.sphere import unit_vectors
from tasks.core.encoders.harmonics import checked
from tasks.core.encoders.location import SingleEncoder

SHARPNESS = 45.0  # of a new site: exp(45 (cos - 1)) falls to a half within 10 degrees
SPREAD = 0.02  # standard deviation of a new site's vector
SHARE = 0.5  # of the tokens in the mixture with the site's own vector
GOLDEN = (math.sqrt(5) - 1) / 2  # turns from one point of the lattice to the next


class Tessellation(SingleEncoder):
    """Maps places to vectors by the sites near them."""

    def __init__(
        self,
        sites: int = 1024,
        tokens: int = 64,
        hidden: int = 512,
        layers: int = 2,
        dim: int = 256,
        dropout: float = 0.0,
    ) -> None:
        """Initialises the sites as a lattice of equal areas.

        Args:
            sites: Number of sites.
            tokens: Number of tokens.
            hidden: Length of a site's vector and of a token, and width of the network.
            layers: Number of residual layers.
            dim: Length of an embedding.
            dropout: Share of hidden units dropped in training.
        """
        super().__init__()
        self.dim, self.dropout = dim, dropout
        self.sites = nn.Parameter(torch.from_numpy(lattice(sites)).float())
        self.log_sharpness = nn.Parameter(torch.full((sites,), math.log(SHARPNESS)))
        self.site_vectors = nn.Parameter(SPREAD * torch.randn(sites, hidden))
        self.tokens = nn.Parameter(torch.randn(tokens, hidden) / math.sqrt(hidden))
        self.attention = nn.Linear(hidden, tokens)
        self.norm = nn.LayerNorm(hidden)
        self.first = nn.Linear(hidden, hidden)
        self.layers = nn.ModuleList(Residual(hidden, dropout) for _ in range(layers))
        self.last = nn.Linear(hidden, dim, bias=False)

    @property
    def architecture(self) -> dict[str, Any]:
        """Returns the arguments that rebuild this encoder, and its kind."""
        return {
            "kind": "tessellation",
            "sites": len(self.sites),
            "tokens": len(self.tokens),
            "hidden": self.first.out_features,
            "layers": len(self.layers),
            "dim": self.dim,
            "dropout": self.dropout,
        }

    def place(self, lonlat: NDArray[np.float64]) -> None:
        """Moves the sites to (site, 2) places."""
        with torch.no_grad():
            self.sites.copy_(torch.from_numpy(unit_vectors(lonlat)))

    def inputs(self, lonlat: NDArray[np.float64]) -> Tensor:
        """Returns the places as unit vectors, (n, 3)."""
        return torch.from_numpy(unit_vectors(checked(lonlat))).to(self.sites)

    def from_inputs(self, features: Tensor) -> Tensor:
        """Embeds places from their unit vectors, (n, dim), not normalised."""
        with torch.autocast(features.device.type, enabled=False):  # bf16 would blur the cosines of near sites
            near = self.assigned(features) @ self.site_vectors
        shared = self.attention(near).softmax(-1) @ self.tokens
        x = functional.relu(self.first(self.norm((1 - SHARE) * near + SHARE * shared)))
        for layer in self.layers:
            x = layer(x)
        return self.last(x)

    def assigned(self, places: Tensor) -> Tensor:
        """Returns the share of each site in each place, (n, site): a softmax of sharpness * (cos - 1).

        Args:
            places: (n, 3) unit vectors.
        """
        cosines = places @ functional.normalize(self.sites, dim=-1).T
        return ((cosines - 1) * self.log_sharpness.exp()).softmax(-1)

    @torch.no_grad()
    def embed(self, lonlat: NDArray[np.float64], batch: int = 4096) -> NDArray[np.float32]:
        """Returns unit embeddings of many places, (n, dim) float32, without gradients and dropout."""
        was_training = self.training
        self.eval()
        places = checked(lonlat)
        out = np.empty((len(places), self.dim), np.float32)
        for start in range(0, len(places), batch):
            rows = slice(start, start + batch)
            out[rows] = functional.normalize(self(places[rows]), dim=-1).float().cpu().numpy()
        self.train(was_training)
        return out


class Residual(nn.Module):
    """Two layers beside a shortcut."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.inner, self.outer, self.dropout = nn.Linear(width, width), nn.Linear(width, width), dropout

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, width) to the same shape."""
        inner = functional.dropout(functional.relu(self.inner(x)), self.dropout, self.training)
        return x + functional.relu(self.outer(inner))


def lattice(count: int) -> NDArray[np.float64]:
    """Returns points spread evenly over the sphere, (count, 3): equal steps in height, golden angles between them."""
    steps = np.arange(count)
    height, turn = 1 - (2 * steps + 1) / count, 2 * np.pi * GOLDEN * steps
    return np.stack([np.sqrt(1 - height**2) * wave for wave in (np.cos(turn), np.sin(turn))] + [height], axis=1)
