"""Quire beside other engines on the same token ids: ``python benchmarks/peers/compare.py``.

Each run is a process of its own. Peers alternate: the first round of all, the second of all, and
so on. Results are appended to a file as JSON lines; what is there already is not run again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from install import PEERS, peer_python

from quire.bench.chart import write_bars
from quire.bench.limit import count_work, least_seconds, measure_machine
from quire.bench.shapes import SHAPES, make_checkpoint
from quire.bench.workloads import WORKLOADS, Workload, make_workload
from quire.kernels import native
from quire.kv.arena import token_bytes
from quire.models.loader import load_spec, weight_bytes
from quire.weights.quantise import parse as parse_weights

ALL = ("quire", *PEERS)
KEY = ("shape", "workload", "scale", "precision", "threads", "peer", "repeat")
Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    shape: str
    workload: list[str]
    precision: str
    repeats: int
    scale: float
    peers: list[str]
    threads: int
    folder: Path
    results: Path
    plot: Path | None
    timeout: float
    transformers_tokens: int


def parse(arguments: list[str]) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="135m", help="model shape")
    add("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    add("--precision", choices=("bf16", "int8", "int4"), default="bf16")
    add("--repeats", type=int, default=3, help="rounds; the median of each counts")
    add("--scale", type=float, default=1.0, help="multiplies all lengths")
    add("--peers", nargs="+", choices=ALL, default=list(ALL))
    add("--threads", type=int, default=os.cpu_count() or 1)
    add("--folder", type=Path, default=Path("bench-out"), help="checkpoints, jobs and logs")
    add("--results", type=Path, help="JSON lines; default: peers.jsonl in the folder")
    add("--plot", type=Path, help="draw the speeds into this SVG file")
    add("--timeout", type=float, default=7200.0, help="seconds for one run")
    add(
        "--transformers-tokens",
        type=int,
        default=16384,
        help="transformers runs the first requests, up to so many prompt tokens",
    )
    found = vars(parser.parse_args(arguments))
    found["results"] = found["results"] or found["folder"] / "peers.jsonl"
    return Options(**found)


def write_tokenizer(checkpoint: Path, vocab: int) -> None:
    """Give a checkpoint a tokenizer of numbered words, which Quire's interface asks for."""
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "WordLevel",
            "vocab": {f"t{number}": number for number in range(vocab)},
            "unk_token": "t0",
        },
    }
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))


def write_job(options: Options, checkpoint: Path, workload: Workload, peer: str) -> Path:
    """The job file of a peer on a workload."""
    prompts = workload.prompts
    if peer == "transformers":
        share = options.transformers_tokens / workload.asked_tokens
        prompts = prompts[: max(1, int(share * len(prompts)))]
    config = json.loads((checkpoint / "config.json").read_text())
    numbers = config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    kv_bytes = None
    if workload.kv_share is not None:
        tokens = int(workload.kv_share * (workload.optimum_tokens + workload.output_tokens))
        kv_bytes = 4 * numbers * tokens  # keys and values, of two bytes each
    job = {
        "checkpoint": str(checkpoint.resolve()),
        "precision": options.precision,
        "requests": [
            {"prompt": p.tolist(), "n": workload.samples, "max_tokens": workload.output}
            for p in prompts
        ],
        "kv_bytes": kv_bytes,
        "threads": options.threads,
        "repeats": 1,
        "cache": str((options.folder / "converted").resolve()),
    }
    file = options.folder / "jobs" / f"{options.shape}-{workload.name}-{peer}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(job))
    return file


