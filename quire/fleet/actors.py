"""Workers as actors of a Ray cluster (extra ``ray``), each on the machine that it is placed on."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from quire.api.setup import Setup
from quire.engine.budget import Budget, parse_bytes
from quire.errors import InvalidRequestError, QuireError
from quire.fleet.fleet import Fleet, count_workers, llm_options, make_setup
from quire.fleet.messages import Command, Died, Message, Start
from quire.fleet.worker import Worker

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError:
    ray = None

CONNECT_SECONDS = 10.0
RETRY_SECONDS = 10.0  # until a worker that found no node is started again


def on_ray(
    model: str | Path = "demo",
    *,
    address: str = "auto",
    workers: int | str = "auto",
    warn: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> Fleet:
    """A fleet of ``workers`` actors; ``"auto"``: one for each GPU, or for each node with cores.

    ``address``: a cluster's, ``"auto"`` for the one that this machine is part of, or ``"local"``
    for one that is started here. Quire and ``model``, under the same path, must be on every
    machine. ``options`` are those of `LLM`; ``memory``, ``kv_memory`` and ``threads`` mean all
    workers of a machine together. Raises what `on_this_machine` does, and QuireError where there
    is no cluster.
    """
    full = llm_options(model=model, **options)
    transport = Actors(address, workers, full | {"on_budget": None})

    def setup(budget: Budget) -> Setup:
        if full["on_budget"] is not None:
            full["on_budget"](budget)
        return make_setup(full, budget=budget)

    return Fleet(transport, len(transport.nodes), full, setup, warn)


class Actors:
    """Carries messages to and from actors, one call at a time for each.

    ``nodes``: the id of each worker's node, where it is started again while that node lives.
    """

    def __init__(self, address: str, workers: int | str, options: dict[str, Any]) -> None:
        if ray is None:
            raise QuireError(
                "Ray is not installed.", action="Install it with pip install 'quire[ray]'."
            )
        self._options = options
        self._gpus = str(options["device"]).startswith("cuda")
        self._handles: dict[int, Any] = {}
        self._calls: dict[Any, int] = {}  # reference of an answer -> worker
        self._starting: set[int] = set()
        self._later: list[tuple[float, int, Message]] = []  # time to tell it
        count_workers(workers, 1)  # raises before anything is started
        self._own = not ray.is_initialized()
        if self._own:
            _connect(address)
        room = self._room()
        count = count_workers(workers, sum(room.values()) if self._gpus else len(room))
        names = [name for name in room for _ in range(room[name])] if self._gpus else list(room)
        if not names or (self._gpus and count > len(names)):
            self.close()
            what = "GPUs" if self._gpus else "nodes with cores"
            raise InvalidRequestError(
                f"{count} workers are asked for and the cluster has {len(names)} {what}.",
                field="workers",
                value=count,
                limit=len(names),
            )
        self.nodes = [names[i % len(names)] for i in range(count)]
        self._together = Counter(self.nodes)

    def _room(self) -> dict[str, int]:
        """Cores, or GPUs, of each living node that has any, by id."""
        kind = "GPU" if self._gpus else "CPU"
        counts = {n["NodeID"]: int(n["Resources"].get(kind, 0)) for n in ray.nodes() if n["Alive"]}
        return {node: count for node, count in sorted(counts.items()) if count}

    def send(self, worker: int, command: Command) -> None:
        """Hand ``command`` over, without waiting for its answer."""
        if isinstance(command, Start):
            self._starting.add(worker)
            self._calls[self._place(worker)] = worker
        else:
            self._calls[self._handles[worker].advance.remote(command)] = worker

    def _place(self, worker: int) -> Any:
        """Make the actor, on its node or on one that has come since; returns the call to start."""
        room, node = self._room(), self.nodes[worker]
        if node not in room:
            new = [name for name in room if name not in self._together]
            node = new[0] if new else node  # on a node that is gone, the start fails
            self._together[self.nodes[worker]] -= 1
            self._together[node] += 1
            self.nodes[worker] = node
        together, cores = self._together[node], room.get(node, 1)
        options = dict(self._options)
        if not self._gpus:
            total = options["threads"] or cores
            options["threads"] = max(1, total // together)
            if options["kv_memory"] is not None:
                options["kv_memory"] = parse_bytes(options["kv_memory"]) // together
        handle = (
            ray.remote(Worker)
            .options(
                num_cpus=0 if self._gpus else cores // together or cores / together,
                num_gpus=1 if self._gpus else 0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
                max_restarts=0,
                max_task_retries=0,
            )
            .remote()
        )
        self._handles[worker] = handle
        return handle.start.remote(options, 1 if self._gpus else together)

    def wait(self, seconds: float) -> list[tuple[int, Message]]:
        """Messages, as soon as there is one; none if nothing came within ``seconds``."""
        calls, done = list(self._calls), []
        if calls:
            ray.wait(calls, num_returns=1, timeout=seconds)
            done, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        elif self._later:
            time.sleep(seconds)
        now = time.monotonic()
        for call in done:
            worker = self._calls.pop(call)
            message = self._receive(worker, call)
            # The cluster takes a while to know that a node is gone, and to bring another.
            lost = isinstance(message, Died) and message.error is None and worker in self._starting
            self._later.append((now + RETRY_SECONDS if lost else now, worker, message))
            self._starting.discard(worker)
        told = [(worker, message) for due, worker, message in self._later if due <= now]
        self._later = [each for each in self._later if each[0] > now]
        return told

    def _receive(self, worker: int, call: Any) -> Message:
        message: Message
        try:
            message = ray.get(call)
        except RayTaskError as error:  # what the actor raised
            message = Died.of(error.cause if isinstance(error.cause, Exception) else error)
        except RayError as error:  # what became of the actor
            message = Died(" ".join(str(error).split())[:300])
        if isinstance(message, Died):
            with suppress(RayError):
                ray.kill(self._handles.pop(worker))
        return message

    def close(self) -> None:
        """End all workers at once."""
        for handle in self._handles.values():
            with suppress(RayError):
                ray.kill(handle)
        self._handles.clear()
        self._calls.clear()
        if self._own:
            ray.shutdown()


def _connect(address: str) -> None:
    """Connect to the cluster, or start one, without a word."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Reports of the cluster's nodes would go to standard output, which is for data.
    ray._private.worker._worker_logs_enabled = False
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address == "local":
            ray.init("local", include_dashboard=False, **quiet)
            return
        host, _, port = address.rpartition(":")
        if port.isdecimal() and "/" not in host:  # Ray itself tries for minutes
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        ray.init(address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        raise QuireError(
            f"There is no Ray cluster at {address!r}: {error}",
            value=address,
            action="Give the address of one, or local to start one here.",
        ) from error
