"""The ``quire`` command."""

from __future__ import annotations

import typer

from quire.cli.bench import bench
from quire.cli.bench_kv import bench_kv
from quire.cli.convert import convert
from quire.cli.info import info
from quire.cli.jobs import app as jobs
from quire.cli.run import run

app = typer.Typer(
    name="quire",
    help="Run a language model over a large pile of prompts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(run)
benches = typer.Typer()
benches.callback(invoke_without_command=True)(bench)
benches.command("kv")(bench_kv)
app.add_typer(benches, name="bench")
app.command()(convert)
app.command()(info)
app.add_typer(jobs, name="jobs")
