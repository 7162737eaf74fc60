"""What the rows of a run come to: scores with their standard errors, and what was published."""

from __future__ import annotations

import math
from typing import Any

from dsv2cli.evaluation.published import published
from dsv2cli.evaluation.record import Record, Row, unpacked
from dsv2cli.evaluation.statistics import Mean, mean, mean_of_blocks, mean_of_means


def summary(record: Record, model: str, tasks: dict[str, bool]) -> list[dict[str, Any]]:
    """An object a task, in this order; each is said to be scored by the mean of its subsets, or not."""
    source, scores = published(model)
    found = []
    for task, by_subset in tasks.items():
        rows = record.of_task(task)
        if not rows:
            continue
        if task == "perplexity":
            found.append({"task": task} | foreseen(rows))
            continue
        one = {"task": task} | scored(rows, by_subset)
        if task in scores:
            one |= {"published": scores[task] / 100, "published_model": source}
        found.append(one)
    return found


def counts(rows: list[Row]) -> dict[str, Any]:
    """Tokens that were read, reused and written, questions that could not be asked, and remarks."""
    names = ("prompt_tokens", "reused_tokens", "generated_tokens")
    return {name: sum(row.get(name, 0) for row in rows) for name in names} | {
        "errors": sum("error" in row for row in rows),
        "remarks": list(dict.fromkeys(row["remark"] for row in rows if "remark" in row)),
    }


def right(rows: list[Row]) -> list[float]:
    """1 or 0 for each that has been judged."""
    return [float(row["right"]) for row in rows if row.get("right") is not None]


def score(rows: list[Row], by_subset: bool) -> Mean | None:
    """None where nothing has been judged."""
    subsets = dict[str, list[Row]]()
    for row in rows:
        subsets.setdefault(row["subset"] if by_subset else "", []).append(row)
    means = [mean(values) for each in subsets.values() if (values := right(each))]
    return mean_of_means(means) if means else None


def scored(rows: list[Row], by_subset: bool) -> dict[str, Any]:
    """Of questions with right and wrong answers."""
    whole = score(rows, by_subset)
    subsets = dict.fromkeys(row["subset"] for row in rows)
    shots = [row["shots"] for row in rows if "shots" in row]
    return {
        "score": None if whole is None else whole.value,
        "standard_error": None if whole is None else whole.error,
        "questions": len(rows),
        "right": sum(row.get("right") is True for row in rows),
        "unjudged": sum(row.get("right") is None for row in rows),
        "shots": max(shots, default=None),
        "fewer_shots": sum(each < max(shots) for each in shots),
        "subsets": {
            name: {"score": one.value, "standard_error": one.error, "questions": one.count}
            for name in subsets
            if name and (one := score([row for row in rows if row["subset"] == name], False)) is not None
        },
    } | counts(rows)


def foreseen(rows: list[Row]) -> dict[str, Any]:
    """Of texts."""
    fine = [row for row in rows if "error" not in row]
    nats = [value for row in fine for value in unpacked("f", row["nats"])]
    size, whole = sum(row["bytes"] for row in fine), mean_of_blocks(nats) if nats else None
    return {
        "perplexity": None if whole is None else math.exp(min(whole.value, 700.0)),
        "nats_per_token": None if whole is None else whole.value,
        "standard_error": None if whole is None else whole.error,
        "bits_per_byte": math.fsum(nats) / math.log(2) / size if size else None,
        "tokens": len(nats),
        "windows": len(fine),
    } | counts(rows)
