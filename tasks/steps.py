"""Makes the steps Prefect tasks: plain functions first, shown in the UI where there is a server.

Steps take and return URLs and parameters, never arrays. Prefect caches nothing: every step derives what is left to do
from what is stored, so a step that is retried does only the rest.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.runtime import deployment
from prefect.tasks import exponential_backoff

from infra import clusters, workers
from infra.errors import may_pass
from tasks import ablate, encode, evaluate, publish, sample, train
from tasks.artifacts import reported
from tasks.database import join
from tasks.release import promotion, versions
from tasks.units import Work, in_run, note

R = TypeVar("R")

RETRIES = 3  # retries of a step, which outlive an outage of some minutes
BACKOFF = 30  # seconds before the first retry; each wait is twice the one before
JITTER = 1.0  # share of a wait that is added at random, so that steps that failed together do not retry together


def may_mend(_: Task, __: TaskRun, state: State) -> bool:
    """Tells whether a failed step is retried: only in a deployment, and where the cause may pass without the user."""
    error = state.result(raise_on_failure=False)
    return deployment.id is not None and may_pass(error)


def on_cluster(step: Callable[..., str]) -> Callable[..., str]:
    """Wraps a step so that it connects to the cluster at each attempt: a retry can use a new scheduler."""

    def attempt(*arguments: Any) -> str:
        with clusters.connect() as client:
            url = step(client, *arguments)
            limit, most = workers.peak(client)
            note(Work("memory of a worker", None, done=most, limit=limit or None, bytes=True))
            return url

    attempt.__name__, attempt.__qualname__, attempt.__doc__ = step.__name__, step.__qualname__, step.__doc__
    return attempt


_task: Any = partial(
    task,
    cache_policy=NO_CACHE,
    retries=RETRIES,
    retry_delay_seconds=exponential_backoff(BACKOFF),
    retry_jitter_factor=JITTER,
    retry_condition_fn=may_mend,
)


def _step(name: str, function: Callable[..., R]) -> Callable[..., R]:
    """Makes a function a task of the run that calls it; outside a run, since no server is set, it stays plain."""
    seen = _task(function, name=name)

    @wraps(function)
    def step(*arguments: Any, **options: Any) -> R:
        return (seen if in_run() else function)(*arguments, **options)

    return step


sample_patches = _step("sample patches", reported(on_cluster(sample.sample_patches)))
train_model = _step("train model", reported(on_cluster(train.train_model)))
encode_database = _step("encode database", reported(on_cluster(encode.encode_database)))
join_databases = _step("join databases", reported(join.join_databases))
publish_grid = _step("publish grid", reported(on_cluster(publish.publish_grid)))
evaluate_database = _step("evaluate database", reported(evaluate.evaluate_database))
ablate_database = _step("ablate database", reported(ablate.ablate_database))
promote_evaluated = _step("promote grid", promotion.promote_evaluated)
prune_grids = _step("prune grids", versions.prune)
