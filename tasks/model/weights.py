"""Reads weights of other projects, in `.safetensors` or `torch.save` files, without executing anything in them.

A file of `torch.save` is a pickle, which names classes and functions to be called. PyTorch's reader for weights alone
imports none of them, and refuses a file that names any beyond its own. But a checkpoint of Lightning names many:
callbacks, paths, kinds of hyperparameters. So each of these gets a stand-in, a class of that name that does nothing.
Nothing is imported, and nothing runs. Functions of Python itself, such as print, have no business in a checkpoint: a
file that names one is refused.
"""

import argparse
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as parse
from torch import Tensor

from infra.addresses import as_url, name_of, shown
from infra.errors import UserError
from tasks.foreign import read_file

ALLOWED: list[Any] = [argparse.Namespace]  # Lightning stores this beside plain containers and tensors
PLAIN = {"argparse", "collections", "datetime", "decimal", "enum", "functools", "pathlib", "types", "typing", "uuid"}
NESTED = ("model", "state_dict")  # where a training script puts the weights beside what else it stores
PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".tar")


class StandIn:
    """Takes the place of a class of another project: takes anything, and does nothing."""

    def __new__(cls, *_args: Any, **_named: Any) -> "StandIn":
        """Makes one of whatever arguments."""
        return object.__new__(cls)

    def __init__(self, *_args: Any, **_named: Any) -> None:
        """Forgets its arguments."""

    def __setstate__(self, _state: Any) -> None:
        """Forgets the state."""


def load_foreign(source: str | Path, kind: str) -> dict[str, Any]:
    """Reads weights of another project, a `.safetensors` or `torch.save` file. Nothing in the file is executed.

    Args:
        source: Path or URL.
        kind: What is wanted, for the message.

    Raises:
        UserError: The file does not exist, or cannot be read without running code from it.
    """
    data = read_file(source, kind)
    if _is_safetensors(name_of(as_url(source)), data):
        try:
            return parse(data)
        except Exception as error:  # a hostile file may fail in any way
            raise UserError(f"{shown(source)} is no .safetensors ({first_line(error)}): give {kind}") from error
    return unpickle(data, source, kind)


def _is_safetensors(name: str, data: bytes) -> bool:
    """Tells by the suffix, else by the content, which begins with a length and an opening brace."""
    if name.endswith((".safetensors", *PICKLED)):
        return name.endswith(".safetensors")
    return data[8:9] == b"{" or not data.startswith((b"PK", b"\x80"))


def load_tensors(source: str | Path, kind: str) -> dict[str, Tensor]:
    """Reads tensors by name, also where a training script stored them as `model` or `state_dict` beside other things.

    Raises:
        UserError: As `load_foreign`, or there are no tensors in the file.
    """
    content: Any = load_foreign(source, kind)
    for name in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if isinstance(content, Mapping):
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        if tensors:
            return tensors
    raise UserError(f"{shown(source)} has no tensors by name: give {kind}")


def unpickle(data: bytes, source: str | Path, kind: str) -> dict[str, Any]:
    """Reads a file of `torch.save`, with stand-ins for classes that are not PyTorch's.

    Args:
        data: Bytes of the file.
        source: Path or URL, for the message.
        kind: What is wanted, for the message.

    Raises:
        UserError: It is no such file, or it names functions of Python, which could only be there to be run.
    """
    try:
        with torch.serialization.safe_globals([*ALLOWED, *_stand_ins(data)]):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile file may fail in any way
        raise UserError(
            f"{shown(source)} is no checkpoint that can be read without running code from it ({first_line(error)}): "
            f"give {kind} as published"
        ) from error


def _stand_ins(data: bytes) -> list[tuple[type[StandIn], str]]:
    """Returns a stand-in for each class that a file names beyond PyTorch's own, with its full name."""
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
    except Exception:  # no archive, or damaged: its reader says what is wrong
        return []
    allowed = {f"{one.__module__}.{one.__qualname__}" for one in ALLOWED}
    return [(type("StandIn", (StandIn,), {}), name) for name in named if name not in allowed and _may_stand(name)]


def _may_stand(name: str) -> bool:
    package = name.split(".")[0]
    return package in PLAIN or package not in {*sys.stdlib_module_names, "__builtin__", "nt", "posix"}


def first_line(error: Exception) -> str:
    """Returns the first line of an error's text, or its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
