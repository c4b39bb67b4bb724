"""Which recipes are judged unless the user says: every known method, at several budgets."""

from __future__ import annotations

import inspect
import re
from typing import get_args, get_type_hints

from quire.kv.recipes import METHODS

SHARES = (0.5, 0.25, 0.125)  # of the context, for a method with a budget
BITS = (4, 2)  # for a method with bits
TUNED = {  # the defaults suit 128k tokens
    "landmarks": "landmarks(budget={budget},outliers=2)",
    "lowrank": "lowrank(outliers=2)",
    "shadowkv": "shadowkv(budget={budget},outliers=2)",
}
TOGETHER = ("snapkv(budget=25%)+kivi(bits=4)",)


def default_recipes(quick: bool = False) -> list[str]:
    """The uncompressed cache first, then every method; ``quick``: one budget each."""
    shares = (0.25,) if quick else SHARES
    found = ["none"]
    for name in METHODS:
        kinds = get_type_hints(METHODS[name])
        options = inspect.signature(METHODS[name]).parameters
        if "budget" in options:
            form = TUNED.get(name, name + "(budget={budget})")
            whole = float not in (get_args(kinds["budget"]) or (kinds["budget"],))
            budgets = [f"{100 * share:g}%" if whole else f"{share:g}" for share in shares]
            found += [form.format(budget=budget) for budget in budgets]
        elif "bits" in options:
            found += [f"{name}(bits={bits})" for bits in BITS]
        else:
            found.append(TUNED.get(name, name))
    return found if quick else [*found, *TOGETHER]


def fill(recipe: str, length: int) -> str:
    """``recipe`` with every ``25%`` as that share of ``length`` tokens."""

    def tokens(match: re.Match[str]) -> str:
        return str(max(1, round(float(match[1]) * length / 100)))

    return re.sub(r"(\d+(?:\.\d+)?)%", tokens, recipe)
