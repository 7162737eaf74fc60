"""How the result of `dsv2 eval` is shown: a table, Markdown, a picture, and sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsv2cli.evaluation.chart import Bar, Group, chart
from dsv2cli.evaluation.statistics import Mean
from dsv2cli.evaluation.verdict import sentence

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = ("task", "score", "questions", "shots", "published")


def filled(facts: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The names of the columns that hold something, and the rows."""
    rows = [row_of(one) for one in facts["results"]]
    used = [i for i in range(len(COLUMNS)) if any(row[i] for row in rows)]
    return [COLUMNS[i] for i in used], [[row[i] for i in used] for row in rows]


def row_of(one: dict[str, Any]) -> tuple[str, ...]:
    """A task's cells."""
    if "perplexity" in one:
        return one["task"], figure(one), f"{one['tokens']:,} tokens", "", ""
    shots = "" if one["shots"] is None else str(one["shots"])
    published = f"{one['published']:.1%}" if "published" in one else ""
    return one["task"], figure(one), f"{one['questions']:,}", shots, published


def figure(one: dict[str, Any]) -> str:
    """The score, or the perplexity, with its standard error."""
    if "perplexity" in one:
        if one["perplexity"] is None:
            return "none"
        error = one["standard_error"]
        spread = "" if error is None else f" \u00b1 {one['perplexity'] * error:.2g}"
        return f"perplexity {one['perplexity']:.4g}{spread}"
    if one["score"] is None:
        return "not judged"
    return str(Mean(one["score"], one["standard_error"], one["questions"]))


def title(facts: dict[str, Any]) -> str:
    cache = "" if facts["cache"] == "auto" else f", {facts['cache']} cache"
    return f"{facts['model']}, {facts['weights']}{cache}, {facts['device']}, {facts['kernels']}"


def remarks(facts: dict[str, Any]) -> list[str]:
    """What belongs to the table, a sentence each."""
    said = []
    for one in facts["results"]:
        said += remarks_on(one)
    results = facts["results"]
    read, reused, written = (
        sum(one[name] for one in results) for name in ("prompt_tokens", "reused_tokens", "generated_tokens")
    )
    said.append(
        f"{read:,} tokens of prompts: {read - reused:,} computed, and {reused:,} of what questions have in "
        f"common, which is read once; {written:,} tokens written"
    )
    sources = sorted({one["published_model"] for one in results if "published_model" in one})
    if sources:
        settings = facts["settings"]
        own = settings["shots"] is not None or settings["chat"]
        other = "; this run has a setting of its own" if own else ""
        said.append(f"published: of {', '.join(sources)}, arXiv 2405.04434{other}")
    return said


def remarks_on(one: dict[str, Any]) -> list[str]:
    if "perplexity" in one:
        if one["bits_per_byte"] is None:
            return []
        return [
            f"{one['task']}: {one['nats_per_token']:.4f} nats a token, {one['bits_per_byte']:.4f} bits a byte"
        ]
    said = [f"{one['task']}: {remark}" for remark in one["remarks"]]
    if one["unjudged"]:
        said.append(
            f"{one['task']}: {one['unjudged']:,} programs were not run; with --run-code they are, in a box "
            "without network"
        )
    if one["fewer_shots"]:
        said.append(
            f"{one['task']}: {one['fewer_shots']:,} questions had fewer examples, for want of context"
        )
    return said


def show(console: Console, facts: dict[str, Any]) -> None:
    """The table, and below it what it does not say."""
    from rich.table import Table

    console.print(title(facts))
    table = Table(box=None, pad_edge=False)
    names, rows = filled(facts)
    for name in names:
        table.add_column(name, justify="left" if name == "task" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for line in [*remarks(facts), *verdict_lines(facts)]:
        console.print(line)


def verdict_lines(facts: dict[str, Any]) -> list[str]:
    """What two runs say of each other, where there are two."""
    if "verdict" not in facts:
        return []
    lines = [f"against {title(facts['against'])}"]
    for one in facts["verdict"]:
        lines.append(f"{one['task']}: {sentence(one)}")
        told = []
        if "kl" in one:
            error = "" if one["kl_error"] is None else f" \u00b1 {one['kl_error']:.2g}"
            told.append(f"KL {one['kl']:.4g}{error} nats a token, over {one['kl_places']:,}")
        if "top1_agreement" in one:
            told.append(f"the same likeliest token in {one['top1_agreement']:.2%}")
        if told:
            lines.append(f"{one['task']}: {'; '.join(told)}")
        if one["others"]:
            lines.append(
                f"{one['task']}: {one['others']:,} questions differ between the runs, and are left out"
            )
    return lines


def markdown(facts: dict[str, Any]) -> str:
    """The same for a page."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"

    names, rows = filled(facts)
    said = "".join(f"- {each}\n" for each in [*remarks(facts), *verdict_lines(facts)])
    ruler = "| --- |" + " ---: |" * (len(names) - 1) + "\n"
    return f"{title(facts)}\n\n{line(names)}{ruler}{''.join(map(line, rows))}\n{said}"


def picture(facts: dict[str, Any]) -> str:
    """Bars of the scores, and of those they are compared with; of texts the share of places where both runs
    hold the same token for the likeliest. An SVG file's text.
    """
    against = {one["task"]: one for one in facts.get("verdict", ())}
    groups = []
    for one in facts["results"]:
        other = against.get(one["task"], {})
        bars = list[Bar]()
        if one.get("score") is not None:
            bars.append(Bar(one["score"], one["standard_error"], figure(one)))
        if other.get("questions"):
            bars = [Bar(other["score"], one["standard_error"], f"{other['score']:.1%}")]
            bars.append(Bar(other["against_score"], None, f"{other['against_score']:.1%}"))
        if "perplexity" in one and "top1_agreement" in other:
            agreement = other["top1_agreement"]
            bars = [Bar(agreement, None, f"{agreement:.2%} the same likeliest token")]
        remark = sentence(other) if other else figure(one) if "perplexity" in one else ""
        if "kl" in other:
            remark = f"KL {other['kl']:.4g} nats a token; {remark}"
        groups.append(Group(one["task"], tuple(bars), remark))
    legend = [title(facts)] + ([title(facts["against"])] if "against" in facts else [])
    return chart("dsv2 eval", legend, groups)
