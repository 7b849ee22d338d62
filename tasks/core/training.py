"""Trains the location encoder by contrastive learning: schedule, batches, trainer, and held-out measurements.

The image backbone is frozen, so its features are computed once, before. The location encoder, a projection of the
features into its space, and the logit scale are trained. The harmonics of the training places are constants too, and
are computed once where they fit in memory.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.nn import functional

from tasks.core.contrastive import FIRST_SCALE, LARGEST_SCALE, ImageProjection, info_nce, near_pairs, process, summed
from tasks.core.encoders.location import PlaceEncoder, SingleEncoder
from tasks.core.ensemble import Projections

FITTED_ON = 16_384  # pairs whose features give the projection its mean and standard deviation
MEASURED = 8192  # most held-out pairs that are measured: the cost grows with their square, the precision hardly
INPUTS_BYTES = 1 << 30  # bytes of the harmonics of all training places; above it each batch computes its own
JITTER = 1  # third part of the jitter's seed; that of the batches has two
Precision = Literal["float32", "bf16"]


@dataclass(frozen=True)
class Schedule:
    """Training schedule; validated by the step's parameters."""

    steps: int
    """Optimiser steps."""
    batch: int
    """Pairs in a batch; the others are the negatives of each."""
    lr: float
    """Peak learning rate."""
    weight_decay: float
    """Weight decay of AdamW, for weight matrices."""
    warmup: int
    """Steps of linear warm-up, before the cosine decay."""
    seed: int = 0
    """Seed of the initial weights, the batches and the dropout."""
    window: int = 65_536
    """Pairs that are shuffled together."""
    mask_km: float = 0.0
    """Pairs of a batch whose places are within this distance in km are no negatives of each other. 0: all are."""
    jitter_degrees: float = 0.0
    """Longitude and latitude of a place are moved by up to this many degrees each way, anew in each step."""
    patience: int = 0
    """Early stopping: measurements without improvement after which training ends with the best weights. 0: never."""
    precision: Precision = "float32"
    """Precision of the encoders' matrix products."""

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step: linear warm-up, then a cosine decay to 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (1 + math.cos(math.pi * done)) / 2


class Features(Protocol):
    """Image features, which may be larger than memory."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Returns (view, image, feature)."""

    @property
    def run(self) -> int:
        """Returns the number of neighbouring images that are stored and read together."""

    def take(self, rows: NDArray[np.int64], views: NDArray[np.int64]) -> NDArray[np.float32]:
        """Returns features of images, each in the view at the same position, (n, feature)."""


