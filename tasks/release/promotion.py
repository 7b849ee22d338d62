"""Promotes a version to the latest of its line, unless it was rolled back or its scores are too low."""

from typing import Any

from prefect.events import emit_event

from infra import storage
from infra.errors import UserError
from tasks.cards import home_of, name_of, parse_card
from tasks.release import versions
from tasks.release.diff import drift
from tasks.release.gate import CARD, ScoreCard, gate
from tasks.units import in_run, log

DRIFTED, REFUSED = "rangegrid.grid.drifted", "rangegrid.grid.refused"  # events in `infra/automations.yaml`


def promote_evaluated(grid: str, margin: float, drift_alert: float) -> bool:
    """Makes a version the latest of its line if its score card is good enough.

    Args:
        grid: URL of its Zarr, beside which is its score card.
        margin: What the score of a task may fall by, against the latest version of its line.
        drift_alert: Drift from which an event is sent.

    Returns:
        Whether it is the latest now.

    Raises:
        UserError: It scores worse, by more than the margin, or no better than raw coordinates; or it was not evaluated.
    """
    since = versions.begin(grid)
    card = read_scores(grid)
    if card is None:
        raise UserError(f"{grid} has no score card: evaluate it first, with `rangegrid evaluate … --grid {grid}`")
    if since.grid and since.grid != grid:
        current = read_scores(since.grid)
    else:
        current = None
    if refusals := gate(card, current, margin):
        message = (
            f"{grid} is not promoted ({'; '.join(map(str, refusals))}): readers keep "
            f"{since.grid or 'nothing'}. To promote it all the same: `rangegrid grid promote {grid}`"
        )
        send(REFUSED, grid, {"message": message})
        raise UserError(message)
    return promote_unless_withdrawn(grid, since, drift_alert)


def read_scores(grid: str) -> ScoreCard | None:
    """Returns the score card beside a grid, or None where it was not evaluated.

    Raises:
        UserError: It is damaged.
    """
    url = storage.join(home_of(grid), CARD)
    if storage.exists(url):
        return parse_card(storage.read_json(url), ScoreCard, url)
    return None


def promote_unless_withdrawn(grid: str, since: versions.Pointer, drift_alert: float) -> bool:
    """Makes a version the latest, unless it was rolled back: a person decided that, and only a person may undo it."""
    if name_of(grid) in versions.read_pointer(since.line)[0].withdrawn:
        log().warning("%s was rolled back, and is not promoted again but by `rangegrid grid promote`", grid)
        return False
    if since.grid not in ("", grid):
        found = tell_drift(since.grid, grid, drift_alert)
    else:
        found = {}
    log().info("the latest grid of the line %s is %s", since.line, versions.promote(grid, since, found).grid)
    return True


def tell_drift(old: str, new: str, alert: float) -> dict[str, float]:
    """Measures the drift of the canaries, and sends an event where it is too large.

    It is sent before the promotion: a run that is killed between the two sends it again, where it would else be lost.

    Args:
        old: URL of the Zarr that readers have.
        new: URL of the one that they get.
        alert: Mean drift of a part from which it is too far.

    Returns:
        The drift; nothing, and a line in the log, where the two cannot be compared.
    """
    try:
        found = drift(old, new)
    except (UserError, OSError, ValueError, RuntimeError) as error:  # a broken old version does not stop the new one
        log().warning("drift was not measured: %s", error)
        return {}
    told = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in found.items())
    log().info("drift, 1 - cosine to %s: %s", old, told)
    if max(found["visual_mean"], found["location_mean"]) > alert:
        send_drifted(old, new, found, f"{told}; the alert is at {alert:g}")
    return found


def send_drifted(old: str, new: str, found: dict[str, float], told: str) -> None:
    """Reports the drift of the vectors in the log and by an event."""
    message = (
        f"its vectors turned from those of {old} ({told}): train again what was trained on those, or go back with "
        "`rangegrid grid rollback`"
    )
    log().warning("%s: %s", new, message)
    send(DRIFTED, new, {**found, "old": old, "message": message})


def send(event: str, grid: str, payload: dict[str, Any]) -> None:
    """Sends an event about a grid to the server of the run, if there is one."""
    if in_run():
        resource = {"prefect.resource.id": f"rangegrid.grid.{name_of(grid)}", "prefect.resource.name": grid}
        emit_event(event, resource, payload=payload)
