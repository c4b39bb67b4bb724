"""Write the generated parts of the docs: ``python docs/generate.py [--check]``."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import get_args, get_type_hints

import typer

from quire.cli.bench import bench
from quire.cli.bench_kv import bench_kv
from quire.cli.convert import convert
from quire.cli.run import run
from quire.kv.recipes import METHODS
from quire.models.registry import SUPPORTED

DOCS = Path(__file__).parent


def flags(command: Callable[..., None]) -> str:
    """A table of a command's flags."""
    hints = get_type_hints(command, include_extras=True)
    rows = ["| flag | what | default |", "|---|---|---|"]
    for name, parameter in inspect.signature(command).parameters.items():
        if hints[name] is typer.Context:
            continue
        kind, info = get_args(hints[name])
        # Typer takes the first declared name for the default when it is given by position.
        first = (info.default,) if str(info.default).startswith("-") else ()
        declared = (*first, *(info.param_decls or ()))
        names = declared or (info.metavar or "--" + name.replace("_", "-"),)
        text = info.help.replace("|", "\\|")
        enum = next((k for k in (kind, *get_args(kind)) if issubclass(_plain(k), Enum)), None)
        if enum is not None:
            text += " One of " + ", ".join(f"`{member.value}`" for member in enum) + "."
        default = getattr(parameter.default, "value", parameter.default)
        unset = any(default is nothing for nothing in (None, False, inspect.Parameter.empty))
        shown = " ".join(f"`{n}`" for n in names)
        rows.append(f"| {shown} | {text} | {'' if unset else f'`{default}`'} |")
    return "\n".join(rows)


def _plain(kind: object) -> type:
    return kind if isinstance(kind, type) and not get_args(kind) else object


def architectures() -> str:
    """The list of supported architectures."""
    rows = ["| architecture | file |", "|---|---|"]
    for name, function in sorted(SUPPORTED.items()):
        file = function.__module__.rsplit(".", 1)[1]
        rows.append(f"| `{name}` | [{file}.py](../quire/models/{file}.py) |")
    return "\n".join(rows)


def kv_methods() -> str:
    """The KV methods by name: axis, options with their defaults, file."""
    rows = ["| name | axis | what | options |", "|---|---|---|---|"]
    for name, make in METHODS.items():
        what = (inspect.getdoc(make) or "").split("\n\n")[0].replace("\n", " ")
        options = ", ".join(
            f"`{option.name}={option.default}`"
            for option in inspect.signature(make).parameters.values()
        )
        file = make.__module__.removeprefix("quire.kv.").replace(".", "/")
        axis = getattr(make, "axis", "several")
        link = f"[`{name}`](../quire/kv/{file}.py)"
        rows.append(f"| {link} | {axis} | {what} | {options} |")
    return "\n".join(rows)


PARTS = {
    "run.md": {"flags run": lambda: flags(run)},
    "benchmarks.md": {"flags bench": lambda: flags(bench)},
    "kv.md": {"kv methods": kv_methods, "flags bench kv": lambda: flags(bench_kv)},
    "models.md": {"architectures": architectures, "flags convert": lambda: flags(convert)},
}


def main() -> None:
    """Rewrite the parts between their markers; with ``--check`` only compare."""
    stale = []
    for page, parts in PARTS.items():
        path = DOCS / page
        text = new = path.read_text(encoding="utf-8")
        for name, make in parts.items():
            pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
            assert pattern.search(new), f"{page} has no part {name!r}"
            body = make()
            new = pattern.sub(lambda m, b=body: f"{m[1]}{b}\n{m[2]}", new)
        if new != text:
            stale.append(page)
            if "--check" not in sys.argv:
                path.write_text(new, encoding="utf-8")
    if stale and "--check" in sys.argv:
        sys.exit(f"Stale: {', '.join(stale)}. Run: make docs")


if __name__ == "__main__":
    main()
