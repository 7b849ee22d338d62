"""Runs the train step: computes image features once, then trains the location encoder, in one process or several."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from distributed import Client
from numpy.typing import NDArray

from infra import storage
from infra.errors import UserError
from tasks.artifacts import keep_picture
from tasks.cards import is_finished, product_url, read_card
from tasks.core.contrastive import ImageProjection, process
from tasks.core.encoders.location import LocationEncoder
from tasks.core.training import FITTED_ON, Diverged, Pairs, Progress, Schedule, Trainer, hold_out, plan, train
from tasks.model.checkpoint import dump_state, parse_state, save_checkpoint
from tasks.model.features import StoredFeatures, encode_features, features_url, identity, open_encoder, open_store
from tasks.newest import inherit
from tasks.params import TrainParams
from tasks.plots.charts import loss_curve
from tasks.products import PatchesCard
from tasks.units import log, progress

BLOCK_DEGREES = 10  # side of the blocks that are held out
REPORTS = 20  # measurements over the run: points of the loss curve, and the unit of patience
PATIENCE = timedelta(days=7)  # how long the other processes wait for the first, which encodes the features
NOT_CONTENT = {"device", "save_every"}  # parameters that do not change the result


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
        patience=params.patience,
        precision=params.precision,
    )


def train_model(client: Client | None, patches: str, params: TrainParams) -> str:
    """Trains the location encoder against the images of a patch store, and resumes where a run stopped.

    Under torchrun every process calls this. The first one also encodes the images and stores the checkpoint.

    Args:
        client: The Dask cluster that encodes the images; None in all processes but the first.
        patches: URL of the patches.
        params: Architecture and training schedule.

    Returns:
        The URL of the checkpoint.

    Raises:
        UserError: There are too few patches, an image could not be encoded, there is no such device, or training
            diverged.
    """
    source = read_card(patches, PatchesCard)
    made_of = {"patches": source.fingerprint, **params.model_dump(exclude=NOT_CONTENT)}
    made_of["encoder"] = identity(params.encoder)
    url = product_url("checkpoints", made_of)
    state = storage.join(url, "training.pt")
    if is_finished(url):
        storage.delete(state)  # left by a run that was killed after its card
        inherit(url, patches)
        return url
    with processes(params.device) as device:
        lonlat, held_out = split(patches, params)
        features = features_url(patches, params.encoder, params.views)
        if client is not None:
            encode_features(client, patches, params.encoder, params.views)
        _wait()
        pairs = Pairs(lonlat, StoredFeatures(features, params.shuffle), held_out)
        trainer = new_trainer(pairs, params, device)
        try:
            fit(trainer, pairs, state, params.save_every)
        except Diverged as error:
            raise UserError(str(error)) from error
        if client is not None:
            encoder = open_encoder(features, patches, params.encoder.name)
            _save(url, trainer, encoder, source, made_of)
            inherit(url, patches)
            storage.delete(state)
    return url


def _save(url: str, trainer: Trainer, encoder: Any, source: PatchesCard, made_of: dict[str, Any]) -> None:
    """Stores the loss curve and the checkpoint, with its card last, as completion marker."""
    history, attribution = [vars(now) for now in trainer.history], source.attribution
    picture = loss_curve(history, "Contrastive training", attribution)
    keep_picture(storage.join(url, "loss.png"), picture, "loss-curve", "InfoNCE loss, and recall@1 % on held-out pairs")
    save_checkpoint(
        url,
        trainer.location.cpu(),
        trainer.projection.cpu(),
        encoder,
        patches=source.fingerprint,
        attribution=attribution,
        line=source.line,
        made_of=made_of,
        metrics=vars(trainer.result),
        history=history,
    )


@contextmanager
def processes(name: str) -> Iterator[str]:
    """Yields the device to train on; under torchrun joins the process group, and leaves it at the end.

    Raises:
        UserError: This machine has no such device.
    """
    device = choose_device(name)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE)
    try:
        yield device
    finally:
        torch.distributed.destroy_process_group()


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


def _wait() -> None:
    if process()[1] > 1:
        torch.distributed.barrier()


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
    location = LocationEncoder(
        params.degree, params.hidden, dim=params.dim, dropout=params.dropout, smoothness=params.smoothness
    )
    rows = np.flatnonzero(~pairs.held_out)
    if len(rows) > FITTED_ON:
        rows = np.sort(np.random.default_rng(params.seed).choice(rows, FITTED_ON, replace=False))
    projection = ImageProjection(pairs.features.shape[2], params.dim).fit(pairs.untouched(rows))
    return Trainer(location, projection, schedule(params), device)


def fit(trainer: Trainer, pairs: Pairs, state: str, save_every: int) -> None:
    """Trains to the end, and stores the training state at the URL `state` every `save_every` steps.

    A run that was killed resumes from this state.
    """
    _resume(trainer, state)
    steps, first = trainer.schedule.steps, process()[0] == 0
    with progress("train", steps, trainer.step_number) if first else nullcontext(_silent) as advance:
        rate = _throughput(trainer)
        note = ""
        for now in train(trainer, pairs, max(1, steps // REPORTS)):
            if now:
                note = _note(now, rate())
                log().info("step %d of %d: %s", now.step, steps, note)
            advance(1, note)
            if first and trainer.step_number % save_every == 0 and not trainer.finished:
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


def _resume(trainer: Trainer, state: str) -> None:
    if not storage.exists(state):
        return
    trainer.restore(parse_state(storage.read(state), state))
    log().info("training goes on from step %d", trainer.step_number)
