"""Trains several location encoders of one recipe: side by side on the cluster, or one after the other under torchrun.

Each is a unit of work. It resumes from its own state, and leaves its weights as one object.
"""

import secrets
import threading
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from distributed import Client, get_worker, wait

from infra import storage
from tasks.core.contrastive import process
from tasks.core.training import Pairs, Trainer
from tasks.model.checkpoint import dump_state, parse_state
from tasks.model.features import StoredFeatures, features_url
from tasks.model.fitting import choose_device, fit, new_trainer, resume, split, told, walk
from tasks.params import TrainParams
from tasks.units import RETRIES, log, progress

SEEDS = 1 << 32  # the range of seeds
ALONE = threading.Lock()  # PyTorch's random numbers belong to the process, so one member is trained at a time in each


def seeded(params: TrainParams, number: int) -> TrainParams:
    """Returns the parameters of a member, which has a seed of its own."""
    return params.model_copy(update={"seed": (params.seed + number) % SEEDS})


@dataclass(frozen=True)
class Job:
    """What every member of a checkpoint needs to be trained."""

    url: str
    """URL of the checkpoint."""
    patches: str
    """URL of the patches."""
    params: TrainParams
    """The parameters, with the seed of the first member."""
    device: str = "auto"
    """Where to train."""

    def state(self, number: int) -> str:
        """Returns the URL of a member's training state."""
        return storage.join(self.url, f"training-{number}.pt")

    def finished(self, number: int) -> str:
        """Returns the URL of a member that is trained."""
        return storage.join(self.url, f"member-{number}.pt")

    def pairs(self) -> Pairs:
        """Opens the pairs, with the same ones held out for all members."""
        features = features_url(self.patches, self.params.encoder, self.params.views)
        lonlat, held_out = split(self.patches, self.params)
        return Pairs(lonlat, StoredFeatures(features, self.params.shuffle), held_out)


@dataclass(frozen=True)
class Trained:
    """A member after its training."""

    trainer: Trainer
    """Its weights, and what was measured."""
    seed: int
    """Its seed."""

    @property
    def facts(self) -> dict[str, Any]:
        """Returns what was measured, for a card."""
        return {"metrics": vars(self.trainer.result), "history": [vars(now) for now in self.trainer.history]}


def in_turn(job: Job) -> list[Trained]:
    """Trains the members one after the other, in all processes of a group together."""
    for number in range(job.params.members):
        if not storage.exists(job.finished(number)):
            pairs = job.pairs()
            trainer = new_trainer(pairs, seeded(job.params, number), job.device)
            with told():
                fit(trainer, pairs, job.state(number), job.params.save_every, f"train {_name(number)}")
            if process()[0] == 0:
                _finish(job, number, trainer)
        wait_for_all()
    return _collect(job)


def side_by_side(client: Client, job: Job) -> list[Trained]:
    """Trains the members on the cluster, as units, and shows the steps of all of them."""
    members, steps, topic = job.params.members, job.params.steps, f"training {secrets.token_hex(8)}"
    left = [number for number in range(members) if not storage.exists(job.finished(number))]
    events: SimpleQueue[tuple[int, int, str]] = SimpleQueue()
    client.subscribe_topic(topic, lambda event: events.put(event[1]["told"]))
    at = dict.fromkeys(left, 0)
    with progress("train", members * steps, (members - len(left)) * steps) as advance:
        futures = client.map(partial(train_member, job, topic), left, pure=False, retries=RETRIES)
        try:
            while _running(futures) or not events.empty():
                while not events.empty():
                    number, step, note = events.get()
                    advance(step - at[number], f"{_name(number)}: {note}")
                    log().info("%s, step %d of %d: %s", _name(number), step, steps, note)
                    at[number] = step
            client.gather(futures)
        except BaseException:
            client.cancel(futures)
            raise
        finally:
            client.unsubscribe_topic(topic)
    return _collect(job)


def _running(futures: list[Any], seconds: float = 0.5) -> bool:
    """Waits a moment, and tells whether a unit is at work still."""
    try:
        return bool(wait(futures, timeout=seconds).not_done)
    except TimeoutError:
        return True


def train_member(job: Job, topic: str, number: int) -> None:
    """Trains a member in a worker, tells the topic how it stands, and stores its weights as one object."""
    with ALONE, told():
        if storage.exists(job.finished(number)):
            return
        pairs = job.pairs()
        trainer = new_trainer(pairs, seeded(job.params, number), choose_device(job.params.device))
        resume(trainer, job.state(number))
        for note in walk(trainer, pairs, job.state(number), job.params.save_every):
            if note:
                get_worker().log_event(topic, {"told": (number, trainer.step_number, note)})
        _finish(job, number, trainer)


def _finish(job: Job, number: int, trainer: Trainer) -> None:
    """Stores a member that is trained, and deletes the state that it resumed from."""
    storage.write(job.finished(number), dump_state(trainer.state()))
    storage.delete(job.state(number))


def _collect(job: Job) -> list[Trained]:
    """Reads the members that were trained."""
    pairs, trained = job.pairs(), []
    for number in range(job.params.members):
        trainer = new_trainer(pairs, seeded(job.params, number))
        trainer.restore(parse_state(storage.read(job.finished(number)), job.finished(number)))
        trained.append(Trained(trainer, seeded(job.params, number).seed))
    return trained


def _name(number: int) -> str:
    return f"member {number + 1}"


def wait_for_all() -> None:
    """Waits for the other processes of the group, where there is one."""
    if process()[1] > 1:
        torch.distributed.barrier()
