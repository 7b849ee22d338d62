"""Pictures and tables: stored beside the product they show and, inside a Prefect run, seen in the UI."""

import base64
import io
from typing import Any

from PIL import Image
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact

from infra import storage
from tasks.units import in_run

PREVIEW_WIDTH = 1200  # pixels: the artifact carries the picture itself, since a browser cannot open s3:// URLs


def keep_picture(url: str, png: bytes, key: str, description: str) -> str:
    """Writes a PNG to `url` and shows it as the run's image artifact.

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
        create_image_artifact(_data_url(png), key=key, description=f"{description}\n\nFull size: `{url}`")
    return url


def _data_url(png: bytes) -> str:
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.thumbnail((PREVIEW_WIDTH, PREVIEW_WIDTH))
    preview = io.BytesIO()
    picture.save(preview, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(preview.getvalue()).decode()


def show_table(rows: list[dict[str, Any]], key: str, description: str) -> None:
    """Shows rows as the run's table artifact."""
    if in_run():
        create_table_artifact(rows, key=key, description=description)


def keep_table(url: str, markdown: str, key: str, description: str) -> str:
    """Writes a Markdown table to `url` and shows it as the run's artifact; returns `url`."""
    storage.write(url, markdown.encode())
    if in_run():
        create_markdown_artifact(f"{description}\n\n{markdown}\n", key=key, description=description)
    return url