def run_peer(peer: str, job: Path, timeout: float) -> Row:
    """Run a peer's script in a process group of its own; what it prints, or ``error``."""
    here = Path(__file__).parent
    python = Path(sys.executable) if peer == "quire" else peer_python(peer)
    if not python.exists():
        return {"error": f"not installed: python {here.name}/install.py {peer}"}
    environment = {k: v for k, v in os.environ.items() if peer == "quire" or k != "PYTHONPATH"}
    log = job.with_suffix(".log")
    with log.open("w") as errors:
        process = subprocess.Popen(
            [python, here / f"{peer}_peer.py", job],
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {timeout:g} s"}
        finally:  # also what outlives it, as vLLM's engine does, and would slow down the next run
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode != 0:
        lines = log.read_text(errors="replace").strip().splitlines()
        return {"error": lines[-1] if lines else f"ended with {process.returncode}"}
    row: Row = json.loads(output.strip().splitlines()[-1])
    return row


def read_rows(file: Path) -> list[Row]:
    """What has been measured; a line cut short is left out."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def measure(options: Options) -> list[Row]:
    """Run what is missing; all rows that belong to ``options``."""
    checkpoint = make_checkpoint(options.shape, options.folder)
    write_tokenizer(checkpoint, SHAPES[options.shape].vocab)
    done = {tuple(row[k] for k in KEY): row for row in read_rows(options.results)}
    rows: list[Row] = []
    failed: set[tuple[str, str]] = set()
    for repeat in range(options.repeats):
        for name in options.workload:
            workload = make_workload(name, SHAPES[options.shape].vocab, options.scale)
            for peer in options.peers:
                settings = (options.shape, name, options.scale, options.precision, options.threads)
                key = (*settings, peer, repeat)
                if key not in done and (name, peer) not in failed:
                    job = write_job(options, checkpoint, workload, peer)
                    found = run_peer(peer, job, options.timeout)
                    if "error" in found:
                        print(f"{name} {peer}: {found['error']}", file=sys.stderr, flush=True)
                        failed.add((name, peer))
                        continue
                    done[key] = found | dict(zip(KEY, key, strict=True))
                    done[key]["date"] = datetime.date.today().isoformat()
                    with options.results.open("a") as stream:
                        print(json.dumps(done[key]), file=stream)
                if key in done:
                    rows.append(done[key])
                    seconds = done[key]["seconds"][0]
                    print(f"{repeat + 1} {name} {peer}: {seconds:.2f} s", file=sys.stderr)
    return rows


def speeds(rows: list[Row]) -> dict[tuple[str, str], float]:
    """Tokens a second by workload and peer: prompt tokens asked for and output, the median."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        tokens = row["prompt_tokens"] + row["output_tokens"]
        each = [tokens / seconds for seconds in row["seconds"]]
        found.setdefault((row["workload"], row["peer"]), []).extend(each)
    return {key: median(values) for key, values in found.items()}


def table(rows: list[Row], workloads: list[str], peers: list[str]) -> str:
    """Markdown: tokens a second, how many times faster Quire is, and the most memory held."""
    speed = speeds(rows)
    others = [p for p in peers if p != "quire"] if "quire" in peers else []
    header = [*(f"{p}, tokens/s" for p in peers), *(f"quire / {p}" for p in others)]
    lines = [_line("workload", header), _line("---", ["---:"] * len(header))]
    for name in workloads:
        cells = [f"{speed[name, p]:,.0f}" if (name, p) in speed else "" for p in peers]
        for peer in others:
            both = (name, peer) in speed and (name, "quire") in speed
            cells.append(f"{speed[name, 'quire'] / speed[name, peer]:.2f}x" if both else "")
        lines.append(_line(name, cells))
    lines += ["", _line("workload", [f"{p}, peak RSS" for p in peers])]
    lines.append(_line("---", ["---:"] * len(peers)))
    for name in workloads:
        cells = []
        for peer in peers:
            sizes = [
                r["peak_rss_bytes"] for r in rows if r["workload"] == name and r["peer"] == peer
            ]
            cells.append(f"{max(sizes) / 2**30:.2f} GiB" if sizes else "")
        lines.append(_line(name, cells))
    versions = {r["peer"]: r["version"] for r in rows}
    lines += ["", ", ".join(f"{p} {versions[p]}" for p in peers if p in versions)]
    return "\n".join(lines)


def limits(options: Options, rows: list[Row]) -> str:
    """Markdown: the least time that this machine's rates allow, Quire's share of it, and how much
    faster than the fastest peer Quire is and an engine at the limit would be.
    """
    native.configure()
    machine = measure_machine()
    checkpoint = make_checkpoint(options.shape, options.folder)
    spec = load_spec(checkpoint)
    kv_token = token_bytes(len(spec.layers), spec.kv_heads, spec.head_dim, torch.bfloat16)
    int8 = options.precision == "int8"
    weights = {"int8": "int8", "int4": "int4:32"}.get(options.precision)
    size = weight_bytes(checkpoint, torch.bfloat16, parse_weights(weights) if weights else None)
    header = ["limit, s", "quire, s", "share", "best peer, s", "ratio", "at the limit"]
    lines = [
        f"This machine: {2 * machine.dense / 1e9:.0f} GFLOP/s bf16, {2 * machine.int8 / 1e9:.0f} "
        f"GOP/s int8, {machine.bandwidth / 1e9:.0f} GB/s.",
        "",
        _line("workload", header),
        _line("---", ["---:"] * len(header)),
    ]
    for name in options.workload:
        workload = make_workload(name, SHAPES[options.shape].vocab, options.scale)
        least = least_seconds(count_work(spec, workload, size, kv_token), machine, int8=int8)
        seconds: dict[str, list[float]] = {}
        for row in rows:
            if row["workload"] == name:
                seconds.setdefault(row["peer"], []).append(row["seconds"][0])
        taken = {peer: median(values) for peer, values in seconds.items()}
        mine = taken.pop("quire", None)
        if mine is not None:
            cells = [f"{least:.1f}", f"{mine:.1f}", f"{100 * least / mine:.0f}%"]
            best = min(taken.values(), default=None)
            if best is not None:
                cells += [f"{best:.1f}", f"{best / mine:.2f}x", f"{best / least:.2f}x"]
            lines.append(_line(name, cells))
    return "\n".join(lines)


def _line(first: str, cells: list[str]) -> str:
    return f"| {' | '.join([first, *cells])} |"


def main(arguments: list[str]) -> int:
    """Measure, print the table, draw the plot."""
    options = parse(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    rows = measure(options)
    print(table(rows, options.workload, options.peers), limits(options, rows), sep="\n\n")
    if options.plot is not None:
        title = f"{options.shape}, {options.precision}, {options.threads} threads: tokens/s"
        write_bars(options.plot, title, options.workload, options.peers, speeds(rows))
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
