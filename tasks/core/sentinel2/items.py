"""Reads what a STAC item of Sentinel-2 L2A says of itself, whichever provider wrote it.

Items are plain dictionaries here. Earth Search names bands by colour (`red`), Planetary Computer by number (`B04`),
Copernicus by number and pixel size (`B04_10m`), EOPF by array or by a group of arrays; baseline, tile and acquisition
stand in properties or only in a name.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

NAMES = {
    "B01": "coastal",
    "B02": "blue",
    "B03": "green",
    "B04": "red",
    "B05": "rededge1",
    "B06": "rededge2",
    "B07": "rededge3",
    "B08": "nir",
    "B8A": "nir08",
    "B09": "nir09",
    "B11": "swir16",
    "B12": "swir22",
    "SCL": "scl",
}
METRES = {"B02": 10, "B03": 10, "B04": 10, "B08": 10, "B01": 60, "B09": 60}  # pixels as taken; of other bands: 20
COMMON = {common: band for band, common in NAMES.items()}
BASELINE_KEYS = ("s2:processing_baseline", "processing:version", "sentinel:processing_baseline")
PRODUCT_KEYS = ("s2:product_uri", "s2:datatake_id", "sentinel:product_id", "s2:product_id")
TILE = re.compile(r"(?<![0-9A-Z])T?(\d{1,2})([C-HJ-NP-X][A-HJ-NP-Z]{2})(?![0-9A-Z])")
SENSED = re.compile(r"(S2[A-Z])_(?:MSIL2A_)?(\d{8}T\d{6})")
SIZED = re.compile(r"(\w+)_(\d+)m")
GSD = re.compile(r"gsd:(\d+)m")
FILES = re.compile(
    r"image/.*(tif|cog|jp2|jpx|jpeg2000|j2k)|application/.*geotiff"
)  # media types of files that are read
CLASSES = "conditions/mask/l2a_classification/r20m/scl"  # where EOPF's products have the scene classification
TEST_BASELINE = (99, 99)  # written by Sen2Cor in a user's own run; says nothing of the format


def properties(item: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the item's properties; empty where they are no mapping."""
    found = item.get("properties")
    return found if isinstance(found, Mapping) else {}


def _names(item: Mapping[str, Any]) -> list[str]:
    """Returns the names of the product, the most informative first, the item's id last."""
    return [str(properties(item).get(key, "")) for key in PRODUCT_KEYS] + [str(item.get("id", ""))]


