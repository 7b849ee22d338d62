"""Windows of cloud-optimised GeoTIFFs in their own projection, by few requests."""

import random
import time
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

import numpy as np
import rasterio
from numpy.typing import NDArray
from pyproj import Transformer
from rasterio.errors import RasterioError
from rasterio.windows import Window

from infra.catalogs import signed, unsigned
from infra.errors import UserError
from infra.settings import settings

ATTEMPTS = 4


class UnreadableAsset(UserError):
    """An asset that stays unreadable after all attempts."""


def gdal_options() -> dict[str, str | int | bool | None]:
    """GDAL's options for many small windows over HTTP, with the credentials of the moment."""
    where = settings()
    options: dict[str, str | int | bool | None] = {
        "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
        "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",
        "GDAL_HTTP_MAX_RETRY": 3,
        "GDAL_HTTP_RETRY_DELAY": 0.5,  # type: ignore[dict-item]
        "GDAL_CACHEMAX": 64,
        "GDAL_INGESTED_BYTES_AT_OPEN": 32_768,
        "CPL_VSIL_CURL_NON_CACHED": "/vsicurl/:/vsis3/",  # GDAL caches errors per URL: a retry would see them
        "AWS_REGION": where.region,
    }
    if where.s3_endpoint:
        parts = urlsplit(where.s3_endpoint)
        options |= {
            "AWS_S3_ENDPOINT": parts.netloc,
            "AWS_HTTPS": "YES" if parts.scheme == "https" else "NO",
            "AWS_VIRTUAL_HOSTING": "FALSE",
        }
    return options


def gdal_path(href: str) -> str:
    """GDAL's name for a href."""
    parts = urlsplit(href)
    if parts.scheme == "s3":
        return f"/vsis3/{parts.netloc}{parts.path}"
    if parts.scheme in ("http", "https"):
        return f"/vsicurl/{href}"
    if parts.scheme in ("", "file"):
        return unquote(parts.path)
    raise UserError(f"the asset {unsigned(href)} has the scheme {parts.scheme!r}: s3, https and file are read")


def read_windows(href: str, lonlat: NDArray[np.float64], pixels: int, resolution_m: float) -> list[NDArray | None]:
    """Square windows of one asset around places, with one open.

    A coarser asset (20 and 60 m bands, the scene classification) is brought to `resolution_m` by its nearest
    pixels, on the pixel grid of the finest band: nothing is blended, so no nodata is, and all bands register.
    A window that crosses the edge is refused, never padded.

    Args:
        href: The asset, unsigned.
        lonlat: (n, 2) places in degrees.
        pixels: Side of the window.
        resolution_m: Pixel size of the window in metres.

    Returns:
        One (pixels, pixels) array per place, or None where the window leaves the asset.

    Raises:
        UnreadableAsset: The asset cannot be read.
    """
    for attempt in range(ATTEMPTS):
        try:
            with rasterio.Env(**gdal_options()), rasterio.open(gdal_path(signed(href))) as source:
                factor = _factor(source, resolution_m)
                return [_read(source, corner, pixels, factor) for corner in _corners(source, lonlat, pixels, factor)]
        except (RasterioError, OSError) as error:
            if attempt == ATTEMPTS - 1:
                name = "/".join(PurePosixPath(urlsplit(href).path).parts[-2:])
                raise UnreadableAsset(
                    f"the asset {name} cannot be read ({type(error).__name__}): it is missing, corrupt or forbidden"
                ) from None
            time.sleep(0.1 * 2**attempt * (0.5 + random.random()))
    raise AssertionError("the last attempt returns or raises")


def _factor(source: rasterio.DatasetReader, resolution_m: float) -> int:
    """Pixels of `resolution_m` along one side of a pixel of the asset."""
    ratio = source.res[0] / resolution_m
    if round(ratio) < 1 or abs(ratio - round(ratio)) > 1e-6:
        raise UserError(
            f"an asset of {source.res[0]:g} m pixels does not fit windows of {resolution_m:g} m pixels: its pixel "
            "size must be a whole multiple of that"
        )
    return round(ratio)


def _corners(source: rasterio.DatasetReader, lonlat: NDArray[np.float64], pixels: int, factor: int) -> NDArray:
    """First column and row of each window, (n, 2), in pixels of the windows' grid.

    That grid begins at the asset's own corner, which the bands of a scene share: so a place gets the same window in
    every band, whatever the band's pixel size.
    """
    to_native = Transformer.from_crs(4326, source.crs, always_xy=True)
    x, y = to_native.transform(lonlat[:, 0], lonlat[:, 1])
    columns, rows = ~source.transform @ (np.asarray(x), np.asarray(y))
    return np.rint(np.column_stack([columns, rows]) * factor - pixels / 2).astype(int)


def _read(source: rasterio.DatasetReader, corner: NDArray, pixels: int, factor: int) -> NDArray | None:
    """One window: every pixel takes the asset's pixel that holds its centre."""
    if (corner < 0).any() or (corner + pixels > np.array([source.width, source.height]) * factor).any():
        return None
    columns, rows = ((start + np.arange(pixels)) // factor for start in corner)
    window = Window(columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1)
    data = source.read(1, window=window)
    return data if factor == 1 else data[np.ix_(rows - rows[0], columns - columns[0])]
