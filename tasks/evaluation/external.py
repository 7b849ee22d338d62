"""Takes vectors of other projects for embedders: a table of vectors at places, or a function of a package."""

import hashlib
import importlib
import inspect
import re
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra.errors import UserError
from tasks.tables.files import is_table
from tasks.tables.vectors import read_vectors

Lonlat = NDArray[np.float64]
Embeddings = NDArray[np.float32]

FUNCTION = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
TRIAL = np.array([[0.0, 0.0], [2.35, 48.86]])  # places that a function is tried with


def is_external(path: str) -> bool:
    """Tells whether a text is a function of a package, or the path or URL of a table."""
    text = path.strip()
    return bool(FUNCTION.fullmatch(text)) or is_table(text.partition("?")[0])


def external(path: str) -> tuple[Callable[[Lonlat], Embeddings], str]:
    """Returns an embedder of another project, and a text that changes when it does.

    Args:
        path: `package.module:function`, which maps (n, 2) degrees (lon, lat) to (n, d), or the path or URL of a table
            of vectors at places.

    Raises:
        UserError: The function is not there or gives no vectors, or the table cannot be read.
    """
    text = path.strip()
    if FUNCTION.fullmatch(text):
        return _function(text)
    found = read_vectors(text)
    content = hashlib.sha256(np.ascontiguousarray(found.vectors).tobytes() + found.lonlat.tobytes())
    return found.at, content.hexdigest()[:12]


def _function(text: str) -> tuple[Callable[[Lonlat], Embeddings], str]:
    module, _, name = text.partition(":")
    package = module.partition(".")[0]
    if package in sys.stdlib_module_names:
        raise UserError(f"the embedder {text} is a function of Python itself: name one that maps lon, lat to vectors")
    try:
        found = importlib.import_module(module)
        function = vars(found)[name]
    except Exception as error:  # the module's own code may fail in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UserError(f"the embedder {text} was not found ({reason}): install its package here") from error

    def embed(lonlat: Lonlat) -> Embeddings:
        return _checked(function, text, lonlat)

    embed(TRIAL)
    return embed, _version(package, found)


def _checked(function: Any, text: str, lonlat: Lonlat) -> Embeddings:
    """Returns what a function gives for places, as an array, after a check of its shape."""
    try:
        given = function(lonlat.copy())
        if hasattr(given, "detach"):
            given = given.detach().cpu()
        vectors = np.asarray(given, np.float32)
    except Exception as error:  # the function's own code may fail in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UserError(f"the embedder {text} failed on {len(lonlat)} places ({reason})") from error
    if vectors.ndim != 2 or len(vectors) != len(lonlat) or not vectors.shape[1]:
        raise UserError(
            f"the embedder {text} gave an array {vectors.shape} for {len(lonlat)} places: it must give (n, d) for "
            "(n, 2) degrees (lon, lat)"
        )
    return vectors


def _version(package: str, module: Any) -> str:
    """Returns the package's version, with a digest of the module's source."""
    try:
        released = version(package)
    except PackageNotFoundError:
        released = ""
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):  # compiled
        source = ""
    return f"{released} {hashlib.sha256(source.encode()).hexdigest()[:12]}".strip()
