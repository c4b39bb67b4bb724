"""Recipes: KV methods by name, and how names compose.

``snapkv(budget=1024)+kivi(bits=2)`` is a selection and a store. Each method is a line in `METHODS`.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from quire.errors import InvalidRequestError
from quire.kv.fetch.landmarks import Landmarks
from quire.kv.method import Recipe
from quire.kv.select.observation import ObservationWindow
from quire.kv.select.sink_recent import SinkRecent
from quire.kv.store.affine import Kivi

METHODS: dict[str, Callable[..., Any]] = {
    "streaming": SinkRecent,
    "snapkv": ObservationWindow,
    "kivi": Kivi,
    "landmarks": Landmarks,
}

AXES = ("select", "store", "fetch", "sparse", "shorten")
_PART = re.compile(r"\s*([a-z0-9_]+)\s*(?:\((.*)\))?\s*", re.DOTALL)


def parse(text: str) -> Recipe:
    """The recipe that ``text`` names. Raises InvalidRequestError."""
    recipe = Recipe(text)
    if text.strip() in ("", "none"):
        return recipe
    for part in re.split(r"\+(?![^(]*\))", text):
        made = _make(part)
        recipe = _compose(recipe, made if isinstance(made, Recipe) else _on_axis(made), part)
    return recipe


def _on_axis(method: Any) -> Recipe:
    return replace(Recipe(), **{method.axis: method})


def _make(part: str) -> Any:
    match = _PART.fullmatch(part)
    if match is None or match[1] not in METHODS:
        raise _invalid(f"{part.strip()!r} is not a KV method.", f"Known are {', '.join(METHODS)}.")
    make = METHODS[match[1]]
    known = inspect.signature(make).parameters
    given: dict[str, Any] = {}
    for argument in filter(None, (a.strip() for a in (match[2] or "").split(","))):
        name, _, value = (x.strip() for x in argument.partition("="))
        if name not in known:
            raise _invalid(
                f"{match[1]} has no option {name!r}.", f"It has {', '.join(known) or 'none'}."
            )
        given[name] = _value(match[1], name, value, known[name].default)
    return make(**given)


def _value(method: str, name: str, text: str, default: Any) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    kind = float if isinstance(default, float) and isinstance(value, int) else type(default)
    if default is not None and not isinstance(value, (type(default), kind)):
        raise _invalid(f"{method}({name}={text}) is not {kind.__name__}.", f"Default: {default}.")
    return kind(value) if kind is float else value


def _compose(recipe: Recipe, more: Recipe, part: str) -> Recipe:
    for axis in AXES:
        method = getattr(more, axis)
        if method is None:
            continue
        if getattr(recipe, axis) is not None:
            raise _invalid(
                f"{part.strip()!r} cannot be added: there is a method that decides {axis} already.",
                "Take one method for each of select, store and fetch.",
            )
        recipe = replace(recipe, **{axis: method})
    if recipe.select is not None and recipe.fetch is not None and recipe.select.every is not None:
        raise _invalid(
            "A selection that goes on while decoding cannot be combined with a fetch.",
            "The fetch's index would be stale after every selection.",
        )
    return recipe


def _invalid(what: str, action: str) -> InvalidRequestError:
    return InvalidRequestError(what, field="kv", action=action)
