"""What a job's results depend on: two runs of one job must agree on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quire.decode.params import SamplingParams
from quire.errors import JournalError
from quire.jobs.template import read_template
from quire.models.digest import digest, model_digest


def job_settings(
    folder: Path, params: SamplingParams, template: str | None, **others: object
) -> dict[str, Any]:
    """All settings by name, as JSON values. ``folder`` is the checkpoint.

    Threads, memory, policy and the like are not among them: they change speed, not results.
    """
    settings = {
        "model": model_digest(folder),
        "template": None if template is None else digest([read_template(template).encode()]),
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
