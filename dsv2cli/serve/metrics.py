"""What has happened and what is going on, as Prometheus collects it."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from dsv2cli.serve.desk import Desk


class Meter:
    """The numbers of one desk at the moment they are asked for."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def collect(self) -> Iterator[Metric]:
        counts, scheduler = self.desk.counts, self.desk.scheduler
        running = len(scheduler.active)
        for name, about, value in (
            ("requests", "requests that were taken", counts.requests),
            ("requests_refused", "requests for which there was no room", counts.refused),
            ("prompt_tokens", "tokens of prompts", counts.prompt_tokens),
            ("prompt_tokens_cached", "of these, found in the cache", counts.reused_tokens),
            ("generated_tokens", "tokens of answers", counts.generated_tokens),
            ("preemptions", "times that a request had to leave its pages to others", scheduler.preempted),
        ):
            yield CounterMetricFamily(f"dsv2_{name}", about, value)
        for name, about, value in (
            ("requests_running", "answers that are being made", running),
            ("requests_waiting", "answers that are to be made", max(0, self.desk.held - running)),
            ("cache_pages_used", "pages of the cache in use", sum(book.held for book in scheduler.books)),
            ("cache_pages", "pages of the cache", sum(book.count for book in scheduler.books)),
        ):
            yield GaugeMetricFamily(f"dsv2_{name}", about, value)
