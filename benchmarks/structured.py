"""Structured output: which schemas compile, whether they hold, and what they cost.

``python benchmarks/structured.py PART...`` prints Markdown tables. The parts:

- ``compile --schemas FILE``: share of schemas that compile, time of each, why others do not
- ``suite --suite FILE``: the official test suite (a tar file): are valid instances accepted and
  invalid ones rejected?
- ``outputs --schemas FILE``: outputs of the demonstration model under schemas, biased to close what
  is open, validated with the ``jsonschema`` package
- ``speed --schemas FILE --corpus FILE``: time of a batch with schemas over that of a batch of the
  same lengths without, on the demonstration model and on a random one of 135M parameters, whose
  tokenizer of 32,000 tokens is made of the corpus

FILE of ``--schemas`` has a JSON object ``{"set", "name", "schema"}`` a line; all are gzip files.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import re
import statistics
import sys
import tarfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import tokenizers

sys.path.insert(0, str(Path(__file__).parent.parent))

from quire import LLM, SamplingParams, Structure
from quire.bench.shapes import make_checkpoint
from quire.decode import grammar
from quire.decode.grammar import Grammars, Matcher
from quire.errors import InvalidRequestError
from quire.models.tokenizer import Tokenizer

DRAFTS = {
    "draft7": "http://json-schema.org/draft-07/schema#",
    "draft2020-12": "https://json-schema.org/draft/2020-12/schema",
}


def read_schemas(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The schemas of each set, in order."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            found[row["set"]].append(row["schema"])
    return found


def make_grammars(tokenizer: Tokenizer) -> Grammars:
    """A compiler for a tokenizer without a model."""
    return Grammars(tokenizer.to_json, tokenizer.vocab_size, tokenizer.eos_ids)


def structure(schema: object) -> Structure:
    """The structure of a schema."""
    found = Structure.of({"json_schema": schema})
    assert found is not None
    return found


def cause(error: InvalidRequestError) -> str:
    """A short name of why a schema was refused."""
    text = str(error).partition("cannot be used: ")[2]
    keys = re.search(r"Unimplemented keys: \[(.*?)\]", text)
    if keys:
        return "keyword " + ", ".join(sorted(re.findall(r'"(.*?)"', keys[1])))
    return re.sub(r"[\"'`].*", "...", text)[:60]


def compile_all(path: Path, tokenizer: Tokenizer) -> None:
    """Compile every schema once."""
    found = make_grammars(tokenizer)
    found.check(Structure("json_object"))
    causes: Counter[str] = Counter()
    print(
        "| schemas | compiled | median ms | 95% below ms | longest ms |\n|---|---:|---:|---:|---:|"
    )
    total: list[float] = []
    counts = [0, 0]
    for name, schemas in read_schemas(path).items():
        seconds = []
        good = 0
        for schema in schemas:
            started = time.perf_counter()
            try:
                found.check(structure(schema))
                good += 1
            except InvalidRequestError as error:
                causes[cause(error)] += 1
            seconds.append(1000 * (time.perf_counter() - started))
        total += seconds
        counts = [counts[0] + good, counts[1] + len(schemas)]
        print(compile_row(name, good, seconds))
    print(compile_row("all", counts[0], total))
    print("\nRefused:")
    for reason, count in causes.most_common(25):
        print(f"- {count} {reason}")


def compile_row(name: str, good: int, seconds: list[float]) -> str:
    """A row of the table."""
    late = sorted(seconds)[int(0.95 * len(seconds))]
    return (
        f"| {name} | {good} of {len(seconds)} ({100 * good / len(seconds):.1f}%) "
        f"| {statistics.median(seconds):.1f} | {late:.1f} | {max(seconds):.0f} |"
    )


def cases(path: Path) -> Iterator[tuple[str, str, Any, list[dict[str, Any]]]]:
    """Draft, file, schema and tests of every group in the suite."""
    with tarfile.open(path) as tar:
        for member in sorted(tar.getmembers(), key=lambda m: m.name):
            parts = Path(member.name).parts
            draft = next((d for d in DRAFTS if d in parts), None)
            if draft is None or not member.isfile() or not member.name.endswith(".json"):
                continue
            file = tar.extractfile(member)
            assert file is not None
            optional = "optional" in parts
            for group in json.load(file):
                schema = group["schema"]
                if isinstance(schema, dict) and "$schema" not in schema:
                    schema = {"$schema": DRAFTS[draft], **schema}
                kind = f"{draft}, optional" if optional else draft
                yield kind, Path(member.name).stem, schema, group["tests"]


def orders(value: object) -> Iterator[object]:
    """The value with the properties of its outermost object in every order."""
    if not isinstance(value, dict) or len(value) > 5:
        yield value
        return
    for names in itertools.permutations(value):
        yield {name: value[name] for name in names}


def accepts(found: Grammars, made: Structure, value: object) -> bool:
    """Whether an output that is the value as JSON follows the structure."""
    state = found._compiled(made).deep_copy()
    text = json.dumps(value, ensure_ascii=False)
    tokens = found._tokenizer.tokenize_str(text)
    return state.try_consume_tokens(tokens) == len(tokens) and state.is_accepting()


def official_suite(path: Path, tokenizer: Tokenizer) -> None:
    """Valid and invalid instances of the official suite."""
    found = make_grammars(tokenizer)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    misses: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for draft, file, schema, tests in cases(path):
        here, missed = counts[draft], misses[draft]
        here["groups"] += 1
        made = structure(schema)
        try:
            found.check(made)
        except InvalidRequestError:
            missed["refused"][file] += 1
            continue
        here["compiled"] += 1
        for test in tests:
            value = test["data"]
            if test["valid"]:
                here["valid"] += 1
                exact = accepts(found, made, value)
                here["accepted as it is"] += exact
                some = exact or any(accepts(found, made, each) for each in orders(value))
                here["accepted"] += some
                if not some:
                    missed["valid but rejected"][file] += 1
            else:
                here["invalid"] += 1
                wrong = any(accepts(found, made, each) for each in orders(value))
                here["rejected"] += not wrong
                if wrong:
                    missed["invalid but accepted"][file] += 1
    print(
        "| draft | schemas compiled | valid accepted, any order | as written | invalid rejected |"
        "\n|---|---:|---:|---:|---:|"
    )
    for draft, here in counts.items():

        def share(part: str, whole: str, here: Counter[str] = here) -> str:
            return f"{here[part]} of {here[whole]} ({100 * here[part] / here[whole]:.1f}%)"

        print(
            f"| {draft} | {share('compiled', 'groups')} | {share('accepted', 'valid')} "
            f"| {share('accepted as it is', 'valid')} | {share('rejected', 'invalid')} |"
        )
    for draft, kinds in misses.items():
        for kind, files in kinds.items():
            names = ", ".join(f"{name} {count}" for name, count in files.most_common())
            print(f"\n{draft}, {kind}: {names}")


def compiled_only(llm: LLM, schemas: list[dict[str, Any]], count: int) -> list[Structure]:
    """The first structures that compile."""
    made = []
    for schema in schemas:
        if len(made) == count:
            break
        try:
            llm.grammars.check(structure(schema))
            made.append(structure(schema))
        except InvalidRequestError:
            continue
    return made


def check_outputs(path: Path, count: int, max_tokens: int) -> None:
    """Validate what the demonstration model writes."""
    print("| schemas | outputs | complete | of them valid | invalid by |\n|---|---:|---:|---:|---|")
    with LLM("demo", kv_memory="512MiB") as llm:
        for name, schemas in read_schemas(path).items():
            made = compiled_only(llm, schemas, count)
            closing = {
                token: 6.0
                for token in range(llm.tokenizer.vocab_size)
                if llm.tokenizer.token_text(token).startswith(('"', "}", "]"))
            }
            params = [
                SamplingParams(
                    n=2, max_tokens=max_tokens, structure=each, seed=index, logit_bias=closing
                )
                for index, each in enumerate(made)
            ]
            prompts = [{"messages": [{"role": "user", "content": "Write JSON."}]}] * len(made)
            samples = complete = valid = 0
            causes: Counter[str] = Counter()
            for output, each in zip(llm.generate(prompts, params), made, strict=True):
                if output.error is not None:
                    causes["error"] += 1
                for sample in output.outputs:
                    samples += 1
                    if sample.finish_reason != "stop":
                        continue
                    complete += 1
                    fault = invalid_by(sample.text, json.loads(each.source))
                    valid += fault is None
                    if fault is not None:
                        causes[fault] += 1
            share = f"{100 * valid / complete:.1f}%" if complete else ""
            print(
                f"| {name} | {samples} | {complete} | {valid} ({share}) "
                f"| {', '.join(f'{k} {v}' for k, v in causes.most_common())} |",
                flush=True,
            )


def invalid_by(text: str, schema: dict[str, Any]) -> str | None:
    """The keyword that an output breaks, or None."""
    try:
        validator = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
        checker = validator(schema, format_checker=validator.FORMAT_CHECKER)
        error = next(iter(checker.iter_errors(json.loads(text))), None)
    except json.JSONDecodeError:
        return "JSON"
    except Exception as broken:  # the schema itself is at fault
        return type(broken).__name__
    return None if error is None else str(error.validator)


def make_model(folder: Path, corpus: list[Path]) -> Path:
    """A random model of 135M parameters and a byte-level tokenizer of 32,000 tokens."""
    target = make_checkpoint("135m", folder)
    if not (target / "tokenizer.json").exists():
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=32000,
            special_tokens=["<unk>", "<s>", "</s>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        )
        texts = (gzip.decompress(file.read_bytes()).decode() for file in corpus)
        backend.train_from_iterator((line for text in texts for line in text.splitlines()), trainer)
        backend.save(str(target / "tokenizer.json"))
        (target / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return target


ENDLESS = {  # short strings and numbers, names that are forced, and no end within the limit
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "first_name": {"type": "string", "maxLength": 20},
            "years_of_age": {"type": "integer", "minimum": 0, "maximum": 120},
            "member": {"type": "boolean"},
        },
        "required": ["first_name", "years_of_age", "member"],
        "additionalProperties": False,
    },
}
FREE_TEXT = {
    "type": "object",
    "properties": {"text": {"type": "string", "minLength": 5000}},
    "required": ["text"],
}


def speed(
    model: str | Path, path: Path, batch: int, max_tokens: int, repeats: int, slices: str
) -> None:
    """Time with schemas over the time of the same lengths without."""
    sets = read_schemas(path)
    print(
        "| model | rows | free, tokens/s | with schemas, one token a step | with forced tokens "
        "| forced |\n|---|---|---:|---:|---:|---:|"
    )
    name = "demo" if model == "demo" else "135m"
    with LLM(model, kv_memory="2GiB") as llm:
        if slices:
            library = llm.grammars._library.LLTokenizer
            llm.grammars.__dict__["_tokenizer"] = llm.grammars._tokenizer.with_slices(
                library.json_slices() if slices == "json" else []
            )
        various = [
            each for schemas in sets.values() for each in compiled_only(llm, schemas, batch // 8)
        ][:batch]
        jobs = {
            "one schema, records": [structure(ENDLESS)] * batch,
            "one schema, free text": [structure(FREE_TEXT)] * batch,
            "a schema each, of the sample": various,
        }
        for job, structures in jobs.items():
            one_job(llm, f"| {name} | {len(structures)}, {job}", structures, max_tokens, repeats)


def one_job(
    llm: LLM, title: str, structures: list[Structure], max_tokens: int, repeats: int
) -> None:
    """Alternate the three ways of running one batch."""
    prompts = [f"Record number {index}: " for index in range(len(structures))]
    bound = [
        SamplingParams(max_tokens=max_tokens, structure=each, seed=index)
        for index, each in enumerate(structures)
    ]

    def run(params: list[SamplingParams], jump: bool = True) -> tuple[float, list[int], int]:
        """Seconds, output lengths and steps."""
        accept = Matcher.accept

        def walk(self: Matcher, token: int, *, jump: bool) -> list[int]:  # noqa: ARG001
            return accept(self, token, jump=False)

        if not jump:
            Matcher.accept = walk  # type: ignore[method-assign]
        try:
            before, started = llm.stats.steps, time.perf_counter()
            outputs = llm.generate(prompts, params)
            seconds = time.perf_counter() - started
        finally:
            Matcher.accept = accept  # type: ignore[method-assign]
        assert not any(output.error for output in outputs)
        return seconds, [len(o.outputs[0].token_ids) for o in outputs], llm.stats.steps - before

    _, lengths, _ = run(bound)
    free = [
        replace(params, structure=None, ignore_eos=True, max_tokens=length)
        for params, length in zip(bound, lengths, strict=True)
    ]
    tokens = sum(lengths)
    ratios: dict[str, list[float]] = defaultdict(list)
    speeds = []
    for _ in range(repeats):
        base, same, free_steps = run(free)
        assert same == lengths
        speeds.append(tokens / base)
        walking, found, steps = run(bound, jump=False)
        assert found == lengths
        assert abs(steps - free_steps) <= 1
        ratios["walk"].append(walking / base)
        ratios["jump"].append(run(bound)[0] / base)
    forced = forced_share(llm, prompts, bound)

    def spread(values: list[float]) -> str:
        middle = 100 * (statistics.median(values) - 1)
        return f"{middle:+.1f}% ({100 * (min(values) - 1):+.1f} to {100 * (max(values) - 1):+.1f})"

    print(
        f"{title}, {tokens} tokens | {statistics.median(speeds):,.0f} "
        f"({min(speeds):,.0f} to {max(speeds):,.0f}) | {spread(ratios['walk'])} "
        f"| {spread(ratios['jump'])} | {100 * forced:.0f}% |",
        flush=True,
    )


def forced_share(llm: LLM, prompts: list[str], params: list[SamplingParams]) -> float:
    """The share of tokens that were taken unsampled."""
    accept, counts = Matcher.accept, Counter[str]()

    def counted(self: Matcher, token: int, *, jump: bool) -> list[int]:
        forced = accept(self, token, jump=jump)
        counts["forced"] += len(forced)
        counts["all"] += 1 + len(forced)
        return forced

    Matcher.accept = counted  # type: ignore[method-assign]
    try:
        llm.generate(prompts, params)
    finally:
        Matcher.accept = accept  # type: ignore[method-assign]
    return counts["forced"] / counts["all"]


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="+", choices=["compile", "suite", "outputs", "speed"])
    parser.add_argument("--schemas", type=Path, help="sample of schemas, .jsonl.gz")
    parser.add_argument("--suite", type=Path, help="the official suite, .tar.gz")
    parser.add_argument("--corpus", type=Path, nargs="+", help="texts for a tokenizer, .gz")
    parser.add_argument("--folder", type=Path, default=Path("bench-out"))
    parser.add_argument("--tokenizer", type=Path, help="folder; default: the demonstration model")
    parser.add_argument("--count", type=int, default=40, help="schemas of a set for outputs")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=["demo", "135m"])
    parser.add_argument("--slices", default="", help="json or none, instead of the default")
    args = parser.parse_args()
    grammar.COMPILED = 10_000
    tokenizer = Tokenizer.load(args.tokenizer or Path(grammar.__file__).parents[1] / "demo_model")
    if "compile" in args.part:
        compile_all(args.schemas, tokenizer)
    if "suite" in args.part:
        official_suite(args.suite, tokenizer)
    if "outputs" in args.part:
        check_outputs(args.schemas, args.count, args.max_tokens)
    if "speed" in args.part:
        for model in args.models:
            folder: str | Path = model
            if model == "135m":
                folder = make_model(args.folder, args.corpus)
            speed(folder, args.schemas, args.batch, args.max_tokens, args.repeats, args.slices)


if __name__ == "__main__":
    main()
