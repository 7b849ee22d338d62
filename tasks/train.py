"""The train step: image features once, then the contrastive location encoder."""

from typing import Any

import torch
from distributed import Client

from infra import storage
from infra.errors import UserError
from tasks.artifacts import keep_picture
from tasks.cards import is_finished, product_url, read_card
from tasks.checkpoint import dump_state, parse_state, save_checkpoint
from tasks.core.contrastive import ImageProjection, Pairs, Progress, Schedule, Trainer, hold_out, train
from tasks.core.location import LocationEncoder
from tasks.features import encode_features, open_encoder, open_store, read_features
from tasks.params import TrainParams
from tasks.pictures import loss_curve
from tasks.units import log, progress

BLOCK_DEGREES = 10
REPORTS = 20  # points of the loss curve
SAVE_EVERY = 100  # steps: what a killed run repeats at most, some seconds


def schedule(params: TrainParams) -> Schedule:
    """The core's schedule, with a tenth of the steps, at most 100, as warm-up."""
    warmup = min(100, params.steps // 10)
    return Schedule(params.steps, params.batch, params.lr, params.weight_decay, warmup, params.seed)


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
    return Trainer(location, projection, schedule(params))


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