def baselines(item: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Returns every processing baseline in the properties and then in the product's names."""
    stated = [str(properties(item).get(key, "")) for key in BASELINE_KEYS]
    found = [re.fullmatch(r"(\d\d)\.?(\d\d)", text) for text in stated]
    found += [re.search(r"_N(\d\d)\.?(\d\d)(?:_|\.SAFE|$)", name) for name in _names(item)]
    versions = [(int(match[1]), int(match[2])) for match in found if match]
    return [version for version in versions if version != TEST_BASELINE]


def baseline(item: Mapping[str, Any]) -> tuple[int, int] | None:
    """Returns the processing baseline from a property, else from the product's name, else None."""
    return next(iter(baselines(item)), None)


def tile(item: Mapping[str, Any]) -> str:
    """Returns the MGRS tile, such as `06VVN`, or the item's id where none is stated."""
    stated = [str(properties(item).get(key, "")) for key in ("s2:mgrs_tile", "grid:code")]
    for text in [*stated, *(name.replace("_", " ") for name in _names(item))]:
        if match := TILE.search(text):
            return match[1].zfill(2) + match[2]
    return str(item.get("id", ""))


def acquisition(item: Mapping[str, Any]) -> str:
    """Returns the overpass and tile as text, the same for every processing of an acquisition at every provider.

    The datatake's own id will not do, since it ends in the baseline.
    """
    for name in _names(item):
        if match := SENSED.search(name):
            return f"{match[1]} {match[2]} {tile(item)}"
    day = str(properties(item).get("datetime") or properties(item).get("start_datetime"))[:10]
    return f"{str(properties(item).get('platform', '')).lower()} {day} {tile(item)}"


class Source(NamedTuple):
    """Where a band is read from."""

    key: str
    """Key of the asset."""
    href: str
    """Href of the file or of the array, which may lie below the asset's."""
    format: str
    """`zarr`, `zarr2` or `zarr3`; empty: a file, whose first bytes tell what it is."""


def band_assets(item: Mapping[str, Any]) -> dict[str, str]:
    """Returns asset keys by band name, `B04` or `SCL`; see `band_sources`."""
    return {band: source.key for band, source in band_sources(item).items()}


def band_sources(item: Mapping[str, Any]) -> dict[str, Source]:
    """Returns where each band is read from, by its name, `B04` or `SCL`.

    A band is recognised by the key, by its common name, or by what the asset says of its bands. Of several assets the
    original counts, not a copy of other pixels: the one whose role is `sampling:original`, else that of the pixel size
    that the band was taken in; then a file before an array; then the plainest key.
    """
    listed = item.get("assets")
    found: dict[str, list[tuple[int, Source]]] = {}
    for key, asset in (listed if isinstance(listed, Mapping) else {}).items():
        if isinstance(asset, Mapping) and (format_ := format_of(asset)) is not None:
            for band, rank, path in _fits(key, asset, format_):
                source = Source(key, _below(str(asset.get("href", "")), path), format_)
                found.setdefault(band, []).append((rank, source))
    best = {band: _best(band, found[band], item) for band in NAMES if band in found}
    return best if "SCL" in best else best | _classes_beside(best)


def _best(band: str, choices: list[tuple[int, Source]], item: Mapping[str, Any]) -> Source:
    """Returns the original among the sources of a band."""
    if len(choices) == 1:
        return choices[0][1]

    def order(choice: tuple[int, Source]) -> tuple[Any, ...]:
        rank, source = choice
        return (
            *_copied(source.key, item["assets"][source.key], band, source.href),
            source.format != "",
            rank,
            source.key,
        )

    return min(choices, key=order)[1]


def format_of(asset: Mapping[str, Any]) -> str | None:
    """Returns how an asset is stored, as `Source.format` tells it, by its media type; None where it is not read.

    Without a media type the name tells whether it is Zarr.
    """
    told = str(asset.get("type") or "").lower()
    if FILES.match(told):
        return ""
    if "zarr" in told and "zip" not in told:
        version = re.search(r"version=\"?([23])", told)
        return f"zarr{version[1]}" if version else "zarr"
    if not told or told.startswith(("application/octet-stream", "binary/octet-stream")):
        return "zarr" if re.search(r"\.zarr(/|$)", urlsplit(str(asset.get("href", ""))).path.lower()) else ""
    return None


def unread(item: Mapping[str, Any]) -> dict[str, str]:
    """Returns the media types of the assets of bands that no reader takes, by band."""
    listed = item.get("assets")
    told = [(key, a) for key, a in (listed if isinstance(listed, Mapping) else {}).items() if isinstance(a, Mapping)]
    return {
        band: str(asset.get("type"))
        for key, asset in told
        if format_of(asset) is None
        for band, *_ in _fits(key, asset, "")
    }


def _copied(key: str, asset: Mapping[str, Any], band: str, href: str) -> tuple[int, float]:
    """Orders the assets of a band: the original first, then what may be, by its pixels; copies last."""
    roles, native = asset.get("roles"), METRES.get(band, 20)
    told = [role for role in (roles if isinstance(roles, list) else []) if str(role).startswith("sampling:")]
    if told:
        return (0 if "sampling:original" in told else 2), 0.0
    if f"/r{native}m/" in href:  # of a group of several pixel sizes
        return 1, 0.0
    size = _pixel(key, asset)
    return 1, abs(size - native) if size else 0.0


def _fits(key: str, asset: Mapping[str, Any], format_: str) -> Iterator[tuple[str, int, str]]:
    """Yields the bands of an asset, each with a rank of its key, and the path to it below the asset."""
    sized = SIZED.fullmatch(key)
    if format_ and _is_group(asset, len(bands := _named(asset) & NAMES.keys())):
        several = re.search(r"/reflectance/?$", urlsplit(str(asset.get("href", ""))).path)
        for each in sorted(bands):
            yield each, 2, f"r{METRES.get(each, 20)}m/{each.lower()}" if several else each.lower()
    elif band := _band(key):
        yield band, int(key != band), ""
    elif sized and (band := _band(sized[1])):
        yield band, 2, ""
    elif "visual" not in key and len(named := _named(asset)) == 1 and named <= NAMES.keys():
        yield named.pop(), 3, ""


def _named(asset: Mapping[str, Any]) -> set[str]:
    """Returns the names of an asset's bands, which are alike in each extension."""
    return {str(entry["name"]).upper() for entry in entries(asset) if entry.get("name")}


def _is_group(asset: Mapping[str, Any], bands: int) -> bool:
    """Tells whether an asset of Zarr holds an array for each band: a picture of three has one array for all."""
    if kind := asset.get("zarr:node_type"):
        return bool(kind == "group")
    roles = asset.get("roles")
    path = urlsplit(str(asset.get("href", ""))).path
    told = "reflectance" in (roles if isinstance(roles, list) else []) or re.search(
        r"/(reflectance|SR_\d+m)(/|$)", path
    )
    return bands > 1 and bool(told)


def _below(href: str, path: str) -> str:
    """Returns the href of an array below a group; a query signs it too."""
    if not path:
        return href
    parts = urlsplit(href)
    return parts._replace(path=f"{parts.path.rstrip('/')}/{path}").geturl()


def _classes_beside(found: Mapping[str, Source]) -> dict[str, Source]:
    """Returns the scene classification of a product of EOPF, whose item names the reflectance alone."""
    for source in found.values():
        path = urlsplit(source.href).path
        if source.format and (match := re.match(r"(.*\.zarr)/measurements/reflectance/", path)):
            parts = urlsplit(source.href)._replace(path=f"{match[1]}/{CLASSES}")
            return {"SCL": Source(source.key, parts.geturl(), source.format)}
    return {}


def _band(name: str) -> str | None:
    """Returns the band of a name, in any case, or of a common name."""
    if name.upper() in NAMES:
        return name.upper()
    return COMMON.get(name.lower())


def _pixel(key: str, asset: Mapping[str, Any]) -> float:
    """Returns an asset's pixel size in metres, 0 where nothing tells it: its `gsd` may be that of the instrument."""
    if match := SIZED.fullmatch(key):
        return float(match[2])
    roles, grid = asset.get("roles"), asset.get("proj:transform")
    told = [str(role) for role in (roles if isinstance(roles, list) else [])]
    if sized := [match[1] for match in map(GSD.fullmatch, told) if match]:
        return float(sized[0])
    values = [grid[0] if isinstance(grid, list) and grid else None, asset.get("raster:spatial_resolution")]
    values += [entry.get("spatial_resolution") for entry in entries(asset)] + [asset.get("gsd")]
    return next((abs(size) for size in map(number, values) if size), 0.0)


def number(value: Any) -> float | None:
    """Returns a finite number, or None: JSON can hold true, NaN and integers beyond any float."""
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            found = float(value)
        else:
            found = math.nan
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def entries(asset: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yields what an asset says of its bands, in STAC 1.0's `eo:bands` and `raster:bands`, and STAC 1.1's `bands`."""
    for key in ("eo:bands", "raster:bands", "bands"):
        listed = asset.get(key)
        yield from (entry for entry in (listed if isinstance(listed, list) else []) if isinstance(entry, Mapping))
