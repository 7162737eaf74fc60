"""Damaged configuration files and environment variables, for `dsv2 complete`."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

from dsv2cli.cli.complete import CUT_OFF
from tests.fuzz import tiny
from tests.fuzz.case import complaint, same
from tests.fuzz.lines import read_answer
from tests.fuzz.strange import Mutation, mutate_bytes, mutate_place
from tests.running import program, run_dsv2

FILE = """\
[complete]
max-new-tokens = 2
temperature = 0.5
top-k = 7
seed = 4
stop = ["zq"]
threads = 1
device = "cpu"
kernels = "off"
echo = false
batch-size = 3

[chat]
on-overflow = "drop"
threads = 1
kernels = "off"

[presets.terse]
top-p = 0.8
max_new_tokens = 3
temperature = 0
"""
MESSAGES = json.dumps([{"role": "user", "content": "Hi"}]) + "\n"
OPTIONS: dict[str, list[str]] = {  # of `complete`, with values that it may have, as TOML
    "max-new-tokens": ["3", "200", "1"],
    "temperature": ["0", "1", "0.7", "2.5"],
    "top-p": ["1", "0.3"],
    "top-k": ["0", "3"],
    "min-p": ["0.1", "0"],
    "repetition-penalty": ["1.2"],
    "seed": ["0", "5", "4294967296"],
    "stop": ['["a"]', '["a", "b"]', "[]"],
    "threads": ["2"],
    "device": ['"auto"'],
    "dtype": ['"float32"', '"bfloat16"'],
    "quantize": ['"none"'],
    "kernels": ['"off"', '"auto"'],
    "attention": ['"absorbed"', '"reference"'],
    "echo": ["true", "false"],
    "ignore-eos": ["true", "false"],
    "logprobs": ["0", "3"],
    "batch-size": ["1"],
    "samples": ["1", "2"],
    "speculate": ["true", "false"],
    "fail-on-length": ["false"],
    "prefix": ['""'],
    "split-attention": ['"heads"'],
    "gpus": ["1"],
    "experts": ['"auto"'],
}
VALUES = [  # as TOML; few are right anywhere
    *("-1", "0", "1", "2", "3.7", "1.0", "-0.5", "1e-5", "1e400", "inf", "-inf", "nan", "true", "false"),
    *(
        "9223372036854775807",
        "-9223372036854775808",
        "18446744073709551616",
        "9" * 300,
        "9" * 5000,
        "0x7f",
        "1_0",
    ),
    *('""', '"x"', '"0.5"', '"3"', '"true"', '"inf"', '"nan"', '"a\\u0000b"', "'''\nx\n'''", '"\\uD800"'),
    *(
        "[]",
        "{}",
        "[1]",
        "[[1]]",
        '["a"]',
        '["a", 1]',
        "[true]",
        "{ a = 1 }",
        "[{ a = 1 }]",
        '[["a"], ["b"]]',
    ),
    *("1979-05-27T07:32:00Z", "1979-05-27", "07:32:00", "[" * 500 + "]" * 500, "[" * 5000 + "]" * 5000),
    *('"' + "a" * 100_000 + '"', '"\\u001b[2J"', '"é"', '"9' + "9" * 5000 + '"', "nul", ""),
]
TEXTS = [
    "",
    " ",
    "-1",
    "0",
    "1",
    "2",
    "3.7",
    "nan",
    "inf",
    "1e400",
    "true",
    "x",
    "9" * 5000,
    "\udcff",
    "é",
    "\x1b[2J",
]
TEXTS += [
    "a" * 100_000,
    "[1]",
    "None",
    "null",
    "a b",
    "--help",
    "\n",
    "0x1",
    "1_0",
    "١",
    "1,2",
    "/dev/null",
    "~",
    ".",
]
CLUSTER: list[dict[str, str]] = [
    {"RANK": "3", "WORLD_SIZE": "8"},
    {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
    {"RANK": "0", "WORLD_SIZE": "8"},
    {"RANK": "0", "WORLD_SIZE": "1"},
    {"RANK": "", "WORLD_SIZE": ""},
    {"RANK": "x", "WORLD_SIZE": "y"},
    {"RANK": "1"},
    {"RANK": "0"},
    {"WORLD_SIZE": "8"},
    {"WORLD_SIZE": "x"},
    {"RANK": "-1", "WORLD_SIZE": "-8"},
    {"RANK": "1", "WORLD_SIZE": "0"},
    {"LOCAL_RANK": "5"},
    {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"},
    {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8"},
    {"PMI_RANK": "3", "PMI_SIZE": "8"},
    {"DSV2_LAUNCHED": "x"},
    {"DSV2_LAUNCHED": "1", "RANK": "1", "WORLD_SIZE": "2"},
    {"CUDA_VISIBLE_DEVICES": "7"},
    {"OMP_NUM_THREADS": "x"},
    {"TRITON_INTERPRET": "x"},
    {"NO_COLOR": "1", "COLUMNS": "-1", "LINES": "x"},
    {"COLUMNS": "0"},
    {"TERM": "nothing-known", "FORCE_COLOR": "x"},
    {"XDG_CACHE_HOME": "/dev/null"},
    {"HOME": ""},
    {"TMPDIR": "/nothing/there"},
    {"_DSV2_COMPLETE": "x"},
    {"_DSV2_COMPLETE": "complete_bash"},
]


class SettingsDriver:
    """A configuration file, the variables beside it, and a short answer or the plan of one."""

    name = "config"

    def __init__(self, work: Path) -> None:
        self.model = work / "model"
        tiny.make(self.model, 1)
        whole = work / "whole"
        whole.mkdir()
        self.prepare(whole)
        self.references = {}
        for form in ("plan", "answer", "chat"):
            done = run_dsv2(*self.arguments(form), stdin=MESSAGES, DSV2_CONFIG=str(whole / "config.toml"))
            assert done.returncode == 0, done.stderr
            self.references[form] = told(done.stdout)
        self.reference = self.references["plan"]

    def arguments(self, form: str) -> list[str]:
        """The command: a plan, an answer, or a turn of a chat."""
        if form == "chat":
            return ["chat", "--model", str(self.model), "--json", "--preset", "terse"]
        given = ["complete", "--prompt-ids", "300,5,7", "--model", str(self.model), "--json"]
        return [*given, "--dry-run"] if form == "plan" else given

    def prepare(self, folder: Path) -> None:
        (folder / "config.toml").write_text(FILE)

    def mutate(self, folder: Path, numbers: random.Random) -> Mutation:
        form = numbers.choice(["plan", "plan", "answer", "chat"])
        path, variables = folder / "config.toml", dict[str, str]()
        way = numbers.choice(
            ["option"] * 6 + ["file"] * 2 + ["bytes"] * 2 + ["place"] + ["variable"] * 4 + ["cluster"] * 2
        )
        if way == "option":
            mutation = mutate_option(path, numbers, "[presets.terse]" if form == "chat" else "[complete]")
        elif way == "file":
            mutation = mutate_tables(path, numbers)
        elif way == "bytes":
            data, mutation = mutate_bytes(path.read_bytes(), numbers, True)
            path.write_bytes(data)
            shorter = mutation.what.startswith(("cut off", "nothing but spaces"))
            mutation = Mutation(mutation.what, mutation.changes or shorter)
        elif way == "place":
            mutation = mutate_place(path, numbers)
            emptied = mutation.what.rpartition(": ")[2] in ("empty", "missing", "/dev/null", "dangling link")
            mutation = Mutation(mutation.what, emptied)
        elif way == "variable":
            variables, mutation = mutate_variable("CHAT" if form == "chat" else "COMPLETE", numbers)
        else:
            variables = numbers.choice(CLUSTER)
            mutation = Mutation(f"left in the environment: {variables}", "_DSV2_COMPLETE" in variables)
        (folder / "form").write_text(form)
        (folder / "variables").write_text(json.dumps(variables))
        return Mutation(f"{form}: {mutation.what}", mutation.changes)

    def act(self, folder: Path) -> dict[str, Any]:
        """The command in this process, and what it wrote."""
        form = (folder / "form").read_text()
        if form == "chat":
            (folder.parent / "in").write_text(MESSAGES)
            os.dup2(os.open(folder.parent / "in", os.O_RDONLY), 0)
        variables = json.loads((folder / "variables").read_text())
        os.chdir(folder)
        code = program(tuple(self.arguments(form)), {"DSV2_CONFIG": str(folder / "config.toml"), **variables})
        sys.stdout.flush()
        sys.stderr.flush()
        return {
            "form": form,
            "code": code,
            "out": (folder.parent / "out").read_text(errors="replace")[-100_000:],
            "said": (folder.parent / "err").read_text(errors="replace"),
        }

    def judge(self, answer: Any, mutation: Mutation) -> tuple[str, str]:
        said, out = answer["said"], answer["out"]
        fault, last = complaint(said)
        if fault:
            return fault, last
        if answer["code"] in (1, 2):
            return (
                ("refused", "") if said.strip() else ("wrong", f"exit code {answer['code']}, and not a word")
            )
        if answer["code"] != 0:
            asked_for = answer["code"] == CUT_OFF and mutation.changes
            return "lenient" if asked_for else "wrong", f"exit code {answer['code']}: {last}"
        try:
            given = told(out)
        except ValueError as error:
            return ("lenient" if mutation.changes else "wrong"), f"stdout is no JSON: {error}"
        reference = self.references[answer["form"]]
        if same(given, reference):
            return "right", ""
        first = given[0] if given else {}
        differing = [key for key in reference[0] if not same(first.get(key), reference[0][key])]
        return ("lenient" if mutation.changes else "wrong"), f"another {', '.join(differing)}"


def told(out: str) -> Any:
    """The objects on stdout, without their timings. Raises ValueError for what is no JSON."""
    objects = [read_answer(line.encode("utf-8", "surrogatepass")) for line in out.splitlines()]
    if not all(isinstance(each, dict) for each in objects):
        raise ValueError("it is no object")
    return [
        {key: value for key, value in each.items() if key not in ("timing", "loaded")} for each in objects
    ]


def mutate_option(path: Path, numbers: random.Random, head: str) -> Mutation:
    """One option of [complete] or of the preset with another value, or one more."""
    option = numbers.choice(sorted(OPTIONS))
    valid = numbers.random() < 0.15
    value = numbers.choice(OPTIONS[option] if valid else VALUES)
    valid = valid or value in OPTIONS[option] or fits(option, value)
    lines = path.read_text().splitlines()
    name = option if numbers.random() < 0.7 else option.replace("-", "_")
    end = lines.index("") if head == "[complete]" else len(lines)
    start = lines.index(head) + 1
    kept = [line for line in lines[start:end] if line.split(" = ")[0].replace("_", "-") != option]
    lines[start:end] = [*kept, f"{name} = {value}"]
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    return Mutation(f"{head} {name} = {value[:60]}", valid)


def fits(option: str, value: str) -> bool:
    """Whether a TOML value, as it is or as a text, is of the option's type."""
    plain = value.strip('"')
    first = OPTIONS[option][0]
    try:
        if first in ("true", "false"):
            return plain in ("true", "false", "0", "1", "")
        if first[0] == "[":
            return value[0] in "[\"'"
        if first[0] == '"':
            return value[0] in "\"'" and option == "prefix"
        number = float(plain.replace("0x7f", "127"))
        whole = option not in ("temperature", "top-p", "min-p", "repetition-penalty")
        return abs(number) < 1e30 and (not whole or ("." not in plain and "e" not in plain))
    except (ValueError, IndexError):
        return False


