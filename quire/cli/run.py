"""``quire run``: a file of prompts through a model to a file of results."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from enum import StrEnum
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from quire.api.llm import LLM
from quire.api.setup import Setup, model_folder
from quire.cli.info import machine
from quire.decode.params import SamplingParams
from quire.decode.structure import Structure
from quire.errors import InputFileError, QuireError
from quire.fleet.fleet import Fleet
from quire.fleet.processes import on_this_machine
from quire.jobs.dry_run import dry_run
from quire.jobs.job import Job
from quire.jobs.log import JsonLog, Log, TextLog
from quire.jobs.recorder import Recorder
from quire.jobs.report import check_writable, make_report, write_report
from quire.jobs.run import make_parser, run_job
from quire.jobs.settings import job_settings
from quire.jobs.summary import write_stats
from quire.kv.recipes import check, parse
from quire.models.loader import load_spec, stored_dtype


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


def _structure(
    schema: Path | None, regex: str | None, choice: list[str] | None, grammar: Path | None
) -> Structure | None:
    """The default structure; at most one of its forms may be given."""

    def text(file: Path | None) -> str | None:
        try:
            return None if file is None else file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputFileError(f"{file} cannot be read: {error}.", value=str(file)) from error

    forms = {
        "json_schema": text(schema),
        "regex": regex,
        "choice": choice or None,
        "grammar": text(grammar),
    }
    asked = {name: value for name, value in forms.items() if value is not None}
    return Structure.of(asked) if asked else None


def _backend(
    workers: str | None, ray: str | None, warn: Callable[[str], None]
) -> Callable[..., LLM | Fleet]:
    """What makes the engine: in this process, in several, or on a cluster."""
    if ray is not None:
        from quire.fleet.actors import on_ray  # importing Ray takes a second

        return partial(on_ray, address=ray, workers=workers or "auto", warn=warn)
    if workers is not None:
        return partial(on_this_machine, workers=workers, warn=warn)
    return LLM


def run(
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT",
            help="JSONL, CSV, Parquet or Arrow files, folders of them, or - for standard input.",
        ),
    ],
    output: Annotated[
        str,
        typer.Option("--output", "-o", help="JSONL or .parquet file, or - for standard output."),
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
    kv_dir: Annotated[
        Path | None, typer.Option(help="Folder that keeps the KV of prompts, for later runs too.")
    ] = None,
    kv_disk: Annotated[str, typer.Option(help="Limit for the size of --kv-dir.")] = "16GiB",
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
        str | None,
        typer.Option(help="jinja2 text or file that makes a prompt of each row's columns."),
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
    schema: Annotated[
        Path | None, typer.Option(help="JSON Schema file: the form of rows without their own.")
    ] = None,
    regex: Annotated[
        str | None, typer.Option(help="Regular expression that outputs match as a whole.")
    ] = None,
    choice: Annotated[
        list[str] | None, typer.Option(help="A text that an output may be; repeatable.")
    ] = None,
    grammar: Annotated[
        Path | None, typer.Option(help="File with a Lark grammar that outputs follow.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of rows without one of their own.")] = 0,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Plan only: rows, tokens, savings, time.")
    ] = False,
    stats: Annotated[Path | None, typer.Option(help="Write the summary as JSON.")] = None,
    journal: Annotated[
        Path | None,
        typer.Option(help="File that records what is finished. Default: OUTPUT.journal."),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over: delete the job's journal and output first.")
    ] = False,
    dedupe: Annotated[
        bool,
        typer.Option(
            help="Compute equal rows once if their answers must be equal; --no-dedupe: each."
        ),
    ] = True,
    report: Annotated[Path | None, typer.Option(help="Write a report as an HTML page.")] = None,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="JSON lines on standard error, for programs.")
    ] = False,
    log_every: Annotated[
        float, typer.Option(min=0, help="Seconds between lines of progress in a log.")
    ] = 10.0,
    metrics_port: Annotated[
        str | None,
        typer.Option(help="Serve Prometheus metrics meanwhile: PORT or HOST:PORT."),
    ] = None,
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
    """Run every row of INPUT through a model. The same command goes on where a run was cut short.

    Exit status: 0 all rows fine, 1 some rows failed, 2 nothing could be run, 130 interrupted.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    given = {name: value for name, value in locals().items() if name != "dry"}
    log: Log = (JsonLog if log_json else TextLog)(sys.stderr, log_every)
    warnings.showwarning = lambda message, *_, **__: log.warn(str(message))
    try:
        params = SamplingParams(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            max_tokens=max_tokens,
            stop=tuple(stop or ()),
            structure=_structure(schema, regex, choice, grammar),
        )
        options: dict[str, Any] = {
            "dtype": dtype.value if dtype else None,
            "weights": weights,
            "memory": memory,
            "kv_memory": kv_memory,
            "chunk": chunk,
            "context": context,
            "device": device,
        }
        job = Job(
            source=tuple(source),
            output=output,
            params=params,
            model=model,
            template=template,
            order=order.value,
            limit=limit,
            seed=seed,
            dedupe=dedupe,
            journal=journal,
            fresh=fresh,
            command=tuple(word for word in sys.argv[1:] if word != "--fresh"),
        )
        if dry:
            recipe = parse(kv)
            setup = Setup.make(model, **options)
            windows = [layer.window for layer in setup.spec.layers]
            check(recipe, windows, setup.spec.context, deterministic=deterministic)
            log.start(given, setup.budget)
            parser = make_parser(job, log.warn)
            rows = (parser.read(record) for record in islice(job.records(), limit))
            log.plan(dry_run(setup, rows))
            return
        folder = model_folder(model)
        settings = job_settings(
            folder,
            params,
            template,
            dtype=dtype.value if dtype else str(stored_dtype(folder)).removeprefix("torch."),
            weights=weights,
            kv=kv,
            context=load_spec(folder, context=context).context,
            device=device,
            on_overlong=on_overlong.value,
            deterministic=deterministic,
            plain=plain,
            seed=seed,
        )
        recorder = Recorder(on_failure=log.failed)
        if report is not None:
            check_writable(report)
        with _metrics(metrics_port, recorder):
            summary = run_job(
                replace(job, settings=settings),
                lambda: _backend(workers, ray, log.warn)(
                    model=model,
                    **options,
                    kv=kv,
                    kv_dir=None if kv_dir is None else str(kv_dir),
                    kv_disk=kv_disk,
                    policy=policy.value,
                    threads=threads,
                    window=window,
                    seed=seed,
                    on_overlong=on_overlong.value,
                    deterministic=deterministic,
                    plain=plain,
                    on_budget=lambda budget: log.start(given, budget),
                ),
                view=log.view(),
                say=log.warn,
                recorder=recorder,
            )
        log.summary(summary)
        if stats is not None:
            write_stats(summary, stats)
        if report is not None:
            setup = Setup.make(model, **options)
            page = make_report(
                summary,
                recorder,
                settings=given,
                budget=setup.budget,
                machine=machine(),
                decode=setup.tokenizer.decode,
            )
            write_report(report, page)
    except QuireError as error:
        log.error(error)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:  # before there was anything to run, or a second one
        log.warn("Interrupted")
        raise typer.Exit(130) from error
    if summary.state != "done":
        raise typer.Exit(130)
    if summary.rows == 0:
        log.warn(f"quire: {' '.join(source)} has no rows.")
    if summary.rows_failed:
        raise typer.Exit(1)


def _metrics(address: str | None, recorder: Recorder) -> AbstractContextManager[object]:
    if address is None:
        return nullcontext()
    try:
        from quire.jobs.metrics import serve_metrics
    except ImportError as error:
        raise QuireError(
            "--metrics-port needs prometheus-client, which is not installed.",
            action="pip install 'quire[metrics]'",
        ) from error
    return serve_metrics(address, recorder)


def _interrupt(*_: object) -> None:
    """A request to end (SIGTERM) ends a run as Ctrl-C does."""
    raise KeyboardInterrupt
