"""Many answers at once, and complete's ways of asking: the same words as one by one, in order, none lost or
repeated.
"""

from __future__ import annotations

import json
import signal
import time

import pytest
from conftest import DATA
from running import run_dsv2

from dsv2cli.checkpoint.tokenizer import Tokenizer
from dsv2cli.engine.batch import Job, run_batch, run_samples
from dsv2cli.engine.generate import Request, Result, stream_text
from dsv2cli.engine.sampling import SamplingParams

V2 = str(DATA / "golden" / "v2")
GREEDY = SamplingParams(temperature=0.0)
PROMPTS = [
    "Once upon a time",
    "The bear",
    "A",
    "Tell me about the sun. " * 20,
    "One day a small dog went to the garden and",
]


def alone(model, tokenizer, job):
    result = Result()
    list(stream_text(model, tokenizer, job.prompt_ids, job.request, model.new_cache(), result))
    return result


@pytest.mark.parametrize("width", [1, 3, 8])
def test_a_batch_says_what_each_prompt_gets_alone_and_in_order(embedded, embedded_tokenizer, width):
    ids = [embedded_tokenizer.encode(text) for text in PROMPTS]
    jobs = [
        Job(prompt, Request(GREEDY, 5 + 7 * i, frozenset({4095}), stop=("!",)))
        for i, prompt in enumerate(ids)
    ]
    jobs.insert(2, Job([], Request(), error="no prompt"))
    given = list(run_batch(embedded, embedded_tokenizer, jobs, width))
    assert given == jobs
    for job in jobs:
        if not job.error:
            expected = alone(embedded, embedded_tokenizer, job)
            assert job.result.token_ids == expected.token_ids
            assert (job.result.text, job.result.finish_reason) == (expected.text, expected.finish_reason)


def test_samples_are_what_their_seeds_give_alone(embedded, embedded_tokenizer):
    ids = embedded_tokenizer.encode(PROMPTS[0])
    jobs = [Job(ids, Request(SamplingParams(0.7), 12, seed=seed)) for seed in range(4)]
    assert list(run_samples(embedded, embedded_tokenizer, jobs)) == jobs
    assert [job.result.text for job in jobs] == [
        alone(embedded, embedded_tokenizer, job).text for job in jobs
    ]
    assert len({job.result.text for job in jobs}) > 1


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_speculation_changes_no_word(embedded, embedded_tokenizer: Tokenizer, temperature):
    """Greedy and sampled; also where the text repeats itself and where the limit or the end falls into a
    draft.
    """
    for text in (*PROMPTS, "1 2 3 1 2 3 1 2 3 1 2"):
        for count in (1, 2, 7, 60):
            results = []
            for speculate in (False, True):
                request = Request(
                    SamplingParams(temperature), count, frozenset({4095}), seed=3, speculate=speculate
                )
                results.append(
                    alone(embedded, embedded_tokenizer, Job(embedded_tokenizer.encode(text), request))
                )
            assert results[0].token_ids == results[1].token_ids
            assert results[0].finish_reason == results[1].finish_reason


def test_speculation_leaves_the_cache_as_it_should_be(embedded, embedded_tokenizer):
    ids, cache, result = embedded_tokenizer.encode("1 2 3 1 2 3 1 2"), embedded.new_cache(), Result()
    list(stream_text(embedded, embedded_tokenizer, ids, Request(GREEDY, 20, speculate=True), cache, result))
    assert len(ids) < cache.lengths[0] <= len(ids) + len(result.token_ids) + 7
    follow = ids + result.token_ids
    cache.truncate(len(follow) - 1)
    again = Result()
    list(stream_text(embedded, embedded_tokenizer, follow, Request(GREEDY, 10), cache, again))
    assert again.token_ids == alone(embedded, embedded_tokenizer, Job(follow, Request(GREEDY, 10))).token_ids


