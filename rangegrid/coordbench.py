"""Encoders that torchgeo-bench's CoordBench loads: a field, or a published grid. It has to be installed beside.

In its model configuration: `target: rangegrid.coordbench.FieldLocationEncoder` with `checkpoint` and `database`, or
`target: rangegrid.coordbench.GridLocationEncoder` with `grid`.
"""

from typing import Any

from torchgeo_bench.coordbench.models import LocationEncoder

from rangegrid.api import load, open_grid


class FieldLocationEncoder(LocationEncoder):
    """A checkpoint with its database."""

    name = "rangegrid-field"

    def __init__(
        self, checkpoint: str, database: str, method: Any = None, device: str = "cpu", batch_size: int = 8192
    ) -> None:
        """Loads the field."""
        super().__init__(device=device, batch_size=batch_size)
        self.field = load(checkpoint, database, method)

    def _encode(self, lon: Any, lat: Any, year: Any) -> Any:
        return self.field.encode(lon, lat)


class GridLocationEncoder(LocationEncoder):
    """A published grid. Places without a cell get NaN, which CoordBench leaves out."""

    name = "rangegrid-grid"

    def __init__(self, grid: str, device: str = "cpu", batch_size: int = 8192) -> None:
        """Opens the grid."""
        super().__init__(device=device, batch_size=batch_size)
        self.grid = open_grid(grid)

    def _encode(self, lon: Any, lat: Any, year: Any) -> Any:
        return self.grid.encode(lon, lat)
