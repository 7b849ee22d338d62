"""Makes command-line options from the parameter models, so that both have one definition."""

import inspect
import json
from collections.abc import Callable, Iterator
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from infra.errors import UserError
from tasks.params import Params


def with_options(model: type[Params], command: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a command with one option per field of `model` in place of its argument `params`.

    Args:
        model: A parameter model; nested models become prefixed options, `--sample-patches`.
        command: The function to call.
    """
    fields = dict(_fields(model))
    positional = [p for name, p in inspect.signature(command).parameters.items() if name != "params"]
    keyword = inspect.Parameter.KEYWORD_ONLY
    options = [
        inspect.Parameter(name, keyword, default=None, annotation=_option(name, field))
        for name, field in fields.items()
    ]

    def run(*args: Any, **kwargs: Any) -> Any:
        given = {name: kwargs.pop(name) for name in fields}
        chosen = {name: value for name, value in given.items() if value is not None}
        return command(*args, **kwargs, params=build(model, chosen))

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature([*positional, *options])  # type: ignore[attr-defined]
    return run


def build(model: type[Params], values: dict[str, Any]) -> Params:
    """Builds the model from option values.

    Raises:
        UserError: A value does not fit; the message names the option, the value and what is asked for.
    """
    try:
        return model.model_validate(_nest(model, values))
    except ValidationError as error:
        first = error.errors()[0]
        option = _flag("_".join(part for part in first["loc"] if isinstance(part, str)))
        given = f"{option} {first['input']!r}: " if first["loc"] else ""  # a model's own check names its fields
        raise UserError(f"{given}{first['msg'].removeprefix('Value error, ')}. See --help for what fits") from None


def _fields(model: type[Params], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        if _is_model(field):
            yield from _fields(field.annotation, f"{prefix}{name}_")  # type: ignore[arg-type]
        else:
            yield prefix + name, field


def _is_model(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Params)


def _nest(model: type[Params], values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if _is_model(field):
            inner = {k.removeprefix(f"{name}_"): v for k, v in values.items() if k.startswith(f"{name}_")}
            nested[name] = _nest(field.annotation, inner, f"{prefix}{name}_")  # type: ignore[arg-type]
        elif name in values:
            nested[name] = _parse(prefix + name, values[name])
    return nested


def _parse(name: str, value: str | list[str]) -> Any:
    """Parses an option: lists are JSON or repeated options, `null` is None, and other text is left to pydantic."""
    if isinstance(value, list):
        return _parse(name, value[0]) if len(value) == 1 and value[0].lstrip().startswith("[") else value
    if not value.lstrip().startswith(("[", "{")) and value != "null":
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        flag = _flag(name)
        raise UserError(
            f'{flag} {value[:80]!r} is no JSON ({error}): give a list as \'["a", "b"]\', or the option once for each'
        ) from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _option(name: str, field: FieldInfo) -> Any:
    flag = _flag(name)
    bounds = [str(b) for b in field.metadata if type(b).__name__ in ("Gt", "Ge", "Lt", "Le")]
    leaves = [leaf for part in get_args(field.annotation) for leaf in get_args(part) or [part]]
    parts = [leaf for leaf in leaves if leaf not in (type(None), Ellipsis)]
    kind = "|".join(getattr(part, "__name__", str(part)) for part in parts or [field.annotation])
    text = f"{field.description or ''} {' '.join(bounds)}".strip()
    default = json.dumps(field.get_default(call_default_factory=True), default=str)
    given = list[str] | None if get_origin(field.annotation) is tuple else str | None  # a list's option may come again
    return Annotated[given, typer.Option(flag, help=text, metavar=kind.upper(), show_default=default)]
