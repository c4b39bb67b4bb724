"""Metrics over HTTP, of a real job."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from quire import LLM, SamplingParams
from quire.errors import InvalidRequestError
from quire.jobs.job import Job
from quire.jobs.metrics import JobCollector, parse_address, serve_metrics
from quire.jobs.progress import Lines
from quire.jobs.recorder import STEP_SECONDS, Recorder
from quire.jobs.run import run_job


def scrape(port: int) -> dict[str, float]:
    """All samples; labels are part of the name."""
    with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = "".join(f"{{{k}={v}}}" for k, v in sample.labels.items())
            found[sample.name + labels] = sample.value
    return found


def test_a_job_is_scraped(tinystories: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    shared = "One day, Lily and Ben went to the park. They saw a big tree and a small bird. " * 2
    rows = [json.dumps({"prompt": f"{shared}{name}"}) for name in ("Tom", "Max", "Lily", "Sam")]
    source.write_text("\n".join([*rows, "{", '{"prompt": 5}']))
    recorder = Recorder()
    job = Job((str(source),), str(tmp_path / "out.jsonl"), SamplingParams(max_tokens=6))
    with serve_metrics("0", recorder) as port:
        before = scrape(port)
        with open(tmp_path / "log", "w") as log:
            summary = run_job(
                job,
                lambda: LLM(tinystories, kv_memory="8MiB"),
                view=Lines(log, 0.0),
                say=print,
                recorder=recorder,
            )
        found = scrape(port)
    assert before["quire_rows_finished_total{result=ok}"] == 0
    assert "quire_rows_expected" not in before
    assert found["quire_rows_finished_total{result=ok}"] == summary.rows_ok == 4
    assert found["quire_rows_finished_total{result=failed}"] == summary.rows_failed == 2
    assert found["quire_rows_expected"] == 6
    assert found["quire_prompt_tokens_total"] == summary.prompt_tokens
    assert found["quire_prompt_tokens_computed_total"] == summary.computed_tokens
    assert found["quire_prompt_tokens_saved"] == summary.saved_tokens > 0
    assert found["quire_output_tokens_total"] == summary.output_tokens
    assert found["quire_preemptions_total"] == summary.preemptions
    assert found["quire_kv_limit_bytes"] == summary.kv_bytes
    assert found["quire_kv_used_bytes"] == 0
    assert found["quire_sequences_running"] == found["quire_sequences_waiting"] == 0
    assert found["quire_step_duration_seconds_count"] == summary.steps
    assert 0 < found["quire_step_duration_seconds_sum"] <= summary.seconds
    counts = [found[f"quire_step_duration_seconds_bucket{{le={b}}}"] for b in STEP_SECONDS]
    assert counts == sorted(counts)
    with pytest.raises(OSError, match="refused"):
        scrape(port)


def test_names_follow_the_conventions() -> None:
    for family in JobCollector(Recorder()).collect():
        assert family.name.startswith("quire_")
        assert family.documentation
        assert not family.name.endswith("_total"), "the exposition adds it to counters"
        if "bytes" in family.name or "seconds" in family.name:
            assert family.name.endswith(("_bytes", "_seconds")), "the unit comes last"


def test_a_taken_port_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(InvalidRequestError, match=f"nothing can listen at 127.0.0.1:{port}"),
            serve_metrics(str(port), Recorder()),
        ):
            pass


@pytest.mark.parametrize(
    ("text", "address"),
    [("9400", ("127.0.0.1", 9400)), ("0.0.0.0:1", ("0.0.0.0", 1)), ("[::1]:80", ("::1", 80))],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "port", "host:", "99999", "-1", "1:²"])
def test_bad_addresses(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="HOST:PORT"):
        parse_address(text)


def test_the_page_lists_them_all() -> None:
    page = Path(__file__).parents[2] / "docs" / "report.md"
    listed = set(re.findall(r"`(quire_\w+)", page.read_text(encoding="utf-8")))
    recorder = Recorder()
    recorder.rows_total = 1
    families = list(JobCollector(recorder).collect())
    assert listed == {f.name + ("_total" if f.type == "counter" else "") for f in families}
