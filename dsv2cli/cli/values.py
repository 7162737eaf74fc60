"""From what was typed to the values of options, where that needs no library."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def lightly(parameter: Any) -> Any:
    """An option or argument of typer's, or None, with defaults and texts taken as they are: to give values
    another form typer imports pydantic, a tenth of a second.
    """
    if parameter is not None and not isinstance(parameter.process_value, functools.partial):
        parameter.process_value = functools.partial(as_it_is, parameter, parameter.process_value)
    return parameter


def as_it_is(parameter: Any, process: Callable[..., Any], ctx: Any, value: Any) -> Any:
    """A value that needs no other form; any other as `process` makes it."""
    form = parameter.type_descriptor.annotation
    a_text = isinstance(value, str) and form in (str, str | None) and not parameter.multiple
    nothing = value is None or value == ()
    if parameter.required or not (a_text or nothing or value is parameter.default):
        return process(ctx, value)
    value = () if nothing and parameter.multiple else value
    return value if parameter.callback is None else parameter.callback(ctx, parameter, value)
