"""``quire run`` as users start it, in a process of its own."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.slow  # each runs the command as a process


FAST = ["--threads", "1", "--kv-memory", "32MiB", "--max-tokens", "8", "--temperature", "0"]


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "quire", *map(str, words)]


def quire(*words: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*words), input=stdin, capture_output=True, text=True, timeout=300, check=False
    )


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, records: list[object]) -> Path:
    text = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("".join(line + "\n" for line in text))
    return path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, object]:
    """A file with good and bad lines, run once."""
    folder = tmp_path_factory.mktemp("mixed")
    source = write(
        folder / "in.jsonl",
        [
            {"custom_id": "first", "prompt": "The king and the queen", "n": 2},
            "{broken",
            "",
            {
                "url": "/v1/chat/completions",
                "body": {"messages": [{"role": "user", "content": "Hi"}]},
            },
            {"prompt": "word " * 3000},
            {"prompt": ""},
            {"prompt": "The king and the queen", "logprobs": 1, "prompt_logprobs": 0},
            {"prompt": "x", "model": "other"},
            {"prompt_token_ids": [10, 99999]},
        ],
    )
    stats = folder / "stats.json"
    done = quire("run", source, "-o", folder / "out.jsonl", "--stats", stats, *FAST)
    return folder / "out.jsonl", stats, done


def test_bad_rows_do_not_take_the_good_ones(mixed: tuple[Path, Path, object]) -> None:
    out, _, done = mixed
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    rows = lines(out)
    assert [r["error"] is None for r in rows] == [
        True, False, True, False, False, True, False, False,
    ]  # fmt: skip
    assert [r["error"]["line"] for r in rows if r["error"]] == [2, 5, 6, 8, 9]
    assert [r["error"]["field"] for r in rows if r["error"]] == [
        None, "prompt", "prompt", "model", "prompt_token_ids",
    ]  # fmt: skip
    assert "the context holds 2304" in rows[3]["error"]["message"]


def test_results_have_the_openai_form(mixed: tuple[Path, Path, object]) -> None:
    rows = lines(mixed[0])
    first = rows[0]["response"]["body"]
    assert rows[0]["custom_id"] == "first"
    assert first["object"] == "text_completion"
    assert [c["index"] for c in first["choices"]] == [0, 1]
    assert first["choices"][0]["text"] == first["choices"][1]["text"] != ""
    usage = first["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    cached = [
        r["response"]["body"]["usage"]["prompt_tokens_details"]["cached_tokens"]
        for r in rows
        if r["response"]
    ]
    assert len(cached) == 3
    chat = rows[2]["response"]["body"]
    assert chat["object"] == "chat.completion"
    assert chat["choices"][0]["message"]["role"] == "assistant"
    scored = rows[5]["response"]["body"]
    assert len(scored["prompt_logprobs"]) == scored["usage"]["prompt_tokens"] - 1
    assert len(scored["choices"][0]["logprobs"]["tokens"]) == scored["usage"]["completion_tokens"]


def test_summary_and_stats(mixed: tuple[Path, Path, object]) -> None:
    _, stats, done = mixed
    found = json.loads(stats.read_text())
    assert (found["rows_ok"], found["rows_failed"]) == (3, 5)
    assert found["computed_tokens"] + found["saved_tokens"] == found["prompt_tokens"]
    for words in ("weights", "workspace", "3 ok, 5 failed", "saved by sharing", "KV peak"):
        assert words in done.stderr


def test_standard_streams_and_completion_order() -> None:
    text = '{"id": "a", "prompt": "One"}\n{"id": "b", "prompt": "Two"}\n'
    done = quire("run", "-", "--order", "completion", *FAST, stdin=text)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line)["custom_id"] for line in done.stdout.splitlines()]
    assert sorted(found) == ["a", "b"]


def test_policies_write_the_same_rows(tmp_path: Path) -> None:
    source = write(
        tmp_path / "in.jsonl",
        [
            {"prompt": f"A long story of {i % 3} and then {i}", "temperature": 0.7}
            for i in range(12)
        ],
    )
    texts = []
    for name in ("batch", "fcfs"):
        out = tmp_path / f"{name}.jsonl"
        options = ["--policy", name, "--dtype", "float32", "--chunk", 16]
        assert quire("run", source, "-o", out, *FAST, *options).returncode == 0
        texts.append([r["response"]["body"]["choices"][0]["text"] for r in lines(out)])
    assert texts[0] == texts[1]


def test_csv_with_template(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text('name,place\nAnna,"a, town"\nBob\nCleo,sea\n')
    (tmp_path / "t.txt").write_text("{{ name }} lived by {{ place }}.")
    out = tmp_path / "out.jsonl"
    done = quire("run", tmp_path / "in.csv", "-o", out, "--template", tmp_path / "t.txt", *FAST)
    assert done.returncode == 1, done.stderr
    rows = lines(out)
    assert [r["error"] is None for r in rows] == [True, False, True]
    assert rows[1]["error"]["line"] == 3


def test_a_folder_of_several_formats_to_parquet(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "a.jsonl", [{"name": "Anna", "id": 5}, "{broken", {"name": "\ud800", "id": 6}])
    (folder / "b.csv").write_text('name,text\nBob,"own, text"\n')
    table = pa.table({"name": ["Cleo", None], "score": [0.5, 1.5]})
    pq.write_table(table, folder / "c.parquet")
    data = gzip.compress(b'{"name": "Dora"}\n' * 9)
    (folder / "d.jsonl.gz").write_bytes(data[:-9])
    out = tmp_path / "out.parquet"
    template = "{{ name }} lived by {% if name %}the sea{% endif %}"
    done = quire("run", folder, "-o", out, "--template", template, *FAST)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    rows = pq.read_table(out).to_pylist()
    assert [row["name"] for row in rows] == [
        "Anna", None, "\ufffd", "Bob", "Cleo", None, *["Dora"] * 9, None,
    ]  # fmt: skip
    assert [n for n, row in enumerate(rows) if row["error"]] == [1, 2, 15]
    assert "surrogate" in rows[2]["error"]
    assert "d.jsonl.gz is damaged after line 9" in rows[15]["error"]
    assert [row["custom_id"] for row in rows[:5]] == ["5", None, "6", "b.csv:2", "c.parquet:1"]
    assert [row["score"] for row in rows[3:6]] == [None, 0.5, 1.5]
    assert rows[3]["input_text"] == "own, text"
    assert all(row["text"] for row in rows if not row["error"])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"in", "out.parquet", "out.parquet.journal", "out.parquet.journal.lock"}


def test_several_files_and_standard_output(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", [{"prompt": "One", "n": 2}, {"prompt": 1}])
    two = write(tmp_path / "b.jsonl", [{"prompt": "Two", "custom_id": "\ud800"}])
    done = quire("run", one, two, *FAST)
    assert done.returncode == 1, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["custom_id"] for row in found] == ["a.jsonl:1", "a.jsonl:2", "\ud800"]
    assert (found[1]["error"]["file"], found[1]["error"]["line"]) == (str(one), 2)


def test_dry_run_plans_only(tmp_path: Path) -> None:
    shared = "The same beginning of every prompt, again and again. " * 4
    source = write(tmp_path / "in.jsonl", [{"prompt": shared + str(i)} for i in range(20)])
    done = quire("run", source, "--dry-run", *FAST)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "20 good, 0 bad" in done.stderr
    assert "saved" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing.jsonl"], "cannot be read"),
        (["in.jsonl", "--model", "nowhere"], "no checkpoint folder nowhere"),
        (["in.jsonl", "--memory", "lots"], "'lots' is not a size"),
        (["in.jsonl", "--memory", "50MiB"], "Ask for at least --memory"),
        (["in.jsonl", "--memory", "9000GiB"], "Ask for at most --memory"),
        (["in.jsonl", "--temperature", "-1"], "temperature is -1.0"),
        (["in.jsonl", "--kv", "kivy"], "'kivy' is not a KV method"),
        (["in.jsonl", "--kv", "kivy", "--dry-run"], "'kivy' is not a KV method"),
        (["in.jsonl", "--kv", "gemfilter(layer=99)", "--dry-run"], "the model has 6 layers"),
        (["in.csv"], "no column prompt; its columns are 'a'"),
        (["in.gz"], "in.gz cannot be read: the gzip data is cut off"),
        (["in.csv", "--template", "no.txt"], "template no.txt cannot be read"),
        (["in.csv", "--template", "{{ a"], "template cannot be used"),
        (["*.parquet"], "no such file"),
        (["-", "-o", "out.parquet"], "standard input has none"),
        (["in.jsonl", "-o", "there/out.jsonl"], "cannot be written"),
        (["in.jsonl", "-o", "in.jsonl"], "would replace the input"),
        (["in.jsonl", "-o", "in.csv"], "exists already"),
        (["in.jsonl", "--journal", "in.csv"], "is damaged: file is not a database"),
        (["in.jsonl", "-o", "there/out.parquet"], "cannot be written"),
        (["long.jsonl", "--on-overlong", "fail"], "the context holds"),
        (["in.jsonl", "-o", "/dev/full"], "No space left on device"),
    ],
)
def test_unusable_input_is_status_two(tmp_path: Path, words: list[str], message: str) -> None:
    write(tmp_path / "in.jsonl", [{"prompt": "x"}])
    write(tmp_path / "long.jsonl", [{"prompt": "word " * 3000}])
    (tmp_path / "in.csv").write_text("a\n1\n")
    (tmp_path / "in.gz").write_bytes(b"\x1f\x8b\x08\x00\x81\x82\n")
    done = subprocess.run(
        command("run", *words), capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_warnings_are_for_people(tmp_path: Path) -> None:
    """KV that cannot be read: a line without the place in the code that found it."""
    prompt = "The same beginning of every prompt, again and again. " * 8
    source = write(tmp_path / "in.jsonl", [{"prompt": prompt + str(i)} for i in range(2)])
    words = ("run", source, "--kv-dir", tmp_path / "kv", *FAST)
    quire(*words, "-o", tmp_path / "a.jsonl")
    for piece in (tmp_path / "kv").glob("*/*.kv"):
        piece.unlink()
        piece.mkdir()
    done = quire(*words, "-o", tmp_path / "b.jsonl")
    assert done.returncode == 0, done.stderr
    assert "cannot be read: [Errno 21]" in done.stderr
    assert "UserWarning" not in done.stderr


@pytest.mark.parametrize("how", ["truncate-left", "truncate-right"])
def test_overlong_prompts_are_cut(tmp_path: Path, how: str) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": "word " * 3000}])
    out = tmp_path / "out.jsonl"
    done = quire("run", source, "-o", out, "--on-overlong", how, *FAST)
    assert done.returncode == 0, done.stderr
    assert lines(out)[0]["response"]["body"]["usage"]["prompt_tokens"] == 2304 - 8


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n\n")
    done = quire("run", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", *FAST)
    assert done.returncode == 0
    assert "has no rows" in done.stderr
    assert (tmp_path / "out.jsonl").read_text() == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupt_writes_what_is_finished(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": f"Chapter {i}", "max_tokens": 4 + 40 * (i % 2)} for i in range(3000)]
    source = write(tmp_path / "in.jsonl", rows)
    out = tmp_path / "out.jsonl"
    process = subprocess.Popen(
        command("run", source, "-o", out, "--order", "completion", *FAST),
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # also under nohup
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not out.exists() or out.stat().st_size < 2000):
        time.sleep(0.1)
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Interrupted: the same command goes on from here" in errors
    assert "Traceback" not in errors
    assert 0 < len(lines(out)) < 3000


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Ten times the rows, window by window, take hardly more memory."""
    peaks = []
    for count in (400, 4000):
        rows = [{"prompt": f"{i} was a number", "max_tokens": 2} for i in range(count)]
        source = write(tmp_path / f"{count}.jsonl", rows)
        stats = tmp_path / f"{count}.json"
        options = ["--window", 200, "--stats", stats, "--max-tokens", 2]
        done = quire("run", source, "-o", tmp_path / f"{count}.out", *FAST, *options)
        assert done.returncode == 0, done.stderr
        peaks.append(json.loads(stats.read_text())["peak_rss_bytes"])
    assert peaks[1] < peaks[0] + (24 << 20)


