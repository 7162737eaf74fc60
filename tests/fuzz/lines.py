"""Damaged lines for `dsv2 complete --batch` and `--jsonl`: each has an answer; the others' stay."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any, NoReturn

from tests.fuzz import tiny
from tests.fuzz.case import complaint, same
from tests.fuzz.strange import Mutation, alike, mutate_bytes, mutate_tree
from tests.running import program, run_dsv2

SAMPLING = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1}
FIRST = {"id": "a", "prompt": "Once", "seed": 3}
MIDDLES: list[dict[str, Any]] = [
    {"id": "b", "prompt": "Hi é", "seed": 5, "max_new_tokens": 3, "stop": ["zq"], **SAMPLING},
    {"id": 2, "prompt_ids": [300, 5, 70], "seed": 5, "max_new_tokens": 3, "stop": [], **SAMPLING},
    {
        "id": None,
        "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "Hi"}],
        "seed": 5,
        "stop": ["zq", "Q"],
        **SAMPLING,
    },
]
LAST = {"id": "c", "messages": [{"role": "user", "content": "Hi"}], "seed": 4, "temperature": 0.5}
TEXTS = [
    "",
    " ",
    "\ud800",
    "\0",
    "a" * 100_000,
    "word " * 60,
    "\u202e\u2028",
    "<｜end▁of▁sentence｜>",
    "\x1b[2J",
]
OPTIONS = ["--device", "cpu", "--kernels", "off", "--threads", "1", "--on-bad-line", "skip", "-n", "2"]


class LinesDriver:
    """Three lines, of which the middle one is damaged."""

    name = "lines"

    def __init__(self, work: Path) -> None:
        self.model = work / "model"
        tiny.make(self.model, 1)
        whole = work / "whole"
        whole.mkdir()
        self.middles = []
        for middle in MIDDLES:
            write(whole / "in.jsonl", json.dumps(middle).encode())
            done = run_dsv2(*self.arguments(whole))
            assert done.returncode == 0, done.stderr
            answers = [read_answer(line) for line in (whole / "out.jsonl").read_bytes().splitlines()]
            self.middles.append(answers[1])
            self.reference = [answers[0], answers[2]]
            (whole / "out.jsonl").unlink()

    def arguments(self, folder: Path) -> list[str]:
        """The command, by the file's name a batch or lines from stdin."""
        given = ["complete", "--model", str(self.model), *OPTIONS]
        if (folder / "stdin.jsonl").exists():
            return [*given, "--jsonl"]
        return [*given, "--batch", str(folder / "in.jsonl"), "--output", str(folder / "out.jsonl")]

    def prepare(self, folder: Path) -> None:
        """Nothing: which of the lines stands in the middle decides `mutate`."""

    def mutate(self, folder: Path, numbers: random.Random) -> Mutation:
        number = numbers.randrange(len(MIDDLES))
        line = json.loads(json.dumps(MIDDLES[number]))
        way = numbers.choice(["tree"] * 5 + ["bytes"] * 2 + ["value"] * 4)
        if way == "tree":
            data, mutation = mutate_tree(
                line, numbers, lambda path, old, text: line_may_differ(path, old, text)
            )
        elif way == "bytes":
            data, mutation = mutate_bytes(json.dumps(line, ensure_ascii=False).encode(), numbers, True)
        else:
            what, changes = mutate_line(line, numbers)
            data, mutation = json.dumps(line).encode(), Mutation(what, changes)
        name = numbers.choice(["in.jsonl", "in.jsonl", "stdin.jsonl"])
        write(folder / name, data)
        (folder / "middle").write_text(str(number))
        return Mutation(f"{name}, middle {number}: {mutation.what}", mutation.changes)

    def act(self, folder: Path) -> dict[str, Any]:
        """The command in this process; the lines it wrote."""
        out, given = folder / "out.jsonl", folder / "stdin.jsonl"
        if given.exists():
            out = folder.parent / "out"
            os.dup2(os.open(given, os.O_RDONLY), 0)
        code = program(tuple(self.arguments(folder)), {})
        sys.stdout.flush()
        sys.stderr.flush()
        asked = (folder / ("stdin.jsonl" if given.exists() else "in.jsonl")).read_bytes()
        return {
            "code": code,
            "asked": sum(bool(line.strip()) for line in asked.split(b"\n")),
            "middle": int((folder / "middle").read_text()),
            "lines": out.read_bytes().decode("latin-1").split("\n") if out.exists() else [],
            "said": (folder.parent / "err").read_text(errors="replace"),
        }

    def judge(self, answer: Any, mutation: Mutation) -> tuple[str, str]:
        fault, line = complaint(answer["said"])
        if fault:
            return fault, line
        if answer["code"] != 0:
            return "wrong", f"exit code {answer['code']}: {line}"
        try:
            given = [read_answer(line.encode("latin-1")) for line in answer["lines"] if line]
        except ValueError as error:
            return "wrong", f"an answer is no JSON: {error}"
        if len(given) != answer["asked"]:
            return "wrong", f"{answer['asked']} lines, {len(given)} answers"
        if any(("error" in each) == ("text" in each) for each in given):
            return "wrong", "an answer without a text or an error"
        if not same(
            [without_place(given[0]), without_place(given[-1])], list(map(without_place, self.reference))
        ):
            return "wrong", "the answer to another line differs"
        return self.judge_middle(given[1:-1], self.middles[answer["middle"]], mutation)

    def judge_middle(self, given: list[Any], whole: Any, mutation: Mutation) -> tuple[str, str]:
        """Of the damaged line alone: an error, the same text, or another where that may be."""
        if all("error" in each for each in given):
            silent = any(not each["error"].strip() for each in given)
            return ("wrong", "an error that says nothing") if silent else ("refused", "")
        if all(same(without_place(each), without_place(whole)) for each in given):
            return "right", ""
        return "lenient" if mutation.changes else "wrong", "a line of another meaning is answered"


