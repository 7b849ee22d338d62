"""Decides about a promotion: a product must be no worse than the current latest, and better than coordinates.

The gate compares score cards on blocked splits alone, since random splits leak between neighbours.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator

from tasks.cards import Part

CARD = "scorecard.json"
BASELINE = "coordinates"
COMPARABLE = ("n", "block_degrees", "folds", "labels")  # what two cards must have in common on a task


def _scored(value: Any) -> Any:
    return math.nan if value is None else value


class Row(Part):
    """The scores of one embedder on one task."""

    task: str
    """Its name."""
    embedder: str
    """Its name."""
    metric: str = ""
    """Name of the metric."""
    blocked: Annotated[float, BeforeValidator(_scored)] = math.nan
    """The score on blocked splits; NaN where there is none."""
    n: Any = None
    """Number of places."""
    block_degrees: Any = None
    """Side of the blocks in degrees."""
    folds: Any = None
    """Number of folds."""
    labels: Any = None
    """Digest of the labels."""


class ScoreCard(Part):
    """The scores of a product and of the embedders beside it."""

    product: str
    """Name of the embedder that is the product."""
    scores: tuple[Row, ...]
    """All embedders on all tasks."""


@dataclass(frozen=True)
class Refusal:
    """A reason against promoting a product."""

    task: str
    """Name of the task."""
    by: float | None
    """By how much the score falls short; None where scores cannot be compared."""
    reason: str
    """The reason in a sentence."""

    def __str__(self) -> str:
        return self.reason


def gate(new: ScoreCard, current: ScoreCard | None, margin: float) -> list[Refusal]:
    """Returns the reasons against promoting a product; promote it where there are none.

    Args:
        new: Its score card.
        current: The card of the product in force; none, if there is none yet.
        margin: What a score may fall by on any task.

    Returns:
        A refusal per task that fell by more than the margin, that cannot be compared, or on which the product is not
        better than raw coordinates.
    """
    ours, base = rows_of(new, new.product), rows_of(new, BASELINE)
    if not ours:
        return [Refusal("", None, f"the score card has no scores of its product, {new.product!r}: evaluate it")]
    refusals = [found for task, row in ours.items() if (found := _against_baseline(row, base.get(task)))]
    if current is not None:
        theirs = rows_of(current, current.product)
        refusals += [found for task, row in theirs.items() if (found := _against_current(ours.get(task), row, margin))]
    return refusals


def rows_of(card: ScoreCard, embedder: str) -> dict[str, Row]:
    """Returns an embedder's rows with scores, by task."""
    return {row.task: row for row in card.scores if row.embedder == embedder and not math.isnan(row.blocked)}


def _against_baseline(row: Row, base: Row | None) -> Refusal | None:
    task = row.task
    if base is None:
        return Refusal(task, None, f"{task}: {BASELINE} were not scored, so that nothing shows what the product adds")
    short = base.blocked - row.blocked
    if short < 0:
        return None
    return Refusal(
        task,
        short,
        f"{task}: blocked {row.metric} {row.blocked:.4f} is not above the {base.blocked:.4f} of {BASELINE}, "
        f"short by {short:.4f}",
    )


def _against_current(row: Row | None, current: Row, margin: float) -> Refusal | None:
    task = current.task
    if row is None:
        return Refusal(task, None, f"{task}: the product in force was scored on it, this one was not: evaluate it too")
    for name in COMPARABLE:
        ours, theirs = getattr(row, name), getattr(current, name)
        if ours != theirs:
            reason = f"{name} is {ours}, and was {theirs}: evaluate both on the same places and blocks"
            return Refusal(task, None, f"{task}: {reason}")
    fell = current.blocked - row.blocked
    if fell <= margin:
        return None
    return Refusal(
        task,
        fell,
        f"{task}: blocked {row.metric} fell from {current.blocked:.4f} to {row.blocked:.4f}, by {fell:.4f}, "
        f"more than the margin of {margin:g}",
    )
