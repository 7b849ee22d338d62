"""The last step of a version: it becomes the latest, unless a person or its own scores speak against it."""

from infra import storage
from infra.errors import UserError
from tasks import versions
from tasks.gate import CARD, Card, gate
from tasks.units import log
from tasks.updates import home_of


def promote_evaluated(grid: str, margin: float) -> bool:
    """Makes a version the latest if its score card is good enough.

    Args:
        grid: URL of its Zarr, beside which is its score card.
        margin: What the score of a task may fall by, against the version that is the latest now.

    Returns:
        Whether it is the latest now.

    Raises:
        UserError: It scores worse, by more than the margin, or no better than raw coordinates; or it was not evaluated.
    """
    since = versions.begin(grid)
    card = read_scores(grid)
    if card is None:
        raise UserError(f"{grid} has no score card: evaluate it first, with `rangegrid evaluate … --grid {grid}`")
    current = read_scores(since.grid) if since.grid and since.grid != grid else None
    if refusals := gate(card, current, margin):
        raise UserError(
            f"{grid} is not promoted ({'; '.join(map(str, refusals))}): readers keep "
            f"{since.grid or 'nothing'}. To promote it all the same: `rangegrid grid promote {grid}`"
        )
    return promote_unless_withdrawn(grid, since)


def read_scores(grid: str) -> Card | None:
    """The score card beside a grid, if it was evaluated."""
    url = storage.join(home_of(grid), CARD)
    return storage.read_json(url) if storage.exists(url) else None


def promote_unless_withdrawn(grid: str, since: versions.Pointer) -> bool:
    """Makes a version the latest, unless it was rolled back: that decision is a person's, and so is its end."""
    if versions.name_of(grid) in versions.read_pointer()[0].withdrawn:
        log().warning("%s was rolled back, and is not promoted again but by `rangegrid grid promote`", grid)
        return False
    log().info("the latest grid is %s", versions.promote(grid, since).grid)
    return True
