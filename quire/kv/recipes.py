"""Recipes: KV methods by name, and how names compose.

``snapkv(budget=1024)+kivi(bits=2)`` is a selection and a store. Each method is a line in `METHODS`.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from types import NoneType
from typing import Any, get_args, get_type_hints

from quire.errors import InvalidRequestError
from quire.kv.fetch.landmarks import Landmarks
from quire.kv.fetch.quantised import QuantisedKeys
from quire.kv.fetch.sentences import SentenceBuckets
from quire.kv.fetch.sparf import LoudChannels
from quire.kv.fetch.squeezed import SqueezedAttention
from quire.kv.method import Recipe
from quire.kv.select.chelsea import SoftMatching
from quire.kv.select.elastic import Anchors
from quire.kv.select.gemfilter import GemFilter
from quire.kv.select.h2o import HeavyHitters
from quire.kv.select.kvmerger import SimilarRuns
from quire.kv.select.observation import ObservationWindow
from quire.kv.select.prefixkv import SameLevel
from quire.kv.select.scissorhands import Persistence
from quire.kv.select.sink_recent import SinkRecent
from quire.kv.sparse.dhsa import Hierarchical
from quire.kv.sparse.pbs import PermutedBlocks
from quire.kv.store.affine import Kivi
from quire.kv.store.bfp import BlockFloat
from quire.kv.store.cross_layer import CrossLayer
from quire.kv.store.disk import OnDisk, instinfer
from quire.kv.store.fp8 import Fp8
from quire.kv.store.gear import Gear
from quire.kv.store.int8 import Int8
from quire.kv.store.mikv import MixedPrecision
from quire.kv.store.minicache import SharedDirections
from quire.kv.store.rotatekv import RotateKV
from quire.kv.store.shadow import LowRankKeys, shadowkv
from quire.kv.store.shrunken import ChannelShrinking

METHODS: dict[str, Callable[..., Any]] = {
    "streaming": SinkRecent,
    "h2o": HeavyHitters,
    "scissorhands": Persistence,
    "snapkv": ObservationWindow,
    "prefixkv": SameLevel,
    "elastic": Anchors,
    "kvmerger": SimilarRuns,
    "chelsea": SoftMatching,
    "gemfilter": GemFilter,
    "kivi": Kivi,
    "landmarks": Landmarks,
    "int8": Int8,
    "fp8": Fp8,
    "bfp": BlockFloat,
    "rotatekv": RotateKV,
    "gear": Gear,
    "mikv": MixedPrecision,
    "minicache": SharedDirections,
    "xkv": CrossLayer,
    "cskv": ChannelShrinking,
    "lowrank": LowRankKeys,
    "shadowkv": shadowkv,
    "squeezed": SqueezedAttention,
    "sentencekv": SentenceBuckets,
    "a2ats": QuantisedKeys,
    "sparf": LoudChannels,
    "pbs": PermutedBlocks,
    "dhsa": Hierarchical,
    "disk": OnDisk,
    "instinfer": instinfer,
}

AXES = ("select", "store", "fetch", "sparse", "shorten")
_WORDS = ("true", "false", "none")
_ONCE = "give it every=none."
_PART = re.compile(r"\s*(\w+)\s*(?:\((.*)\))?\s*", re.DOTALL)


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
    if match is None:
        raise _invalid(
            f"{part.strip()!r} cannot be read as a KV method.",
            "Write a recipe like snapkv(budget=1024)+kivi(bits=4).",
        )
    method = match[1]
    if method not in METHODS:
        close = get_close_matches(method.lower(), METHODS, 1)
        meant = f"Do you mean {close[0]}? " if close else ""
        raise _invalid(f"{method!r} is not a KV method.", f"{meant}Known are {', '.join(METHODS)}.")
    make = METHODS[method]
    known, types = inspect.signature(make).parameters, get_type_hints(make)
    given: dict[str, Any] = {}
    for argument in filter(None, (a.strip() for a in (match[2] or "").split(","))):
        name, equals, value = (x.strip() for x in argument.partition("="))
        if not equals:
            raise _invalid(
                f"{argument!r} in {method} has no name.", f"Write name=value: {', '.join(known)}."
            )
        if name not in known:
            raise _invalid(f"{method} has no option {name!r}.", f"It has {', '.join(known)}.")
        if name in given:
            raise _invalid(f"{method} is given {name} twice.", "Leave one of them out.")
        kinds = get_args(types[name]) or (types[name],)
        given[name] = _value(f"{method}({name}={value})", value, kinds, known[name].default)
    try:
        return make(**given)
    except InvalidRequestError as error:  # tell which of the recipe's methods it is
        raise _invalid(f"{method}: {error.what}", error.action) from error


def _value(place: str, text: str, kinds: tuple[type, ...], default: Any) -> Any:
    """``text`` as one of the types ``kinds`` that an option may have."""
    try:
        value = ast.literal_eval(text[:1].upper() + text[1:] if text in _WORDS else text)
    except (ValueError, SyntaxError):
        value = text
    if type(value) is int and int not in kinds and float in kinds:
        return float(value)
    if type(value) not in kinds:
        names = " or ".join("none" if kind is NoneType else kind.__name__ for kind in kinds)
        share = " Write a share as a fraction, such as 0.25." if float in kinds else ""
        raise _invalid(f"{place} is not {names}.", f"Default: {default}.{share}")
    return value


def _compose(recipe: Recipe, more: Recipe, part: str) -> Recipe:
    for axis in AXES:
        method = getattr(more, axis)
        if method is None:
            continue
        if getattr(recipe, axis) is not None:
            raise _invalid(
                f"{part.strip()!r} cannot be added: there is a method that decides {axis} already.",
                "Take one method an axis.",
            )
        recipe = replace(recipe, **{axis: method})
    _check_together(recipe)
    return recipe


def _check_together(recipe: Recipe) -> None:
    if recipe.store is not None and getattr(recipe.select, "mass_bias", False):
        raise _invalid(
            "Entries with a bias cannot be packed by a store.",
            "Give the selection mass_bias=false.",
        )
    if recipe.select is None or recipe.select.every is None:
        return
    if recipe.fetch is not None:
        raise _invalid(
            "A selection that goes on while decoding cannot be combined with a fetch.",
            f"The fetch's index would be stale after every selection: {_ONCE}",
        )
    if recipe.store is not None:
        raise _invalid(
            "A selection that goes on while decoding cannot be combined with a store.",
            f"Every selection would unpack all and lose a little more: {_ONCE}",
        )


def check(
    recipe: Recipe, windows: Sequence[int | None], context: int, *, deterministic: bool
) -> None:
    """Raise InvalidRequestError where a recipe makes no sense for a model with that context.

    ``windows``: of each layer of the model, None where it sees everything. ``deterministic``:
    whether a request's tokens must not depend on what it is batched with.
    """
    _check_together(recipe)
    for axis in ("store", "fetch", "sparse"):
        if deterministic and getattr(recipe, axis) is not None:
            raise _invalid(
                f"A KV method that decides {axis} works on chunks and on nodes of the prefix tree, "
                "which other requests cut: tokens would depend on them, not so in deterministic "
                "mode.",
                "Take a method that selects, or do without deterministic mode.",
            )
    window = min((w for w in windows if w is not None), default=context)
    if recipe.select is not None and window < context:
        raise _invalid(
            f"Some layers of the model see the last {window} tokens only, and would see nothing of "
            "older entries that a selection keeps.",
            f"Take a store or a fetch, or a context that fits the window: --context {window}.",
        )
    if recipe.shorten is not None:
        recipe.shorten.layers(len(windows))  # raises for a layer that the model does not have


def _invalid(what: str, action: str) -> InvalidRequestError:
    return InvalidRequestError(what, field="kv", action=action)
