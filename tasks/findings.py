"""What a check of a product found: of a database's audit, of a grid's validation."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One check."""

    check: str
    """What was checked."""
    passed: bool | None
    """The result; none where it could not be checked."""
    detail: str
    """The numbers, or why it could not be checked."""
