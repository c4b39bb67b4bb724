"""``quire run``: a file of prompts through a model to a file of results."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from quire.api.llm import LLM
from quire.api.setup import Setup
from quire.decode.params import SamplingParams
from quire.errors import QuireError
from quire.fleet.fleet import Fleet
from quire.fleet.processes import on_this_machine
from quire.jobs.dry_run import dry_run
from quire.jobs.progress import default_view
from quire.jobs.run import Job, job_rows, run_job, write_stats


class Policy(StrEnum):
    """Policies by name."""

    batch = "batch"
    fcfs = "fcfs"


class Dtype(StrEnum):
    """Dtypes by name."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Order(StrEnum):
    """Orders of the output."""

    input = "input"
    completion = "completion"


class Overlong(StrEnum):
    """What to do with a prompt that leaves no room in the context."""

    error = "error"
    truncate_left = "truncate-left"
    truncate_right = "truncate-right"
    fail = "fail"


def _say(text: str) -> None:
    """Messages go to standard error; standard output is for data."""
    print(text, file=sys.stderr, flush=True)


def _generator(workers: str | None, ray: str | None) -> Callable[..., LLM | Fleet]:
    """What makes the engine: in this process, in several, or on a cluster."""
    if ray is not None:
        from quire.fleet.actors import on_ray  # importing Ray takes a second

        return partial(on_ray, address=ray, workers=workers or "auto", warn=_say)
    if workers is not None:
        return partial(on_this_machine, workers=workers, warn=_say)
    return LLM


def run(
    source: Annotated[
        str, typer.Argument(metavar="INPUT", help="JSONL or CSV file, or - for standard input.")
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", help="JSONL file, or - for standard output.")
    ] = "-",
    model: Annotated[
        str, typer.Option(help='Checkpoint folder, .gguf file, or "demo" for the bundled model.')
    ] = "demo",
    dtype: Annotated[
        Dtype | None, typer.Option(help="Dtype of weights and KV. Default: the checkpoint's.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Quantise on load: int8, int4, or int4:GROUP with or without +zeros."),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: all cores.")] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Limit for everything, such as 6GiB. Default: 85% of what is free."),
    ] = None,
    kv_memory: Annotated[str | None, typer.Option(help="Limit for the KV cache alone.")] = None,
    kv: Annotated[
        str, typer.Option(help='KV methods, such as "snapkv(budget=1024)+kivi(bits=4)".')
    ] = "none",
    policy: Annotated[
        Policy, typer.Option(help="batch plans all rows together; fcfs takes them in order.")
    ] = Policy.batch,
    chunk: Annotated[int, typer.Option(help="Most tokens computed in a step.")] = 512,
    window: Annotated[int, typer.Option(help="Most rows planned together.")] = 32768,
    context: Annotated[
        int | None, typer.Option(help="Longest sequence. Default: the model's.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    template: Annotated[
        Path | None, typer.Option(help="jinja2 file that makes a prompt of each CSV row.")
    ] = None,
    order: Annotated[
        Order, typer.Option(help="Write results in input order or as they finish.")
    ] = Order.input,
    on_overlong: Annotated[
        Overlong,
        typer.Option(help="Prompt longer than the context: error row, truncate, or fail the job."),
    ] = Overlong.error,
    limit: Annotated[int | None, typer.Option(help="Read only the first rows.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Default most output tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="Default temperature; 0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Default top-p; 1 is off.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Default top-k; 0 is off.")] = 0,
    min_p: Annotated[float, typer.Option(help="Default min-p; 0 is off.")] = 0.0,
    stop: Annotated[list[str] | None, typer.Option(help="Default stop string; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of rows without one of their own.")] = 0,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Plan only: rows, tokens, savings, time.")
    ] = False,
    stats: Annotated[Path | None, typer.Option(help="Write the summary as JSON.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing output file.")] = False,
    deterministic: Annotated[
        bool, typer.Option(help="A row's tokens do not depend on the rows beside it (slower).")
    ] = False,
    plain: Annotated[
        bool, typer.Option(help="PyTorch alone and the reference attention (slow).")
    ] = False,
    workers: Annotated[
        str | None,
        typer.Option(help="Processes or Ray actors: a number, or auto: a GPU or node each."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option("--ray", metavar="ADDRESS", help="Ray cluster: an address, auto or local."),
    ] = None,
) -> None:
    """Run every row of INPUT through a model.

    Exit status: 0 all rows fine, 1 some rows failed, 2 nothing could be run, 130 interrupted.
    """
    try:
        params = SamplingParams(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            max_tokens=max_tokens,
            stop=tuple(stop or ()),
        )
        job = Job(source, output, params, template, order.value, limit, overwrite)
        started = time.perf_counter()
        options: dict[str, Any] = {
            "dtype": dtype.value if dtype else None,
            "weights": weights,
            "memory": memory,
            "kv_memory": kv_memory,
            "chunk": chunk,
            "context": context,
            "device": device,
        }
        if dry:
            setup = Setup.make(model, **options)
            _say(f"Memory\n{setup.budget.table()}")
            _say(dry_run(setup, job_rows(job, model, _say)).text())
            return
        with _generator(workers, ray)(
            model=model,
            **options,
            kv=kv,
            policy=policy.value,
            threads=threads,
            window=window,
            seed=seed,
            on_overlong=on_overlong.value,
            deterministic=deterministic,
            plain=plain,
            on_budget=lambda table: _say(f"Memory\n{table}"),
        ) as llm:
            loaded = time.perf_counter() - started
            summary = run_job(job, llm, load_seconds=loaded, view=default_view(), warn=_say)
        _say(summary.text())
        if stats is not None:
            write_stats(summary, stats)
    except QuireError as error:
        _say(f"quire: {error}")
        raise typer.Exit(2) from error
    if summary.interrupted:
        raise typer.Exit(130)
    if summary.rows_ok + summary.rows_failed == 0:
        _say(f"quire: {source} has no rows.")
    if summary.rows_failed:
        raise typer.Exit(1)
