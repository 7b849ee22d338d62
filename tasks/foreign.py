"""Files in other projects' formats: read whole, refused where they could fill the memory, never overwritten unasked."""

import io
import zipfile
from pathlib import Path

from infra import storage
from infra.addresses import as_url, is_web, shown
from infra.errors import UserError

EXPANSION = 20  # bytes that a byte of an archive may become: numbers of embeddings become 1 to 3


def read_file(place: str | Path, kind: str) -> bytes:
    """The bytes of a file.

    Args:
        place: Path or URL.
        kind: What is wanted, for the message: "a satclip-*.ckpt".

    Raises:
        UserError: It is not there, or is an archive that expands beyond reason.
    """
    try:
        data = storage.read(as_url(place))
    except FileNotFoundError:
        raise UserError(f"there is no file {shown(str(place))}: give the path or URL of {kind}") from None
    _refuse_bomb(data, place, kind)
    return data


def _refuse_bomb(data: bytes, place: str | Path, kind: str) -> None:
    try:
        expanded = sum(member.file_size for member in zipfile.ZipFile(io.BytesIO(data)).infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # no archive at all: its reader says what is wrong
    if expanded > EXPANSION * len(data):
        raise UserError(
            f"{place} is an archive of {len(data):,} bytes that would expand to {expanded:,}: give {kind} as published"
        )


def write_file(place: str | Path, data: bytes, overwrite: bool) -> str:
    """Writes a file whole.

    Args:
        place: Path or URL.
        data: Its bytes.
        overwrite: Whether one that is there is replaced.

    Returns:
        The URL.

    Raises:
        UserError: One is there, and is not to be replaced.
    """
    url = as_url(place)
    if overwrite:
        storage.write(url, data)
    elif not storage.create(url, data):
        raise _taken(place)
    return url


def check_free(place: str | Path, overwrite: bool) -> None:
    """Refuses, before any work, what `write_file` would refuse after it."""
    url = as_url(place)
    if is_web(url):
        raise UserError(f"nothing can be written to {shown(url)}: give a path, file:// or s3://")
    if not overwrite and storage.exists(url):
        raise _taken(place)


def _taken(place: str | Path) -> UserError:
    return UserError(f"{place} is there already: name another file, or give --overwrite")
