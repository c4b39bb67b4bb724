from __future__ import annotations

import gc
import json
from pathlib import Path

import jsonschema
import psutil
import pytest
import torch

from quire import LLM, QuireError, SamplingParams, Stats
from quire.engine.budget import Budget
from quire.errors import InvalidRequestError, MemoryBudgetError, PromptTooLongError
from quire.schedule.groups import Group

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.fixture(scope="module")
def llm(tinystories: Path) -> LLM:
    return LLM(tinystories, kv_memory="8MiB", chunk=64)


def test_forms_of_prompts(llm: LLM) -> None:
    text = "Once upon a time"
    ids = llm.tokenizer.encode(text)
    found = llm.generate([text, {"prompt": text}, {"prompt_token_ids": ids}], GREEDY)
    assert len({o.outputs[0].text for o in found}) == 1
    assert [o.request_id for o in found] == [0, 1, 2]
    assert found[0].prompt == text
    assert found[2].prompt is None
    assert all(o.prompt_token_ids == ids for o in found)
    assert llm.generate(text, GREEDY)[0].outputs[0].text == found[0].outputs[0].text


def test_parameters_one_each(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in (1, 5, 3)]
    found = llm.generate(["a", "b", "c"], params)
    assert [len(o.outputs[0].token_ids) for o in found] == [1, 5, 3]
    with pytest.raises(InvalidRequestError, match="3 prompts came with 2"):
        llm.generate(["a", "b", "c"], params[:2])


def test_results_come_as_they_finish(llm: LLM) -> None:
    lengths = [40, 1, 20]
    pairs = [
        (f"Tom {n}", SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True))
        for n in lengths
    ]
    steps: list[int] = []
    order = [
        o.request_id for o in llm.generate_iter(pairs, on_step=lambda s: steps.append(s.steps))
    ]
    assert order == [1, 2, 0]
    assert len(steps) >= 40


def test_leaving_the_iterator_early_frees_the_engine(llm: LLM) -> None:
    found = llm.generate_iter(("A cat", GREEDY) for _ in range(30))
    next(found)
    found.close()
    assert llm.engine.unfinished == 0
    assert llm.engine.world.pool.used_pages == 0
    assert llm.generate("A cat", GREEDY)[0].outputs


def test_a_bad_request_does_not_take_the_good_ones(llm: LLM) -> None:
    found = llm.generate(
        [{"prompt_token_ids": []}, "ok", "x " * 600, {"prompt_token_ids": [1, 512]}, {"a": 1}],
        GREEDY,
    )
    kinds = [type(o.error) for o in found]
    assert kinds == [
        InvalidRequestError,
        type(None),
        PromptTooLongError,
        InvalidRequestError,
        InvalidRequestError,
    ]
    assert found[1].outputs


def test_same_seed_same_output_in_any_company(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=12, n=2)
    alone = llm.generate("The dog", params)[0]
    company = llm.generate(["The dog", "The dog and", "The dog", "A"], params)
    for other in (company[0], company[2]):
        assert [s.token_ids for s in other.outputs] == [s.token_ids for s in alone.outputs]
    assert alone.outputs[0].token_ids != alone.outputs[1].token_ids


def test_logprobs(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=3, prompt_logprobs=2)
    found = llm.generate("Once upon a time", params)[0]
    sample = found.outputs[0]
    assert sample.logprobs is not None
    assert [e.token for e in sample.logprobs] == sample.token_ids
    assert sample.cumulative_logprob == pytest.approx(sum(e.logprob for e in sample.logprobs))
    assert found.prompt_logprobs is not None
    assert [e.token for e in found.prompt_logprobs] == found.prompt_token_ids[1:]


def test_penalties_and_bad_words_reach_the_sampler(llm: LLM) -> None:
    plain = llm.generate("Once upon a time", GREEDY)[0].outputs[0].text
    word = plain.split()[-1].strip(".,")
    params = SamplingParams(temperature=0.0, max_tokens=12, bad_words=(word,))
    assert word in plain
    assert word not in llm.generate("Once upon a time", params)[0].outputs[0].text


def test_chat() -> None:
    with LLM("demo", kv_memory="8MiB") as demo:
        one = demo.chat([{"role": "user", "content": "Hello."}], GREEDY)
        many = demo.chat([[{"role": "user", "content": "Hello."}]] * 2, GREEDY)
    assert len(one) == 1
    assert [o.outputs[0].text for o in many] == [one[0].outputs[0].text] * 2


@pytest.mark.slow
def test_close_gives_the_memory_back(tmp_path: Path) -> None:
    from quire.bench.shapes import make_checkpoint

    folder = make_checkpoint("tiny", tmp_path)
    (folder / "tokenizer.json").write_text(
        (Path(__file__).parents[1] / "data/tinystories-260k/tokenizer.json").read_text()
    )
    process = psutil.Process()
    prompt = {"prompt_token_ids": list(range(3, 500))}
    params = SamplingParams(temperature=0.0, max_tokens=2, n=2)

    def cycle() -> int:
        with LLM(folder, kv_memory="256MiB", dtype="float32") as llm:
            arena = llm.engine.runner.arena
            arena.keys.fill_(0)
            arena.values.fill_(0)
            assert llm.generate([prompt], params)[0].outputs
            inside = process.memory_info().rss
        del arena
        gc.collect()
        assert inside - process.memory_info().rss > 200 << 20
        with pytest.raises(QuireError, match="closed"):
            llm.generate([prompt], params)
        return process.memory_info().rss

    first = cycle()
    assert cycle() < first + (32 << 20)


