"""Pictures and tables: stored beside the product they show and, inside a Prefect run, seen in the UI."""

import base64
import io
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any

from PIL import Image
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact
from prefect.runtime import task_run

from infra import storage
from tasks.units import REPORTED, Work, in_run
from tasks.updates import home_of

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


def reported(step: Callable[..., str]) -> Callable[..., str]:
    """The step, which returns its product's URL, with a table at its end: what was planned beside what was done."""

    @wraps(step)
    def run(*arguments: Any) -> str:
        parts: list[Work] = []
        token = REPORTED.set(parts)
        try:
            url = step(*arguments)
        except BaseException:
            with suppress(Exception):  # the step's own error is what counts
                _show_parts(step.__name__, parts)
            raise
        finally:
            REPORTED.reset(token)
        _show_parts(step.__name__, [*parts, Work("bytes stored", 0, 0, storage.size(home_of(url)))])
        return url

    return run


def _show_parts(step: str, parts: list[Work]) -> None:
    rows = [
        {
            "what": part.name,
            "planned": part.planned or None,
            "already there": part.there,
            "done": part.done,
            "seconds": round(part.seconds, 1) or None,
            "per second": round(part.done / part.seconds, 2) if part.seconds else None,
        }
        for part in parts
    ]
    show_table(rows, f"{step.replace('_', '-')}-run", f"Plan and actual; attempt {task_run.run_count}")
