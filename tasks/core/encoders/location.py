"""Defines what every location encoder offers, and SatCLIP's: spherical harmonics, then a sinusoidal network (SIREN)."""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from tasks.core.encoders.harmonics import Basis, checked, legendre, longitude_part, spherical_harmonics

FIRST_FREQUENCY = 30.0  # w0 of SIREN's first layer; the others have 1
SHARED = 8  # places per distinct latitude from which the first layer is cheaper by rows of latitude


class PlaceEncoder(nn.Module):
    """What every location encoder offers, whether one network or several side by side."""

    dim: int
    """Length of an embedding."""
    degree: int = 0
    """Number of degrees of spherical harmonics; 0: it has none."""

    @property
    def architecture(self) -> dict[str, Any]:
        """Returns the arguments that rebuild this encoder."""
        raise NotImplementedError

    def embed(self, lonlat: NDArray[np.float64], batch: int = 4096) -> NDArray[np.float32]:
        """Returns unit embeddings of many places, without gradients and dropout.

        Args:
            lonlat: (n, 2) longitude and latitude in degrees.
            batch: Places computed at a time.

        Returns:
            (n, dim) float32, each of length 1.
        """
        raise NotImplementedError


class SingleEncoder(PlaceEncoder):
    """A location encoder that can be trained: from a place its inputs, which no weight changes, then a network."""

    def inputs(self, lonlat: NDArray[np.float64]) -> Tensor:
        """Returns the network's inputs for (n, 2) places in degrees, on the device and in the dtype of the weights."""
        raise NotImplementedError

    def from_inputs(self, features: Tensor) -> Tensor:
        """Embeds places from their inputs, which training computes once; (n, dim), not normalised."""
        raise NotImplementedError

    def forward(self, lonlat: NDArray[np.float64] | Tensor) -> Tensor:
        """Embeds places. Gradients reach the weights, not the places.

        Args:
            lonlat: (n, 2) longitude and latitude in degrees.

        Returns:
            (n, dim), not normalised.
        """
        return self.from_inputs(self.inputs(np.asarray(lonlat, np.float64)))


