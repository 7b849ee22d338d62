"""Writes tables of vectors: an output appears whole or not at all, and never replaces another unasked."""

import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet
from numpy.typing import NDArray

from infra import storage
from infra.addresses import as_url, name_of
from infra.errors import UserError

OUTPUTS = (".parquet", ".zarr")


def check_output(output: str | Path, overwrite: bool, kinds: tuple[str, ...] = OUTPUTS) -> str:
    """Returns the suffix of an output that can be written.

    Raises:
        UserError: The output is of another kind, has no directory, is on the web, or exists and is not to be replaced.
    """
    url = as_url(output)
    suffix = Path(name_of(url)).suffix
    if suffix not in kinds:
        raise UserError(f"the output {output} is of no kind that can be written: name it {' or '.join(kinds)}")
    if not url.startswith("file:"):
        _check_remote(url, output, overwrite)
        return suffix
    path = Path(unquote(urlsplit(url).path))
    if not path.parent.is_dir():
        raise UserError(f"there is no directory {path.parent} to write {path.name} into: make it")
    if os.path.lexists(path) and not overwrite:
        raise _taken(output)
    return suffix


def _check_remote(url: str, output: str | Path, overwrite: bool) -> None:
    storage.check_writable(url.rpartition("/")[0])
    if not overwrite and (storage.exists(url) or storage.paths(url + "/")):
        raise _taken(output)


def _taken(output: str | Path) -> UserError:
    return UserError(f"{output} is there already: name another output, or give --overwrite")


@contextmanager
def whole(output: str | Path) -> Iterator[Path]:
    """Yields a path to write to, which becomes `output` if nothing goes wrong.

    A former output stays until then: a file is replaced in one step, a directory set aside until the new one is there.
    """
    url = as_url(output)
    if not url.startswith("file:"):
        with tempfile.TemporaryDirectory() as scratch:
            yield (partial := Path(scratch, name_of(url)))
            _publish(partial, url)
        return
    path = Path(unquote(urlsplit(url).path))
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".partial", dir=path.parent) as scratch:
        yield (partial := Path(scratch, path.name))
        _replace(partial, path, Path(scratch, "former"))


def _publish(partial: Path, url: str) -> None:
    """Uploads an output, and last deletes the objects of a former output that the new one does not have."""
    former = set(storage.paths(url + "/"))
    storage.upload(partial, url)
    for name in former - {file.relative_to(partial).as_posix() for file in partial.rglob("*")}:
        storage.delete(storage.join(url, name))


def _replace(partial: Path, path: Path, former: Path) -> None:
    """Moves an output into place, and moves a former output back where this fails."""
    if not (partial.is_dir() or path.is_dir()):
        partial.replace(path)
        return
    if there := os.path.lexists(path):
        path.rename(former)
    try:
        partial.rename(path)
    except BaseException:
        if there:
            former.rename(path)
        raise


def write_table(path: Path, tables: Iterator[pa.Table], about: dict[str, Any]) -> None:
    """Writes tables of the same columns as one Parquet file.

    Args:
        path: Path of the file.
        tables: The rows in order, in one table at least.
        about: Metadata of the file, beside the metadata of the tables.
    """
    first = next(tables)
    schema = first.schema.with_metadata((first.schema.metadata or {}) | {b"rangegrid": json.dumps(about).encode()})
    kept = {"compression": "zstd", "use_dictionary": False, "write_page_checksum": True}
    with pa.parquet.ParquetWriter(path, schema, **kept) as writer:
        for table in itertools.chain([first], tables):
            writer.write_table(table.cast(schema))


def vectors_column(array: NDArray) -> pa.Array:
    """Returns a column of numbers, (n,), or of vectors, (n, dim)."""
    if array.ndim == 1:
        return pa.array(array)
    return pa.FixedSizeListArray.from_arrays(pa.array(array.ravel()), array.shape[1])