def test_memory_limits_are_refused_with_a_suggestion_that_works(tinystories: Path) -> None:
    with pytest.raises(MemoryBudgetError, match="Ask for at least --memory") as caught:
        LLM(tinystories, memory="10MiB")
    needed = str(caught.value).rsplit("--memory ", 1)[1].rstrip(".")
    budgets: list[Budget] = []
    LLM(tinystories, memory=f"{int(needed[:-3]) + 16}MiB", on_budget=budgets.append).close()
    assert budgets[0].kv > 0


def test_bad_options_name_the_choices(tinystories: Path) -> None:
    for options, words in (
        ({"policy": "lifo"}, "batch, fcfs"),
        ({"dtype": "int3"}, "float32, float16, bfloat16"),
        ({"on_overlong": "drop"}, "truncate-left"),
        ({"chunk": 0}, "chunk must be at least 1"),
    ):
        with pytest.raises(InvalidRequestError, match=words):
            LLM(tinystories, **options)  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_gives_the_same_tokens(tinystories: Path, llm: LLM) -> None:
    prompts = ["Once upon a time", "Once upon a hill", "The dog"]
    expected = [o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY)]
    with LLM(tinystories, kv_memory="8MiB", device="cuda") as gpu:
        assert [o.outputs[0].token_ids for o in gpu.generate(prompts, GREEDY)] == expected


def test_groups_and_stats_of_a_run(llm: LLM) -> None:
    """Every window tells its shared prefixes; stats count what is computed and what is held."""
    shared = "One day, Lily and Ben went to the park. They saw a big tree and a small bird. "
    pairs = [(shared + name, GREEDY) for name in ("Tom", "Max", "Lily", "Sam")]
    before = llm.stats
    windows: list[list[Group]] = []
    seen: list[Stats] = []
    llm.window, window = 2, llm.window
    try:
        found = list(llm.generate_iter(pairs, on_step=seen.append, on_groups=windows.append))
    finally:
        llm.window = window
    after = llm.stats
    lengths = [len(o.prompt_token_ids) for o in found]
    assert after.prompt_tokens - before.prompt_tokens == sum(lengths)
    outputs = sum(len(o.outputs[0].token_ids) for o in found)
    assert after.output_tokens - before.output_tokens == outputs
    assert after.decode_tokens - before.decode_tokens == outputs - len(pairs)
    asked = after.prompt_tokens - before.prompt_tokens
    saved = asked - (after.computed_tokens - before.computed_tokens)
    assert len(windows) >= 2
    assert sum(g.saved for groups in windows for g in groups) == saved > 0
    assert len({g.key for groups in windows for g in groups[:1]}) == 1
    assert max(s.kv_used_bytes for s in seen) > 0 == after.kv_used_bytes
    times = [s.step_seconds for s in seen]
    assert times == sorted(times)


def test_saved_tokens_are_not_counted_before_they_are_saved(llm: LLM) -> None:
    """Rows that were planned and not run save nothing."""
    shared = "One day, Lily and Ben went to the park. They saw a big tree and a small bird. " * 3
    before = llm.stats
    pairs = [(shared + str(i), GREEDY) for i in range(200)]
    results = llm.generate_iter(pairs)
    first = next(results)
    results.close()
    after = llm.stats
    asked = after.prompt_tokens - before.prompt_tokens
    assert len(first.prompt_token_ids) <= asked < 200 * len(first.prompt_token_ids) / 2


SHAPE = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{0,7}$"},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog"]}, "maxItems": 2},
    },
    "required": ["name", "age", "pets"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("model", ["stories", "demo"])
def test_structured_rows_among_others(tinystories: Path, model: str) -> None:
    """Valid outputs of real tokenizers; the other rows have the same tokens as without them.

    One model is in float32, the other in bfloat16 and deterministic mode.
    """
    pytest.importorskip("llguidance")
    prompts = ["Once upon a time", "Once upon a hill", "The dog"]
    free = SamplingParams(max_tokens=30, seed=3)
    bound = SamplingParams(max_tokens=120, n=3, seed=4, structure={"json_schema": SHAPE})  # type: ignore[arg-type]
    bad = SamplingParams(structure={"regex": "("})  # type: ignore[arg-type]
    folder = tinystories if model == "stories" else "demo"
    with LLM(folder, kv_memory="8MiB", deterministic=model == "demo") as llm:
        alone = [o.outputs[0].token_ids for o in llm.generate(prompts, free)]
        mixed = [(p, params) for p in prompts for params in (free, bound, bad)]
        found = llm.generate([p for p, _ in mixed], [params for _, params in mixed])
        assert [o.outputs[0].token_ids for o in found[::3]] == alone
        for output in found[1::3]:
            for sample in output.outputs:
                assert sample.finish_reason == "stop"
                jsonschema.validate(json.loads(sample.text), SHAPE)
        for output in found[2::3]:
            assert isinstance(output.error, InvalidRequestError)
            assert output.error.field == "response_format"
            assert not output.outputs


def test_a_folder_too_small_for_a_piece(tinystories: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="a piece of 256 tokens") as info:
        LLM(tinystories, kv_memory="8MiB", kv_dir=tmp_path, kv_disk="100KiB")
    assert info.value.field == "kv_disk"
