"""Write the generated parts of the docs: ``python docs/generate.py [--check]``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import typer

from quire.cli.main import app
from quire.models.registry import SUPPORTED

DOCS = Path(__file__).parent


def flags(command: str) -> str:
    """A table of a command's flags."""
    group = typer.main.get_command(app)
    rows = ["| flag | what | default |", "|---|---|---|"]
    for param in group.commands[command].params:  # type: ignore[attr-defined]
        if param.name == "help":
            continue
        name = " ".join(f"`{opt}`" for opt in param.opts) if param.opts[0][0] == "-" else "`INPUT`"
        choices = getattr(param.type, "choices", None)
        text = (param.help or "").replace("|", "\\|")
        if choices:
            text += " One of " + ", ".join(f"`{getattr(c, 'value', c)}`" for c in choices) + "."
        default = getattr(param.default, "value", param.default)
        shown = "" if default in (None, False, ()) or callable(default) else f"`{default}`"
        rows.append(f"| {name} | {text} | {shown} |")
    return "\n".join(rows)


def architectures() -> str:
    """The list of supported architectures."""
    rows = ["| architecture | file |", "|---|---|"]
    for name, function in sorted(SUPPORTED.items()):
        file = function.__module__.rsplit(".", 1)[1]
        rows.append(f"| `{name}` | [{file}.py](../quire/models/{file}.py) |")
    return "\n".join(rows)


PARTS = {
    "run.md": {"flags run": lambda: flags("run")},
    "benchmarks.md": {"flags bench": lambda: flags("bench")},
    "models.md": {"architectures": architectures},
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
