"""Embeds places and reads published grids: what users of the field need.

    from rangegrid import load, open_grid

    vectors = load("checkpoint", "database").embed([[2.35, 48.86]])
    stored = open_grid("s3://bucket/grids/world/v1.zarr").sample([[2.35, 48.86]])

Coordinates are degrees in the order (lon, lat). Everything else of the project (`flows`, `tasks`, `infra`) may change
without notice; these names stay.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rangegrid.api import Field, Grid, load, open_grid, sample

__all__ = ["Field", "Grid", "load", "open_grid", "sample"]


def __getattr__(name: str) -> Any:
    """Imports the public names when they are asked for, since PyTorch takes a while."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rangegrid import names

    names.check()
    from rangegrid import api

    return getattr(api, name)
