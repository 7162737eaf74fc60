"""What `dsv2 bench --concurrency` takes and shows: a model that many ask at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from dsv2cli.cli.figures import digits, numbers, ranged
from dsv2cli.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from dsv2cli.engine.traffic import Traffic

COLUMNS = ("at once", "prompt", "new", "tok/s", "requests/s", "first token s", "ms a token", "hits", "pages")


@dataclass(frozen=True)
class Many:
    """How they come."""

    heading = "Many who ask at once"

    concurrency: Annotated[
        str | None,
        Option(
            metavar="N",
            help="Requests that run at once, each in its own time, instead of --batch; lists and ranges.",
        ),
    ] = None
    requests: Annotated[
        int | None, Option(min=1, help="Requests in all. Default: four times --concurrency.")
    ] = None
    rate: Annotated[
        float | None,
        Option(help="Requests a second that arrive, at random moments. Default: each as another ends."),
    ] = None
    shared_prefix: Annotated[
        float, Option(min=0.0, max=1.0, help="Share of each prompt that is the same in all, from 0 to 1.")
    ] = 0.0

    def traffics(self, prompts: list[int], generate: list[int]) -> list[Traffic]:
        """Every combination. Raises UsageError for what can not be read."""
        if self.concurrency is None:
            for option, given in (
                ("--requests", self.requests is not None),
                ("--rate", self.rate is not None),
                ("--shared-prefix", self.shared_prefix > 0),
            ):
                if given:
                    raise UsageError(f"{option} is for --concurrency", fix="--concurrency 8, or leave it out")
            return []
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise UsageError(f"--rate {self.rate:g} can not be used", why="it is a number above 0")

        from dsv2cli.engine.traffic import Traffic

        return [
            Traffic(width, length, new, self.requests or 4 * width, self.rate, self.shared_prefix)
            for width in numbers("--concurrency", self.concurrency, 1)
            for length in prompts
            for new in generate
        ]


def cells(run: dict[str, Any]) -> list[str]:
    """One row; first token and time between tokens as p50/p90/p99."""
    first = "/".join(digits(run["ttft_seconds"][key]) for key in ("p50", "p90", "p99"))
    gaps = "/".join(digits(1000 * run["itl_seconds"][key]) for key in ("p50", "p90", "p99"))
    return [
        *(str(run[key]) for key in ("concurrency", "prompt_tokens", "generated_tokens")),
        ranged(run["output_tokens_per_second"]),
        ranged(run["requests_per_second"]),
        first,
        gaps,
        "" if run["hit_rate"] is None else f"{run['hit_rate']:.0%}",
        "" if run["pages_used"] is None else str(run["pages_used"]),
    ]


def label(run: dict[str, Any]) -> str:
    """What was measured, with what is not plain."""
    rate = "" if run["rate"] is None else f", {run['rate']:g} a second"
    cache = "" if run["cache"] == "auto" else f", {run['cache']} cache"
    shared = f", {run['shared_prefix']:.0%} shared" if run["shared_prefix"] else ""
    first = f"{run['requests']} requests, {run['concurrency']} at once{rate}"
    return f"{first}, prompt {run['prompt_tokens']}{shared}, {run['generated_tokens']} new{cache}"


def remarks(console: Console, runs: list[dict[str, Any]]) -> None:
    """What stands in no column."""
    for run in runs:
        total = f"{ranged(run['total_tokens_per_second'])} tok/s with those of the prompts"
        pages = "" if run["pages"] is None else f", {run['pages_used']:,} of {run['pages']:,} pages"
        left = f", {run['preempted']} times a request had to leave its pages" if run["preempted"] else ""
        console.print(f"{label(run)}: {total}{pages}{left}")
