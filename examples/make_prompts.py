"""Make examples/prompts.jsonl: documents with planted facts, and questions that share them."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from random import Random

from quire.bench import recall
from training.train import read_text

STARTS = [
    "It was a dark night, and the old man",
    "The king looked at the queen and said",
    "My fellow citizens, we are",
    "In the garden there was",
]


def main() -> None:
    """Write the file."""
    rng = Random(7)
    text = re.sub(r"[ \n]+", " ", read_text("books", held_out=True))
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", text) if s.isascii()]
    rows: list[dict[str, object]] = []
    for number in range(8):
        facts = recall.make_facts(rng, 8)
        start = rng.randrange(len(sentences) - 40)
        context = recall.plant(rng, facts, sentences[start : start + 24])
        for index, fact in enumerate(facts):
            name = f"doc{number}-q{index}"
            question = {"custom_id": name, "prompt": recall.question_prompt(context, fact)}
            if number % 4 == 3:
                content = f"{context}\n\n{fact.question}"
                body = {"messages": [{"role": "user", "content": content}], "max_tokens": 24}
                question = {
                    "custom_id": name,
                    "method": "POST",
                    "url": "/v1/chat/completions",
                    "body": body,
                }
            else:
                question |= {"max_tokens": 8, "stop": ["."]}
            rows.append({"row": question, **asdict(fact)})
    rng.shuffle(rows)
    folder = Path(__file__).parent
    lines = [row["row"] for row in rows]
    for index, start_text in enumerate(STARTS):
        lines.append({"custom_id": f"story{index}", "prompt": start_text, "max_tokens": 48})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
