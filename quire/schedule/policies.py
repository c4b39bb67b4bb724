"""The table of policies."""

from __future__ import annotations

from quire.schedule.batch import BATCH
from quire.schedule.fcfs import FCFS
from quire.schedule.state import Policy

POLICIES: dict[str, Policy] = {policy.name: policy for policy in (BATCH, FCFS)}
