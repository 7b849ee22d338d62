"""Names what is read of a scene: an asset, how it is stored, and what its item tells of the way to it."""

import json
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

FILE = ""  # a format that its first bytes tell: TIFF or JPEG 2000


@dataclass(frozen=True)
class Access:
    """What an item tells of the way to an asset; keys are in no item."""

    endpoint: str = ""
    """URL of the S3 endpoint that has the bucket; empty: AWS, or that of the settings."""
    region: str = ""
    """Region of the bucket."""
    requester_pays: bool = False
    """Whether who asks pays."""


PUBLIC = Access()


@dataclass(frozen=True)
class Asset:
    """A band of a scene, as it is read."""

    href: str
    """HTTP, `s3://` or a path; its query, which may sign it, is shown and stored nowhere."""
    format: str = FILE
    """`zarr`, `zarr2` or `zarr3` for an array; else empty: a file of TIFF or JPEG 2000."""
    crs: str = ""
    """CRS that the item tells, for arrays that tell none."""
    access: Access = PUBLIC
    """The way to it."""

    @property
    def place(self) -> str:
        """Returns the host or bucket that serves it."""
        return urlsplit(self.href).netloc + self.access.endpoint


def of(asset: Asset | str) -> Asset:
    """Returns an asset; an href alone is one of a file."""
    return asset if isinstance(asset, Asset) else Asset(asset)


def to_text(assets: dict[str, Asset]) -> str:
    """Returns what is to be known of assets beside their hrefs, by band, as JSON."""
    facts = {band: asdict(asset) for band, asset in assets.items()}
    return json.dumps({band: {name: told[name] for name in told if name != "href"} for band, told in facts.items()})


def from_text(hrefs: dict[str, str], text: str) -> dict[str, Asset]:
    """Returns assets by band, as `to_text` wrote of them; without a text they are files."""
    facts: dict[str, Any] = json.loads(text) if text else {}
    return {band: _known(href, dict(facts.get(band, {}))) for band, href in hrefs.items()}


def _known(href: str, facts: dict[str, Any]) -> Asset:
    return Asset(href, access=Access(**facts.pop("access", {})), **facts)
