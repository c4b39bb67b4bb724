"""Judge the demonstration model: recall by context length, perplexity on held-out text.

``python -m training.evaluate [--model FOLDER] [--trials N]`` prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from random import Random

from quire import LLM, SamplingParams
from quire.bench import recall
from training.train import read_text

LENGTHS = (256, 512, 1024, 2048)
NEEDLES = (1, 4)
WINDOW = 1024  # tokens of context for perplexity


def needle_prompts(
    rng: Random, llm: LLM, sentences: list[str], needles: int, length: int
) -> list[tuple[str, str]]:
    """Prompts of ``length`` tokens at most, one for each planted fact, with their answers."""
    facts = recall.make_facts(rng, needles)
    start = rng.randrange(len(sentences) - 200)
    filler: list[str] = []
    used = len(llm.tokenizer.encode(recall.question_prompt(recall.plant(rng, facts, []), facts[0])))
    for sentence in sentences[start:]:
        used += len(llm.tokenizer.encode(" " + sentence))
        if used > length - 8:
            break
        filler.append(sentence)
    context = recall.plant(rng, facts, filler)
    return [(recall.question_prompt(context, fact), fact.value) for fact in facts]


def recall_rate(llm: LLM, sentences: list[str], needles: int, length: int, trials: int) -> float:
    """Share of facts given back right, greedy."""
    rng = Random(f"{needles}/{length}")
    pairs = [
        pair for _ in range(trials) for pair in needle_prompts(rng, llm, sentences, needles, length)
    ]
    params = SamplingParams(temperature=0.0, max_tokens=8)
    found = llm.generate([prompt for prompt, _ in pairs], params)
    right = sum(
        o.outputs[0].text.startswith(f" {value}.")
        for o, (_, value) in zip(found, pairs, strict=True)
    )
    return right / len(pairs)


def perplexity(llm: LLM, text: str, windows: int) -> tuple[float, float]:
    """Perplexity a token, and bits a byte, over non-overlapping windows."""
    ids = llm.tokenizer.encode(text)
    parts = [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW, WINDOW)][:windows]
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    found = llm.generate([{"prompt_token_ids": part} for part in parts], params)
    scores = [entry.logprob for output in found for entry in output.prompt_logprobs or []]
    size = sum(len(llm.tokenizer.decode(part).encode()) for part in parts)
    return math.exp(-sum(scores) / len(scores)), -sum(scores) / math.log(2) / size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    held_out = read_text("books", held_out=True)
    sentences = re.split(r"(?<=[.!?])\s+", re.sub(r"[ \n]+", " ", held_out))
    result: dict[str, float] = {}
    with LLM(args.model, kv_memory="512MiB") as llm:
        print("| needles | " + " | ".join(f"{n} tokens" for n in LENGTHS) + " |")
        print("|---" * (len(LENGTHS) + 1) + "|")
        for needles in NEEDLES:
            for length in LENGTHS:
                rate = recall_rate(llm, sentences, needles, length, args.trials // needles)
                result[f"recall/{needles}/{length}"] = rate
            row = [f"{100 * result[f'recall/{needles}/{n}']:.0f}%" for n in LENGTHS]
            print(f"| {needles} | " + " | ".join(row) + " |", flush=True)
        print("\n| held-out text | perplexity a token | bits a byte |\n|---|---|---|")
        for name, text in (
            ("books (last 2% of the training files)", held_out),
            ("WikiText-2 test", read_text("wikitext-2-test")),
        ):
            per_token, bits = perplexity(llm, text, args.windows)
            result[f"perplexity/{name}"] = per_token
            print(f"| {name} | {per_token:.1f} | {bits:.2f} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
