"""``quire bench kv``: every KV recipe beside the uncompressed cache."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table as RichTable

from quire.api.setup import model_folder
from quire.bench.kv.judge import Judged, Plan, judge
from quire.bench.kv.recipes import default_recipes
from quire.bench.kv.report import Table, tables, write_all
from quire.bench.kv.suite import TASKS
from quire.errors import QuireError
from quire.models.loader import load_spec

LENGTHS = (512, 1024, 2048)
SAMPLES, QUICK_SAMPLES = 16, 4
QUICK_TASKS = ("kv", "needle", "many-shot")


def bench_kv(
    kv: Annotated[
        list[str] | None,
        typer.Option(
            help='A recipe, as in quire run; "25%" is that share of the length. Repeatable. '
            "Default: every method.",
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help='Checkpoint folder, .gguf file, or "demo" for the bundled model.')
    ] = "demo",
    length: Annotated[
        list[int] | None,
        typer.Option(
            help="Tokens of a session. Repeatable. Default: 512, 1024, 2048, if they fit."
        ),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(TASKS)}; repeatable. Default: all.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help=f"Sessions of each task and length. Default: {SAMPLES}.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer lengths, tasks, sessions and budgets.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for tables and plot.")] = Path("bench-kv"),
    seed: Annotated[int, typer.Option(help="Seed of the sessions.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
) -> None:
    """Judge KV recipes: fidelity, bytes and speed.

    Exit status: 0 all recipes fine, 1 some failed, 2 nothing could be run.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    command = shlex.join(["quire", *sys.argv[1:]])
    found: list[Judged] = []
    try:
        plan = Plan(
            tuple(kv or default_recipes(quick)),
            model,
            tuple(length or _lengths(model, quick)),
            tuple(task or (QUICK_TASKS if quick else TASKS)),
            samples if samples is not None else QUICK_SAMPLES if quick else SAMPLES,
            seed,
            rounds=1 if quick else 2,
        )
        for one in judge(plan):
            found.append(one)
            print(f"{one.length} {one.recipe}: {one.error or 'done'}", file=sys.stderr, flush=True)
            write_all(found, out, command)
    except QuireError as error:
        print(f"quire: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    console = Console(width=max(132, Console().width))
    for each in tables(found, plan.lengths[-1]):
        console.print(_rich(each))
    print(f"All lengths and turns: {out}", file=sys.stderr)
    if any(one.error for one in found):
        raise typer.Exit(1)


def _lengths(model: str, quick: bool) -> list[int]:
    """The default lengths that fit the model's context; ``quick``: the first two."""
    context = load_spec(model_folder(model)).context
    fitting = [n for n in LENGTHS if n <= context] or [context]
    return fitting[:2] if quick else fitting


def _rich(table: Table) -> RichTable:
    drawn = RichTable(title=table.title)
    for number, column in enumerate(table.columns):
        drawn.add_column(column, justify="right" if number else "left", no_wrap=not number)
    for row in table.rows:
        drawn.add_row(*row)
    return drawn
