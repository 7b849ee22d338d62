"""Computes the contrastive loss: a place and the image taken there attract each other, all other pairs repel.

In a process group of `torch.distributed` every process embeds its part of a batch and contrasts it with the whole
batch. Loss and gradients equal those of a single process.

The usual way, a cross-entropy of all similarities, keeps several (n, n) matrices for the backward pass: 268 MB each at
8,192 pairs. Here both passes hold some rows of one at a time, and the gradients are equal.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor, distributed, nn
from torch.nn import functional

from tasks.core.earth.sphere import EARTH_RADIUS_KM, unit_vectors

FIRST_SCALE = math.log(1 / 0.07)  # log of the logit scale before training, as in CLIP
LARGEST_SCALE = math.log(100)  # bounds the log of the logit scale, as in CLIP
CHUNK = 1024  # rows of the similarity matrix held at a time: 34 MB at a batch of 8,192


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
        """Sets mean and standard deviation to those of (n, feature) features."""
        self.mean.copy_(torch.from_numpy(features.mean(0, dtype=np.float64)))
        self.std.copy_(torch.from_numpy(features.std(0, dtype=np.float64).clip(1e-6)))
        return self

    def forward(self, features: Tensor) -> Tensor:
        """Returns the projection of (n, feature) features, (n, dim), not normalised."""
        return self.linear((features - self.mean) / self.std)

    @torch.no_grad()
    def keys(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the unit keys of (n, feature) features, (n, dim)."""
        device = self.mean.device
        return functional.normalize(self(torch.from_numpy(features).to(device)), dim=-1).cpu().numpy()


def info_nce(
    places: Tensor, images: Tensor, scale: Tensor, chunk: int = CHUNK, near: Tensor | None = None, gather: bool = False
) -> Tensor:
    """Returns the symmetric InfoNCE loss of unit vectors that belong together row by row.

    Args:
        places: (n, dim) unit embeddings of places.
        images: (n, dim) unit embeddings of images.
        scale: Factor of the cosines; a scalar.
        chunk: Rows of the (n, n) similarities held at a time. It changes neither loss nor gradients.
        near: (m, 2) indices of a place and an image that are no negatives of each other, sorted by place, on the CPU.
        gather: Whether the vectors are this process's part of the batch, of the same size in every process. Loss and
            gradients of the vectors are then those of the whole batch; the gradient of the scale must be summed over
            the processes. `near` has indices of the whole batch.

    Returns:
        The mean of the cross-entropies of places among images and of images among places.
    """
    return _InfoNCE.apply(places, images, scale, chunk, near, gather)


class _InfoNCE(torch.autograd.Function):
    """InfoNCE without the whole similarity matrix: both passes compute it chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, places: Tensor, images: Tensor, scale: Tensor, chunk: int, near: Tensor | None, gather: bool
    ) -> Tensor:
        everyone = gathered(images) if gather else images
        first = process()[0] * len(places) if gather else 0
        own = slice(first, first + len(places))
        rows, columns = [], torch.full_like(everyone[:, 0], -torch.inf)
        for start in range(0, len(places), chunk):
            logits = _logits(places[start : start + chunk], everyone, scale, near, first + start)
            rows.append(logits.logsumexp(1))
            columns = torch.logaddexp(columns, logits.logsumexp(0))
        if gather:
            columns = gathered(columns[None]).logsumexp(0)
        row = torch.cat(rows)
        ctx.save_for_backward(places, everyone, scale, row, columns)
        ctx.chunk, ctx.near, ctx.gather, ctx.own = chunk, near, gather, own
        loss = ((row + columns[own]) / 2 - scale * (places * images).sum(1)).sum() / len(everyone)
        return summed(loss) if gather else loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        places, images, scale, row, columns = ctx.saved_tensors
        to_places, to_images = torch.empty_like(places), torch.zeros_like(images)
        to_scale = torch.zeros_like(scale)
        for start in range(0, len(places), ctx.chunk):
            rows, first = slice(start, start + ctx.chunk), ctx.own.start + start
            logits = _logits(places[rows], images, scale, ctx.near, first)
            share = ((logits - row[rows, None]).exp_() + logits.sub_(columns).exp_()).div_(2 * len(images))
            share.diagonal(first).sub_(1 / len(images))
            pulled = share @ images
            to_scale += (places[rows] * pulled).sum()
            to_places[rows] = scale * pulled
            to_images += scale * (share.T @ places[rows])
        if ctx.gather:
            to_images = summed(to_images)[ctx.own]
        (grad,) = grads
        return grad * to_places, grad * to_images, grad * to_scale, None, None, None


def _logits(places: Tensor, images: Tensor, scale: Tensor, near: Tensor | None, first: int) -> Tensor:
    """Returns logits of the batch's places from `first` on; -inf where a place and an image are no negatives."""
    logits = (places @ images.T).mul_(scale)
    if near is not None:
        edges = torch.tensor([first, first + len(places)])
        start, stop = torch.searchsorted(near[:, 0].contiguous(), edges).tolist()
        row, column = near[start:stop].to(logits.device).T
        logits[row - first, column] = -torch.inf
    return logits


def near_pairs(lonlat: NDArray[np.float64], km: float) -> Tensor:
    """Returns all pairs (i, j) of different rows whose places are within `km` on the sphere, (m, 2), sorted by i.

    Args:
        lonlat: (n, 2) degrees.
        km: Great-circle distance in kilometres.
    """
    chord = 2 * math.sin(min(km / EARTH_RADIUS_KM, math.pi) / 2)
    pairs = cKDTree(unit_vectors(lonlat)).query_pairs(chord, output_type="ndarray")
    both = np.concatenate([pairs, pairs[:, ::-1]])
    return torch.from_numpy(both[np.lexsort(both.T[::-1])])


def process() -> tuple[int, int]:
    """Returns this process's rank in its group and the number of processes; (0, 1) without a group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def gathered(part: Tensor) -> Tensor:
    """Returns the parts of all processes, joined along the first axis."""
    parts = [torch.empty_like(part) for _ in range(process()[1])]
    distributed.all_gather(parts, part.contiguous())
    return torch.cat(parts)


def summed(part: Tensor) -> Tensor:
    """Sums a tensor over all processes, in place, and returns it."""
    distributed.all_reduce(part)
    return part
