"""Prometheus metrics of a running job. Needs the ``metrics`` extra (prometheus-client).

Nothing happens in the step loop: the figures are read from the recorder when they are asked for,
in the server's own thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from quire.errors import InvalidRequestError
from quire.jobs.recorder import STEP_SECONDS, Recorder

LOCAL = "127.0.0.1"


class JobCollector(Collector):
    """Makes metrics of a recorder's state."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def collect(self) -> Iterator[Metric]:
        """All metrics, as they stand."""
        recorder, stats = self._recorder, self._recorder.stats
        rows = CounterMetricFamily(
            "quire_rows_finished", "Rows finished by this run, by result.", labels=["result"]
        )
        rows.add_metric(["ok"], recorder.rows_ok)
        rows.add_metric(["failed"], recorder.failures.count)
        yield rows
        if recorder.rows_total is not None:
            yield GaugeMetricFamily(
                "quire_rows_expected",
                "Rows of this run's input; absent until it is read to its end.",
                recorder.rows_total,
            )
        yield GaugeMetricFamily(
            "quire_rows_finished_before",
            "Rows that earlier runs of this job finished.",
            recorder.rows_before,
        )
        for name, text, value in (
            (
                "quire_prompt_tokens",
                "Prompt tokens of all samples that have an output, as if nothing were shared.",
                stats.prompt_tokens,
            ),
            (
                "quire_prompt_tokens_computed",
                "Prompt tokens computed, recomputation included.",
                stats.computed_tokens,
            ),
            (
                "quire_tokens_recomputed",
                "Tokens computed again after preemption.",
                stats.recomputed_tokens,
            ),
            ("quire_output_tokens", "Output tokens sampled.", stats.output_tokens),
            ("quire_preemptions", "Sequences that gave up their KV.", stats.preemptions),
        ):
            yield CounterMetricFamily(name, text, value)
        for name, text, value in (
            (
                "quire_prompt_tokens_saved",
                "Prompt tokens that sharing saved so far; falls when tokens are recomputed.",
                stats.saved_tokens,
            ),
            ("quire_sequences_running", "Sequences that are running.", stats.running),
            ("quire_sequences_waiting", "Sequences that wait.", stats.waiting),
            ("quire_kv_used_bytes", "KV memory in use.", stats.kv_used_bytes),
            ("quire_kv_limit_bytes", "KV memory of the pool.", stats.kv_bytes),
        ):
            yield GaugeMetricFamily(name, text, value)
        times = recorder.step_times
        bounds = [*map(str, STEP_SECONDS), "+Inf"]
        yield HistogramMetricFamily(
            "quire_step_duration_seconds",
            "Time of a step.",
            buckets=list(zip(bounds, accumulate(times.counts), strict=True)),
            sum_value=times.sum,
        )


def parse_address(text: str) -> tuple[str, int]:
    """``PORT`` (of this machine alone) or ``HOST:PORT``. Raises InvalidRequestError."""
    host, _, port = text.rpartition(":")
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise InvalidRequestError(
            f"--metrics-port is {text!r}.",
            field="metrics-port",
            value=text,
            action="Give a port, such as 9400, or HOST:PORT, such as 0.0.0.0:9400.",
        )
    return host.strip("[]") or LOCAL, int(port)


@contextmanager
def serve_metrics(address: str, recorder: Recorder) -> Iterator[int]:
    """Answer ``GET /metrics`` at ``address`` until the block ends; yields the port.

    Port 0 takes a free one. Raises InvalidRequestError if the address cannot be used.
    """
    host, port = parse_address(address)
    registry = CollectorRegistry()
    registry.register(JobCollector(recorder))
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise InvalidRequestError(
            f"--metrics-port: nothing can listen at {host}:{port}: {error.strerror or error}.",
            field="metrics-port",
            value=address,
            action="Give another port.",
        ) from error
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
