"""Decides about a promotion: the images must add something, and scores be no worse than those of the current latest.

The gate compares score cards on blocked splits alone, since random splits leak between neighbours, and split by split
(`tasks.core.paired`). Over all tasks a product must be beyond noise above two embedders on the same places: the
location encoder, which has no images, and the product's own recipe with each image's values at another image. The
latter knows where images are, and not what they show: beside a weak location encoder that alone is worth a lot. The
mean over tasks shows far smaller differences than any task alone. A score has fallen where it is below the current
latest's by more than the margin, beyond noise: seeds of one training differ by some hundredths.

Former score cards have no scores of single splits. They are judged by their means, against raw coordinates; so is a
product of no more images than their values have components, of which no score tells what the images add.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator

from tasks.cards import Part
from tasks.core.paired import Difference, paired

CARD = "scorecard.json"
BASELINE, SHUFFLED, FORMER_BASELINE = "location encoder", "shuffled values", "coordinates"
COMPARABLE = ("n", "block_degrees", "folds", "fold_seeds", "labels")  # what two cards must have in common on a task


def _scored(value: Any) -> Any:
    return math.nan if value is None else value


def _each(value: Any) -> Any:
    return () if value is None else value


class Row(Part):
    """The scores of one embedder on one task."""

    task: str
    """Its name."""
    embedder: str
    """Its name."""
    places: str = ""
    """Name of the section: whose places it was scored on."""
    metric: str = ""
    """Name of the metric."""
    blocked: Annotated[float, BeforeValidator(_scored)] = math.nan
    """The score on blocked splits; NaN where there is none."""
    blocked_splits: Annotated[tuple[float, ...], BeforeValidator(_each)] = ()
    """The score on each blocked split; former cards have none."""
    n: Any = None
    """Number of places."""
    block_degrees: Any = None
    """Side of the blocks in degrees."""
    folds: Any = None
    """Number of folds."""
    fold_seeds: Any = None
    """How often the blocks were dealt to folds; None on former cards, which did it once."""
    labels: Any = None
    """Digest of the labels."""


class ScoreCard(Part):
    """The scores of a product and of the embedders beside it."""

    product: str
    """Name of the embedder that is the product."""
    scores: tuple[Row, ...]
    """All embedders on all tasks."""
    few_images: bool = False
    """Whether the database has no more images than their values have components. Values dealt to other images span the
    same then, and no score tells what the images add."""


@dataclass(frozen=True)
class Refusal:
    """A reason against promoting a product."""

    task: str
    """Name of the task; empty where it is about all of them."""
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
        margin: What a score may fall by, beyond noise, on any task and on their mean.

    Returns:
        A refusal where the product is not beyond noise above the location encoder or its own recipe with shuffled
        values, and for each task that fell, or cannot be compared.
    """
    ours = rows_of(new, new.product)
    if not ours:
        return [Refusal("", None, f"the score card has no scores of its product, {new.product!r}: evaluate it")]
    if all(row.blocked_splits for row in ours.values()) and not new.few_images:
        refusals = _against_baseline(new, ours)
    else:
        refusals = _against_coordinates(new, ours)
    if current is not None:
        refusals += _against_current(ours, rows_of(current, current.product), margin)
    return refusals


def rows_of(card: ScoreCard, embedder: str, places: str | None = None) -> dict[str, Row]:
    """Returns an embedder's rows with scores, by task; those on the places of one section, if it is named."""
    return {
        row.task: row
        for row in card.scores
        if row.embedder == embedder and not math.isnan(row.blocked) and places in (None, row.places)
    }


def _against_baseline(card: ScoreCard, ours: Mapping[str, Row]) -> list[Refusal]:
    """Returns what speaks against a product beside embedders that see no images, over all tasks.

    A card of a former version has no shuffled values of the product's recipe, and is judged without them.
    """
    places = next(iter(ours.values())).places
    base, shuffled = rows_of(card, BASELINE, places), rows_of(card, SHUFFLED, places)
    if missing := [task for task in ours if task not in base]:
        reason = f"{missing[0]}: the {BASELINE} was not scored on the same places, so that nothing shows what the "
        return [Refusal(missing[0], None, f"{reason}images add: evaluate it with its checkpoint and database")]
    against = {BASELINE: base} | ({SHUFFLED: shuffled} if ours.keys() <= shuffled.keys() else {})
    judged = (_not_above(ours, name, rows) for name, rows in against.items())
    return [refusal for refusal in judged if refusal]


