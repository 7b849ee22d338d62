"""The train step: image features once, then the contrastive location encoder."""

from typing import Any

import torch
from distributed import Client
from pydantic import Field

from infra import storage
from infra.errors import UserError
from tasks.artifacts import keep_picture
from tasks.cards import is_finished, product_url, read_card
from tasks.checkpoint import dump_state, parse_state, save_checkpoint
from tasks.core.contrastive import ImageProjection, Pairs, Progress, Schedule, Trainer, hold_out, train
from tasks.core.location import LocationEncoder
from tasks.features import EncoderParams, encode_features, open_encoder, open_store, read_features
from tasks.params import Params
from tasks.pictures import loss_curve
from tasks.units import log, progress


class TrainParams(Params):
    """Architecture and schedule of the location encoder."""

    encoder: EncoderParams = Field(default_factory=EncoderParams)
    """The image encoder, frozen."""
    degree: int = Field(20, ge=1, le=100)
    """Degrees of spherical harmonics: structure down to about 180 degrees / degree."""
    hidden: int = Field(512, ge=8, le=4096)
    """Width of the two sine layers."""
    dim: int = Field(256, ge=2, le=4096)
    """Length of a location embedding and of a key."""
    smoothness: float = Field(1.0, ge=0, le=4)
    """Harmonics of degree l enter times (1 + l) ** -smoothness; 0 is SatCLIP's own."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of hidden units dropped in training."""
    steps: int = Field(400, ge=1, le=1_000_000)
    """Optimiser steps."""
    batch: int = Field(1024, ge=2, le=65_536)
    """Pairs in a batch: each image is told from all others in it."""
    lr: float = Field(1e-3, gt=0, le=1)
    """Highest learning rate, after the warm-up."""
    weight_decay: float = Field(0.01, ge=0, le=10)
    """AdamW's weight decay."""
    held_out_share: float = Field(0.1, ge=0, le=0.5)
    """Share of the 10-degree blocks whose pairs only measure retrieval."""
    seed: int = 0
    """Of the weights, the batches and the held-out blocks."""

    def schedule(self) -> Schedule:
        """The core's schedule, with a tenth of the steps, at most 100, as warm-up."""
        warmup = min(100, self.steps // 10)
        return Schedule(self.steps, self.batch, self.lr, self.weight_decay, warmup, self.seed)


BLOCK_DEGREES = 10
REPORTS = 20  # points of the loss curve
SAVE_EVERY = 100  # steps: what a killed run repeats at most, some seconds


def train_model(client: Client, patches: str, params: TrainParams) -> str:
    """Trains the location encoder against the images of a patch store, resuming where a run stopped.

    Args:
        client: The Dask cluster that encodes the images.
        patches: URL of the patches.
        params: Architecture and schedule.

    Returns:
        The URL of the checkpoint.

    Raises:
        UserError: There are too few patches, or an image could not be encoded.
    """
    source = read_card(patches, "patches")
    made_of = {"patches": source["fingerprint"], **params.model_dump()}
    url = product_url("checkpoints", made_of)
    if is_finished(url):
        return url
    features = encode_features(client, patches, params.encoder)
    pairs = load_pairs(patches, features, params)
    trainer = new_trainer(pairs, params)
    history = fit(trainer, pairs, storage.join(url, "training.pt"))
    save_checkpoint(
        url,
        trainer.location,
        trainer.projection,
        open_encoder(features, patches, params.encoder.name),
        patches=source["fingerprint"],
        attribution=source.get("attribution", ""),
        made_of=made_of,
        metrics=history[-1],
        history=history,
    )
    picture = loss_curve(history, "Contrastive training", source.get("attribution", ""))
    keep_picture(storage.join(url, "loss.png"), picture, "loss-curve", "Loss and held-out retrieval accuracy")
    storage.delete(storage.join(url, "training.pt"))
    return url


def load_pairs(patches: str, features: str, params: TrainParams) -> Pairs:
    """Places, features and which of them are held out."""
    manifest = open_store(patches).manifest
    lonlat = manifest[["lon", "lat"]].to_numpy("f8")
    held_out = hold_out(lonlat, BLOCK_DEGREES, params.held_out_share, params.seed)
    if (~held_out).sum() < 2:
        raise UserError(f"{patches} has {len(lonlat)} patches: training needs at least some hundred, sample more")
    return Pairs(lonlat, read_features(features), held_out)


def new_trainer(pairs: Pairs, params: TrainParams) -> Trainer:
    """A trainer with initial weights from the seed."""
    torch.manual_seed(params.seed)
    location = LocationEncoder(
        params.degree, params.hidden, dim=params.dim, dropout=params.dropout, smoothness=params.smoothness
    )
    projection = ImageProjection(pairs.features.shape[1], params.dim).fit(pairs.features[~pairs.held_out])
    return Trainer(location, projection, params.schedule())


def fit(trainer: Trainer, pairs: Pairs, state: str) -> list[dict[str, Any]]:
    """Trains to the end of the schedule; `state` is the URL of what a killed run goes on from.

    Returns:
        The progress after every twentieth of the steps.
    """
    history: list[dict[str, Any]] = _resume(trainer, state)
    steps = trainer.schedule.steps
    every = max(1, steps // REPORTS)
    with progress("train", steps) as advance:
        advance(trainer.step_number)

        def report(now: Progress) -> None:
            advance(now.step - (history[-1]["step"] if history else 0))
            history.append(vars(now))
            log().info("%s", now)
            if now.step % (every * max(1, SAVE_EVERY // every)) == 0 and now.step < steps:
                storage.write(state, dump_state({"trainer": trainer.state(), "history": history}))

        train(trainer, pairs, every, report)
    return history


def _resume(trainer: Trainer, state: str) -> list[dict[str, Any]]:
    if not storage.exists(state):
        return []
    saved = parse_state(storage.read(state))
    trainer.restore(saved["trainer"])
    log().info("training goes on from step %d", trainer.step_number)
    return saved["history"]
