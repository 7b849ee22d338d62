"""Defines the flow `train`, which trains the location encoder."""

import os

from prefect import flow

from flows.deployed import HOUR, made
from flows.inputs import settle
from flows.started import start
from tasks import train as plain
from tasks.params import TrainParams
from tasks.steps import train_model


@flow(name="train", flow_run_name="train on {patches}", timeout_seconds=24 * HOUR)
def train(patches: str, params: TrainParams = TrainParams()) -> str:
    """Trains the location encoder by contrastive learning against the images of a patch store.

    Args:
        patches: URL of the patches, or newest:LINE.
        params: Architecture and training schedule.

    Returns:
        The URL of the checkpoint.
    """
    return made(train_model(*settle(patches=patches, params=params)))


def run(patches: str, params: TrainParams) -> str | None:
    """Runs the flow and returns the URL of its checkpoint.

    Under torchrun, only the first process runs the flow. The others train along, and return nothing.
    """
    if int(os.environ.get("RANK", "0")) == 0:
        return start(train, patches, params)
    plain.train_model(None, patches, params)
    return None
