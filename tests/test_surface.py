"""The public names and flags. A change here is a change for users: make it on purpose."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import typer

import quire
from quire import errors
from quire.cli.main import app
from quire.decode.params import SamplingParams

FLAGS = {
    "run": {
        "source", "--output", "--model", "--dtype", "--weights", "--threads", "--memory",
        "--kv-memory", "--kv", "--kv-dir", "--kv-disk",
        "--policy", "--chunk", "--window", "--context", "--device", "--template", "--order",
        "--on-overlong", "--limit", "--max-tokens", "--temperature", "--top-p", "--top-k",
        "--min-p", "--stop", "--seed", "--dry-run", "--stats", "--journal", "--fresh", "--dedupe",
        "--plain",
        "--schema", "--regex", "--choice", "--grammar",
        "--deterministic",
        "--report", "--log-json", "--log-every", "--metrics-port",
        "--workers", "--ray",
    },
    "convert": {"model", "output", "--weights", "--dtype"},
    "info": {"--model"},
    "jobs list": {"folder"},
    "jobs show": {"job"},
    "jobs cancel": {"job"},
    "jobs retry-failed": {"job"},
    "jobs export": {"job", "--output"},
    "bench": {
        "--workload", "--shape", "--system", "--scale", "--repeat", "--chunk", "--threads",
        "--device", "--folder", "--weights", "--deterministic",
    },
    "bench kv": {
        "--kv", "--model", "--length", "--task", "--samples", "--quick", "--out", "--seed",
        "--threads",
    },
}  # fmt: skip


def test_names() -> None:
    assert set(quire.__all__) == {
        "LLM", "CompletionOutput", "QuireError", "RequestOutput", "SamplingParams", "Stats",
        "Structure",
    }  # fmt: skip
    assert all(hasattr(quire, name) for name in quire.__all__)


def test_sampling_fields() -> None:
    assert {f.name for f in fields(SamplingParams)} == {
        "n", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
        "frequency_penalty", "logit_bias", "seed", "logprobs", "prompt_logprobs", "stop",
        "stop_token_ids", "min_tokens", "max_tokens", "ignore_eos", "bad_words",
        "structure",
    }  # fmt: skip


def test_flags() -> None:
    assert flags("", typer.main.get_command(app)) == FLAGS


def flags(name: str, command: Any) -> dict[str, set[str]]:
    """The flags of a command and of those below it."""
    below = getattr(command, "commands", {})
    mine = {p.opts[0] for p in command.params if p.name != "help"}
    found = {name: mine} if name and (mine or not below) else {}
    for part in below:
        found |= flags(f"{name} {part}".strip(), below[part])
    return found


def test_error_tree() -> None:
    tree = {
        kind.__name__: kind.__bases__[0].__name__
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.QuireError)
    }
    assert tree == {
        "QuireError": "Exception",
        "ModelError": "QuireError",
        "UnsupportedModelError": "ModelError",
        "CheckpointError": "ModelError",
        "MemoryBudgetError": "QuireError",
        "RequestError": "QuireError",
        "InvalidRequestError": "RequestError",
        "PromptTooLongError": "RequestError",
        "WorkerDiedError": "RequestError",
        "InputFileError": "QuireError",
        "JournalError": "QuireError",
        "EngineStallError": "QuireError",
    }
    assert all(name in (errors.__doc__ or "") for name in tree)
