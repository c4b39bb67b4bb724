"""Workers as processes of this machine, each on its part of the cores or on a GPU of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from quire.engine.budget import divide_memory, parse_bytes
from quire.errors import InvalidRequestError, MemoryBudgetError, QuireError
from quire.fleet.cores import divide_cores, numa_nodes, pin
from quire.fleet.fleet import Fleet, count_workers, llm_options, make_setup
from quire.fleet.messages import Command, Died, Message, Start
from quire.fleet.worker import Worker

GRACE_SECONDS = 5.0  # from the end of a worker's pipe to that of its process
# The interpreter is started by hand: what `multiprocessing` starts imports the user's main module.
CHILD = """
import json, sys
pipe, sys.path[:] = json.loads(sys.argv[1])
from quire.fleet.processes import serve
serve(pipe)
"""


def on_this_machine(
    model: str | Path = "demo",
    *,
    workers: int | str = "auto",
    warn: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> Fleet:
    """A fleet of ``workers`` processes; ``"auto"``: one for each GPU, or for each NUMA node.

    ``options`` are those of `LLM`; ``memory``, ``kv_memory`` and ``threads`` mean all workers
    together, but on GPUs, where memory is that of each. Raises ModelError, MemoryBudgetError or
    InvalidRequestError.
    """
    full = llm_options(model=model, **options)
    gpus = torch.cuda.device_count() if str(full["device"]).startswith("cuda") else 0
    count = count_workers(workers, gpus or len(numa_nodes()))
    if gpus and count > gpus:
        raise InvalidRequestError(
            f"{count} workers are asked for and there are {gpus} GPUs.",
            field="workers",
            value=count,
            limit=gpus,
            action="Each worker needs a GPU of its own.",
        )
    memory, kv_memory, threads = full["memory"], full["kv_memory"], full["threads"]
    if not gpus:
        if kv_memory is not None:
            kv_memory = parse_bytes(kv_memory) // count
        if memory is not None or kv_memory is None:
            memory = divide_memory(memory, count)
    try:
        setup = make_setup(full, memory=memory, kv_memory=kv_memory)
    except MemoryBudgetError as error:
        raise MemoryBudgetError(
            f"Memory is divided among {count} workers. {error.what}",
            value=error.value,
            limit=error.limit,
            action="Use fewer workers, or give more memory.",
        ) from error
    if full["on_budget"] is not None:
        full["on_budget"](setup.budget)
    children = [
        _Child(
            cores,
            full
            | {
                "memory": None,
                "kv_memory": setup.budget.kv,  # the same for all, whenever they measure
                "threads": max(1, threads // count) if threads else len(cores),
                "device": f"cuda:{number}" if gpus else full["device"],
                "on_budget": None,
            },
        )
        for number, cores in enumerate(divide_cores(count))
    ]
    return Fleet(Processes(children), count, full, lambda _: setup, warn)


class _Child:
    """A worker's process, started again at will, and the pipe to it while it lives."""

    def __init__(self, cores: list[int], options: dict[str, Any]) -> None:
        self.pipe: Connection | None = None
        self._cores = cores
        self._options = options

    def start(self) -> None:
        """Start the process. An interrupt of this one's terminal does not reach it."""
        self.pipe, theirs = Pipe()
        number = theirs.fileno()
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD, json.dumps([number, sys.path])],
            stdin=subprocess.DEVNULL,
            stdout=2,  # standard output is for data
            pass_fds=[number],
            process_group=0,
        )
        theirs.close()
        self.send((self._cores, self._options))

    def send(self, message: object) -> None:
        """Send to the process, dead or alive."""
        assert self.pipe is not None
        with suppress(OSError):
            self.pipe.send(message)

    def receive(self) -> Message:
        """What it has sent; `Died` when that is nothing."""
        assert self.pipe is not None
        message: Message
        try:
            message = self.pipe.recv()
        except (EOFError, OSError):
            message = Died(self._last_words())
        if isinstance(message, Died):
            self.end()
        return message

    def _last_words(self) -> str:
        try:
            status = self._process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        if status >= 0:
            return f"its process ended with status {status}"
        return f"its process was killed by {signal.Signals(-status).name}"

    def end(self) -> None:
        """End the process at once."""
        if self.pipe is not None:
            self.pipe.close()
            self.pipe = None
            self._process.kill()
            self._process.wait()


class Processes:
    """Carries messages to and from child processes, which end when this process does."""

    def __init__(self, children: list[_Child]) -> None:
        self._children = children

    def send(self, worker: int, command: Command) -> None:
        """Hand ``command`` over, without waiting for its answer."""
        if isinstance(command, Start):
            self._children[worker].start()
        else:
            self._children[worker].send(command)

    def wait(self, seconds: float) -> list[tuple[int, Message]]:
        """Messages, as soon as there is one; none if nothing came within ``seconds``."""
        pipes = [child.pipe for child in self._children]
        heard = wait([pipe for pipe in pipes if pipe is not None], seconds)
        return [(n, self._children[n].receive()) for n, pipe in enumerate(pipes) if pipe in heard]

    def close(self) -> None:
        """End all workers at once."""
        for child in self._children:
            child.end()


def serve(number: int) -> None:
    """Be a worker: obey what comes through the pipe of this file descriptor, until it closes."""
    pipe = Connection(number)
    commands: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, commands), daemon=True).start()
    cores, options = commands.get()
    pin(cores)
    worker = Worker()
    try:
        pipe.send(worker.start(options))
        while True:
            pipe.send(worker.advance(commands.get()))
    except Exception as error:
        if not isinstance(error, QuireError):
            traceback.print_exc()
        with suppress(OSError):
            pipe.send(Died.of(error))


def _listen(pipe: Connection, commands: SimpleQueue[Any]) -> None:
    """Queue what comes; when the other side is gone, whatever it died of, so is this process."""
    while True:
        try:
            commands.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(0)
