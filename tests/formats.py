"""A scene of GeoTIFFs rewritten as each archive stores it, with the item that tells of it."""

import re
from pathlib import Path

import numpy as np
import rasterio
import xarray as xr
import zarr
from zarr.codecs import BloscCodec, ZstdCodec

from tasks.core.sentinel2.items import NAMES

METRES = {"B02": 10, "B03": 10, "B04": 10, "B08": 10, "B01": 60, "B09": 60}  # pixels that the names tell
ZARR = "application/vnd.zarr"


def metres(band):
    return METRES.get(band, 20)


def read(path):
    """Pixels, CRS and transform of a file."""
    with rasterio.open(path) as source:
        return source.read(1), source.crs, source.transform


def jp2(path, source, **options):
    """Writes a file as lossless JPEG 2000."""
    data, crs, grid = read(source)
    size = {"height": data.shape[0], "width": data.shape[1], "count": 1, "dtype": data.dtype}
    placed = {"crs": crs, "transform": grid}
    how = {"QUALITY": "100", "REVERSIBLE": "YES", "blockxsize": 128, "blockysize": 128} | options
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", driver="JP2OpenJPEG", **size, **placed, **how) as target:
        target.write(data, 1)
    return path


def array(root, path, source, version, name=None, **encoding):
    """Writes a file as an array of Zarr, with its coordinates beside it."""
    data, crs, grid = read(source)
    group, _, name = path.rpartition("/")
    rows, columns = data.shape
    axes = {"x": grid.c + grid.a * (np.arange(columns) + 0.5), "y": grid.f + grid.e * (np.arange(rows) + 0.5)}
    band = xr.DataArray(
        data, dims=("y", "x"), attrs={"proj:epsg": crs.to_epsg(), "proj:transform": [1, 0, 0, 0, -1, 0]}
    )
    packed = {"compressors": BloscCodec(cname="zstd", shuffle="bitshuffle")} if version == 3 else {}
    xr.Dataset({name: band}, axes).to_zarr(
        root, group=group, mode="a", zarr_format=version, consolidated=False, encoding={name: packed | encoding}
    )


def copernicus(folder, files, url):
    """JPEG 2000, each band in every size from its own on: of the copies no pixel is the band's."""
    found = {}
    for n, (band, path) in enumerate(files.items()):
        name = f"{band}_{metres(band)}m"
        jp2(folder / f"{name}.jp2", path, **({"TLM": "YES"} if n % 2 else {}))
        found[name] = asset(f"{url}/{name}.jp2", "image/jp2", metres(band), ["data", "sampling:original"], band)
        if band == "B01":
            jp2(folder / "B01_20m.jp2", files["SCL"])
            copied = ["data", "reflectance", "sampling:upsampled", "gsd:20m"]
            found["B01_20m"] = asset(f"{url}/B01_20m.jp2", "image/jp2", 20, copied, band)
    return found


def eopf(folder, files, url):
    """Zarr of version 2, an array for each band; B01 has a copy of 20 m, and the original in a group alone."""
    root, found = folder / "a.zarr", {}
    for band, path in files.items():
        where = place(band)
        array(root, where, path, 2, chunks=(300, 300))
        if band != "B01":
            key = f"{band}_{metres(band)}m"
            found[key] = asset(f"{url}/a.zarr/{where}", ZARR, metres(band), ["data", "reflectance"], band)
    if "B01" in files:
        array(root, "measurements/reflectance/r20m/b01", files["SCL"], 2)
        copied = f"{url}/a.zarr/measurements/reflectance/r20m/b01"
        found["B01_20m"] = asset(copied, ZARR, 20, ["data", "reflectance"], "B01")
        group = f"{url}/a.zarr/measurements/reflectance/r60m"
        found["SR_60m"] = asset(group, ZARR, 60, ["data", "reflectance", "dataset"], "B01", "B09")
    return found


def groups(folder, files, url):
    """Zarr of version 3 in shards, a group for each pixel size, bands in lower case."""
    root, found = folder / "a.zarr", {}
    for band, path in files.items():
        prefix = "SCL" if band == "SCL" else "SR"
        key = f"{prefix}_{metres(band)}m"
        array(root, f"{key}/{band.lower()}", path, 3, chunks=(64, 64), shards=(256, 256))
        told = found.setdefault(key, asset(f"{url}/a.zarr/{key}", f"{ZARR}; version=3", metres(band), ["data"]))
        told |= {"bands": [*told["bands"], {"name": band.lower()}], "zarr:node_type": "group"}
    return found


def multiscale(folder, files, url):
    """Zarr of version 3, one asset of all reflectances, and a scene classification that the item does not name."""
    root = folder / "a.zarr"
    for band, path in files.items():
        array(root, place(band), path, 3, chunks=(128, 128), compressors=ZstdCodec())
    bands = [band.lower() for band in files if band != "SCL"]
    href = f"{url}/a.zarr/measurements/reflectance"
    return {"reflectance": asset(href, f"{ZARR}; version=3; profile=multiscales", 10, ["reflectance"], *bands)}


def place(band):
    """Path of an array in a product of EOPF."""
    if band == "SCL":
        return "conditions/mask/l2a_classification/r20m/scl"
    return f"measurements/reflectance/r{metres(band)}m/{band.lower()}"


def cogs(folder, files, url):
    """The files as they are, by colour."""
    found = {}
    for band, path in files.items():
        (folder / Path(path).name).write_bytes(Path(path).read_bytes())
        kind = "image/tiff; application=geotiff; profile=cloud-optimized"
        found[NAMES[band]] = asset(f"{url}/{Path(path).name}", kind, metres(band), ["data"])
    return found


def asset(href, kind, size, roles, *bands):
    return {"href": href, "type": kind, "gsd": size, "roles": roles, "bands": [{"name": band} for band in bands]}


SHAPES = {"cog": cogs, "jp2": copernicus, "eopf": eopf, "groups": groups, "multiscale": multiscale}


def item(scene, assets):
    """The item of a scene with other assets."""
    kept = {key: value for key, value in scene.item.items() if key not in ("assets", "links")}
    return kept | {"assets": assets, "links": [], "id": re.sub("_L2A$", "", scene.item["id"])}


def open_array(folder, path):
    """An array, by Zarr alone."""
    return zarr.open_array(str(folder / path), mode="r")
