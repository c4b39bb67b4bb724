"""``quire bench``: generated workloads, every policy beside transformers, in one run."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from quire.bench.compare import Measured, run_policy, run_transformers
from quire.bench.limit import measure_machine
from quire.bench.shapes import SHAPES, make_checkpoint
from quire.bench.workloads import WORKLOADS, make_workload
from quire.engine.budget import format_bytes
from quire.jobs.summary import peak_rss
from quire.kernels import native
from quire.weights.quantise import parse

SYSTEMS = ("batch", "fcfs", "transformers")


def bench(
    context: typer.Context,
    workload: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(WORKLOADS)}; repeatable.")
    ] = None,
    shape: Annotated[str, typer.Option(help=f"Model shape: {', '.join(SHAPES)}.")] = "135m",
    system: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(SYSTEMS)}; repeatable.")
    ] = None,
    scale: Annotated[float, typer.Option(help="Multiplies all lengths.")] = 1.0,
    repeat: Annotated[int, typer.Option(help="Rounds; the fastest of each counts.")] = 1,
    chunk: Annotated[int, typer.Option(help="Most tokens computed in a step.")] = 512,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    weights: Annotated[
        str | None, typer.Option(help="Quantise on load, as in quire run; not for transformers.")
    ] = None,
    deterministic: Annotated[
        bool, typer.Option(help="Deterministic mode; not for transformers.")
    ] = False,
    folder: Annotated[Path, typer.Option(help="Where random checkpoints are kept.")] = Path(
        "bench-out"
    ),
) -> None:
    """Measure policies and transformers on generated workloads.

    Systems alternate within each round. The last line of the output is JSON.
    """
    if context.invoked_subcommand is not None:
        return
    names, systems = workload or list(WORKLOADS), system or list(SYSTEMS)
    unknown = [n for n in names if n not in WORKLOADS] + [s for s in systems if s not in SYSTEMS]
    if unknown or shape not in SHAPES:
        print(f"quire: unknown: {', '.join(unknown) or shape}", file=sys.stderr)
        raise typer.Exit(2)
    if threads is not None:
        torch.set_num_threads(threads)
    asked = parse(weights) if weights is not None else None
    native.configure()
    checkpoint = make_checkpoint(shape, folder)
    machine = measure_machine() if device == "cpu" else None
    if machine is not None:
        print(
            f"this machine: {2 * machine.dense / 1e9:.0f} GFLOP/s in bf16, "
            f"{2 * machine.int8 / 1e9:.0f} GOP/s in int8, {machine.bandwidth / 1e9:.0f} GB/s",
            file=sys.stderr,
        )
    results: list[Measured] = []
    for name in names:
        job = make_workload(name, SHAPES[shape].vocab, scale)
        best: dict[str, Measured] = {}
        for _ in range(repeat):
            for each in systems:
                if each == "transformers":
                    found = run_transformers(checkpoint, job, device=device)
                else:
                    found = run_policy(
                        each,
                        checkpoint,
                        job,
                        chunk=chunk,
                        device=device,
                        weights=asked,
                        deterministic=deterministic,
                        machine=machine,
                    )
                if each not in best or found.seconds < best[each].seconds:
                    best[each] = found
                print(f"{name} {each}: {found.seconds:.1f} s", file=sys.stderr, flush=True)
        results.extend(best[each] for each in systems)
    _print_table(results)
    print(
        json.dumps(
            {
                "shape": shape,
                "threads": torch.get_num_threads(),
                "scale": scale,
                "weights": weights,
                "deterministic": deterministic,
                "kernels": native.active(),
                "machine": asdict(machine) if machine is not None else None,
                "repeat": repeat,
                "peak_rss_bytes": peak_rss(),
                "results": [asdict(result) for result in results],
            }
        )
    )


def _print_table(results: list[Measured]) -> None:
    table = Table()
    for column in (
        "workload",
        "system",
        "tokens/s",
        "of batch",
        "computed / optimum",
        "tokens/step",
        "of the limit",
        "planning",
        "outside model",
        "peak KV",
    ):
        table.add_column(column, justify="left" if column in ("workload", "system") else "right")
    base = {r.workload: r.tokens_per_second for r in results if r.system == "batch"}
    for r in results:
        own = r.system != "transformers"
        table.add_row(
            r.workload,
            r.system,
            f"{r.tokens_per_second:,.0f}",
            f"{r.tokens_per_second / base[r.workload]:.2f}" if r.workload in base else "",
            f"{r.computed_tokens / r.optimum_tokens:.3f}" if own else "",
            f"{r.tokens_per_step:.0f}" if own else "",
            f"{100 * r.limit_seconds / r.seconds:.0f}%" if r.limit_seconds else "",
            f"{100 * r.plan_share:.1f}%" if own else "",
            f"{100 * r.outside_model_share:.1f}%" if own else "",
            format_bytes(r.peak_kv_bytes) if own else "",
        )
    Console(width=120).print(table)