def write(path: Path, middle: bytes) -> None:
    """The three lines."""
    path.write_bytes(json.dumps(FIRST).encode() + b"\n" + middle + b"\n" + json.dumps(LAST).encode() + b"\n")


def read_answer(line: bytes) -> Any:
    """An answer's object. Raises ValueError for what is no JSON, such as NaN."""

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"it holds {name}")

    return json.loads(line.decode("utf-8"), parse_constant=refuse)


def without_place(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without its id, its number and its timings."""
    return {
        key: value for key, value in answer.items() if key in ("text", "token_ids", "prompt_ids", "error")
    }


def line_may_differ(path: tuple[Any, ...], old: Any, text: str) -> bool:
    """Another value of the same type asks for something else; one left out has a default."""
    return text == "" or alike(old, text) or path == ("id",)


def mutate_line(line: dict[str, Any], numbers: random.Random) -> tuple[str, bool]:
    """Values a line can not have, or could; gives what was done, and whether it has a meaning."""
    key = next(key for key in ("prompt", "prompt_ids", "messages") if key in line)
    tokens: list[Any] = [-1, 302, 2**31, 2**63, 2**64, 10**300, True, 1.0, "5", None, [5]]
    numbers_: list[Any] = [
        -1,
        0,
        1,
        0.0,
        1e-30,
        1e-320,
        1e30,
        1e308,
        2**62,
        2**63,
        2**64,
        10**300,
        True,
        "1",
        None,
    ]
    counts: list[Any] = [-1, 0, 1, 300, 2**31, 2**63, 2**64, 10**300, True, 2.0, "2", None]
    stops: list[Any] = ["x", [""], ["", "a"], ["\ud800"], [1], [None], None, {}, ["a" * 10**5], ["a"] * 10**4]
    ids: list[Any] = [
        None,
        "",
        [],
        {},
        [[1]],
        1e308,
        10**300,
        True,
        "\ud800",
        "c",
        "a" * 10**5,
        "\n",
        {"a": [{}]},
    ]
    strange: list[Any] = [None, "", [], {}, 0, True, "Hi", [5], [{"role": "user"}], [[]]]
    sampled = numbers.choice(sorted(SAMPLING))
    number, count, token = numbers.choice(numbers_), numbers.choice(counts), numbers.choice(tokens)
    valid = type(number) in (int, float)
    text, stop, one_id, other = (numbers.choice(each) for each in (TEXTS, stops, ids, strange))
    way = numbers.choice(
        ["sampling"] * 3 + ["count", "seed", "stop", "id", "prompt", "tokens", "role", "two", "key"]
    )
    if way == "sampling":
        line[sampled] = number
        return f"{sampled} {short_json(number)}", valid
    if way in ("count", "seed"):
        name = "seed" if way == "seed" else "max_new_tokens"
        line[name] = count
        return f"{name} {short_json(count)}", type(count) is int
    if way == "stop":
        line["stop"] = stop
        return f"stop {short_json(stop)}", isinstance(stop, list) and all(type(each) is str for each in stop)
    if way == "id":
        line["id"] = one_id
        return f"id {short_json(one_id)}", False
    if way == "prompt":
        line[key] = numbers.choice([text, other]) if key == "prompt" else other
        return f"{key} {short_json(line[key])}", isinstance(line[key], type(MIDDLES[0].get(key, [])))
    if way == "tokens":
        line.pop(key)
        line["prompt_ids"] = numbers.choice([[5, token], [token], [5] * 255, [5] * 256, [5] * 10**5])
        whole = all(type(each) is int for each in line["prompt_ids"])
        return f"prompt_ids {short_json(line['prompt_ids'])}", whole
    if way == "role":
        line.pop(key)
        role = numbers.choice(["user", "tool", "", "assistant", "system", None, ["user"], {"a": 1}, 5])
        line["messages"] = [{"role": role, "content": numbers.choice([text, 5, None, [{"text": "x"}]])}]
        return f"messages {short_json(line['messages'])}", True
    if way == "two":
        line["prompt" if key != "prompt" else "prompt_ids"] = other
        return f"besides {short_json(other)}", False
    line[numbers.choice(["", "Prompt", "n", "\ud800", "__class__", "a" * 10**5])] = other
    return f"an unknown key of {short_json(other)}", False


def short_json(value: Any) -> str:
    """The beginning of a value as JSON."""
    return json.dumps(value)[:60]
