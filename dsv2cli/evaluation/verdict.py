"""What two runs over the same questions say of each other.

Of texts: the divergence of one distribution from the other (KL, in nats a token), how often both hold the
same token for the likeliest, and the ratio of their perplexities. Of questions: those that only one of both
answered rightly, and McNemar's test.
"""

from __future__ import annotations

import math
from typing import Any

from dsv2cli.errors import UsageError
from dsv2cli.evaluation.record import Record, Row, unpacked
from dsv2cli.evaluation.statistics import Flips, Mean, mean, mean_of_blocks

LEAST = 1e-12  # probability that a tail is taken for, at least
SIGNIFICANT = 0.05


def verdict(now: Record, then: Record) -> list[dict[str, Any]]:
    """An object for each task of both. Raises UsageError where they have no question in common."""
    found = []
    for task in dict.fromkeys(row["task"] for row in now.rows.values()):
        pairs = [(row, then.rows[row["key"]]) for row in now.of_task(task) if row["key"] in then.rows]
        same = [(a, b) for a, b in pairs if a.get("digest") == b.get("digest")]
        fine = [(a, b) for a, b in same if "error" not in a and "error" not in b]
        if not fine:
            continue
        kind = foreseen if "nats" in fine[0][0] else answered
        one = {"task": task, "others": len(pairs) - len(same)}
        found.append(one | kind(fine) | diverged(fine))
    if not found:
        why = "no question of one is in the other"
        raise UsageError("The two runs can not be compared", why=why, fix="the same tasks, data and --limit")
    return found


def answered(pairs: list[tuple[Row, Row]]) -> dict[str, Any]:
    """Of questions that are right or wrong."""
    both = [(a.get("right"), b.get("right")) for a, b in pairs]
    judged = [(a, b) for a, b in both if a is not None and b is not None]
    if not judged:
        return {"questions": 0}
    flips = Flips(sum(a and not b for a, b in judged), sum(b and not a for a, b in judged), len(judged))
    difference = mean([float(a) - float(b) for a, b in judged])
    return {
        "questions": len(judged),
        "score": sum(a for a, _ in judged) / len(judged),
        "against_score": sum(b for _, b in judged) / len(judged),
        "difference": difference.value,
        "difference_error": difference.error,
        "won": flips.won,
        "lost": flips.lost,
        "p": flips.p,
    }


def foreseen(pairs: list[tuple[Row, Row]]) -> dict[str, Any]:
    """Of texts."""
    ours, theirs, same = list[float](), list[float](), list[bool]()
    for a, b in pairs:
        ours += unpacked("f", a["nats"])
        theirs += unpacked("f", b["nats"])
        if len(ours) != len(theirs):
            raise UsageError("The two runs can not be compared", why="a window has other tokens in each")
        same += [x == y for x, y in zip(unpacked("i", a["top"]), unpacked("i", b["top"]), strict=True)]
    difference = mean_of_blocks([x - y for x, y in zip(ours, theirs, strict=True)])
    ratio = math.exp(difference.value)
    differs = None if difference.reach is None else abs(difference.value) > difference.reach
    return {
        "tokens": len(ours),
        "differs": differs,
        "top1_agreement": sum(same) / len(same),
        "perplexity": math.exp(min(mean(ours).value, 700.0)),
        "against_perplexity": math.exp(min(mean(theirs).value, 700.0)),
        "perplexity_ratio": ratio,
        "perplexity_ratio_error": None if difference.error is None else ratio * difference.error,
    }


def diverged(pairs: list[tuple[Row, Row]]) -> dict[str, Any]:
    """KL of what is new from what was before, where both have kept distributions; and how often the likeliest
    first token of an answer is the same.
    """
    values, tops = list[float](), list[bool]()
    for a, b in pairs:
        if a.get("kept_places") == b.get("kept_places") and "kept" in a and "kept" in b:
            values += [divergence(x, y) for x, y in zip(b["kept"], a["kept"], strict=True)]
        if isinstance(a.get("top"), int) and isinstance(b.get("top"), int):
            tops.append(a["top"] == b["top"])
    found: dict[str, Any] = {}
    if values:
        whole = mean_of_blocks(values)
        found |= {"kl": whole.value, "kl_error": whole.error, "kl_places": whole.count}
    if tops:
        found["top1_agreement"] = sum(tops) / len(tops)
    return found


def divergence(reference: list[str], other: list[str]) -> float:
    """KL(reference || other) in nats of two kept distributions, each without its tail.

    Tokens that not both have kept are taken together as one outcome: what comes out is never more than the
    whole divergence, and less by what the tails of 0.1% could tell.
    """
    ours, theirs = table(reference), table(other)
    both = ours.keys() & theirs.keys()
    total = math.fsum(math.exp(ours[token]) * (ours[token] - theirs[token]) for token in both)
    left = max(LEAST, 1 - math.fsum(math.exp(ours[token]) for token in both))
    right = max(LEAST, 1 - math.fsum(math.exp(theirs[token]) for token in both))
    return max(0.0, total + left * math.log(left / right))


def table(kept: list[str]) -> dict[int, float]:
    """Token to log-probability. Raises UsageError for what is none."""
    ids, logprobs = unpacked("i", kept[0]), unpacked("f", kept[1])
    return dict(zip(ids, logprobs, strict=True))


def sentence(one: dict[str, Any]) -> str:
    """The verdict on one task, for a person."""
    if "perplexity_ratio" in one:
        error = one["perplexity_ratio_error"]
        spread = "" if error is None else f" \u00b1 {error:.4f}"
        ratio = one["perplexity_ratio"]
        change = "more" if ratio > 1 else "less"
        judged = "no difference that this text can show"
        if one["differs"]:
            judged = f"{abs(ratio - 1):.2%} {change}"
        if one["differs"] is None:
            judged = "so short a text tells nothing of the spread"
        return (
            f"perplexity {one['perplexity']:.4g}, against {one['against_perplexity']:.4g}: "
            f"ratio {ratio:.4f}{spread}, {judged}"
        )
    if not one.get("questions"):
        return "nothing has been judged"
    judged = "no difference that these questions can show"
    if one["p"] < SIGNIFICANT:
        judged = "better" if one["won"] > one["lost"] else "worse"
    difference = Mean(one["difference"], one["difference_error"], one["questions"])
    return (
        f"{one['score']:.1%}, against {one['against_score']:.1%}: {difference} of {one['questions']:,} "
        f"questions, {one['won']} won, {one['lost']} lost, p {one['p']:.2g}: {judged}"
    )
