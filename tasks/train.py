"""Runs the train step: computes image features once, then trains one or several location encoders."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from distributed import Client

from infra import storage
from tasks.artifacts import keep_picture
from tasks.cards import is_finished, product_url, read_card
from tasks.core.contrastive import process
from tasks.core.ensemble import together
from tasks.core.training import held_out_accuracy
from tasks.model.checkpoint import save_checkpoint
from tasks.model.features import encode_features, features_url, identity, open_encoder
from tasks.model.fitting import choose_device, fit, new_trainer, split, told
from tasks.model.members import Job, Trained, in_turn, side_by_side, wait_for_all
from tasks.newest import inherit
from tasks.params import TrainParams
from tasks.plots.charts import loss_curve
from tasks.products import MemberFacts, PatchesCard

PATIENCE = timedelta(days=7)  # how long the other processes wait for the first, which encodes the features
NOT_CONTENT = {"device", "save_every"}  # parameters that do not change the result
OF_OTHERS = {"harmonics": {"sites", "tokens"}, "tessellation": {"degree", "smoothness"}}  # not used by this one
ADDED = {
    "members",
    "jitter_degrees",
    "location",
}  # parameters that came later: the default, as it always was, is not told


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
    made_of = {"patches": source.fingerprint, **_decisive(params)}
    url = product_url("checkpoints", made_of)
    if is_finished(url):
        _clear(url)  # of what a run left that was killed after its card
        inherit(url, patches)
        return url
    with processes(params.device) as device:
        split(patches, params)
        if client is not None:
            encode_features(client, patches, params.encoder, params.views)
        wait_for_all()
        job = Job(url, patches, params, device)
        if params.members == 1:
            trained = [_train_one(job)]
        elif client is not None and process()[1] == 1:
            trained = side_by_side(client, job)
        else:
            trained = in_turn(job)
        if client is not None:
            _save(job, trained, source, made_of)
            inherit(url, patches)
            _clear(url)
    return url


def _decisive(params: TrainParams) -> dict[str, Any]:
    """Returns the parameters that decide the result, with the digest of the image encoder's weights for their path."""
    untold = {name for name in ADDED if getattr(params, name) == TrainParams.model_fields[name].default}
    return params.model_dump(exclude=NOT_CONTENT | untold | OF_OTHERS[params.location]) | {
        "encoder": identity(params.encoder)
    }


def _clear(url: str) -> None:
    """Deletes training states, and the weights of members that are in the checkpoint."""
    for name in storage.names(url):
        if name.endswith(".pt"):
            storage.delete(storage.join(url, name))


def _train_one(job: Job) -> Trained:
    """Trains the only member."""
    pairs = job.pairs()
    trainer = new_trainer(pairs, job.params, job.device)
    with told():
        fit(trainer, pairs, storage.join(job.url, "training.pt"), job.params.save_every)
    return Trained(trainer, job.params.seed)


def _save(job: Job, trained: list[Trained], source: PatchesCard, made_of: dict[str, Any]) -> None:
    """Stores the loss curve and the checkpoint, with its card last, as completion marker."""
    picture = loss_curve([one.facts["history"] for one in trained], "Contrastive training", source.attribution)
    below = "InfoNCE loss, and recall@1 % on held-out pairs"
    keep_picture(storage.join(job.url, "loss.png"), picture, "loss-curve", below)
    features = features_url(job.patches, job.params.encoder, job.params.views)
    location, projection = together([one.trainer for one in trained])
    if len(trained) == 1:
        facts = trained[0].facts
    else:
        all_of_them = {"accuracy": held_out_accuracy(job.pairs(), location, projection)}
        facts = {"metrics": all_of_them, "members": [MemberFacts(seed=one.seed, **one.facts) for one in trained]}
    save_checkpoint(
        job.url,
        location.cpu(),
        projection.cpu(),
        open_encoder(features, job.patches, job.params.encoder.name),
        patches=source.fingerprint,
        attribution=source.attribution,
        line=source.line,
        made_of=made_of,
        **facts,
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