def _not_above(ours: Mapping[str, Row], name: str, theirs: Mapping[str, Row]) -> Refusal | None:
    """Returns a refusal where a product is not beyond noise above another embedder, over all of its tasks."""
    found = pooled(ours, {task: theirs[task] for task in ours})
    if found.verdict == "above":
        return None
    reason = (
        f"over all tasks it is not above the {name} beyond noise (by {found.mean:+.4f}, interval {found.low:+.4f} to "
        f"{found.high:+.4f}), so that nothing shows what the images add"
    )
    return Refusal("", -found.mean, reason)


def _against_coordinates(card: ScoreCard, ours: Mapping[str, Row]) -> list[Refusal]:
    """Returns the tasks on which coordinates are as good, of a product with a former card or of few images."""
    base = rows_of(card, FORMER_BASELINE)
    return [found for task, row in ours.items() if (found := _below_coordinates(row, base.get(task)))]


def _below_coordinates(row: Row, base: Row | None) -> Refusal | None:
    task = row.task
    if base is None:
        return Refusal(
            task, None, f"{task}: {FORMER_BASELINE} were not scored, so that nothing shows what the product adds"
        )
    short = base.blocked - row.blocked
    if short < 0:
        return None
    return Refusal(
        task,
        short,
        f"{task}: blocked {row.metric} {row.blocked:.4f} is not above the {base.blocked:.4f} of {FORMER_BASELINE}, "
        f"short by {short:.4f}",
    )


def _against_current(ours: Mapping[str, Row], theirs: Mapping[str, Row], margin: float) -> list[Refusal]:
    """Returns the tasks that fell or cannot be compared, and the mean over tasks where that alone fell."""
    if {bool(row.blocked_splits) for row in (*ours.values(), *theirs.values())} == {True, False}:
        reason = "one of the two score cards is a former one, without the scores of splits: evaluate that grid again"
        return [Refusal("", None, f"{reason}, with `rangegrid evaluate … --grid`")]
    refusals = [fallen for task, row in theirs.items() if (fallen := _fallen(ours.get(task), row, margin))]
    if refusals or not all(row.blocked_splits for row in theirs.values()):
        return refusals
    found = pooled(ours, theirs)
    if not _fell(found, margin):
        return []
    reason = f"over all tasks blocked scores fell by {-found.mean:.4f}, more than the margin of {margin:g}"
    return [Refusal("", -found.mean, reason + _beyond(found))]


def _fallen(row: Row | None, current: Row, margin: float) -> Refusal | None:
    task = current.task
    if row is None:
        return Refusal(task, None, f"{task}: the product in force was scored on it, this one was not: evaluate it too")
    for name in COMPARABLE:
        ours, theirs = getattr(row, name), getattr(current, name)
        if ours != theirs:
            reason = f"{name} is {ours}, and was {theirs}: evaluate both on the same places and blocks"
            return Refusal(task, None, f"{task}: {reason}")
    found = _difference(row, current)
    if not _fell(found, margin):
        return None
    return Refusal(
        task,
        -found.mean,
        f"{task}: blocked {row.metric} fell from {current.blocked:.4f} to {row.blocked:.4f}, by {-found.mean:.4f}, "
        f"more than the margin of {margin:g}{_beyond(found)}",
    )


def _difference(row: Row, other: Row) -> Difference:
    """Returns the difference of two scores of a task; of former cards that of the means, without an interval."""
    if row.blocked_splits and other.blocked_splits:
        return paired(row.blocked_splits, other.blocked_splits, 1 / (row.folds - 1))
    fell = row.blocked - other.blocked
    return Difference(fell, fell, fell)


def pooled(ours: Mapping[str, Row], theirs: Mapping[str, Row]) -> Difference:
    """Returns the difference of the mean scores over tasks, from the mean of each split over them."""
    mine, other = (np.mean([rows[task].blocked_splits for task in theirs], axis=0) for rows in (ours, theirs))
    first = next(iter(theirs.values()))
    return paired(mine, other, 1 / (first.folds - 1))


def _fell(found: Difference, margin: float) -> bool:
    """Tells whether a fall is of more than the margin, beyond noise."""
    return found.high < -margin


def _beyond(found: Difference) -> str:
    """Returns the interval of a fall in words; nothing where there is none."""
    return f" and beyond noise (interval {found.low:+.4f} to {found.high:+.4f})" if found.low < found.high else ""