def mutate_tables(path: Path, numbers: random.Random) -> Mutation:
    """Tables and names that the file can not have."""
    text = path.read_text()
    deep = "[presets" + ".a" * 2000 + "]\nx = 1\n"
    ways = {
        "an unknown table": text + "[surprise]\nx = 1\n",
        "a table twice": text + "[complete]\nseed = 1\n",
        "a key twice": text.replace("seed = 4", "seed = 4\nseed = 5"),
        "a table as a value": text.replace("[chat]", "[[chat]]"),
        "complete as a list": text.replace("[complete]", "[[complete]]"),
        "complete as a number": "complete = 1\n",
        "complete as a text": 'complete = "seed"\n',
        "presets as a number": text.split("[presets")[0].replace("[complete]", "presets = 1\n[complete]"),
        "presets as a list": text.split("[presets")[0] + "[[presets]]\nterse = 1\n",
        "a preset as a number": text.split("[presets")[0] + "[presets]\nterse = 1\n",
        "a preset as a list": text.split("[presets")[0] + "[[presets.terse]]\nseed = 1\n",
        "a preset in a preset": text + "[presets.terse.more]\nseed = 1\n",
        "deep tables": text + deep,
        "an unknown option": text.replace("seed", "sead"),
        "an empty key": text.replace("seed", '""'),
        "a quoted key": text.replace("seed", '"seed"'),
        "a dotted key": text.replace("seed", "seed.x"),
        "help": text.replace("seed = 4", "help = true"),
        "a preset of itself": text + 'preset = "terse"\n',
        "preset in complete": text.replace("seed = 4", 'preset = "terse"'),
        "dashes": text.replace("seed", "--seed"),
        "a surrogate in a key": text.replace("seed", '"\\ud800"'),
        "an escape in a key": text.replace("seed", '"\\u001b[2J"'),
        "an escape in a table": text + '["\\u001b[2J"]\nx = 1\n',
        "markup in a key": text.replace("seed", '"[red]x[/]"'),
        "markup in a table": text + '["[/nothing]"]\n',
        "a long comment": text + "#" + "x" * 10**6,
        "many keys": text + "".join(f"k{n} = 1\n" for n in range(20_000)),
        "many tables": text + "".join(f"[presets.p{n}]\nseed = 1\n" for n in range(5_000)),
        "both forms of a name": text.replace("top-k = 7", "top-k = 7\ntop_k = 8"),
        "model elsewhere": text.replace("seed = 4", 'seed = 4\nmodel = "/nothing/there"'),
        "another way to ask": text.replace("seed = 4", 'seed = 4\nprompt-ids = "1,2"'),
        "a file of another type": text.replace("seed = 4", "seed = 4\njson-schema = 5"),
        "batch of a table": text.replace("seed = 4", "seed = 4\nbatch = { a = 1 }"),
        "messages of a list": text.replace("seed = 4", 'seed = 4\nmessages = ["a"]'),
    }
    name = numbers.choice(sorted(ways))
    path.write_bytes(ways[name].encode("utf-8", "surrogatepass"))
    return Mutation(name, name in ("a quoted key", "both forms of a name", "presets as a number"))


def mutate_variable(command: str, numbers: random.Random) -> tuple[dict[str, str], Mutation]:
    """An environment variable for an option of the command."""
    option, value = numbers.choice(sorted(OPTIONS)), numbers.choice(TEXTS)
    value = numbers.choice([text.strip('"[]') for text in OPTIONS[option]] + [value] * 6)
    name = f"DSV2_{command}_{option.replace('-', '_').upper()}"
    valid = (
        fits(option, value) or f'"{value}"' in OPTIONS[option] or option in ("stop", "prefix") or value == ""
    )
    number = option not in ("stop", "prefix") and value.strip() != value
    return {name: value}, Mutation(f"{name}={ascii(value)[:60]}", valid or number)