def test_structures_of_flags_and_rows(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    shaped = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    bad = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"not": {}}}}
    (tmp_path / "schema.json").write_text(json.dumps({"enum": ["tea", "coffee"]}))
    source = write(
        tmp_path / "in.jsonl",
        [
            {"prompt": "I drink"},
            {"prompt": "I drink", "response_format": {"type": "text"}},
            {"prompt": "I count", "response_format": shaped, "max_tokens": 40, "n": 2},
            {"prompt": "I count", "response_format": bad},
            {"prompt": "I count", "regex": "("},
            {"prompt": "I count", "regex": "[0-9]{2}"},
            {"prompt": "I count", "grammar": 'start: "one" | "two"'},
        ],
    )
    out = tmp_path / "out.jsonl"
    done = quire("run", source, "-o", out, "--schema", tmp_path / "schema.json", *FAST)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    rows = lines(out)
    errors = [r["error"] for r in rows]
    assert [e["line"] for e in errors if e] == [4, 5]
    assert [e["field"] for e in errors if e] == ["response_format"] * 2
    assert "not" in errors[3]["message"]
    choices = [r["response"]["body"]["choices"] if r["response"] else [] for r in rows]
    assert choices[0][0]["text"] in ('"tea"', '"coffee"')
    assert choices[0][0]["finish_reason"] == "stop"
    assert choices[1][0]["text"] not in ('"tea"', '"coffee"')
    for choice in choices[2]:
        assert choice["finish_reason"] == "length" or "n" in json.loads(choice["text"])
    assert len(choices[5][0]["text"]) == 2
    assert choices[6][0]["text"] in ("one", "two")


def test_structures_of_flags_are_one_at_most(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": "x"}])
    for words, message in (
        (["--regex", "a", "--choice", "b"], "exactly one of"),
        (["--schema", "nowhere.json"], "nowhere.json cannot be read"),
        (["--grammar", "nowhere.lark"], "nowhere.lark cannot be read"),
        (["--regex", ""], "not empty"),
    ):
        done = quire("run", source, *words, *FAST)
        assert done.returncode == 2
        assert message in done.stderr
