"""Reads and writes files in other projects' formats.

Files that could fill the memory are refused, and no file is overwritten unasked.
"""

import io
import zipfile
from pathlib import Path

from infra import storage
from infra.addresses import as_url, is_web, shown
from infra.errors import UserError

EXPANSION = 20  # bytes that one byte of an archive may expand to; archives of embeddings expand 1 to 3 times


def read_file(place: str | Path, kind: str) -> bytes:
    """Returns the bytes of a file.

    Args:
        place: Path or URL.
        kind: What is wanted, for the message, such as "a satclip-*.ckpt".

    Raises:
        UserError: There is no such file, or it is an archive that expands more than EXPANSION times.
    """
    try:
        data = storage.read(as_url(place))
    except FileNotFoundError:
        raise UserError(f"there is no file {shown(place)}: give the path or URL of {kind}") from None
    refuse_bomb(data, place, kind)
    return data


def refuse_bomb(content: bytes | Path, place: str | Path, kind: str) -> None:
    """Refuses an archive that expands more than EXPANSION times, given by its bytes or as a file.

    Raises:
        UserError: It does.
    """
    size = content.stat().st_size if isinstance(content, Path) else len(content)
    try:
        with zipfile.ZipFile(content if isinstance(content, Path) else io.BytesIO(content)) as archive:
            expanded = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # no archive at all: its reader says what is wrong
    if expanded > EXPANSION * size:
        raise UserError(
            f"{shown(place)} is an archive of {size:,} bytes that would expand to {expanded:,}: give {kind} as "
            "published"
        )


def write_file(place: str | Path, data: bytes, overwrite: bool) -> str:
    """Writes a file whole.

    Args:
        place: Path or URL.
        data: Bytes of the file.
        overwrite: Whether to replace a file that exists.

    Returns:
        The URL.

    Raises:
        UserError: The file exists and is not to be replaced.
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
    return UserError(f"{shown(place)} is there already: name another file, or give --overwrite")
