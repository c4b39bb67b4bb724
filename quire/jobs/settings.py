"""What a job's results depend on: two runs of one job must agree on it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quire.decode.params import SamplingParams
from quire.errors import JournalError
from quire.jobs.template import read_template

_END_BYTES = 1 << 20
_SMALL = (".json", ".jinja")
_WEIGHTS = (".safetensors", ".gguf")


def job_settings(
    folder: Path, params: SamplingParams, template: str | None, **others: object
) -> dict[str, Any]:
    """All settings by name, as JSON values. ``folder`` is the checkpoint.

    Threads, memory, policy and the like are not among them: they change speed, not results.
    """
    settings = {
        "model": model_digest(folder),
        "template": None if template is None else _digest([read_template(template).encode()]),
        **others,
        **{k: v for k, v in asdict(params).items() if k != "seed"},  # the job's is in ``others``
    }
    found: dict[str, Any] = json.loads(json.dumps(settings))
    return found


def check_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise JournalError, naming each setting that is not what it was."""
    changed = [
        f"{name}: {old.get(name)} -> {new.get(name)}"
        for name in [*new, *(name for name in old if name not in new)]
        if old.get(name) != new.get(name)
    ]
    if changed:
        raise JournalError(
            f"This job was begun with other settings. {'; '.join(changed)}.",
            value=changed,
            action="Run it with those, give another output, or start over with --fresh.",
        )


def model_digest(folder: Path) -> str:
    """A digest of a checkpoint: small files as a whole, of weights the size, beginning and end."""
    files = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    parts: list[bytes] = []
    for file in files:
        if file.suffix in _SMALL:
            parts += [file.name.encode(), file.read_bytes()]
        elif file.suffix in _WEIGHTS:
            parts += [file.name.encode(), *_ends(file)]
    return _digest(parts)


def _ends(file: Path) -> list[bytes]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(_END_BYTES)
        stream.seek(max(0, size - _END_BYTES))
        return [str(size).encode(), first, stream.read(_END_BYTES)]


def _digest(parts: Iterable[bytes]) -> str:
    total = hashlib.blake2b(digest_size=8)
    for part in parts:
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()
