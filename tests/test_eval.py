"""dsv2 eval: the questions and counts of an independent scorer, runs that go on after kill -9, verdicts that
follow from the distributions themselves, and statistics that are those of the books.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from conftest import DATA, ROOT, golden_folders
from rows import scores_of
from running import run_dsv2, run_process

from dsv2cli.checkpoint.load import load_model
from dsv2cli.cli.manual import RECIPES
from dsv2cli.engine.likelihood import likely, readings
from dsv2cli.engine.scheduler import Scheduler
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.evaluation.data import Table, find_data, table_of
from dsv2cli.evaluation.published import published
from dsv2cli.evaluation.question import Question, taken_in_turn
from dsv2cli.evaluation.record import load, packed, unpacked
from dsv2cli.evaluation.run import kept_answers
from dsv2cli.evaluation.statistics import Flips, Mean, mean, mean_of_blocks, mean_of_means
from dsv2cli.evaluation.tasks.listed import TASKS
from dsv2cli.evaluation.verdict import divergence, verdict
from dsv2cli.hubs.find import EMBEDDED
from dsv2cli.run.runner import PlainRunner

OURS = DATA / "eval"
GOLDEN = (
    "lite",
    "v2",
    "v25",
    "first_k0",
    "tied",
    "real_dims",
)  # that transformers computes as the paper does
STORY = (
    "Once upon a time there was a patient boy called Ian. Ian lived with his father in a little house. " * 8
)


def asked(*words, **options):
    done = run_dsv2("eval", *words, **options)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def result(*words, **options):
    done = asked(*words, "--json", **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def questions(name, folder, shots=None):
    task = TASKS[name]
    data = find_data(name, task.names, task.home, folder, True)
    return list(task.questions(data, task.shots if shots is None else shots))


# What is asked.


@pytest.fixture(scope="module")
def other():
    """The embedded model by somebody else's code."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()


