"""Contrastive training: a place and the image taken there are pulled together, all other pairs apart.

The image backbone is frozen, so its features are given, once; what is trained is the location encoder, a
projection of the features into its space, and the logit scale. The harmonics of the fixed training places are
constants too and are computed once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from tasks.core.location import LocationEncoder

FIRST_SCALE = math.log(1 / 0.07)
LARGEST_SCALE = math.log(100)
CHUNK = 1024  # rows of the similarity matrix at a time: at a batch of 8,192 a chunk is 34 MB


class ImageProjection(nn.Module):
    """Standardises image features and maps them linearly into the space of the location encoder."""

    mean: Tensor
    std: Tensor

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, dim)
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))

    def fit(self, features: NDArray[np.float32]) -> "ImageProjection":
        """Takes the mean and the spread of (n, feature) features."""
        self.mean.copy_(torch.from_numpy(features.mean(0, dtype=np.float64)))
        self.std.copy_(torch.from_numpy(features.std(0, dtype=np.float64).clip(1e-6)))
        return self

    def forward(self, features: Tensor) -> Tensor:
        """(n, feature) to (n, dim), not normalised."""
        return self.linear((features - self.mean) / self.std)

    @torch.no_grad()
    def keys(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Unit keys of (n, feature) features, (n, dim)."""
        device = self.mean.device
        return functional.normalize(self(torch.from_numpy(features).to(device)), dim=-1).cpu().numpy()


def info_nce(places: Tensor, images: Tensor, scale: Tensor, chunk: int = CHUNK) -> Tensor:
    """Symmetric InfoNCE of unit vectors that belong together row by row.

    Args:
        places: (n, dim) unit embeddings of places.
        images: (n, dim) unit embeddings of images.
        scale: Factor of the cosines; a scalar.
        chunk: Rows of the (n, n) similarities held at a time; value and gradients do not depend on it.

    Returns:
        The mean of the cross-entropies of places among images and of images among places.
    """
    return _InfoNCE.apply(places, images, scale, chunk)


