"""Train the demonstration model: ``python -m training.train --out DIR`` (resumes from DIR).

Two CPU cores need about two hours. The text mix is books and speeches, key-value lists, repeated
random spans, and planted facts with questions (`quire.bench.recall`), so that the small model
both writes English and retrieves from its context. Sequences grow from 256 to 2,048 tokens as the
run goes on: recall circuits form fast on short ones. Matrices are trained with Muon, the rest with
AdamW; the learning rate is constant, then falls linearly to zero.
"""

from __future__ import annotations

import argparse
import json
import lzma
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from quire.bench import recall
from training.circuits import install
from training.model import Demo, DemoShape

DATA = Path(__file__).parent / "data"
SPECIAL = ["<|end_of_text|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


@dataclass(frozen=True)
class Stage:
    """``steps`` of sequences of ``length``; ``shares`` of the tokens are prose, repeats, pairs and
    facts; the learning rate goes linearly from ``first_rate`` to ``last_rate``."""

    steps: int
    length: int
    shares: tuple[float, float, float, float]
    first_rate: float
    last_rate: float


STAGES = [
    Stage(450, 256, (0.45, 0.10, 0.20, 0.25), 0.0020, 0.0020),
    Stage(200, 512, (0.45, 0.05, 0.15, 0.35), 0.0020, 0.0018),
    Stage(150, 1024, (0.40, 0.05, 0.15, 0.40), 0.0018, 0.0012),
    Stage(170, 2048, (0.40, 0.05, 0.15, 0.40), 0.0012, 0.0),
]
HELD_OUT = 0.02  # last share of every text file, never trained on

Piece = tuple[list[int], float]  # token ids, loss weight of each of them


def read_text(name: str, held_out: bool = False) -> str:
    with lzma.open(DATA / f"{name}.txt.xz", "rt", encoding="utf-8") as file:
        text = file.read()
    cut = int(len(text) * (1 - HELD_OUT))
    return text[cut:] if held_out else text[:cut]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE, digits one by one, special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=DemoShape().vocab,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Mixer:
    """Endless stream of token sequences with a loss weight for every token."""

    def __init__(self, tokenizer: Tokenizer, texts: list[str], rng: Random) -> None:
        self.tokenizer = tokenizer
        self.rng = rng
        self.made = [0, 0, 0, 0]  # tokens of prose, repeats, pairs, facts
        self.sentences = [
            s for text in texts for s in re.split(r"(?<=[.!?])\s+", re.sub(r"[ \n]+", " ", text))
        ]
        encoded = tokenizer.encode_batch([p for text in texts for p in text.split("\n\n")])
        self.text = [i for e in encoded for i in [*e.ids, *self.ids("\n\n")]]
        words = [t[1:] for t in tokenizer.get_vocab() if re.fullmatch("Ġ[a-z]{4,}", t)]
        self.words = sorted(words)
        self.capitals = sorted(
            t[1:] for t in tokenizer.get_vocab() if re.fullmatch("Ġ[A-Z][a-z]{2,}", t)
        )

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def value(self) -> str:
        kind = self.rng.random()
        if kind < 0.5:
            return self.rng.choice(recall.VALUES)
        if kind < 0.7:
            return self.rng.choice(self.words)
        if kind < 0.85:
            return f"{self.rng.choice(self.words)} {self.rng.choice(self.words)}"
        return str(self.rng.randrange(10 ** self.rng.randrange(2, 6)))

    def prose(self, room: int) -> list[Piece]:
        length = min(room, self.rng.randrange(64, 1025))
        start = self.rng.randrange(len(self.text) - length)
        return [(self.text[start : start + length], 1.0)]

    def repeats(self, room: int) -> list[Piece]:
        """A random span, again and again: what teaches a model to look for the last time."""
        length = self.rng.randrange(4, max(5, min(96, room // 2)))
        words = self.rng.random() < 0.5
        if words:
            text = "".join(f" {self.rng.choice(self.words)}" for _ in range(length))
            span = self.ids(text)
        else:
            span = [self.rng.randrange(len(SPECIAL), DemoShape().vocab) for _ in range(length)]
        times = max(1, min(4, room // length - 1))
        return [(span, 0.0)] + [(span, 1.0)] * times

    def pairs(self, room: int) -> list[Piece]:
        """``key: value`` lines, then the same keys asked again in another order."""
        rng = self.rng
        count = rng.randrange(2, max(3, min(100, room // 10)))
        joint = rng.choice([":", " ->", " =", " is"])
        end = rng.choice(["\n", ";\n", ".\n"])
        keys = rng.sample(self.words, count)
        if rng.random() < 0.3:
            keys = [f"{k} {rng.choice(self.words)}" for k in keys]
        table = {k: self.value() for k in keys}
        pieces: list[Piece] = [(self.ids(f"{k}{joint} {v}{end}"), 0.0) for k, v in table.items()]
        for key in rng.choices(keys, k=count):
            pieces.append((self.ids(f"{key}{joint}"), 0.0))
            pieces.append((self.ids(f" {table[key]}"), 2.0))
            pieces.append((self.ids(end), 0.5))
        return pieces

    def facts(self, room: int) -> list[Piece]:
        """Prose with planted facts, then questions on them, plain or as a chat."""
        rng = self.rng
        count = min(rng.choice([1, 2, 4, 4, 8, 12]), max(1, room // 60))
        attributes, names = list(recall.ATTRIBUTES), list(recall.NAMES)
        if rng.random() < 0.2:
            names = self.capitals
        if rng.random() < 0.5:  # few names and attributes: near misses among the facts
            attributes, names = rng.sample(attributes, 4), rng.sample(names, 6)
        facts = recall.make_facts(rng, count, attributes, names)
        facts = [replace(f, value=self.value()) for f in facts]
        asked = rng.choices(facts, k=max(2, count)) if count > 1 else facts
        filler: list[str] = []
        tokens = (count + len(asked)) * 36 + 24
        start = rng.randrange(len(self.sentences) - 200)
        for sentence in self.sentences[start : start + 200]:
            tokens += len(sentence) // 3
            if tokens > room:
                break
            filler.append(sentence)
        context = recall.plant(rng, facts, filler)
        chat = rng.random() < 0.4
        opening = "<|user|>\n" if chat else ""
        if chat and rng.random() < 0.3:
            opening = "<|system|>\nAnswer from the text.<|end|>\n" + opening
        pieces: list[Piece] = [(self.ids(f"{opening}{context}\n\n"), 0.1)]
        for number, fact in enumerate(asked):
            if chat:
                turn = "<|user|>\n" if number else ""
                before, after = f"{turn}{fact.question}<|end|>\n<|assistant|>\n", "<|end|>\n"
            else:
                before, after = f"Question: {fact.question}\nAnswer: ", "\n\n"
            stem = fact.stem
            pieces.append((self.ids(before if chat else before.rstrip(" ")), 0.0))
            pieces.append((self.ids(stem if chat else f" {stem}"), 0.3))
            pieces.append((self.ids(f" {fact.value}"), 3.0))
            pieces.append((self.ids(f".{after}"), 0.3))
        return pieces

    def sequence(self, stage: Stage) -> tuple[list[int], list[float]]:
        """One more token id and weight than ``stage.length``; documents begin with end-of-text."""
        ids: list[int] = []
        weights: list[float] = []
        kinds = (self.prose, self.repeats, self.pairs, self.facts)
        while len(ids) <= stage.length:
            room = stage.length - len(ids)
            total = sum(self.made)
            kind = max(range(4), key=lambda k: stage.shares[k] * total - self.made[k])
            if total == 0 or (kind == 3 and room < 150):
                kind = 1 if stage.shares[1] else 0
            before = len(ids)
            ids.append(0)
            weights.append(0.3)
            for piece, weight in kinds[kind](max(room, 30)):
                ids.extend(piece)
                weights.extend([weight] * len(piece))
            self.made[kind] += min(len(ids), stage.length + 1) - before
        return ids[: stage.length + 1], weights[: stage.length + 1]

    def batch(self, tokens: int, stage: Stage) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, targets (int64) and weights (float32), each ``[tokens / length, length]``."""
        rows = [self.sequence(stage) for _ in range(tokens // stage.length)]
        ids = torch.tensor([r[0] for r in rows])
        weights = torch.tensor([r[1] for r in rows])
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), weights[:, 1:].contiguous()


def stage_at(step: int) -> tuple[Stage, float]:
    """The stage of ``step`` and its learning rate (with a short warm-up at the very start)."""
    first = 0
    for stage in STAGES:
        if step < first + stage.steps:
            share = (step - first) / stage.steps
            rate = stage.first_rate + (stage.last_rate - stage.first_rate) * share
            return stage, rate * min(1.0, (step + 1) / 30)
        first += stage.steps
    raise IndexError(step)


def save_checkpoint(model: Demo, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a Hugging Face directory with bfloat16 weights."""
    from safetensors.torch import save_file

    shape = DemoShape()
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": [0, 4],
        "torch_dtype": "bfloat16",
    }
    template = (
        "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    tokens = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "pad_token": "<|end_of_text|>",
        "model_max_length": shape.context,
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens, indent=1) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="run folder; resumed if not empty")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens a step")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    texts = [read_text(name) for name in ("books", "addresses", "shakespeare")]
    tokenizer_file = args.out / "tokenizer.json"
    if not tokenizer_file.exists():
        train_tokenizer([text.replace("\n\n", "\n") for text in texts]).save(str(tokenizer_file))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))

    torch.manual_seed(0)
    model = Demo(DemoShape())
    install(model, DemoShape())
    model.to(args.device)
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=0.0, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    state_file = args.out / "state.pt"
    first = 0
    if state_file.exists():
        state = torch.load(state_file)
        first = state["step"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    mixer = Mixer(tokenizer, texts, Random(first))  # a resumed run goes on with fresh samples
    compiled = torch.compile(model, dynamic=False)
    losses: list[float] = []
    started = time.time()
    steps = sum(stage.steps for stage in STAGES)
    for step in range(first, steps):
        stage, rate = stage_at(step)
        batch = (t.to(args.device) for t in mixer.batch(args.tokens, stage))
        with torch.autocast(args.device, dtype=torch.bfloat16):
            loss = compiled(*batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 20 == 0:
            speed = args.tokens * (step + 1 - first) / (time.time() - started)
            mean = sum(losses[-20:]) / 20
            print(
                f"step {step + 1} length {stage.length} loss {mean:.3f} {speed:.0f} tokens/s",
                flush=True,
            )
        if (step + 1) % 50 == 0 or step + 1 == steps:
            state = {
                "step": step + 1,
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
            }
            torch.save(state, args.out / "state.tmp")
            (args.out / "state.tmp").replace(state_file)
            save_checkpoint(model, tokenizer, args.out / "checkpoint")


if __name__ == "__main__":
    main()
