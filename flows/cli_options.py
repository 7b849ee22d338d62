"""Makes command-line options from the parameter models, so that both have one definition.

cyclopts and pydantic-settings make options of models too, but in commands of their own: the rest of the command line,
which is typer's, would stand beside a second library with other help, refusals and exit codes.
"""

import inspect
import json
from collections.abc import Callable, Iterator
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from infra.errors import UserError
from tasks.params import Params, described


def with_options(model: type[Params], command: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a command with one option per field of `model` in place of its argument `params`.

    Args:
        model: A parameter model; nested models become prefixed options, `--sample-patches`.
        command: The function to call.
    """
    fields = {"_".join(path): field for path, field in _leaves(model)}
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


def _leaves(model: type[Params], within: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Yields every field that is no model itself, by the names that lead to it."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Params):
            yield from _leaves(field.annotation, (*within, name))
        else:
            yield (*within, name), field


def _nest(model: type[Params], values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values in a dict for each nested model, also where none of its values is given."""
    nested: dict[str, Any] = {}
    for path, _ in _leaves(model):
        inner = nested
        for part in path[:-1]:
            inner = inner.setdefault(part, {})
        if (name := "_".join(path)) in values:
            inner[path[-1]] = _parse(name, values[name])
    return nested


def _parse(name: str, value: str | list[str]) -> Any:
    """Parses an option: lists are JSON or repeated options, `null` is None, and other text is left to pydantic."""
    if isinstance(value, list):
        if len(value) == 1 and value[0].lstrip().startswith("["):
            return _parse(name, value[0])
        return value
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
    return "--" + name.rstrip("_").replace("_", "-")  # with_ is `with`, which Python keeps for itself


def _option(name: str, field: FieldInfo) -> Any:
    default = field.get_default(call_default_factory=True)
    if isinstance(default, str):
        shown = default
    else:
        shown = json.dumps(default, default=str)
    texts = [described(field)]
    if default not in (None, ""):
        texts.append(f"Default: {shown}.")
    given = list[str] | None if get_origin(field.annotation) is tuple else str | None  # a list's option may come again
    option = typer.Option(
        _flag(name),
        help=" ".join(text for text in texts if text),
        metavar="|".join(_kinds(field.annotation)).upper(),
        show_default=False,  # typer's own puts every text into parentheses
    )
    return Annotated[given, option]


def _kinds(annotation: Any) -> Iterator[str]:
    """Yields the names of the types, or the choices, that an annotation allows beside none."""
    inner = [part for part in get_args(annotation) if part not in (type(None), Ellipsis)]
    for part in inner:
        yield from _kinds(part)
    if not inner:
        yield getattr(annotation, "__name__", str(annotation))
