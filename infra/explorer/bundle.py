"""Puts the explorer's page into a storage: `explorer/` beside `grids/`, whose grids it shows."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from infra import storage
from infra.errors import UserError

FOLDER = Path(__file__).parent / "bundle"
PAGE, BUILD = "index.html", "build.json"  # BUILD names the build that is in a storage, and is written last
DIRECTORY = "explorer"  # in a storage, beside `grids`
UNBUILT = (
    "the explorer's page is not built: `make .venv/ready` builds it, with packages of npm; without it, everything else "
    "works"
)


def files() -> dict[str, Path]:
    """Returns the files of the page by name.

    Raises:
        UserError: It is not built.
    """
    if not (FOLDER / PAGE).exists():
        raise UserError(UNBUILT)
    return {path.name: path for path in sorted(FOLDER.iterdir())}


def rules(bucket: str) -> tuple[dict[str, Any], str]:
    """Returns the CORS rules and the policy by which everybody may read a bucket's grids and their page."""
    cors, public = (Path(__file__).with_name(name).read_text() for name in ("cors.json", "public.json"))
    return json.loads(cors), public.replace("PRODUCTS", bucket)


def place_page(root: str) -> str | None:
    """Writes the page into a storage, unless this build is there.

    Args:
        root: URL of the storage, in which grids lie under `grids/`.

    Returns:
        The URL of the page; None, and a line in the log, where it is not built or may not be written: a grid is good
        without it.
    """
    home = storage.join(root, DIRECTORY)
    try:
        _place(home, {name: path.read_bytes() for name, path in files().items()})
    except UserError as error:
        logging.getLogger("rangegrid").warning("the explorer's page was not put beside the grids: %s", error)
        return None
    return storage.join(home, PAGE)


def _place(home: str, found: dict[str, bytes]) -> None:
    digest = hashlib.sha256(b"".join(found.values())).hexdigest()[:12]
    if _placed(home) != digest:
        for name in sorted(found, key=lambda name: name == PAGE):
            storage.write_page(storage.join(home, name), found[name])
        storage.write_json(storage.join(home, BUILD), {"build": digest})


def _placed(home: str) -> str | None:
    try:
        return storage.read_json(storage.join(home, BUILD)).get("build")
    except FileNotFoundError:
        return None