def test_a_thousand_prompts_with_two_kills_give_a_thousand_answers_in_order(start, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    count = 1000
    asked = ({"id": f"q{i}", "prompt_ids": [1 + i % 90, i // 90 % 90]} for i in range(count))
    source.write_text("".join(json.dumps(line) + "\n" for line in asked))
    command = ("complete", "--batch", str(source), "--output", str(out), "-m", V2, "-n", "2", "--seed", "1")
    lines = lambda: out.read_bytes().count(b"\n") if out.exists() else 0  # noqa: E731
    for stop_at in (50, 300):
        process = start(*command, "--batch-size", "8")
        while lines() < stop_at and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL and lines() < count
        with out.open("ab") as file:
            file.write(b'{"id": "q')  # what a kill in the middle of a line leaves
    done = run_dsv2(*command, "--batch-size", "64")
    assert done.returncode == 0 and done.stdout == done.stderr == ""
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [answer["id"] for answer in answers] == [f"q{i}" for i in range(count)]
    assert all(
        len(answer["token_ids"]) in (1, 2) and answer["seed"] == 1 + answer["line"] for answer in answers
    )
    again = run_dsv2(*command)
    assert again.returncode == 0 and lines() == count


def batch(tmp_path, *lines, options=()):
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    return run_dsv2(
        "complete",
        "--batch",
        str(tmp_path / "in.jsonl"),
        "--output",
        str(tmp_path / "out.jsonl"),
        "-n",
        "3",
        "--seed",
        "0",
        *options,
    )


def test_a_line_may_say_more_than_its_prompt(tmp_path):
    messages = [{"role": "user", "content": "Hello"}]
    asked = (
        {"prompt": "Once upon"},
        {"id": 7, "messages": messages, "max_new_tokens": 5, "temperature": 0},
        {"prompt": "Once upon", "seed": 1, "stop": [" "]},
    )
    done = batch(tmp_path, *map(json.dumps, asked), options=("--logprobs", "1"))
    assert done.returncode == 0, done.stderr
    first, second, third = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert (first["id"], first["line"], second["id"], third["id"]) == (1, 1, 7, 3)
    alone = json.loads(run_dsv2("complete", "Once upon", "-n", "3", "--seed", "1", "--json").stdout)
    assert first["seed"] == alone["seed"] == 1 and first["text"] == alone["text"]
    assert len(first["logprobs"]) == 3 and len(second["token_ids"]) == 5 and third["finish_reason"] == "stop"


def test_bad_lines_are_named_and_skipped_or_end_it_before_it_begins(tmp_path):
    bad = [
        "{",
        "[1]",
        '{"id": "x"}',
        '{"prompt": "a", "prompt_ids": [1]}',
        '{"prompt": "a", "colour": 1}',
        '{"prompt_ids": [99999]}',
        '{"prompt": "a", "temperature": -1}',
        '{"prompt": "a", "seed": "b"}',
        '{"messages": [{"role": "x", "content": "y"}]}',
    ]
    for line in bad:
        done = batch(tmp_path, '{"prompt": "Once"}', "", line)
        assert done.returncode == 2 and "line 3" in done.stderr and "Traceback" not in done.stderr, (
            line,
            done.stderr,
        )
        assert not (tmp_path / "out.jsonl").exists()
    done = batch(tmp_path, '{"prompt": "Once"}', *bad, '{"prompt": "A"}', options=("--on-bad-line", "skip"))
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer["line"] for answer in answers] == list(range(1, len(bad) + 3))
    assert ["error" in answer for answer in answers] == [False] + [True] * len(bad) + [False]


def test_answers_to_other_prompts_are_not_written_over(tmp_path):
    assert batch(tmp_path, '{"id": "a", "prompt": "Once"}').returncode == 0
    kept = (tmp_path / "out.jsonl").read_text()
    for other in ('{"id": "b", "prompt": "Once"}', ""):
        done = batch(tmp_path, other)
        assert done.returncode == 2 and "other prompts" in done.stderr
    assert kept.count("\n") == 1
    for letter in ("a letter to my aunt\n", "a letter without an end", kept + "Dear aunt"):
        (tmp_path / "out.jsonl").write_text(letter)
        assert batch(tmp_path, '{"id": "a", "prompt": "Once"}').returncode == 2
        assert (tmp_path / "out.jsonl").read_text() == letter


def test_a_message_goes_through_the_template(tmp_path, embedded_tokenizer):
    (tmp_path / "talk.json").write_text(
        json.dumps([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}])
    )
    options = ("--json", "-n", "1", "--seed", "0")
    ids = [
        json.loads(run_dsv2("complete", *way, *options).stdout)["prompt_ids"]
        for way in (
            ("--chat", "--system", "Be kind.", "Hello"),
            ("--system", "Be kind.", "Hello"),
            ("--messages", str(tmp_path / "talk.json")),
        )
    ]
    assert (
        ids[0]
        == ids[1]
        == ids[2]
        == embedded_tokenizer.encode_chat(json.loads((tmp_path / "talk.json").read_text()))
    )


def test_echo_samples_speculation_and_the_token_limit_from_outside():
    options = ("--temperature", "0", "-n", "8")
    plain = run_dsv2("complete", "Once upon a time", *options).stdout
    assert run_dsv2("complete", "Once upon a time", *options, "--echo").stdout == "Once upon a time" + plain
    assert run_dsv2("complete", "Once upon a time", *options, "--speculate").stdout == plain
    done = run_dsv2("complete", "Once upon a time", *options, "--fail-on-length")
    assert done.returncode == 3 and done.stdout == plain and done.stderr == ""
    done = run_dsv2(
        "complete", "Once upon a time", "--samples", "3", "--seed", "5", "--json", "-n", "8", "--echo"
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["seed"] for answer in answers] == [5, 6, 7] and all(
        answer["text"].startswith("Once upon") for answer in answers
    )


@pytest.mark.parametrize(
    "wrong",
    [
        ("a", "--samples", "2"),
        ("a", "--messages", "x"),
        ("--batch", "x"),
        ("a", "--output", "x"),
        ("--messages", "/nowhere"),
        ("--speculate", "a", "--samples", "2", "--json"),
        ("--prompt-ids", "1", "--chat"),
        ("--batch", "/nowhere", "--output", "x"),
    ],
    ids=" ".join,
)
def test_what_does_not_go_together_is_wrong_usage(wrong):
    done = run_dsv2("complete", *wrong)
    assert (
        done.returncode == 2
        and done.stdout == ""
        and "error:" in done.stderr
        and "Traceback" not in done.stderr
    )
