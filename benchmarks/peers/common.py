"""What all peers share: the job they read, the loop that times them, the line they print."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

MOST_KV_BYTES = 6 << 30
SLACK_TOKENS = 256  # for each sequence: engines round up to blocks of up to 128 tokens
WARM_UP_TOKENS = 48


class PeerError(Exception):
    """A job that this peer cannot run; the text says why."""


@dataclass(frozen=True)
class Request:
    """Token ids, the samples wanted of them (greedy if one), tokens of each sample."""

    prompt: list[int]
    n: int
    max_tokens: int


@dataclass(frozen=True)
class Job:
    """What to run. ``kv_bytes`` None: as much as all requests need; ``cache``: for conversions."""

    checkpoint: Path
    precision: str
    requests: list[Request]
    kv_bytes: int | None
    threads: int
    repeats: int
    cache: Path

    @classmethod
    def read(cls, path: Path) -> Job:
        """From a JSON file."""
        raw = json.loads(path.read_text())
        return cls(
            Path(raw["checkpoint"]),
            raw.get("precision", "bf16"),
            [Request(r["prompt"], r.get("n", 1), r["max_tokens"]) for r in raw["requests"]],
            raw.get("kv_bytes"),
            raw.get("threads", 2),
            raw.get("repeats", 1),
            Path(raw["cache"]),
        )

    @property
    def config(self) -> dict[str, Any]:
        """The checkpoint's ``config.json``."""
        config: dict[str, Any] = json.loads((self.checkpoint / "config.json").read_text())
        return config

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values, at two bytes a number."""
        config = self.config
        return 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]

    @property
    def kv_limit(self) -> int:
        """Bytes for the KV cache."""
        if self.kv_bytes is not None:
            return self.kv_bytes
        tokens = sum(len(r.prompt) + r.n * (r.max_tokens + SLACK_TOKENS) for r in self.requests)
        return min(tokens * self.token_bytes, MOST_KV_BYTES)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, with its output."""
        own = max(len(r.prompt) + r.max_tokens for r in self.requests)
        return max(own, WARM_UP_TOKENS + 8)

    def warm_up(self) -> list[Request]:
        """Small prompts that share nothing with those of the job, greedy and sampled."""
        vocab = self.config["vocab_size"]
        first = {r.prompt[0] for r in self.requests}
        start = next(i for i in range(3, vocab) if i not in first)
        ids = [start, *((start + 7 * i) % (vocab - 3) + 3 for i in range(1, WARM_UP_TOKENS))]
        return [Request(ids, n, 8) for n in sorted({r.n for r in self.requests})]


class Runner(Protocol):
    """A loaded engine. ``clear`` empties its prefix cache; ``run`` gives the output's size."""

    version: str

    def clear(self) -> None:
        """Forget all prompts."""

    def run(self, requests: list[Request]) -> int:
        """Generate for all requests."""


R = TypeVar("R", bound=Runner)


@dataclass(frozen=True)
class Result:
    """What is printed, as JSON. ``seconds``: one for each repeat."""

    peer: str
    version: str
    precision: str
    seconds: list[float]
    output_tokens: int
    prompt_tokens: int
    peak_rss_bytes: int


def measure(name: str, job: Job, runner: Runner) -> Result:
    """Warm up, then run the job as often as it says, each time from an empty cache."""
    runner.run(job.warm_up())
    expected = sum(r.n * r.max_tokens for r in job.requests)
    seconds = []
    for _ in range(job.repeats):
        runner.clear()
        started = time.perf_counter()
        found = runner.run(job.requests)
        seconds.append(time.perf_counter() - started)
        if found != expected:
            raise PeerError(f"{found} tokens were generated, not {expected}.")
    return Result(
        name,
        runner.version,
        job.precision,
        seconds,
        expected,
        sum(r.n * len(r.prompt) for r in job.requests),
        peak_rss(),
    )


def main(
    name: str,
    load: Callable[[Job], Runner],
    precisions: tuple[str, ...],
    environment: Callable[[Job], dict[str, str]] = lambda _: {},
) -> None:
    """Run the job named on the command line and end the process.

    ``load`` imports the engine, after ``environment`` is set. What the engine prints goes to
    standard error; the result is the only line on standard output.
    """
    if len(sys.argv) != 2:
        sys.exit(f"usage: {Path(sys.argv[0]).name} JOB.json")
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        job = Job.read(Path(sys.argv[1]))
        if job.precision not in precisions:
            raise PeerError(f"{job.precision} is not one of {', '.join(precisions)}.")
        os.environ.update({"OMP_NUM_THREADS": str(job.threads)} | environment(job))
        result = measure(name, job, load(job))
    except PeerError as error:
        fail(name, str(error))
    except Exception as error:  # whatever an engine raises
        traceback.print_exc()
        fail(name, f"{type(error).__name__}: {error}")
    print(json.dumps(asdict(result)), file=output, flush=True)
    leave(0)


def fail(name: str, reason: str) -> None:
    """Say why and end the process."""
    print(f"{name} cannot run this: {reason}", file=sys.stderr)
    leave(1)


def leave(status: int) -> None:
    """End the process, its children first."""
    import signal

    for process in _descendants(os.getpid()):
        try:
            os.kill(process, signal.SIGTERM)
        except ProcessLookupError:
            continue
    sys.stderr.flush()
    os._exit(status)


def peak_rss() -> int:
    """Sum of the most memory that this process and each of its children have held, in bytes."""
    return sum(map(_peak, [os.getpid(), *_descendants(os.getpid())]))


def _peak(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def _descendants(process: int) -> list[int]:
    """Children, their children and so on, that are running."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            after_name = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(folder.name)] = int(after_name[1])
    found = [process]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found[1:]


def once(target: Path, make: Callable[[Path], None]) -> Path:
    """``target``, made by ``make`` in a folder beside it if it is not there yet."""
    if not target.exists():
        partial = target.with_name(target.name + ".partial")
        if partial.is_dir():
            import shutil

            shutil.rmtree(partial)
        partial.parent.mkdir(parents=True, exist_ok=True)
        make(partial)
        partial.rename(target)
    return target
