"""Makes the attributes that other tools read: CF, and Zarr conventions `geoemb:`, `proj:`, `spatial:`, multiscales.

Sources: the conventions' own schemas, github.com/geo-embeddings/embeddings-zarr-convention and
github.com/zarr-conventions; tests hold a grid to them.
"""

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import numpy as np
import zarr_cm
from numpy.typing import NDArray
from zarr_cm import ConventionMetadataObject as Convention

from tasks.core.earth.grid import GridSpec
from tasks.core.earth.plane import Plane
from tasks.products import GridRecipe

Centres = NDArray[np.float64]
COPERNICUS = "Copernicus Sentinel"  # in the attribution of what was made from Sentinel-2
SENTINEL_2 = "https://dataspace.copernicus.eu/data-collections/copernicus-sentinel-data/sentinel-2"
LEGAL_NOTICE = "https://sentinels.copernicus.eu/documents/247904/690755/Sentinel_Data_Legal_Notice"
AXIS = ("standard_name", "units", "axis")  # what a coordinate's attributes tell
MODEL, SOURCE = (
    "model.json",
    "source.json",
)  # what `geoemb:` leads to, beside a grid: STAC of the encoder, of the images
GRID_MAPPING = "spatial_ref"  # the variable that holds the CRS, by the name that GDAL and rioxarray give it
PROJ = zarr_cm.convention_metadata("proj", revision="r3")  # these revisions are the conventions' v0.1
SPATIAL = zarr_cm.convention_metadata("spatial", revision="r3")
MULTISCALES = zarr_cm.convention_metadata("multiscales", revision="r2")
GEOEMB: Convention = {  # of another body, so zarr-cm does not know it
    "schema_url": "https://raw.githubusercontent.com/geo-embeddings/embeddings-zarr-convention/refs/tags/v1/schema.json",
    "spec_url": "https://github.com/geo-embeddings/embeddings-zarr-convention/blob/v1/README.md",
    "uuid": "61c12cc5-0e28-4056-999a-480cf3fb7e4c",
    "name": "geoemb:",
    "description": "Geoembeddings convention for geospatial embedding arrays with model provenance",
}


def placed(spec: GridSpec) -> dict[str, Any]:
    """Returns the attributes of the cells' places: CRS, box, transform."""
    (rows, columns), (wide, high) = spec.shape, spec.sides
    west, _, _, north = spec.box
    return {
        "Conventions": "CF-1.11",
        "zarr_conventions": [PROJ, SPATIAL],
        "proj:code" if spec.plane.code else "proj:wkt2": spec.plane.name,
        "spatial:dimensions": list(spec.plane.dims),
        "spatial:bbox": list(spec.box),
        "spatial:shape": [rows, columns],
        "spatial:transform": [wide / columns, 0.0, west, 0.0, -high / rows, north],
        "spatial:registration": "pixel",
    }


def spec_of(attrs: Mapping[str, Any], columns: int, tile: int = 1) -> GridSpec:
    """Returns the grid from the attributes that `placed` wrote."""
    west, south, east, north = attrs["spatial:bbox"]
    crs = attrs.get("proj:code") or attrs["proj:wkt2"]
    land = GridRecipe.model_validate(attrs.get("rangegrid:made_of", {})).land
    return GridSpec((east - west) / columns, tile, (west, south, east, north), crs, land)


def axes(spec: GridSpec) -> dict[str, Any]:
    """Returns the coordinates of the cells with their CRS, as CF asks and GDAL and rioxarray read it."""
    return referenced(spec.plane, spec.y, spec.x, placed(spec)["spatial:transform"])


def referenced(plane: Plane, rows: Centres, columns: Centres, transform: list[float]) -> dict[str, Any]:
    """Returns coordinates with their CRS: of each name the dimensions, the values and the attributes.

    Args:
        plane: The CRS.
        rows: Centres of the rows.
        columns: Centres of the columns.
        transform: The affine transform, as the convention `spatial:` has it.
    """
    y, x = plane.dims
    about = {axis["axis"]: {k: axis[k] for k in AXIS} for axis in plane.definition.cs_to_cf()}
    wide, _, west, _, high, north = transform
    mapping = plane.definition.to_cf()
    mapping |= {"spatial_ref": mapping["crs_wkt"], "GeoTransform": f"{west} {wide} 0.0 {north} 0.0 {high}"}
    return {y: (y, rows, about["Y"]), x: (x, columns, about["X"]), GRID_MAPPING: ((), np.int64(0), mapping)}


def multiscale(spec: GridSpec, names: list[str]) -> dict[str, Any]:
    """Returns the attributes of the group of a grid and its coarser levels, each with half the rows."""
    shaped = "spatial:shape", "spatial:transform"
    layout: list[dict[str, Any]] = []
    for level, name in enumerate(names):
        where = placed(replace(spec, step=spec.step * 2**level))
        if level:
            source = {"derived_from": names[level - 1], "transform": {"scale": [2.0, 2.0]}}
        else:
            source = {}
        layout.append({"asset": name} | source | {key: where[key] for key in shaped})
    attrs = {key: value for key, value in placed(spec).items() if key not in shaped}
    return declared(attrs, MULTISCALES) | {"multiscales": {"layout": layout, "resampling_method": "average"}}


def embedding(spec: GridSpec, parts: dict[str, int], dtype: str) -> dict[str, Any]:
    """Returns the attributes of the vectors; `provenance` adds what made them.

    Args:
        spec: The grid.
        parts: Length of each part of a vector, in order: visual parts, the location part, those of other encoders.
        dtype: How a number is stored.
    """
    edges = np.cumsum([0, *parts.values()]).tolist()
    named = {name: list(edge) for name, edge in zip(parts, pairwise(edges), strict=True)}
    return {
        "geoemb:type": "pixel",
        "geoemb:dimensions": edges[-1],
        "geoemb:data_type": dtype,
        "geoemb:gsd": spec.gsd,
        **({"geoemb:spatial_layout": "global"} if spec.is_globe else {}),
        "geoemb:dimensions_axis": "embedding_dim",
        "geoemb:blocks": {"visual": [0, named["location"][0]]} | named,
    }


def provenance(attribution: str) -> dict[str, Any]:
    """Returns the attributes of provenance: the encoder, the source, the code.

    Encoder and source are named relative to the Zarr, by what lies beside it, since others see no more of a producer's.

    Args:
        attribution: What the database's card says of its source.
    """
    terms = {"license": LEGAL_NOTICE} if COPERNICUS in attribution else {}
    return terms | {
        "geoemb:model": f"../{MODEL}",
        "geoemb:source_data": [f"../{SOURCE}"],
        "geoemb:build_version": f"rangegrid {version('rangegrid')}",
        "attribution": attribution,
    }


def declared(attrs: dict[str, Any], *conventions: Convention) -> dict[str, Any]:
    """Returns the attributes with more conventions declared."""
    return attrs | {"zarr_conventions": [*attrs.get("zarr_conventions", []), *conventions]}
