"""What is known about a model before its weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from quire.engine.budget import Budget, format_bytes, make_budget, parse_bytes
from quire.engine.limits import Limits
from quire.engine.prefixes import PIECE
from quire.errors import InvalidRequestError, shown
from quire.kv.arena import token_bytes
from quire.kv.tiers.prefixes import Layout, PrefixFiles
from quire.models.digest import digest, model_digest
from quire.models.loader import load_spec, stored_dtype, weight_bytes
from quire.models.spec import ModelSpec
from quire.models.tokenizer import Tokenizer
from quire.weights.quantise import Asked, parse

Prompt = str | Mapping[str, Any]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def model_folder(model: str | Path) -> Path:
    """The checkpoint folder or .gguf file of ``model``; ``"demo"`` is the bundled model."""
    if str(model) == "demo":
        return Path(str(files("quire") / "demo_model"))
    return Path(model).expanduser()


@dataclass(frozen=True)
class Setup:
    """A checkpoint's spec and tokenizer, and the memory that a run of it is given."""

    folder: Path
    spec: ModelSpec
    dtype: torch.dtype
    weights: Asked | None
    budget: Budget
    limits: Limits
    tokenizer: Tokenizer

    @classmethod
    def make(
        cls,
        model: str | Path,
        *,
        dtype: str | None = None,
        weights: str | None = None,
        memory: str | int | None = None,
        kv_memory: str | int | None = None,
        chunk: int = 512,
        context: int | None = None,
        device: str = "cpu",
        budget: Budget | None = None,
    ) -> Setup:
        """Read everything but the weights. Raises ModelError or MemoryBudgetError.

        ``budget``: the memory of where the model runs, if that is not this process.
        """
        folder = model_folder(model)
        spec = load_spec(folder, context=context)
        held = DTYPES[dtype] if dtype is not None else stored_dtype(folder)
        asked = parse(weights) if weights is not None else None
        kv_token = token_bytes(len(spec.layers), spec.kv_heads, spec.head_dim, held)
        budget = budget or make_budget(
            spec,
            weight_bytes(folder, held, asked),
            dtype=held,
            chunk=chunk,
            kv_token=kv_token,
            memory=parse_bytes(memory) if memory is not None else None,
            kv_memory=parse_bytes(kv_memory) if kv_memory is not None else None,
            device=device,
        )
        limits = Limits.make(spec.context, budget.kv, kv_token)
        return cls(folder, spec, held, asked, budget, limits, Tokenizer.load(folder))

    def prefix_files(self, folder: Path, limit: int, how: str) -> PrefixFiles:
        """The KV that was kept in ``folder``, at most ``limit`` bytes, and will be.

        ``how``: what else the KV depends on than the checkpoint. Raises InvalidRequestError.
        """
        spec = self.spec
        layout = Layout(len(spec.layers), spec.kv_heads, spec.head_dim, self.dtype)
        least = 2 * layout.nbytes(PIECE)
        if limit < least:
            raise InvalidRequestError(
                f"{format_bytes(limit)} on disk are too little: a piece of {PIECE} tokens of this "
                f"model takes {format_bytes(layout.nbytes(PIECE))}.",
                field="kv_disk",
                value=str(limit),
                action=f"Give {format_bytes(least)} or more.",
            )
        key = digest([model_digest(self.folder).encode(), how.encode()])
        return PrefixFiles(folder.expanduser(), key, layout, limit)

    def encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """Text (None where there is none) and token ids of a prompt, at least one.

        Raises InvalidRequestError.
        """
        text, ids = self._encode(prompt)
        if not ids:
            raise InvalidRequestError(
                "The prompt is empty.", field="prompt", value="", action="Give at least one token."
            )
        return text, ids

    def _encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            return prompt, self.tokenizer.encode(prompt)
        if "messages" in prompt:
            extra = {k: v for k, v in prompt.items() if k != "messages"}
            return None, self.tokenizer.encode_chat(prompt["messages"], **extra)
        if isinstance(prompt.get("prompt"), str):
            return prompt["prompt"], self.tokenizer.encode(prompt["prompt"])
        ids = prompt.get("prompt_token_ids")
        if isinstance(ids, list) and all(type(i) is int for i in ids):
            wrong = next((i for i in ids if not 0 <= i < self.spec.vocab_size), None)
            if wrong is not None:
                raise InvalidRequestError(
                    f"Token id {shown(wrong)} is outside the vocabulary of {self.spec.vocab_size}.",
                    field="prompt_token_ids",
                    value=wrong,
                    limit=self.spec.vocab_size,
                )
            return None, ids
        raise InvalidRequestError(
            f"A prompt is a string, a token id list or messages, not {shown(prompt)}.",
            field="prompt",
            value=prompt,
            action='Give "prompt", "messages" or "prompt_token_ids".',
        )
