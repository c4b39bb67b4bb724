"""A Ray cluster of several nodes on this machine: the same outputs while parts of it are killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("ray", reason="needs the extra ray")

import ray
from ray.cluster_utils import Cluster

from quire import LLM, RequestOutput, SamplingParams
from quire.errors import CheckpointError, InvalidRequestError, QuireError
from quire.fleet.actors import Actors, on_ray
from quire.fleet.fleet import Fleet
from tests.fleet.conftest import OPTIONS
from tests.fleet.test_fleet import rows, tokens

pytestmark = pytest.mark.slow
STORE = 80 << 20  # bytes of object store; smaller ones are refused


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    found = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False},
    )
    for _ in range(2):
        found.add_node(num_cpus=1, object_store_memory=STORE)
    yield found
    found.shutdown()


def long_rows() -> Iterator[tuple[Any, SamplingParams]]:
    for i in range(200):
        params = SamplingParams(max_tokens=80, ignore_eos=True, n=1 + i % 2)
        yield f"A tale of {i % 9} and {i}", params


@pytest.fixture(scope="module")
def expected(tiny: Path) -> list[Any]:
    with LLM(tiny, **OPTIONS) as llm:
        return tokens(list(llm.generate_iter(long_rows())))


def transport(fleet: Fleet) -> Actors:
    assert isinstance(fleet._transport, Actors)
    return fleet._transport


def run_with_trouble(fleet: Fleet, troubles: list[Callable[[], None]]) -> list[RequestOutput]:
    """Run the long rows; after every 30 of them comes the next trouble."""
    found = []
    for output in fleet.generate_iter(long_rows()):
        found.append(output)
        if troubles and len(found) % 30 == 0:
            troubles.pop(0)()
    assert not troubles
    return found


def test_one_actor_a_node(cluster: Cluster, tiny: Path) -> None:
    with LLM(tiny, **OPTIONS) as llm:
        expected = tokens(list(llm.generate_iter(rows(60))))
    with on_ray(tiny, address=cluster.address, **OPTIONS) as fleet:
        assert len(set(transport(fleet).nodes)) == 2
        assert tokens(list(fleet.generate_iter(rows(60)))) == expected
    assert not ray.is_initialized()


def test_killed_actors_and_processes(cluster: Cluster, tiny: Path, expected: list[Any]) -> None:
    rng = random.Random(0)
    words: list[str] = []

    def kill_actor() -> None:
        ray.kill(rng.choice(list(transport(fleet)._handles.values())))

    def kill_process() -> None:
        actors = [p for p in psutil.process_iter(["cmdline"]) if _is_actor(p)]
        os.kill(rng.choice(actors).pid, signal.SIGKILL)

    with on_ray(tiny, address=cluster.address, warn=words.append, **OPTIONS) as fleet:
        assert tokens(run_with_trouble(fleet, [kill_actor, kill_process])) == expected
    assert 1 <= len(words) <= 2  # both may have hit one actor before it was missed
    assert all("It is started again." in text for text in words)


def _is_actor(process: psutil.Process) -> bool:
    return bool(process.info["cmdline"]) and process.info["cmdline"][0].startswith("ray::Worker")


def test_a_node_goes_and_another_comes(cluster: Cluster, tiny: Path, expected: list[Any]) -> None:
    lost = cluster.add_node(num_cpus=1, object_store_memory=STORE)
    words: list[str] = []
    with on_ray(tiny, address=cluster.address, warn=words.append, **OPTIONS) as fleet:
        before = set(transport(fleet).nodes)
        assert len(before) == 3

        def change_nodes() -> None:
            new = cluster.add_node(num_cpus=1, object_store_memory=STORE)
            cluster.remove_node(lost, allow_graceful=False)
            added.append(new)

        added: list[Any] = []
        assert tokens(run_with_trouble(fleet, [change_nodes])) == expected
        deadline = time.monotonic() + 120
        while lost.node_id in transport(fleet).nodes or fleet._plan.starting:
            assert time.monotonic() < deadline
            assert tokens(list(fleet.generate_iter(long_rows()))) == expected
        after = set(transport(fleet).nodes)
    cluster.remove_node(added[0])
    assert lost.node_id in before
    assert after == before - {lost.node_id} | {added[0].node_id}
    assert words


def test_two_actors_on_each_node_share_its_memory(cluster: Cluster, tiny: Path) -> None:
    options = OPTIONS | {"kv_memory": "8MiB"}
    with on_ray(tiny, address=cluster.address, workers=4, **options) as fleet:
        assert fleet.setup.budget.kv == 4 << 20
        assert len(list(fleet.generate_iter(rows(10)))) == 10


def test_what_no_node_has_is_said_once(cluster: Cluster, tmp_path: Path) -> None:
    words: list[str] = []
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        on_ray(tmp_path / "nowhere", address=cluster.address, warn=words.append, **OPTIONS)
    assert words == []


def test_errors_of_the_cluster(tiny: Path) -> None:
    with pytest.raises(QuireError, match=r"no Ray cluster at '127\.0\.0\.1:1'"):
        on_ray(tiny, address="127.0.0.1:1", **OPTIONS)
    with pytest.raises(InvalidRequestError, match="has 0 GPUs"):
        on_ray(tiny, address="local", workers=2, **OPTIONS | {"device": "cuda"})


def test_the_command(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "One", "max_tokens": 4}\n{"prompt": ""}\n')
    words = ["run", source, "-o", out, "--ray", "local", "--kv-memory", "8MiB"]
    done = subprocess.run(
        [sys.executable, "-m", "quire", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert [json.loads(text)["error"] is None for text in out.read_text().splitlines()] == [
        True,
        False,
    ]
    assert "ray" not in done.stderr.lower(), done.stderr