class _InfoNCE(torch.autograd.Function):
    """The whole matrix is never held: both passes make it again, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, places: Tensor, images: Tensor, scale: Tensor, chunk: int) -> Tensor:
        rows, columns = [], torch.full_like(places[:, 0], -torch.inf)
        for part in places.split(chunk):
            logits = scale * (part @ images.T)
            rows.append(logits.logsumexp(1))
            columns = torch.logaddexp(columns, logits.logsumexp(0))
        row = torch.cat(rows)
        ctx.save_for_backward(places, images, scale, row, columns)
        ctx.chunk = chunk
        return ((row + columns) / 2 - scale * (places * images).sum(1)).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        places, images, scale, row, columns = ctx.saved_tensors
        to_places, to_images = torch.empty_like(places), torch.zeros_like(images)
        to_scale = torch.zeros_like(scale)
        for start in range(0, len(places), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            cosines = places[rows] @ images.T
            logits = scale * cosines
            share = ((logits - row[rows, None]).exp_() + (logits - columns).exp_()).div_(2 * len(places))
            share.diagonal(start).sub_(1 / len(places))
            to_scale += (share * cosines).sum()
            to_places[rows] = scale * (share @ images)
            to_images += scale * (share.T @ places[rows])
        (grad,) = grads
        return grad * to_places, grad * to_images, grad * to_scale, None


@dataclass(frozen=True)
class Schedule:
    """How to train; validated by the step's parameters."""

    steps: int
    """Optimiser steps."""
    batch: int
    """Pairs in a batch: the number of negatives."""
    lr: float
    """Highest learning rate."""
    weight_decay: float
    """AdamW's."""
    warmup: int
    """Steps of linear warm-up, before the cosine."""
    seed: int = 0
    """Of the initial weights, the batches and the dropout."""

    def rate(self, step: int) -> float:
        """The learning rate of a step: linear warm-up, then half a cosine down to 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class Pairs:
    """What is aligned: places and the features of the images taken there."""

    lonlat: NDArray[np.float64]
    """(n, 2) degrees."""
    features: NDArray[np.float32]
    """(n, feature)."""
    held_out: NDArray[np.bool_]
    """(n,) pairs that are never trained on, by whole blocks of the Earth."""


def hold_out(lonlat: NDArray[np.float64], degrees: float, share: float, seed: int) -> NDArray[np.bool_]:
    """Marks the places of a random `share` of all blocks of `degrees` by `degrees`."""
    blocks = np.floor((lonlat + np.array([180.0, 90.0])) / degrees).astype(np.int64)
    _, which = np.unique(blocks, axis=0, return_inverse=True)
    which = which.ravel()
    order = np.random.default_rng(seed).permutation(which.max() + 1)
    return order[which] < round(share * len(order))


class Trainer:
    """Training that can stop after any step and go on from its `state` to the same last bit."""

    def __init__(self, location: LocationEncoder, projection: ImageProjection, schedule: Schedule) -> None:
        self.location, self.projection, self.schedule = location, projection, schedule
        self.log_scale = nn.Parameter(torch.tensor(FIRST_SCALE))
        self.optimiser = torch.optim.AdamW(self._groups(), lr=schedule.lr)
        self.rng = torch.Generator().manual_seed(schedule.seed)
        self.order = torch.empty(0, dtype=torch.int64)
        self.step_number = 0

    def _groups(self) -> list[dict[str, Any]]:
        weights = [*self.location.parameters(), *self.projection.parameters()]
        matrices = [w for w in weights if w.ndim > 1]
        rest = [w for w in weights if w.ndim <= 1]
        return [
            {"params": matrices, "weight_decay": self.schedule.weight_decay},
            {"params": [*rest, self.log_scale], "weight_decay": 0.0},
        ]

    def rows(self, n: int) -> Tensor:
        """The next batch of 0..n-1: without replacement, in a new order each time all were seen."""
        batch = min(self.schedule.batch, n)
        if len(self.order) < batch:
            self.order = torch.randperm(n, generator=self.rng)
        rows, self.order = self.order[:batch], self.order[batch:]
        return rows

    def step(self, harmonics: Tensor, features: Tensor) -> float:
        """One optimiser step on a batch; returns its loss."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.schedule.rate(self.step_number)
        torch.manual_seed(self.schedule.seed * 1_000_003 + self.step_number)  # dropout: known by its step
        self.location.train()
        places = functional.normalize(self.location.from_harmonics(harmonics), dim=-1)
        images = functional.normalize(self.projection(features), dim=-1)
        loss = info_nce(places, images, self.log_scale.exp())
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        with torch.no_grad():
            self.log_scale.clamp_(max=LARGEST_SCALE)
        self.step_number += 1
        return loss.item()

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "location": self.location.state_dict(),
            "projection": self.projection.state_dict(),
            "log_scale": self.log_scale.detach(),
            "optimiser": self.optimiser.state_dict(),
            "rng": self.rng.get_state(),
            "order": self.order,
            "step": self.step_number,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to a `state`."""
        self.location.load_state_dict(state["location"])
        self.projection.load_state_dict(state["projection"])
        self.log_scale.data.copy_(state["log_scale"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.rng.set_state(state["rng"])
        self.order, self.step_number = state["order"], state["step"]


@dataclass(frozen=True)
class Progress:
    """How training stands."""

    step: int
    """Steps done."""
    loss: float
    """Mean since the last report."""
    scale: float
    """The logit scale."""
    accuracy: float
    """Share of held-out places whose own image is among the nearest 1 % of the held-out images."""
    held_out_loss: float
    """InfoNCE of the held-out pairs as one batch."""


def train(
    trainer: Trainer,
    pairs: Pairs,
    every: int,
    report: Callable[[Progress], None],
) -> None:
    """Trains from where the trainer stands to the end of its schedule.

    Args:
        trainer: New or restored.
        pairs: What to align.
        every: Steps between reports.
        report: Called with the progress after every `every` steps and after the last.
    """
    fit_on = np.flatnonzero(~pairs.held_out)
    lonlat, features = pairs.lonlat[fit_on], torch.from_numpy(pairs.features[fit_on])
    harmonics = trainer.location.harmonics(lonlat).contiguous()
    losses = []
    while trainer.step_number < trainer.schedule.steps:
        rows = trainer.rows(len(fit_on))
        losses.append(trainer.step(harmonics[rows], features[rows]))
        if trainer.step_number % every == 0 or trainer.step_number == trainer.schedule.steps:
            report(_progress(trainer, pairs, float(np.mean(losses))))
            losses = []


def _progress(trainer: Trainer, pairs: Pairs, loss: float) -> Progress:
    places = trainer.location.embed(pairs.lonlat[pairs.held_out])
    images = trainer.projection.keys(pairs.features[pairs.held_out])
    scale = trainer.log_scale.detach().exp()
    with torch.no_grad():
        value = info_nce(torch.from_numpy(places), torch.from_numpy(images), scale).item() if len(places) else 0.0
    return Progress(trainer.step_number, loss, scale.item(), retrieval_accuracy(places, images), value)


def retrieval_accuracy(places: NDArray[np.float32], images: NDArray[np.float32], nearest: float = 0.01) -> float:
    """Share of places, row by row, whose own image is among the `nearest` share of all images.

    Args:
        places: (n, dim) unit vectors.
        images: (n, dim) unit vectors.
        nearest: Share of the images that counts as near; 0.01 of 1,000 images is a rank of at most 10.
    """
    if not len(places):
        return 0.0
    cosines = places @ images.T
    rank = (cosines > cosines.diagonal()[:, None]).sum(1)
    return float((rank < max(1, nearest * len(images))).mean())
