"""Trains one location encoder on a patch store's pairs, and resumes where a run stopped."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from infra import storage
from infra.errors import UserError
from tasks.core.contrastive import ImageProjection, process
from tasks.core.encoders.location import LocationEncoder, SingleEncoder
from tasks.core.encoders.tessellation import Tessellation
from tasks.core.training import FITTED_ON, Diverged, Pairs, Progress, Schedule, Trainer, hold_out, plan, train
from tasks.model.checkpoint import dump_state, parse_state
from tasks.model.features import open_store
from tasks.params import TrainParams
from tasks.units import log, progress

BLOCK_DEGREES = 10  # side of the blocks that are held out
REPORTS = 20  # measurements over the run: points of the loss curve, and the unit of patience


def schedule(params: TrainParams) -> Schedule:
    """Returns the training schedule, with a tenth of the steps, at most 100, as warm-up."""
    return Schedule(
        params.steps,
        params.batch,
        params.lr,
        params.weight_decay,
        warmup=min(100, params.steps // 10),
        seed=params.seed,
        window=params.shuffle,
        mask_km=params.mask_km,
        jitter_degrees=params.jitter_degrees,
        patience=params.patience,
        precision=params.precision,
    )


def split(patches: str, params: TrainParams) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Returns the places of the patches, and which of them are held out.

    Raises:
        UserError: Fewer pairs than one batch are left to train on, or patience lacks held-out pairs.
    """
    lonlat = open_store(patches).manifest[["lon", "lat"]].to_numpy("f8")
    held_out = hold_out(lonlat, BLOCK_DEGREES, params.held_out_share, params.seed)
    try:
        plan(held_out, schedule(params), run=1, views=1)
    except ValueError as error:
        raise UserError(f"{patches} has {len(lonlat)} patches: {error}") from error
    if params.patience and not held_out.any():
        raise UserError(
            f"patience needs held-out pairs and no {BLOCK_DEGREES}-degree block of {patches} is held out: "
            "sample more of the Earth, raise held_out_share, or give patience 0"
        )
    return lonlat, held_out


def new_trainer(pairs: Pairs, params: TrainParams, device: str = "cpu") -> Trainer:
    """Makes a trainer with initial weights from the seed."""
    torch.manual_seed(params.seed)
    location = _new_location(pairs, params)
    rows = np.flatnonzero(~pairs.held_out)
    if len(rows) > FITTED_ON:
        rows = np.sort(np.random.default_rng(params.seed).choice(rows, FITTED_ON, replace=False))
    projection = ImageProjection(pairs.features.shape[2], params.dim).fit(pairs.untouched(rows))
    return Trainer(location, projection, schedule(params), device)


def _new_location(pairs: Pairs, params: TrainParams) -> SingleEncoder:
    """Makes a location encoder with random weights; sites are at random places that are trained on."""
    about: dict[str, Any] = {"hidden": params.hidden, "dim": params.dim, "dropout": params.dropout}
    if params.location == "harmonics":
        return LocationEncoder(params.degree, smoothness=params.smoothness, **about)
    location = Tessellation(params.sites, params.tokens, **about)
    places = pairs.lonlat[~pairs.held_out]
    rng = np.random.default_rng(params.seed)
    location.place(rng.choice(places, params.sites, replace=params.sites > len(places)))
    return location


def fit(trainer: Trainer, pairs: Pairs, state: str, save_every: int, label: str = "train") -> None:
    """Trains to the end, and stores the training state at the URL `state` every `save_every` steps.

    A run that was killed resumes from this state.
    """
    resume(trainer, state)
    steps = trainer.schedule.steps
    with progress(label, steps, trainer.step_number) if process()[0] == 0 else nullcontext(_silent) as advance:
        last = ""
        for note in walk(trainer, pairs, state, save_every):
            if note:
                log().info("step %d of %d: %s", trainer.step_number, steps, note)
            last = note or last
            advance(1, last)


def walk(trainer: Trainer, pairs: Pairs, state: str, save_every: int) -> Iterator[str]:
    """Trains from the trainer's step to the end; yields after each step a note, empty where nothing was measured."""
    rate = _throughput(trainer)
    for now in train(trainer, pairs, max(1, trainer.schedule.steps // REPORTS)):
        yield _note(now, rate()) if now else ""
        if process()[0] == 0 and trainer.step_number % save_every == 0 and not trainer.finished:
            storage.write(state, dump_state(trainer.state()))


def _silent(*_: Any) -> None:
    """Shows nothing: the first process shows the progress."""


def _throughput(trainer: Trainer) -> Callable[[], float]:
    """Returns a function that gives the pairs per second since its last call."""
    last = [trainer.step_number, time.perf_counter()]

    def rate() -> float:
        before, last[:] = tuple(last), [trainer.step_number, time.perf_counter()]
        return trainer.schedule.batch * (last[0] - before[0]) / (last[1] - before[1])

    return rate


def _note(now: Progress, rate: float) -> str:
    return f"loss {now.loss:.3f}, scale {now.scale:.1f}, held-out retrieval {now.accuracy:.1%}, {rate:,.0f} pairs/s"


def resume(trainer: Trainer, state: str) -> None:
    """Restores the training state at a URL, if there is one."""
    if not storage.exists(state):
        return
    trainer.restore(parse_state(storage.read(state), state))
    log().info("training goes on from step %d", trainer.step_number)


@contextmanager
def told() -> Iterator[None]:
    """Tells of a training that diverged as an error of the user's, who can mend it."""
    try:
        yield
    except Diverged as error:
        raise UserError(str(error)) from error


def choose_device(name: str) -> str:
    """Returns the device to train on, for `auto` or a device's name.

    Raises:
        UserError: This machine has no such device.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [device for device in there if there[device]]
    if name == "auto":
        return available[0]
    if name not in available:
        raise UserError(f"the device {name!r} is not on this machine: use auto or one of {', '.join(available)}")
    return name
