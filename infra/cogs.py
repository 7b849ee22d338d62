"""Windows of cloud-optimised GeoTIFFs in their own projection, by few requests."""

import random
import time
from collections.abc import Sequence
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

    A coarser asset is brought to `resolution_m` by repeating its pixels: nothing is blended, so no nodata is.
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
                return [_read(source, window, pixels) for window in _windows(source, lonlat, pixels, resolution_m)]
        except (RasterioError, OSError) as error:
            if attempt == ATTEMPTS - 1:
                name = "/".join(PurePosixPath(urlsplit(href).path).parts[-2:])
                raise UnreadableAsset(
                    f"the asset {name} cannot be read ({type(error).__name__}): it is missing, corrupt or forbidden"
                ) from None
            time.sleep(0.1 * 2**attempt * (0.5 + random.random()))
    raise AssertionError("the last attempt returns or raises")


def _windows(
    source: rasterio.DatasetReader, lonlat: NDArray[np.float64], pixels: int, resolution_m: float
) -> Sequence[Window]:
    to_native = Transformer.from_crs(4326, source.crs, always_xy=True)
    x, y = to_native.transform(lonlat[:, 0], lonlat[:, 1])
    factor = round(source.res[0] / resolution_m)
    if factor < 1 or abs(source.res[0] / resolution_m - factor) > 1e-6 or pixels % factor:
        raise UserError(
            f"an asset of {source.res[0]:g} m pixels does not fit windows of {pixels} pixels of "
            f"{resolution_m:g} m: its pixel size must be a whole multiple, and the window a multiple of that"
        )
    side = pixels // factor
    columns, rows = ~source.transform @ (np.asarray(x), np.asarray(y))
    first = np.rint(np.column_stack([columns, rows]) - side / 2).astype(int)
    return [Window(int(c), int(r), side, side) for c, r in first]


def _read(source: rasterio.DatasetReader, window: Window, pixels: int) -> NDArray | None:
    if not (0 <= window.col_off <= source.width - window.width):
        return None
    if not (0 <= window.row_off <= source.height - window.height):
        return None
    data = source.read(1, window=window)
    factor = pixels // data.shape[0]
    return data.repeat(factor, 0).repeat(factor, 1) if factor > 1 else data