@dataclass(frozen=True)
class Pairs:
    """The pairs to align: places, and the features of the images taken there."""

    lonlat: NDArray[np.float64]
    """(n, 2) degrees."""
    features: Features
    """Features of n images; view 0 is the image without augmentation."""
    held_out: NDArray[np.bool_]
    """(n,) pairs that are not trained on, by whole blocks of the Earth."""

    def untouched(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Returns features of images without augmentation, (n, feature)."""
        return self.features.take(rows, np.zeros_like(rows))


def hold_out(lonlat: NDArray[np.float64], degrees: float, share: float, seed: int) -> NDArray[np.bool_]:
    """Marks the places in a random `share` of the blocks of `degrees` by `degrees`, (n,)."""
    blocks = np.floor((lonlat + np.array([180.0, 90.0])) / degrees).astype(np.int64)
    _, which = np.unique(blocks, axis=0, return_inverse=True)
    which = which.ravel()
    order = np.random.default_rng(seed).permutation(which.max() + 1)
    return order[which] < round(share * len(order))


class Batches:
    """The pairs of each step. They depend on the seed and the step alone, so that training can resume anywhere.

    An epoch visits every pair once. Runs of neighbours that are stored together come in a new order each epoch, each
    run in a random view, and pairs are shuffled within windows of runs. So memory holds one window at a time; where a
    window holds all pairs, the shuffle is uniform. Pairs left at the end of an epoch that do not fill a batch are
    skipped; they are others in each epoch.
    """

    def __init__(
        self, rows: NDArray[np.int64], size: int, seed: int, run: int = 1, window: int = 65_536, views: int = 1
    ) -> None:
        """Plans batches of `size` of the pairs `rows`.

        Args:
            rows: Pairs to train on, ascending.
            size: Pairs in a batch.
            seed: Seed of the order.
            run: Neighbours that are stored together.
            window: About how many pairs are shuffled together.
            views: Views of each image.

        Raises:
            ValueError: There are fewer pairs than one batch holds.
        """
        if len(rows) < size:
            raise ValueError(
                f"a batch of {size} pairs needs more than the {len(rows)} there are to train on: sample more "
                "patches or make the batch smaller"
            )
        self.rows, self.size, self.seed, self.window, self.views = rows, size, seed, window, views
        _, self.runs = np.unique(rows // run, return_inverse=True)
        self.epoch, self.order = -1, (rows, rows)

    def __call__(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the rows of a step's batch, and their views."""
        epoch, batch = divmod(step, len(self.rows) // self.size)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, self._shuffled(epoch)
        part = slice(batch * self.size, (batch + 1) * self.size)
        return self.order[0][part], self.order[1][part]

    def _shuffled(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        rng = np.random.default_rng([self.seed, epoch])
        runs = int(self.runs[-1]) + 1
        windows = -(-len(self.rows) // self.window)
        window = (rng.permutation(runs) * windows // runs)[self.runs]
        order = np.lexsort((rng.random(len(self.rows)), window))
        views = rng.integers(self.views, size=runs)[self.runs]
        return self.rows[order], views[order]


@dataclass(frozen=True)
class Progress:
    """A measurement during training."""

    step: int
    """Steps done."""
    loss: float
    """Mean training loss since the last measurement."""
    scale: float
    """The logit scale."""
    accuracy: float
    """Recall@1 %: share of held-out places whose own image is among the nearest 1 % of the held-out images."""
    held_out_loss: float
    """InfoNCE of the held-out pairs as one batch."""


class Diverged(ValueError):
    """Training has diverged: a loss or a weight is not finite."""


class Trainer:
    """A training that can stop after any step and resume from its `state`, identical to the last bit."""

    def __init__(
        self, location: SingleEncoder, projection: ImageProjection, schedule: Schedule, device: str = "cpu"
    ) -> None:
        self.device = torch.device(device)
        self.location, self.projection = location.to(self.device), projection.to(self.device)
        self.schedule = schedule
        self.log_scale = nn.Parameter(torch.tensor(FIRST_SCALE, device=self.device))
        self.optimiser = torch.optim.AdamW(self._groups(), lr=schedule.lr)
        self.step_number = 0
        self.losses: list[float] = []
        self.history: list[Progress] = []
        self.best_weights: dict[str, Any] = {}

    def _groups(self) -> list[dict[str, Any]]:
        weights = [*self.location.parameters(), *self.projection.parameters()]
        matrices = [w for w in weights if w.ndim > 1]
        rest = [w for w in weights if w.ndim <= 1]
        return [
            {"params": matrices, "weight_decay": self.schedule.weight_decay},
            {"params": [*rest, self.log_scale], "weight_decay": 0.0},
        ]

    def step(self, inputs: Tensor, features: Tensor, near: Tensor | None = None) -> float:
        """Takes one optimiser step on this process's part of a batch, and returns the loss of the whole batch."""
        rank, processes = process()
        for group in self.optimiser.param_groups:
            group["lr"] = self.schedule.rate(self.step_number)
        torch.manual_seed(self.schedule.seed * 1_000_003 + self.step_number + (rank << 40))  # for the dropout
        self.location.train()
        places, images = self._embed(inputs.to(self.device), features.to(self.device))
        loss = info_nce(places, images, self.log_scale.exp(), near=near, gather=processes > 1)
        self.optimiser.zero_grad()
        loss.backward()
        if processes > 1:
            self._sum_gradients()
        self.optimiser.step()
        with torch.no_grad():
            self.log_scale.clamp_(max=LARGEST_SCALE)
        self.step_number += 1
        return loss.item()

    def _embed(self, inputs: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.schedule.precision == "bf16"):
            places, images = self.location.from_inputs(inputs), self.projection(features)
        return functional.normalize(places.float(), dim=-1), functional.normalize(images.float(), dim=-1)

    def _sum_gradients(self) -> None:
        grads = [w.grad for group in self.optimiser.param_groups for w in group["params"]]
        flat = summed(torch.cat([grad.ravel() for grad in grads]))
        for grad, total in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(total.view_as(grad))

    def check(self) -> None:
        """Refuses a training that has diverged: its vectors are NaN, which would look like perfect retrieval.

        Raises:
            Diverged: A loss or a weight is not finite.
        """
        lost = not np.isfinite(self.losses).all()
        if lost or not all(torch.isfinite(weight).all() for weight in self._weights().values()):
            raise Diverged(f"training diverged before step {self.step_number}: lower lr or weight_decay")

    def note(self, progress: Progress) -> None:
        """Adds a measurement, and keeps the weights of the best one where training may end early."""
        self.history.append(progress)
        self.losses = []
        if self.schedule.patience and self.best == progress:
            self.best_weights = {name: value.clone() for name, value in self._weights().items()}

    @property
    def best(self) -> Progress:
        """Returns the measurement with the highest recall, among equals the lowest held-out loss, then the first."""
        return max(self.history, key=lambda now: (now.accuracy, -now.held_out_loss))

    @property
    def result(self) -> Progress:
        """Returns the measurement of the weights that training ends with."""
        if self.schedule.patience:
            return self.best
        return self.history[-1]

    @property
    def finished(self) -> bool:
        """Tells whether all steps are done, or `patience` measurements brought no improvement."""
        patience = self.schedule.patience
        if self.history:
            waited = len(self.history) - 1 - self.history.index(self.best)
        else:
            waited = 0
        return self.step_number >= self.schedule.steps or 0 < patience <= waited

    def finish(self) -> None:
        """Sets the weights to the best ones, where these were kept."""
        if self.best_weights:
            self._take(self.best_weights)

    def _weights(self) -> dict[str, Any]:
        location = {f"location.{name}": value for name, value in self.location.state_dict().items()}
        projection = {f"projection.{name}": value for name, value in self.projection.state_dict().items()}
        return {**location, **projection, "log_scale": self.log_scale.detach()}

    def _take(self, weights: dict[str, Any]) -> None:
        for part, module in (("location.", self.location), ("projection.", self.projection)):
            own = {name.removeprefix(part): value for name, value in weights.items() if name.startswith(part)}
            module.load_state_dict(own)
        self.log_scale.data.copy_(weights["log_scale"])

    def state(self) -> dict[str, Any]:
        """Returns everything that the next step depends on."""
        return {
            "weights": self._weights(),
            "best_weights": self.best_weights,
            "optimiser": self.optimiser.state_dict(),
            "step": self.step_number,
            "losses": self.losses,
            "history": [vars(progress) for progress in self.history],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restores a `state`."""
        self._take(state["weights"])
        self.best_weights = state["best_weights"]
        self.optimiser.load_state_dict(state["optimiser"])
        self.step_number, self.losses = state["step"], list(state["losses"])
        self.history = [Progress(**progress) for progress in state["history"]]


def train(trainer: Trainer, pairs: Pairs, every: int) -> Iterator[Progress | None]:
    """Trains from the trainer's current step to the end.

    Args:
        trainer: A new or restored trainer; in a process group, the same in every process.
        pairs: The pairs to align.
        every: Steps between measurements. The last step is measured too.

    Yields:
        After each step, the measurement where one was made, else None.

    Raises:
        Diverged: A loss or a weight is no longer finite.
    """
    schedule, (rank, processes) = trainer.schedule, process()
    batches = plan(pairs.held_out, schedule, pairs.features.run, pairs.features.shape[0])
    inputs, measure = _inputs(trainer.location, pairs.lonlat, schedule), _measure(pairs)
    part = slice(rank * schedule.batch // processes, (rank + 1) * schedule.batch // processes)
    while not trainer.finished:
        rows, views = batches(trainer.step_number)
        if schedule.mask_km:
            near = near_pairs(pairs.lonlat[rows], schedule.mask_km)
        else:
            near = None
        features = torch.from_numpy(pairs.features.take(rows[part], views[part]))
        trainer.losses.append(trainer.step(inputs(trainer.step_number, rows, part), features, near))
        measured = trainer.step_number % every == 0 or trainer.step_number == schedule.steps
        if measured:
            trainer.check()
            trainer.note(_agreed(measure, trainer))
        yield trainer.history[-1] if measured else None
    trainer.finish()


def plan(held_out: NDArray[np.bool_], schedule: Schedule, run: int, views: int) -> Batches:
    """Returns the batches of a schedule.

    Raises:
        ValueError: There are fewer pairs than one batch holds, or the processes cannot share a batch evenly.
    """
    processes = process()[1]
    if schedule.batch % processes:
        raise ValueError(f"a batch of {schedule.batch} cannot be cut into {processes} equal parts: use a multiple")
    return Batches(np.flatnonzero(~held_out), schedule.batch, schedule.seed, run, schedule.window, views)


def _inputs(
    location: SingleEncoder, lonlat: NDArray[np.float64], schedule: Schedule
) -> Callable[[int, NDArray[np.int64], slice], Tensor]:
    """Returns a function from a step, the rows of its batch and a part of them to the encoder's inputs of that part.

    These are constants, kept where all fit in memory, unless places are moved in each step.
    """
    if schedule.jitter_degrees:
        return lambda step, rows, part: location.inputs(jittered(lonlat[rows], schedule, step)[part])
    if 4 * len(lonlat) * location.degree**2 > INPUTS_BYTES:
        return lambda _, rows, part: location.inputs(lonlat[rows[part]])
    whole = location.inputs(lonlat).contiguous()
    return lambda _, rows, part: whole[torch.from_numpy(rows[part]).to(whole.device)]


def jittered(lonlat: NDArray[np.float64], schedule: Schedule, step: int) -> NDArray[np.float64]:
    """Returns the (n, 2) places of a whole batch, moved at random; the seed and the step alone decide where to."""
    rng = np.random.default_rng([schedule.seed, step, JITTER])
    lon, lat = (lonlat + rng.uniform(-1, 1, lonlat.shape) * schedule.jitter_degrees).T
    return np.stack([(lon + 180) % 360 - 180, lat.clip(-90, 90)], axis=1)


def _measure(pairs: Pairs) -> Callable[[Trainer], Progress]:
    """Returns a function that measures a trainer on the held-out pairs, which are read once."""
    lonlat, features = _measured(pairs)

    @torch.no_grad()
    def measure(trainer: Trainer) -> Progress:
        places, images = trainer.location.embed(lonlat), trainer.projection.keys(features)
        scale = trainer.log_scale.detach().exp().cpu()
        if len(places):
            value = info_nce(torch.from_numpy(places), torch.from_numpy(images), scale).item()
        else:
            value = 0.0
        accuracy = retrieval_accuracy(places, images)
        return Progress(trainer.step_number, float(np.mean(trainer.losses)), scale.item(), accuracy, value)

    return measure


def _measured(pairs: Pairs) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Returns places and image features of the held-out pairs that are measured."""
    held = np.flatnonzero(pairs.held_out)
    if len(held) > MEASURED:
        held = np.sort(np.random.default_rng(0).choice(held, MEASURED, replace=False))
    return pairs.lonlat[held], pairs.untouched(held)


def held_out_accuracy(pairs: Pairs, location: PlaceEncoder, projection: ImageProjection | Projections) -> float:
    """Returns the recall@1 % of several members together, on the held-out pairs that each was measured on."""
    lonlat, features = _measured(pairs)
    return retrieval_accuracy(location.embed(lonlat), projection.keys(features))


def _agreed(measure: Callable[[Trainer], Progress], trainer: Trainer) -> Progress:
    """Returns the first process's measurement in every process, since all must end at the same step."""
    rank, processes = process()
    measured = [measure(trainer) if rank == 0 else None]
    if processes > 1:
        distributed.broadcast_object_list(measured, 0)
    return measured[0]  # type: ignore[return-value]


def retrieval_accuracy(places: NDArray[np.float32], images: NDArray[np.float32], nearest: float = 0.01) -> float:
    """Returns the share of places whose own image, of the same row, is among the `nearest` share of all images.

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
