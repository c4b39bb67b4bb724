"""The cores of this machine and how workers divide them."""

from __future__ import annotations

import os
from pathlib import Path

SYSTEM = Path("/sys/devices/system")


def numa_nodes(system: Path = SYSTEM) -> list[list[int]]:
    """The cores that this process may use, by NUMA node; one list where the OS tells of none.

    In a node, the hardware threads of a core are neighbours, so that no two workers share a core.
    """
    allowed = _allowed()
    nodes = []
    for path in sorted(system.glob("node/node[0-9]*"), key=lambda p: int(p.name[4:])):
        cores = sorted(_parse(path / "cpulist") & allowed, key=lambda c: (_first(system, c), c))
        if cores:
            nodes.append(cores)
    known = {core for cores in nodes for core in cores}
    return nodes if known == allowed else [sorted(allowed)]


def divide_cores(workers: int, system: Path = SYSTEM) -> list[list[int]]:
    """Cores for each worker: neighbours, of one NUMA node if the numbers allow it.

    With more workers than cores, some have the same one.
    """
    cores = [core for node in numa_nodes(system) for core in node]
    count = len(cores)
    if workers > count:
        return [[cores[i % count]] for i in range(workers)]
    ends = [i * count // workers for i in range(workers + 1)]
    return [cores[ends[i] : ends[i + 1]] for i in range(workers)]


def pin(cores: list[int]) -> None:
    """Keep this process, with threads that it makes from now on, to ``cores``, if the OS can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def _allowed() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _first(system: Path, core: int) -> int:
    """The lowest hardware thread of the physical core that ``core`` is one of."""
    return min(_parse(system / f"cpu/cpu{core}/topology/thread_siblings_list"), default=core)


def _parse(path: Path) -> set[int]:
    """The numbers of a list such as ``0-3,8,10-11``; none where there is no such file."""
    try:
        text = path.read_text().strip()
    except OSError:
        return set()
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found
