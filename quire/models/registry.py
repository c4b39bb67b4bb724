"""The table of architectures."""

from __future__ import annotations

from collections.abc import Callable

from quire.errors import CheckpointError, UnsupportedModelError
from quire.models import (
    gemma2,
    gemma3,
    gpt_neox,
    llama,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)
from quire.models.config import Config
from quire.models.spec import ModelSpec
from quire.weights import stored

SUPPORTED: dict[str, Callable[[Config, int | None], ModelSpec]] = {
    "GPTNeoXForCausalLM": gpt_neox.spec,
    "Gemma2ForCausalLM": gemma2.spec,
    "Gemma3ForCausalLM": gemma3.spec,
    "LlamaForCausalLM": llama.spec,
    "MistralForCausalLM": mistral.spec,
    "MixtralForCausalLM": mixtral.spec,
    "Olmo2ForCausalLM": olmo2.spec,
    "Phi3ForCausalLM": phi3.spec,
    "Qwen2ForCausalLM": qwen2.spec,
    "Qwen3ForCausalLM": qwen3.spec,
    "Qwen3MoeForCausalLM": qwen3_moe.spec,
    "SmolLM3ForCausalLM": smollm3.spec,
}


def spec_from_config(config: Config, context: int | None = None) -> ModelSpec:
    """The model that a ``config.json`` describes.

    ``context``: longest sequence to run, None for the model's. Raises UnsupportedModelError for
    what Quire does not support and CheckpointError for an incomplete config.
    """
    stored.reader(config.get("quantization_config"))  # refuses what cannot be read
    names = config.get("architectures") or ["(none)"]
    if names[0] not in SUPPORTED:
        raise UnsupportedModelError(
            f"The architecture {names[0]} is not supported.",
            value=names[0],
            limit=sorted(SUPPORTED),
            action=f"Supported are {', '.join(sorted(SUPPORTED))}.",
        )
    try:
        return SUPPORTED[names[0]](config, context)
    except KeyError as error:
        raise CheckpointError(
            f"config.json of {names[0]} lacks {error}.",
            value=str(error),
            action="Download it again.",
        ) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"config.json of {names[0]} has a field of a wrong type or value: {error}.",
            value=str(error),
            action="Download it again.",
        ) from error
