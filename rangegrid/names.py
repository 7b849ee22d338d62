"""Tells where another installed package has taken the name of one of this project's import packages."""

from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

OURS = {"flows": "cli.py", "tasks": "cards.py", "infra": "settings.py"}  # a file that each of our packages has


def strangers() -> dict[str, str]:
    """Returns the names that are not ours here, with the package that has them, or the folder."""
    return {name: _owner(name) for name, file in OURS.items() if not _is_ours(name, file)}


def _is_ours(name: str, file: str) -> bool:
    return any(Path(folder, file).exists() for folder in _folders(name))


def _folders(name: str) -> list[str]:
    spec = find_spec(name)
    return list(spec.submodule_search_locations or []) if spec else []


def _owner(name: str) -> str:
    owners = sorted({one for one in packages_distributions().get(name, []) if one != "rangegrid"})
    return ", ".join(owners or _folders(name)) or "no package"


def check() -> None:
    """Refuses an environment in which another package owns one of our names.

    Raises:
        ImportError: It does.
    """
    if found := strangers():
        told = "; ".join(f"{name} is of {owner}" for name, owner in found.items())
        raise ImportError(
            f"rangegrid has the import packages {', '.join(OURS)}, and here {told}: install rangegrid into an "
            "environment of its own"
        )
