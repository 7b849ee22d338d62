"""Stores pictures and tables beside the product that they show, and shows them in Prefect's UI inside a run."""

import base64
import hashlib
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import wraps
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from infra import storage
from infra.errors import UserError
from infra.settings import settings
from tasks.cards import home_of
from tasks.units import REPORTED, Work, in_run, in_words, shown

PREVIEW_WIDTH = 1200  # pixels; the artifact embeds the picture, since a browser cannot open s3:// URLs
LONGEST_SLUG = 60  # characters; file systems allow 255 bytes for a whole name
GLANCE = 5.0  # seconds to wait for an answer of an address; a run needs none


def slugs(names: Iterable[str]) -> dict[str, str]:
    """Returns for each text a lower-case name of ASCII letters, digits and dashes, for files and artifact keys.

    A name that would be empty, too long, or equal to another gets a part of the text's digest.
    """
    asked = list(names)
    plain = {name: _plain(name) for name in asked}
    shared = Counter(plain.values())
    return {name: slug if slug and shared[slug] == 1 else _told_apart(name, slug) for name, slug in plain.items()}


def _plain(text: str) -> str:
    ascii_only = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    slug = re.sub("[^a-z0-9]+", "-", ascii_only).strip("-")
    return slug if len(slug) <= LONGEST_SLUG else ""


def _told_apart(text: str, slug: str) -> str:
    return f"{slug}-{hashlib.sha256(text.encode()).hexdigest()[:8]}".lstrip("-")


def cell(text: object) -> str:
    """Returns a text as one cell of a Markdown table: on one line, with its bars escaped."""
    return " ".join(str(text).split()).replace("|", "\\|")


def markdown_table(heads: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Returns a Markdown table of any texts."""
    lines = [heads, *rows]
    told = ["| " + " | ".join(map(cell, line)) + " |" for line in lines]
    return "\n".join([told[0], "|---" * len(heads) + "|", *told[1:]])


def keep_picture(url: str, png: bytes, key: str, description: str) -> str:
    """Writes a PNG to `url` and shows it as the run's artifact.

    The artifact is Markdown: for an image artifact, the UI prints the address, and ours holds the whole picture.

    Args:
        url: Where the picture goes.
        png: The picture.
        key: Lower-case name of the artifact.
        description: What the picture shows, in Markdown.

    Returns:
        `url`.
    """
    storage.write(url, png)
    if in_run():
        text = f"![{description}]({_data_url(png)})\n\nFull size: {_linked(url)}\n"
        _show_text(text, key=key, description=description)
    return url


def _show_text(markdown: str, key: str, description: str) -> None:
    from prefect.artifacts import create_markdown_artifact

    with shown():
        create_markdown_artifact(markdown, key=key, description=description)


def _data_url(png: bytes) -> str:
    from PIL import Image

    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.thumbnail((PREVIEW_WIDTH, PREVIEW_WIDTH))
    preview = io.BytesIO()
    picture.save(preview, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(preview.getvalue()).decode()


def _linked(url: str) -> str:
    """Returns the URL in Markdown, as a link where a browser can read it."""
    address = web_address(url)
    if address:
        return f"[{url}]({address})"
    return f"`{url}`"


def web_address(url: str) -> str | None:
    """Returns the address at which a browser reads an object without keys, or None where it cannot."""
    if url.startswith("s3:"):
        with suppress(UserError, OSError):
            address = urlsplit(storage.presigned(url))._replace(query="").geturl()
            urlopen(Request(address, method="HEAD"), timeout=GLANCE).close()
            return address
    return None


def show_table(rows: list[dict[str, Any]], key: str, description: str) -> None:
    """Shows rows as the run's table artifact."""
    if in_run():
        from prefect.artifacts import create_table_artifact

        with shown():
            create_table_artifact(rows, key=key, description=description)


def keep_table(url: str, markdown: str, key: str, description: str) -> str:
    """Writes a Markdown table to `url` and shows it as the run's artifact; returns `url`."""
    storage.write(url, markdown.encode())
    if in_run():
        _show_text(f"{markdown}\n", key=key, description=description)
    return url


def reported(step: Callable[..., str]) -> Callable[..., str]:
    """Wraps a step so that a table at its end shows what was planned beside what was done.

    The step must return the URL of its product.
    """

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
        _show_parts(step.__name__, [*parts, Work("stored", None, done=storage.size(home_of(url)), bytes=True)])
        return url

    return run


def _show_parts(step: str, parts: list[Work]) -> None:
    from prefect.runtime import task_run

    title = f"Plan and actual; attempt {task_run.run_count}"
    show_table([_row(part) for part in parts], f"{step.replace('_', '-')}-run", title)


def _row(part: Work) -> dict[str, Any]:
    def number(count: int | None) -> int | str | None:
        if part.bytes and count is not None:
            return in_words(count)
        return count

    return {
        "what": part.name,
        "planned": number(part.planned),
        "limit": number(part.limit),
        "already there": number(part.there),
        "done": number(part.done),
        "seconds": round(part.seconds, 1) or None,
        "per second": round(part.done / part.seconds, 2) if part.seconds else None,
    }


def show_places(places: dict[str, str], code: str, key: str, description: str) -> None:
    """Shows where a run's product is, as the run's artifact.

    Args:
        places: URLs, by what they hold.
        code: Lines of Python that open it.
        key: Lower-case name of the artifact.
        description: What the product is.
    """
    if in_run():
        lines = [f"- {name}: {_linked(url)}" for name, url in places.items()]
        text = "\n".join([*lines, "", "```python", code, "```", ""])
        _show_text(text, key=key, description=description)


def opening(module: str, call: str, url: str) -> str:
    """Returns lines of Python that open a URL at the settings' endpoint, with keys from the environment.

    Args:
        module: What to import, such as `xarray as xr`.
        call: What opens the URL, such as `grid = xr.open_zarr`.
        url: URL of the product.
    """
    endpoint = settings().s3_endpoint if url.startswith("s3:") else None
    if endpoint:
        options = f', storage_options={{"endpoint_url": "{endpoint}"}}'
    else:
        options = ""
    return f'import {module}\nurl = "{url}"\n{call}(url{options})'
