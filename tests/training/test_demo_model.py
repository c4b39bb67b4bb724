"""The bundled model: its recall, its size, and its form."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

import pytest
import torch
import transformers

from quire import LLM
from quire.api.setup import model_folder
from training.circuits import install
from training.evaluate import recall_rate
from training.model import Demo, DemoShape
from training.train import STAGES, Mixer, read_text, stage_at


def test_it_is_small() -> None:
    assert sum(f.stat().st_size for f in model_folder("demo").iterdir()) < 16 << 20


def test_transformers_gives_the_same_logits() -> None:
    folder = model_folder("demo")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = Demo(DemoShape())
    plain.load_state_dict(
        {k: v for k, v in oracle.state_dict().items() if not k.startswith("lm_head")}
    )
    ids = torch.randint(0, DemoShape().vocab, (2, 50))
    with torch.no_grad():
        torch.testing.assert_close(plain.logits(ids), oracle(ids).logits, rtol=0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("needles", "length", "least"),
    [(1, 1024, 0.95), (1, 2048, 0.90), (4, 1024, 0.80), (4, 2048, 0.80)],
)
def test_recall(needles: int, length: int, least: float) -> None:
    text = re.sub(r"[ \n]+", " ", read_text("books", held_out=True))
    sentences = re.split(r"(?<=[.!?])\s+", text)
    with LLM("demo", kv_memory="256MiB") as llm:
        assert recall_rate(llm, sentences, needles, length, 60 // needles) >= least


def test_circuits_look_back_and_copy() -> None:
    """Right after construction, a repeated random span is predicted far above chance."""
    torch.manual_seed(0)
    model = Demo(DemoShape())
    span = torch.randint(5, DemoShape().vocab, (4, 40))
    ids = torch.cat([span, span], dim=1)

    def rank() -> float:
        with torch.no_grad():
            logits = model.logits(ids)[:, 40:-1]
        right = logits.gather(2, ids[:, 41:, None])
        return float((logits > right).sum(-1).float().mean())

    before = rank()
    install(model, DemoShape())
    assert rank() < 0.1 * before


def test_data_mix_follows_its_shares() -> None:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(model_folder("demo") / "tokenizer.json"))
    text = (Path(__file__).parents[2] / "training/README.md").read_text() * 300
    mixer = Mixer(tokenizer, [text], Random(0))
    stage = STAGES[1]
    for _ in range(40):
        ids, weights = mixer.sequence(stage)
        assert len(ids) == len(weights) == stage.length + 1
    made = [count / sum(mixer.made) for count in mixer.made]
    assert made == pytest.approx(stage.shares, abs=0.06)
    inputs, targets, _ = mixer.batch(2048, stage)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_stages_cover_every_step() -> None:
    total = sum(stage.steps for stage in STAGES)
    rates = [stage_at(step)[1] for step in range(total)]
    assert rates[0] < rates[40]
    assert rates[-1] < 0.1 * max(rates)
    with pytest.raises(IndexError):
        stage_at(total)