class Scorer:
    """Counts right answers with transformers: prompts, choices and extraction written a second time."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def write(self, prompt, ends):
        ids = torch.tensor([self.tokenizer.encode(prompt)])
        out = self.model.generate(ids, max_new_tokens=512, do_sample=False, eos_token_id=4095, pad_token_id=0)
        text = self.tokenizer.decode(out[0, ids.shape[1] :].tolist())
        return re.split("|".join(map(re.escape, ends)), text)[0]

    def gsm8k(self, folder):
        shots = (Path(TASKS["gsm8k"].questions.__code__.co_filename).parent / "shots/gsm8k.txt").read_text()
        head = "".join(part.strip() + "\n\n" for part in shots.split("---\n")[1:])
        right = 0
        for line in next(folder.glob("gsm8k_test*")).read_text().splitlines():
            row = json.loads(line)
            text = self.write(f"{head}Q: {row['question']}\nA:", ["\nQ:", "\n\nQ"]).replace(",", "")
            said = re.search(r"answer is \$?(-?\d+\.?\d*)", text)
            numbers = [said[1]] if said else re.findall(r"-?\d+(?:\.\d+)?", text)
            right += bool(numbers) and float(numbers[-1]) == float(
                row["answer"].split("#### ")[1].replace(",", "")
            )
        return right

    def bbh(self, folder, limit=None):
        right = 0
        for path in sorted((folder / "bbh").glob("*.json")):
            rows = json.loads(path.read_text())["examples"]
            name = path.stem.replace("_", " ").capitalize()
            head = f"{name}.\n\n" + "".join(f"Q: {r['input']}\nA: {r['target']}\n\n" for r in rows[:3])
            for row in rows[3:][:limit]:
                text = self.write(f"{head}Q: {row['input']}\nA:", ["\nQ:", "\n\nQ"]).strip().split("\n")[0]
                found = text.split("answer is ")[-1].rstrip(". ")
                right += found == row["target"] or found.lower() == row["target"].lower() in ("yes", "no")
        return right

    def cmmlu(self, folder, names):
        right = 0
        for name, subject in names.items():
            dev, test = (list(csv.reader((folder / f"cmmlu/{name}.{x}.csv").open())) for x in ("dev", "test"))
            form = "题目：{1}\nA. {2}\nB. {3}\nC. {4}\nD. {5}\n答案是："
            head = f"以下是关于{subject}的单项选择题，请直接给出正确答案的选项。\n\n"
            head += "".join(form.format(*map(str.strip, row)) + f"{row[6]}\n\n" for row in dev[1:6])
            for row in test[1:]:
                ids = self.tokenizer.encode(head + form.format(*map(str.strip, row)))
                with torch.no_grad():
                    last = self.model(torch.tensor([ids])).logits[0, -1]
                scores = [float(last[self.tokenizer.encode(letter, False)[0]]) for letter in "ABCD"]
                right += "ABCD"[scores.index(max(scores))] == row[6]
        return right


def test_the_counts_are_those_of_an_independent_scorer(other, embedded_tokenizer):
    told = {one["task"]: one for one in result("gsm8k", "bbh", "cmmlu", "--data", str(OURS))["results"]}
    scorer = Scorer(other, embedded_tokenizer)
    assert told["gsm8k"]["right"] == scorer.gsm8k(OURS) and told["gsm8k"]["questions"] == 12
    assert told["bbh"]["right"] == scorer.bbh(OURS) and told["bbh"]["questions"] == 18
    names = {"astronomy": "天文学", "elementary_mathematics": "初等数学"}
    assert told["cmmlu"]["right"] == scorer.cmmlu(OURS, names) and told["cmmlu"]["questions"] == 12
    assert told["cmmlu"]["right"] > 0


def test_what_questions_have_in_common_is_read_once():
    one, two = result("gsm8k", "cmmlu", "--data", str(OURS))["results"]
    for told, examples in ((one, 1000), (two, 150)):
        many = told["questions"] - 1
        assert told["reused_tokens"] > many * examples * 0.8, told
        assert told["prompt_tokens"] > told["reused_tokens"]


MMLU = ("What is two?,1,2,3,4,B\n", "What is red?,a fish,a colour,a tree,a day,B\n")
EXPECTED_MMLU = (
    "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
    "What is two?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n"
    "What is red?\nA. a fish\nB. a colour\nC. a tree\nD. a day\nAnswer:"
)


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


GRADE = '{"question": "One?", "answer": "#### 1"}\n'
ARC = {"id": "x1", "question": {"stem": "Is ice cold?", "choices": [{"text": "no", "label": "A"}, {"text": "yes", "label": "B"}]}, "answerKey": "B"}  # fmt: skip  # noqa: E501
SCENE = {"ind": 4, "activity_label": "Skiing", "ctx_a": "A man skis.", "ctx_b": "he", "endings": ["falls.", "flies [x] away."], "label": "1"}  # fmt: skip  # noqa: E501
BOXED = {"problem": "What is $1+1$?", "solution": "It is $\\boxed{2}$.", "type": "Algebra"}
TASK = {"task_id": 11, "text": "Write a function f.", "code": "def f():\r\n    return 1", "test_list": ["assert f() == 1"]}  # fmt: skip  # noqa: E501
FUNCTION = {"task_id": "HumanEval/0", "prompt": "def f(x):\n    \"\"\"x plus 1\"\"\"\n", "test": "def check(candidate):\n    assert candidate(1) == 2\n", "entry_point": "f"}  # fmt: skip  # noqa: E501
EXPERT = (
    "You are an expert Python programmer, and here is your task: Write a function f. "
    "Your code should pass these tests:\n\nassert f() == 1\n[BEGIN]\n"
)
COT = "canary\n-----\nSay yes or no.\n\nQ: one\nA: Let's think step by step.\nSo the answer is yes.\n\nQ: two\nA: Let's think step by step.\nSo the answer is no."  # noqa: E501


@pytest.mark.parametrize(
    ("name", "files", "shots", "prompt", "choices", "expected"),
    [
        (
            "mmlu",
            {"data/dev/abstract_algebra_dev.csv": MMLU[0], "data/test/abstract_algebra_test.csv": MMLU[1]},
            1,
            EXPECTED_MMLU,
            (" A", " B", " C", " D"),
            "1",
        ),
        (
            "mmlu",
            {
                "all/dev-00000-of-00001.json": json.dumps(
                    [{"question": "Q?", "choices": ["a", "b"], "answer": 0, "subject": "abstract_algebra"}]
                ),
                "all/test-00000-of-00001.jsonl": lines(
                    {"question": "R?", "choices": ["a", "b"], "answer": 1, "subject": "abstract_algebra"}
                ),
            },
            1,
            "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
            "Q?\nA. a\nB. b\nAnswer: A\n\nR?\nA. a\nB. b\nAnswer:",
            (" A", " B"),
            "1",
        ),
        (
            "ceval",
            {
                "dev/law_dev.csv": "id,question,A,B,C,D,answer,explanation\n0,甲,1,2,3,4,A,x\n",
                "val/law_val.csv": "id,question,A,B,C,D,answer\n0,乙,1,2,3,4,D\n",
                "test/law_test.csv": "id,question,A,B,C,D\n0,丙,1,2,3,4\n",
            },
            1,
            "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n\n"
            "甲\nA. 1\nB. 2\nC. 3\nD. 4\n答案：A\n\n"
            "乙\nA. 1\nB. 2\nC. 3\nD. 4\n答案：",
            ("A", "B", "C", "D"),
            "3",
        ),
        (
            "arc",
            {
                "ARC-Challenge/ARC-Challenge-Train.jsonl": lines(ARC),
                "ARC-Challenge/ARC-Challenge-Test.jsonl": lines(ARC),
            },
            1,
            "Question: Is ice cold?\nAnswer: yes\n\nQuestion: Is ice cold?\nAnswer:",
            (" no", " yes"),
            "1",
        ),
        (
            "hellaswag",
            {"hellaswag_train.jsonl": lines(SCENE), "hellaswag_val.jsonl": lines(SCENE)},
            1,
            "Skiing: A man skis. He flies away.\n\nSkiing: A man skis. He",
            (" falls.", " flies away."),
            "1",
        ),
        (
            "math",
            {"test/algebra/1.json": json.dumps(BOXED)},
            0,
            "Problem:\nWhat is $1+1$?\n\nSolution:",
            (),
            "2",
        ),
        (
            "bbh",
            {
                "bbh/navigate.json": json.dumps(
                    {"canary": "c", "examples": [{"input": "three", "target": "No"}]}
                ),
                "cot-prompts/navigate.txt": COT,
            },
            1,
            "Say yes or no.\n\nQ: one\nA: Let's think step by step.\nSo the answer is yes.\n\n"
            "Q: three\nA: Let's think step by step.",
            (),
            "No",
        ),
        (
            "humaneval",
            {"HumanEval.jsonl.gz": gzip.compress(lines(FUNCTION).encode())},
            0,
            FUNCTION["prompt"],
            (),
            "",
        ),
        (
            "mbpp",
            {"mbpp.jsonl": lines(TASK | {"task_id": 2}, TASK)},
            1,
            f"{EXPERT}def f():\n    return 1\n[DONE]\n\n{EXPERT}",
            (),
            "",
        ),
    ],
)
def test_prompts_are_those_of_the_papers_in_every_shape_of_data(
    tmp_path, name, files, shots, prompt, choices, expected
):
    (one,) = questions(name, write(tmp_path, files), shots)
    assert one.prompt() == prompt
    assert (one.choices, one.expected) == (choices, expected)


def test_examples_are_not_asked_and_without_reasoning_the_answer_stands_alone(tmp_path):
    rows = [{"input": f"in {n}", "target": f"out {n}"} for n in range(5)]
    write(tmp_path, {"bbh/navigate.json": json.dumps({"examples": rows})})
    found = questions("bbh", tmp_path, 3)
    assert [one.id for one in found] == ["3", "4"]
    assert found[0].prompt().endswith("Q: in 2\nA: out 2\n\nQ: in 3\nA:") and "step" not in found[0].prompt()


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("mmlu", {"question": "q", "choices": [{"label": "A", "text": "x"}, 5], "answer": "A"}),
        ("mmlu", {"question": "q", "choices": [None, ["x"]], "answer": 0}),
        ("mmlu", {"question": "q", "a": "", "b": "", "c": "", "d": "", "answer": "A"}),
        ("mmlu", {"question": "q", "choices": ["x", "y"], "answer": True}),
        ("hellaswag", SCENE | {"endings": "xyz"}),
        ("mbpp", TASK | {"test_list": "assert 1"}),
        ("perplexity", {"text": None}),
        ("math", BOXED | {"problem": ["x"]}),
        ("bbh", {"input": 3, "target": "x"}),
        ("humaneval", FUNCTION | {"prompt": 7}),
    ],
    ids=str,
)
def test_rows_of_other_shapes_are_refused(tmp_path, name, row):
    split = "val" if name == "hellaswag" else "test"
    with pytest.raises(Dsv2Error, match="can not be used"):
        questions(name, write(tmp_path, {f"{split}.json": json.dumps([row])}), 0)


def test_a_number_that_is_a_label_is_no_place(tmp_path):
    choices = {"text": ["no", "yes"], "label": ["1", "2"]}
    row = {"question": "q", "choices": choices, "answerKey": 1}
    (one,) = questions("arc", write(tmp_path, {"test.json": json.dumps([row])}), 0)
    assert one.expected == "0"


def test_other_benchmarks_in_the_folder_are_left_alone(tmp_path):
    row = {"question": "q", "choices": ["a", "b"], "answer": 0}
    write(tmp_path, {
        "ARC-Easy/test.jsonl": lines(ARC, ARC), "ARC-Challenge/test.jsonl": lines(ARC),
        "mmlu/law_test.json": json.dumps([row]), "mmlu_pro/law_test.json": json.dumps([row, row]),
        "mbpp-sanitized/test.json": "[]", "mbpp_test.jsonl": lines(TASK),
    })  # fmt: skip
    for name in ("arc", "mmlu", "mbpp"):
        task = TASKS[name]
        data = find_data(name, task.names, task.home, tmp_path, False)
        assert len(list(task.questions(data, 0))) == 1, name


@pytest.mark.parametrize(
    ("path", "split", "subset"),
    [
        ("data/test/high_school_physics_test.csv", "test", "high_school_physics"),
        ("agronomy.dev.csv", "dev", "agronomy"),
        ("test/agronomy.csv", "test", "agronomy"),
        ("agronomy/test/0000.parquet", "test", "agronomy"),
        ("agronomy/val-00000-of-00001.parquet", "val", "agronomy"),
        ("main/train-00003-of-00010.parquet", "train", ""),
        ("gsm8k_test.jsonl", "test", "gsm8k"),
        ("ARC-Challenge-Validation.jsonl.gz", "val", "ARC-Challenge"),
        ("bbh/navigate.json", "test", "navigate"),
        ("MATH/train/algebra/12.json", "train", "algebra"),
    ],
)
def test_a_files_name_says_its_split_and_its_subset(path, split, subset):
    assert table_of(Path(path), Path(path)) == Table(Path(path), split, subset)


def test_a_limit_takes_as_many_of_each_subject_as_can_be():
    made = [
        Question("t", subset, str(n), "", "")
        for subset, n in [*(("a", n) for n in range(5)), ("b", 0), ("c", 0)]
    ]
    taken = taken_in_turn(iter(made), 5)
    assert [one.key for one in taken] == ["t/a/0", "t/a/1", "t/a/2", "t/b/0", "t/c/0"]
    assert taken_in_turn(iter(made), None) == made and taken_in_turn(iter(made), 99) == made


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"gsm8k_test.jsonl": "{"}, "line 1"),
        ({"gsm8k_test.jsonl": "[]\n"}, "no JSON object"),
        ({"gsm8k_test.jsonl": '{"question": 1}\n'}, "'answer'"),
        ({"gsm8k_test.jsonl": '{"question": "q", "answer": "none"}\n'}, "no number"),
        ({"gsm8k_test.jsonl": b"\xff\xfe\0"}, "cannot be read"),
        ({"gsm8k_test.jsonl.gz": b"\x1f\x8b\x08"}, "cannot be read"),
        ({"gsm8k_test.json": "3"}, "no list"),
        ({"gsm8k_test.csv": "question,answer\na,b,c\n"}, "columns"),
        ({"gsm8k_test.parquet": b"PAR1"}, ""),
        ({"gsm8k_test.txt": "?"}, "no data of gsm8k"),
        ({"gsm8k_train.jsonl": '{"question": "q", "answer": "#### 1"}\n'}, "no questions"),
        ({"other.xyz": "?"}, "no data of gsm8k"),
        ({"gsm8k_test.jsonl": '{"question": null, "answer": "#### 1"}\n'}, "question is no text"),
        ({"main/test.jsonl": GRADE, "socratic/test.jsonl": GRADE}, "2 sets of gsm8k"),
        ({"gsm8k_pro/test.jsonl": GRADE, "gsm8k-hard.jsonl": GRADE, "x.txt": ""}, "2 sets"),
    ],
    ids=str,
)
def test_data_that_can_not_be_used_end_in_a_sentence(tmp_path, files, said):
    done = asked("gsm8k", "--data", str(write(tmp_path, files)))
    assert done.returncode in (1, 2) and done.stdout == "" and done.stderr.startswith("error: ")
    assert said in done.stderr and "fix:" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("mmul",), "dsv2 eval mmlu"),
        (("gsm8k", "--data", "/nowhere"), "/nowhere"),
        (("gsm8k", "--data", str(OURS), "--text", "README.md"), "--text"),
        (("gsm8k", "--data", str(OURS), "--run-code"), "--run-code"),
        (("gsm8k", "--data", str(OURS), "--shots", "9"), "8 examples"),
        (("gsm8k", "--data", str(OURS), "--save", "/nowhere/x.jsonl"), "/nowhere"),
        (("gsm8k", "--data", str(OURS), "--against", "/nowhere.jsonl"), "/nowhere.jsonl"),
        (("gsm8k", "--data", str(OURS), "--against", "--save x"), "--save x"),
        (("gsm8k", "--data", str(OURS), "--against", "--quantize '"), "--quantize '"),
        (("gsm8k", "--data", str(OURS), "--depths", "50"), "--depths"),
        (("gsm8k", "--data", str(OURS), "--seed", "1"), "--seed"),
        (("gsm8k", "--data", str(OURS), "--window", "9"), "--window"),
        (("niah", "--limit", "1"), "--tries"),
        (("perplexity", "--text", str(OURS / "NOTICE"), "--shots", "1"), "--shots"),
        (("bbh", "--data", str(OURS), "--shots", "9"), "examples"),
        (("gsm8k", "--data", str(OURS), "--against", ""), "--against is empty"),
        (("gsm8k", "--data", str(OURS), "--against", "--help"), "--help"),
        (("gsm8k", "--data", str(OURS), "--svg", "/nowhere/x.svg"), "/nowhere/x.svg"),
        (("gsm8k", "--data", str(OURS), "--save", "x", "--svg", "x"), "run's file"),
        (("gsm8k", "--data", str(OURS), "--save", "/dev/null"), "no file"),
        (("niah", "--data", str(OURS)), "--data"),
        (("niah", "--lengths", "5000"), "too long"),
        (("perplexity", "--text", "/dev/null"), "no text"),
        (("perplexity", "--text", str(OURS / "NOTICE"), "--chat"), "--chat"),
        (("cmmlu", "--data", str(OURS), "--shots", "6"), "has 5 examples"),
        ((), "TASK"),
    ],
    ids=str,
)
def test_what_can_not_be_asked_is_wrong_usage(words, said):
    done = asked(*words)
    assert done.returncode == 2 and done.stdout == "" and said in done.stderr


def test_a_base_model_has_no_chat_and_a_chat_model_gets_a_message(tmp_path):
    base = shutil.copytree(EMBEDDED, tmp_path / "base")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings.pop("chat_template")
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    done = asked("cmmlu", "--data", str(OURS), "--chat", "-m", str(base))
    assert done.returncode != 0 and "chat template" in done.stderr
    one, two = (
        result("gsm8k", "--data", str(OURS), "--limit", "3", *more)["results"][0]
        for more in ((), ("--chat",))
    )
    assert two["prompt_tokens"] != one["prompt_tokens"]


def test_a_dry_run_shows_what_would_be_asked_and_asks_nothing():
    done = asked("cmmlu", "--data", str(OURS), "--limit", "1", "--dry-run")
    assert done.returncode == 0 and "答案是：\n-- A | B | C | D\n" in done.stdout
    done = asked("cmmlu", "gsm8k", "niah", "--data", str(OURS), "--limit", "2", "--dry-run", "--json",
                 "--lengths", "128", "--depths", "50")  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["task"] for row in rows] == ["cmmlu", "cmmlu", "gsm8k", "gsm8k", "niah"]
    assert rows[4]["expected"] in rows[4]["prompt"] and rows[2]["prompt"].count("Q: ") == 9


def test_a_question_too_long_for_the_context_has_fewer_examples_or_is_told(tmp_path):
    rows = [{"question": "one " * 3800, "answer": "#### 1"}, {"question": "Two?", "answer": "#### 2"}]
    rows += [{"question": "one " * 3000, "answer": "#### 1"}]
    write(tmp_path, {"gsm8k_test.jsonl": lines(*rows)})
    done = asked("gsm8k", "--data", str(tmp_path), "--json")
    one = json.loads(done.stdout)["results"][0]
    assert (one["errors"], one["fewer_shots"], one["questions"]) == (1, 1, 3)
    assert "1 of 3 questions could not be asked" in done.stderr and "4,096" in done.stderr
    write(tmp_path, {"gsm8k_test.jsonl": lines(rows[0])})
    done = asked("gsm8k", "--data", str(tmp_path))
    assert done.returncode == 1 and done.stdout == "" and "No question" in done.stderr


# Runs and their files.


def rows_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()][1:]


def test_a_killed_run_goes_on_and_comes_to_the_same(start, tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    words = ("gsm8k", "cmmlu", "--data", str(OURS), "--at-once", "1")
    result(*words, "--save", str(whole))
    process = start("eval", *words, "--save", str(cut))
    limit = time.monotonic() + 60
    while not cut.exists() or cut.read_bytes().count(b"\n") < 5:
        assert time.monotonic() < limit and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = cut.read_bytes()
    kept = kept[: kept.rindex(b"\n") + 1]
    cut.write_bytes(kept + b'{"key": "gsm8k//11", "ta')  # cut off within a line
    asked(*words, "--save", str(cut))
    assert cut.read_bytes().startswith(kept)
    then, now = rows_in(whole), rows_in(cut)
    assert [row["key"] for row in then] == [row["key"] for row in now] and len(now) == 24
    same = ("answer", "right", "logprobs", "found")
    for a, b in zip(then, now, strict=True):
        a, b = ({name: row.get(name) for name in same} for row in (a, b))
        assert a == b or torch.allclose(torch.tensor(a["logprobs"]), torch.tensor(b["logprobs"]), atol=1e-4)
    before = cut.read_bytes()
    again = asked(*words, "--save", str(cut))  # all is there: nothing is loaded or asked
    assert again.returncode == 0 and cut.read_bytes() == before


def test_a_file_of_another_run_is_left_as_it_is(tmp_path):
    path = tmp_path / "run.jsonl"
    words = ("cmmlu", "--data", str(OURS), "--save", str(path))
    result(*words, "--limit", "4")
    kept = path.read_bytes()
    one = result(*words, "--limit", "2")["results"][0]  # a part of what is there
    assert one["questions"] == 2 and path.read_bytes() == kept
    for more, said in (
        (("--shots", "2"), "shots None, now 2"),
        (("--quantize", "int8"), "number formats"),
        (("-m", str(DATA / "golden" / "v2")), ""),
    ):
        done = asked(*words, *more)
        assert done.returncode != 0 and said in done.stderr and path.read_bytes() == kept
    for damage, said in (
        (b"{}\n", "no result of dsv2 eval"),
        (kept.replace(b"\n", b"\n{broken\n", 1), "damaged"),
        (kept + b'{"a": 1}\n', "damaged"),
        (kept.replace(b'"digest": "', b'"digest": "x'), "another question"),
        (kept.replace(b'"right": false', b'"right": "no"', 1), "damaged"),
        (kept.replace(b'"key": "', b'"key": 3, "k": "', 1), "damaged"),
        (kept.replace(b'"kept": [', b'"kept": [5, ', 1), "damaged"),
    ):
        path.write_bytes(damage)
        done = asked(*words)
        assert done.returncode == 2 and said in done.stderr and path.read_bytes() == damage
    path.write_bytes(kept[:30])  # ended within the first line
    assert result(*words, "--limit", "2")["results"][0]["questions"] == 2 and b'"digest"' in path.read_bytes()
    path.write_bytes(kept)
    result(*words)
    assert path.read_bytes().startswith(kept) and len(rows_in(path)) == 12


def test_programs_are_run_only_where_that_was_asked_for(tmp_path):
    """The embedded model writes none that is right: two answers are put in its mouth."""
    write(tmp_path, {"humaneval.jsonl": lines(FUNCTION, FUNCTION | {"task_id": "HumanEval/1"})})
    path = tmp_path / "run.jsonl"
    words = ("humaneval", "--data", str(tmp_path), "--save", str(path))
    done = asked(*words)
    assert done.returncode == 0 and "not judged" in done.stdout and "2 programs were not run" in done.stdout
    head, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["task_id"] for row in rows] == ["HumanEval/0", "HumanEval/1"] and "completion" in rows[0]
    task = TASKS["humaneval"]
    for row, answer in zip(rows, ("    return x + 1\n", "    return x\n"), strict=True):
        (one,) = [each for each in questions("humaneval", tmp_path) if each.id == row["task_id"]]
        row["program"] = task.program(one, answer)
    path.write_text(lines(head, *rows))
    done = asked(*words, "--run-code", "--json")
    if done.returncode != 0:
        assert "bubblewrap" in done.stderr
        pytest.skip("no box opens here")
    one = json.loads(done.stdout)["results"][0]
    assert (one["right"], one["questions"], one["unjudged"]) == (1, 2, 0)
    assert "AssertionError" in load(path).rows["humaneval//HumanEval/1"]["why"]


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("    return x + 1\n\nprint(f(1))", True),
        ("    return x + 2", False),
        ("```python\ndef f(x):\n    return x + 1\n```", True),
        ("Here it is:\n```python\ndef f(x):\n    return x\n```", False),
        ("", False),
    ],
)
def test_a_completion_and_a_whole_function_become_programs(answer, right):
    one = Question("humaneval", "", "0", FUNCTION["prompt"], "", about=FUNCTION)
    scope = {}
    try:
        exec(TASKS["humaneval"].program(one, answer), scope)
    except (AssertionError, SyntaxError, IndentationError):
        assert not right
    else:
        assert right or scope["f"](1) is None


def test_a_function_stands_behind_what_the_prompt_has_before_it():
    prompt = 'import math\n\ndef poly(x):\n    return x + 1\n\ndef f(x):\n    """poly of x"""\n'
    one = Question("humaneval", "", "0", prompt, "", about=FUNCTION)
    scope = {}
    exec(
        TASKS["humaneval"].program(one, "```sh\nls\n```\n```python\ndef f(x):\n    return poly(x)\n```"),
        scope,
    )
    exec(TASKS["humaneval"].program(one, "```python\n    return poly(x)\n```"), scope)


def test_the_last_sentence_of_minervas_answers_is_read():
    task = TASKS["math"]
    text = (
        "It is \\boxed{3} at first.\nFinal Answer: The final answer is $5$. I hope it is correct.\n\nProblem:"
    )
    cut = min(text.find(stop) for stop in task.stop)
    one = Question("math", "", "0", "", "5")
    assert task.judge(one, text[:cut]).found == "5" and task.judge(one, text[:cut]).right


# What two runs say of each other.


def test_a_verdict_is_what_the_distributions_themselves_say(tmp_path, embedded, embedded_tokenizer):
    text, saved = tmp_path / "story.txt", tmp_path / "then.jsonl"
    text.write_text(STORY)
    words = ("perplexity", "--text", str(text), "--window", "64")
    result(*words, "--save", str(saved))
    done = result(*words, "--quantize", "int4", "--against", str(saved))
    (one,) = done["verdict"]
    packed_model = PlainRunner(load_model(EMBEDDED, torch.device("cpu"), torch.float32, None, "int4"))
    ids, begin = embedded_tokenizer.encode_plain(STORY), embedded_tokenizer.begun([])
    p, q, after = [], [], []
    for start in range(0, len(ids), 64 - len(begin)):
        window = begin + ids[start : start + 64 - len(begin)]
        after += window[1:]
        p.append(scores_of(embedded, window[:-1]).log_softmax(-1))
        q.append(scores_of(packed_model, window[:-1]).log_softmax(-1))
    p, q, after = torch.cat(p), torch.cat(q), torch.tensor(after)[:, None]
    nats, before = -q.gather(1, after).mean(), -p.gather(1, after).mean()
    exact = float((p.exp() * (p - q)).sum(-1).mean())
    assert one["tokens"] == one["kl_places"] == len(after)
    assert 0.9 * exact - 1e-4 < one["kl"] < exact * 1.001 + 1e-6
    assert one["top1_agreement"] == pytest.approx(
        float((p.argmax(-1) == q.argmax(-1)).float().mean()), abs=2e-3
    )
    assert one["perplexity_ratio"] == pytest.approx(float((nats - before).exp()), rel=1e-3)
    assert done["results"][0]["perplexity"] == pytest.approx(float(nats.exp()), rel=1e-3)
    assert done["results"][0]["bits_per_byte"] == pytest.approx(
        float(nats) * len(after) / math.log(2) / len(STORY.encode()), rel=1e-3
    )
    same = result(*words, "--against", str(saved))["verdict"][0]
    assert (
        same["kl"] < 1e-6
        and same["top1_agreement"] == 1
        and same["perplexity_ratio"] == pytest.approx(1, abs=1e-5)
    )


def test_two_set_ups_are_compared_in_one_command(tmp_path):
    text = tmp_path / "story.txt"
    text.write_text(STORY * 3)
    save, svg = tmp_path / "run.jsonl", tmp_path / "run.svg"
    words = ("perplexity", "cmmlu", "--text", str(text), "--data", str(OURS), "--svg", str(svg))
    done = run_process("eval", *words, "--cache", "int4", "--save", str(save), "--against", "--cache auto")
    assert done.returncode == 0, done.stderr
    assert "against embedded, float32, cpu" in done.stdout and "int4 cache" in done.stdout
    assert re.search(
        r"perplexity: KL 0\.\d+ ± \S+ nats a token, over \d+; the same likeliest token in 9\d", done.stdout
    )
    assert re.search(r"cmmlu: .* of 12 questions, \d won, \d lost, p \d", done.stdout)
    assert (tmp_path / "run.jsonl.against").exists()
    drawn = ET.fromstring(svg.read_text())
    assert "cmmlu" in {each.text for each in drawn.iter("{http://www.w3.org/2000/svg}text")}
    done = run_process("eval", "cmmlu", "--data", str(OURS), "--shots", "1", DSV2_EVAL_AGAINST="--shots 0")
    assert done.returncode == 0 and "of 12 questions" in done.stdout, done.stderr  # and no run within a run
    done = run_process("eval", *words, "--against", "--quantize nothing")
    assert done.returncode == 1 and "nothing" in done.stderr and "above" in done.stderr and done.stdout == ""


def test_a_saved_run_of_other_questions_is_refused_at_once(tmp_path):
    saved, text = tmp_path / "a.jsonl", str(OURS / "story.txt")
    result("perplexity", "--text", text, "--limit", "1", "--window", "32", "--save", str(saved))
    for words in (("cmmlu", "--data", str(OURS)), ("perplexity", "--text", text, "--window", "64")):
        done = asked(*words, "--against", str(saved), "--save", str(tmp_path / "b.jsonl"))
        assert done.returncode == 2 and "none of these questions" in done.stderr
    assert not (tmp_path / "b.jsonl").exists()


def test_names_from_the_data_steer_no_terminal(person, tmp_path):
    row = {"question": "q", "choices": ["a", "b"], "answer": 0, "subject": "R[/nope]\x1b[31mred"}
    write(tmp_path, {"mmlu/test.json": json.dumps([row])})
    me = person("eval", "mmlu", "--data", str(tmp_path), "--shots", "0")
    seen = me.end()
    assert "mmlu" in seen and "1" in seen and "\x1b[31mred" not in me.raw


def test_markdown_is_a_table(tmp_path):
    done = asked("cmmlu", "--data", str(OURS), "--limit", "3", "--format", "markdown")
    assert "| cmmlu |" in done.stdout and "| --- | ---: |" in done.stdout


def test_questions_that_differ_are_left_out_of_a_verdict(tmp_path):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, limit in zip(paths, ("6", "4"), strict=True):
        result("cmmlu", "--data", str(OURS), "--limit", limit, "--save", str(path))
    now, then = map(load, paths)
    assert verdict(now, then)[0]["questions"] == 4
    key = next(iter(then.rows))
    then.rows[key]["digest"] = "other"
    one = verdict(now, then)[0]
    assert (one["questions"], one["others"]) == (3, 1)
    with pytest.raises(UsageError, match="can not be compared"):
        verdict(now, type(then)(then.facts, {}))


def test_of_many_answers_some_distributions_are_kept():
    made = [Question("t", "", str(n), "", "0", choices=("A", "B")) for n in range(5000)]
    kept = kept_answers([*made, Question("g", "", "0", "", "")])
    assert len(kept) == 1667 and "t//0" in kept and "g//0" not in kept and len(kept_answers(made[:9])) == 9


def test_a_divergence_of_kept_parts_is_a_lower_bound_and_of_whole_ones_exact():
    torch.manual_seed(0)
    for scale in (0.5, 3.0):
        p, q = (torch.randn(50).mul(scale).log_softmax(0) for _ in range(2))
        exact = float((p.exp() * (p - q)).sum())

        def kept(logprobs, count):
            values, ids = logprobs.topk(count)
            return [packed("i", ids.tolist()), packed("f", values.tolist())]

        assert divergence(kept(p, 50), kept(q, 50)) == pytest.approx(exact, abs=1e-5)
        assert 0 <= divergence(kept(p, 30), kept(q, 40)) <= exact + 1e-6
    assert list(unpacked("i", packed("i", [1, -2, 3]))) == [1, -2, 3]
    with pytest.raises(UsageError, match="damaged"):
        unpacked("f", "AAA")


# Numbers of the books.


@pytest.mark.parametrize(
    ("won", "lost", "p"),
    [
        (0, 0, 1),
        (1, 0, 1),
        (5, 5, 1),
        (9, 1, 0.021484375),
        (1, 9, 0.021484375),
        (12, 3, 0.03515625),
        (0, 20, 1.9073486328125e-06),
    ],
)
def test_mcnemars_exact_test(won, lost, p):
    """By the tables of the binomial distribution."""
    assert Flips(won, lost, 100).p == pytest.approx(p)
    assert 0 <= Flips(3000, 5000, 9000).p < 1e-60


def test_standard_errors_are_those_of_samples():
    assert mean([1.0, 0.0, 1.0, 1.0]).error == pytest.approx(0.25)
    assert str(mean([1.0, 0.0, 1.0, 1.0])) == "75.0% ± 25.0%" and mean([1.0]).error is None
    both = mean_of_means([mean([1.0, 0.0]), mean([1.0, 1.0])])
    assert (both.value, both.error) == (0.75, pytest.approx(0.25))
    for freedom, t in ((4, 2.776), (7, 2.365), (10, 2.228), (30, 2.042), (1000, 1.962)):  # of Student's table
        many = Mean(0.0, 1.0, 9, parts=freedom + 1)
        assert many.reach == pytest.approx(t, rel=0.015)
    assert Mean(0.0, 1.0, 9, parts=4).reach is None
    blocks = mean_of_blocks([1.0] * 128 + [3.0] * 128 + [9.0] * 10)
    assert blocks.error == mean([1.0, (128 * 3 + 90) / 138]).error
    assert blocks.value == pytest.approx(sum([1.0] * 128 + [3.0] * 128 + [9.0] * 10) / 266)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("deepseek-ai/DeepSeek-V2-Lite", "DeepSeek-V2-Lite"),
        ("/models/DeepSeek-V2-Lite-Chat-int4", "DeepSeek-V2-Lite-Chat"),
        ("v2-lite-chat:int4", "DeepSeek-V2-Lite-Chat"),
        ("ms:deepseek-ai/DeepSeek-V2-Chat@main", "DeepSeek-V2-Chat"),
        ("v2", "DeepSeek-V2"),
        ("DeepSeek-V2-Lite.Q4_K_M.gguf", "DeepSeek-V2-Lite"),
        ("deepseek-ai/DeepSeek-V2.5", ""),
        ("deepseek-ai/DeepSeek-Coder-V2-Lite-Base", ""),
        ("deepseek-ai/DeepSeek-V2-Chat-0628", ""),
        ("embedded", ""),
    ],
)
def test_the_published_scores_are_those_of_the_same_model(name, model):
    source, scores = published(name)
    assert source == model and bool(scores) == bool(model)
    if model == "DeepSeek-V2-Lite":
        assert scores["gsm8k"] == 41.1


def test_without_a_network_it_says_so(tmp_path):
    done = run_process("eval", "mmlu", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 1 and "HF_HUB_OFFLINE is set" in done.stderr and "--data DIR" in done.stderr


# Recipes, and somebody else's code.


SAMPLE = {"task_id": "HumanEval/0", "completion": "c"}


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not here")
def test_the_recipes_give_answers_in_the_judges_forms(tmp_path):
    instructions = ["Hello", 'Say "red"\nand blue']
    write(tmp_path, {
        "alpaca_eval.json": json.dumps([{"instruction": each, "output": "x"} for each in instructions]),
        "question.jsonl": lines(
            {"question_id": 81, "category": "writing", "turns": ["My name is Nora.", "What is my name?"]},
            {"question_id": 82, "category": "math", "turns": ["Hello", "What is two plus two?"]},
        ),
        "run.jsonl": lines({"format": "x"}, {"task": "humaneval", **SAMPLE}),
    })  # fmt: skip
    for code in RECIPES.values():
        line = f'dsv2() {{ "{sys.executable}" -m dsv2cli "$@"; }}\nset -e\n{code}'
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=120
        )
        assert done.returncode == 0, done.stderr
    outputs = json.loads((tmp_path / "model_outputs.json").read_text())
    assert [each["instruction"] for each in outputs] == instructions
    assert all(each["output"] and each["generator"] == "dsv2" for each in outputs)
    first, second = [json.loads(line) for line in (tmp_path / "dsv2.jsonl").read_text().splitlines()]
    assert (first["question_id"], second["question_id"]) == (81, 82) and first["answer_id"] != second[
        "answer_id"
    ]
    assert "Nora" in first["choices"][0]["turns"][1] and len(second["choices"][0]["turns"]) == 2
    heats = [json.loads(line)["temperature"] for line in (tmp_path / "in2.jsonl").read_text().splitlines()]
    assert heats == [0.7, 0]
    assert json.loads((tmp_path / "samples.jsonl").read_text()) == {
        "task_id": "HumanEval/0",
        "completion": "c",
    }


@pytest.mark.parametrize(
    "folder",
    [*(each for each in golden_folders() if each.name in GOLDEN), EMBEDDED],
    ids=lambda path: path.name,
)
def test_likelihoods_are_those_of_transformers(folder):
    """Continuations of one context, alike in their beginnings or not: sums within 1e-3."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = PlainRunner(load_model(folder, torch.device("cpu"), torch.float32))
    numbers, most = random.Random(3), ours.config.vocab_size
    scheduler = Scheduler(ours, None, 8)
    for length in (1, 60, 70):
        context = [numbers.randrange(most) for _ in range(length)]
        follow = [[numbers.randrange(most) for _ in range(count)] for count in (1, 1, 3, 5)]
        follow.append([*follow[3][:2], 1])
        read = readings(context, follow)
        assert len(read) == 4  # two of one token are one prompt
        assert not any(job.error for job in scheduler.in_order(each.job() for each in read))
        for tokens in follow:
            with torch.no_grad():
                scores = theirs(torch.tensor([context + tokens])).logits[0].float().log_softmax(-1)
            rows = scores[len(context) - 1 : -1]
            found = likely(context, tokens, read)
            wanted = rows.gather(1, torch.tensor(tokens)[:, None])
            assert found.total == pytest.approx(float(wanted.sum()), abs=1e-3)
            assert found.greedy == (rows.argmax(-1).tolist() == tokens)
