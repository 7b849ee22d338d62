"""Holds what the checks of a product found: in the audit of a database, in the validation of a grid."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Result of one check."""

    check: str
    """What was checked."""
    passed: bool | None
    """Whether the check passed; None where it could not be made."""
    detail: str
    """The numbers, or why the check could not be made."""
