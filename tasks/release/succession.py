"""Tells in the item of a version what came before and after it, in the words of STAC's version extension.

The versions of a product line that were in force are a chain, oldest first, and the last is in force now. A version
that was rolled back is off the chain and deprecated; one that never was in force is off it too. Each leads to the
latest of its line.
"""

from collections.abc import Collection, Mapping
from typing import Any

import pystac
from pystac.utils import datetime_to_str

from tasks.release.lines import Version

SCHEMA = "https://stac-extensions.github.io/version/v1.2.0/schema.json"
LATEST, BEFORE, AFTER = "latest-version", "predecessor-version", "successor-version"
RELATIONS = (LATEST, BEFORE, AFTER)
FIELDS = ("created", "version", "deprecated", "rangegrid:line", "rangegrid:state")


def kept(item: Mapping[str, Any], former: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an item that was made anew with what its former one told of its place among the versions."""
    told = {name: former["properties"][name] for name in FIELDS if name in former["properties"]}
    links = [link for link in former["links"] if link["rel"] in RELATIONS]
    return {**item, "properties": item["properties"] | told, "links": [*item["links"], *links]}


def placed(
    item: Mapping[str, Any], version: Version, chain: list[str], there: Collection[str], name: str
) -> dict[str, Any]:
    """Returns an item with the place of its version among those of its line.

    Args:
        item: The item as it is stored.
        version: The version.
        chain: Fingerprints of the versions of its line that were in force, oldest first.
        there: Fingerprints of the versions that have an item to lead to.
        name: File name of an item.
    """
    properties = {key: value for key, value in item["properties"].items() if key != "deprecated"}
    if version.finished and "created" not in properties:
        properties["created"] = datetime_to_str(version.finished)
    properties |= {"rangegrid:line": version.line, "rangegrid:state": version.state}
    properties.setdefault("version", properties.get("created", version.fingerprint))
    if version.state == "withdrawn":
        properties["deprecated"] = True
    links = [link for link in item["links"] if link["rel"] not in RELATIONS]
    links += [
        _link(rel, f"../{other}/{name}") for rel, other in _relatives(version.fingerprint, chain) if other in there
    ]
    extensions = sorted({*item["stac_extensions"], SCHEMA})
    return {**item, "stac_extensions": extensions, "properties": properties, "links": links}


def _relatives(name: str, chain: list[str]) -> list[tuple[str, str]]:
    found = [(LATEST, chain[-1])] if chain else []
    if name in chain:
        place = chain.index(name)
        found += [(BEFORE, other) for other in chain[max(place - 1, 0) : place]]
        found += [(AFTER, other) for other in chain[place + 1 : place + 2]]
    return found


def _link(rel: str, href: str) -> dict[str, str]:
    return {"rel": rel, "href": href, "type": pystac.MediaType.GEOJSON}
