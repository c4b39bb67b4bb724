from __future__ import annotations

from random import Random

import numpy as np
import pytest

from quire.bench import recall
from quire.bench.compare import run_policy
from quire.bench.shapes import make_checkpoint
from quire.bench.workloads import WORKLOADS, make_workload
from quire.kv.pages import PagePool
from quire.kv.tree import PrefixTree
from quire.schedule.planner import distinct_tokens


@pytest.mark.parametrize("name", list(WORKLOADS))
def test_the_optimum_is_the_tree_s(name: str) -> None:
    workload = make_workload(name, 500, 0.05)
    tree = PrefixTree(PagePool(0, 16))
    for prompt in workload.prompts:
        tree.insert(prompt)
    assert workload.optimum_tokens == distinct_tokens(tree)
    again = make_workload(name, 500, 0.05)
    assert all(np.array_equal(a, b) for a, b in zip(workload.prompts, again.prompts, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(WORKLOADS))
def test_batch_computes_within_a_percent_of_the_optimum(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = make_checkpoint("tiny", tmp_path_factory.getbasetemp() / "shapes")
    workload = make_workload(name, 512, 0.5)
    found = run_policy("batch", folder, workload)
    assert workload.optimum_tokens <= found.computed_tokens <= 1.01 * workload.optimum_tokens
    assert found.peak_kv_bytes > 0


def test_fcfs_computes_more_when_documents_exceed_memory(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = make_checkpoint("tiny", tmp_path_factory.getbasetemp() / "shapes")
    workload = make_workload("many-documents", 512, 0.1)
    assert run_policy("fcfs", folder, workload).computed_tokens > 1.5 * workload.optimum_tokens


def test_recall_tasks() -> None:
    facts = recall.make_facts(Random(3), 12)
    assert len({(f.attribute, f.name) for f in facts}) == 12
    sentences = [f"Sentence {i}." for i in range(20)]
    text = recall.plant(Random(4), facts, sentences)
    assert all(f.statement in text for f in facts)
    assert all(s in text for s in sentences)
    positions = [text.index(s) for s in sentences]
    assert positions == sorted(positions)
    assert recall.question_prompt(text, facts[0]).endswith(facts[0].stem)
    assert recall.make_facts(Random(3), 12) == facts
    with pytest.raises(ValueError, match="5 facts asked of 2 x 2 pairs"):
        recall.make_facts(Random(0), 5, attributes=["a", "b"], names=["c", "d"])
