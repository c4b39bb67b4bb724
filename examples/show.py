"""Print the first results of an output file: ``python examples/show.py FILE [COUNT]``."""

from __future__ import annotations

import json
import sys
from itertools import islice

with open(sys.argv[1], encoding="utf-8") as file:
    for line in islice(file, int(sys.argv[2]) if len(sys.argv) > 2 else 5):
        row = json.loads(line)
        if row["error"]:
            print(f"{row['custom_id']}: {row['error']['message']}")
            continue
        choice = row["response"]["body"]["choices"][0]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        print(f"{row['custom_id']}: {text.strip()!r}")