class LocationEncoder(SingleEncoder):
    """Maps places to vectors: L * L harmonics, `layers` sine layers of `hidden`, a linear layer to `dim`.

    The harmonics are always computed in float64. The network computes in the dtype of its weights (`encoder.double()`).
    """

    def __init__(
        self,
        degree: int = 40,
        hidden: int = 512,
        layers: int = 2,
        dim: int = 256,
        basis: Basis = "orthonormal",
        dropout: float = 0.0,
        smoothness: float = 0.0,
    ) -> None:
        """Initialises the weights as SIREN does.

        Args:
            degree: L, the number of harmonic degrees.
            hidden: Width of the sine layers.
            layers: Number of sine layers.
            dim: Length of an embedding.
            basis: Basis of the harmonics; `analytic` only for imported weights.
            dropout: Share of hidden units dropped before each sine in training.
            smoothness: Harmonics of degree l are scaled by (1 + l) ** -smoothness. The same functions can be learned,
                since the first weights can undo the factor, but training then prefers those smooth on the sphere.
        """
        super().__init__()
        self.degree, self.dim, self.basis, self.dropout = degree, dim, basis, dropout
        widths = [degree * degree, *[hidden] * layers, dim]
        linear = [nn.Linear(a, b) for a, b in pairwise(widths)]
        for i, layer in enumerate(linear):
            _initialise(layer, first=i == 0)
        self.layers = nn.ModuleList(linear)
        self.hidden = hidden
        self.smoothness = smoothness
        degrees = torch.arange(degree).repeat_interleave(2 * torch.arange(degree) + 1)
        self.damping: Tensor
        self.register_buffer("damping", (1.0 + degrees) ** -smoothness, persistent=False)

    @property
    def architecture(self) -> dict[str, Any]:
        """Returns the arguments that rebuild this encoder."""
        return {
            "degree": self.degree,
            "hidden": self.hidden,
            "layers": len(self.layers) - 1,
            "dim": self.dim,
            "basis": self.basis,
            "dropout": self.dropout,
            "smoothness": self.smoothness,
        }

    @property
    def first(self) -> nn.Linear:
        """Returns the layer above the harmonics."""
        layer = self.layers[0]
        assert isinstance(layer, nn.Linear)  # for the type checker: __init__ made it
        return layer

    @property
    def first_weight(self) -> Tensor:
        """Returns the weights of the harmonics, (hidden, degree * degree), times the damping."""
        return self.first.weight * self.damping

    def harmonics(self, lonlat: NDArray[np.float64]) -> Tensor:
        """Returns the harmonics of places, (n, degree * degree), on the device and in the dtype of the weights."""
        features = torch.from_numpy(spherical_harmonics(lonlat, self.degree, self.basis))
        return features.to(self.first.weight)

    def from_harmonics(self, features: Tensor) -> Tensor:
        """Embeds places from their harmonics, which training computes once."""
        with torch.autocast(features.device.type, enabled=False):  # bf16 would blur 30 x in the sine
            first = functional.linear(features, self.first_weight, self.first.bias)
        return self._after_first(first)

    inputs, from_inputs = harmonics, from_harmonics

    def _after_first(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers[1:]):
            if self.dropout and self.training:
                x = functional.dropout(x, self.dropout)
            x = layer(torch.sin(FIRST_FREQUENCY * x if i == 0 else x))
        return x

    @torch.no_grad()
    def embed(self, lonlat: NDArray[np.float64], batch: int = 4096) -> NDArray[np.float32]:
        """Returns unit embeddings of many places, without gradients and dropout.

        Places with the same latitude, such as cells of a grid, share the Legendre part of the first layer, which is
        most of its work.

        Args:
            lonlat: (n, 2) longitude and latitude in degrees.
            batch: Places computed at a time.

        Returns:
            (n, dim) float32, each of length 1.
        """
        was_training = self.training
        self.eval()
        places = checked(lonlat)
        out = np.empty((len(places), self.dim), np.float32)
        for rows, first in self._first_layer(places, batch):
            out[rows] = functional.normalize(self._after_first(first), dim=-1).float().cpu().numpy()
        self.train(was_training)
        return out

    def _first_layer(self, places: NDArray[np.float64], batch: int) -> Iterator[tuple[NDArray, Tensor]]:
        latitudes, which = np.unique(places[:, 1], return_inverse=True)
        if self.basis == "analytic" or len(places) < SHARED * len(latitudes):
            weight = self.first_weight
            for start in range(0, len(places), batch):
                rows = np.arange(start, min(start + batch, len(places)))
                yield rows, functional.linear(self.harmonics(places[rows]), weight, self.first.bias)
            return
        order = np.argsort(which, kind="stable")
        edges = np.searchsorted(which[order], np.arange(len(latitudes) + 1))
        for start, stop in _groups(edges, batch):
            rows = order[edges[start] : edges[stop]]
            yield (
                rows,
                self._by_latitude(latitudes[start:stop], places[rows, 0], np.diff(edges[start : stop + 1])),
            )

    def _by_latitude(self, latitudes: NDArray, lon: NDArray, counts: NDArray) -> Tensor:
        """Computes the first layer for runs of places with one latitude each: Legendre part, then longitudes."""
        cos, sin = longitude_part(lon, self.degree)
        run = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(len(lon)) - np.repeat(np.cumsum(counts) - counts, counts)
        turns = np.zeros((len(counts), counts.max(), 2 * self.degree - 1))
        turns[run, within] = np.concatenate([sin[:0:-1], cos]).T
        first = torch.bmm(torch.from_numpy(turns).to(self.first.weight), self._mix_degrees(latitudes))
        return first[run, within] + self.first.bias

    def _mix_degrees(self, latitudes: NDArray) -> Tensor:
        """Sums over the degrees for each order -(L-1) to L-1, (latitude, order, hidden)."""
        table = np.zeros((self.degree, len(latitudes), self.degree))
        for degree, row in enumerate(legendre(latitudes, self.degree)):
            table[: degree + 1, :, degree] = row
        orders, degrees = np.arange(1 - self.degree, self.degree)[:, None], np.arange(self.degree)
        inside = abs(orders) <= degrees
        column = np.where(inside, degrees * degrees + degrees + orders, 0)
        weights = self.first_weight.T[column] * torch.from_numpy(inside[..., None]).to(self.first.weight)
        values = torch.from_numpy(table[abs(orders[:, 0])]).to(self.first.weight)
        return torch.bmm(values, weights).transpose(0, 1)


def _groups(edges: NDArray, batch: int) -> Iterator[tuple[int, int]]:
    """Yields runs of latitudes with about `batch` places together, and at least one latitude."""
    start = 0
    while start < len(edges) - 1:
        stop = max(start + 1, int(np.searchsorted(edges, edges[start] + batch, side="right")) - 1)
        yield start, stop
        start = stop


def _initialise(layer: nn.Linear, first: bool) -> None:
    inputs = layer.in_features
    bound = 1 / inputs if first else math.sqrt(6 / inputs)
    nn.init.uniform_(layer.weight, -bound, bound)
    nn.init.uniform_(layer.bias, -bound, bound)
