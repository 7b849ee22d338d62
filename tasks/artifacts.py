"""Pictures, tables and places: stored beside the product they show and, inside a Prefect run, seen in the UI."""

import base64
import io
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from PIL import Image
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from infra import storage
from infra.errors import UserError
from infra.settings import settings
from tasks.units import in_run

PREVIEW_WIDTH = 1200  # pixels: the artifact carries the picture itself, since a browser cannot open s3:// URLs
GLANCE = 5.0  # seconds for whether an address answers: a run does without


def keep_picture(url: str, png: bytes, key: str, description: str) -> str:
    """Writes a PNG to `url` and shows it as the run's artifact.

    In Markdown, since the UI writes the address of an image artifact, here the picture itself, across the page.

    Args:
        url: Where the picture goes.
        png: The picture.
        key: Lower-case name of the artifact.
        description: What it shows; Markdown.

    Returns:
        `url`.
    """
    storage.write(url, png)
    if in_run():
        text = f"![{description}]({_data_url(png)})\n\nFull size: {_linked(url)}\n"
        create_markdown_artifact(text, key=key, description=description)
    return url


def _data_url(png: bytes) -> str:
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.thumbnail((PREVIEW_WIDTH, PREVIEW_WIDTH))
    preview = io.BytesIO()
    picture.save(preview, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(preview.getvalue()).decode()


def _linked(url: str) -> str:
    """The URL, as a link where a browser may read it."""
    address = web_address(url)
    return f"[{url}]({address})" if address else f"`{url}`"


def web_address(url: str) -> str | None:
    """Where a browser reads the object without keys; none where it may not."""
    if url.startswith("s3:"):
        with suppress(UserError, OSError):
            address = urlsplit(storage.presigned(url))._replace(query="").geturl()
            urlopen(Request(address, method="HEAD"), timeout=GLANCE).close()
            return address
    return None


def show_table(rows: list[dict[str, Any]], key: str, description: str) -> None:
    """Shows rows as the run's table artifact."""
    if in_run():
        create_table_artifact(rows, key=key, description=description)


def keep_table(url: str, markdown: str, key: str, description: str) -> str:
    """Writes a Markdown table to `url` and shows it as the run's artifact; returns `url`."""
    storage.write(url, markdown.encode())
    if in_run():
        create_markdown_artifact(f"{markdown}\n", key=key, description=description)
    return url


def show_places(places: dict[str, str], code: str, key: str, description: str) -> None:
    """Shows where a run's product is, as its artifact.

    Args:
        places: URLs by what is there.
        code: Lines of Python that open it.
        key: Lower-case name of the artifact.
        description: What the product is.
    """
    if in_run():
        lines = [f"- {name}: {_linked(url)}" for name, url in places.items()]
        text = "\n".join([*lines, "", "```python", code, "```", ""])
        create_markdown_artifact(text, key=key, description=description)


def opening(module: str, call: str, url: str) -> str:
    """Lines of Python that open a URL at the settings' endpoint, by keys in the environment.

    Args:
        module: What to import, as `xarray as xr`.
        call: What opens it, as `grid = xr.open_zarr`.
        url: Where it is.
    """
    endpoint = settings().s3_endpoint if url.startswith("s3:") else None
    options = f', storage_options={{"endpoint_url": "{endpoint}"}}' if endpoint else ""
    return f'import {module}\nurl = "{url}"\n{call}(url{options})'
