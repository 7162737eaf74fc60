"""Many answers at once, and complete's ways of asking: the same words as one by one, in order, none lost or
repeated.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
import subprocess
import time

import pytest
from conftest import DATA
from rows import answered
from running import run_dsv2

from dsv2cli.checkpoint.tokenizer import Tokenizer
from dsv2cli.engine.request import Request, SamplingParams
from dsv2cli.engine.scheduler import Job, Scheduler
from dsv2cli.engine.session import Session
from dsv2cli.hubs.find import EMBEDDED

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
    return answered(model, job.prompt_ids, job.request, tokenizer)


@pytest.mark.parametrize("width", [1, 3, 8])
def test_a_batch_says_what_each_prompt_gets_alone_and_in_order(embedded, embedded_tokenizer, width):
    ids = [embedded_tokenizer.encode(text) for text in PROMPTS]
    jobs = [
        Job(prompt, Request(GREEDY, 5 + 7 * i, frozenset({4095}), stop=("!",)))
        for i, prompt in enumerate(ids)
    ]
    jobs.insert(2, Job([], Request(), error="no prompt"))
    given = list(Scheduler(embedded, embedded_tokenizer, width).in_order(jobs))
    assert given == jobs
    for job in jobs:
        if not job.error:
            expected = alone(embedded, embedded_tokenizer, job)
            assert job.result.token_ids == expected.token_ids
            assert (job.result.text, job.result.finish_reason) == (expected.text, expected.finish_reason)


def test_samples_are_what_their_seeds_give_alone(embedded, embedded_tokenizer):
    ids = embedded_tokenizer.encode(PROMPTS[0])
    jobs = [Job(ids, Request(SamplingParams(0.7), 12, seed=seed)) for seed in range(4)]
    assert list(Scheduler(embedded, embedded_tokenizer).samples(jobs)) == jobs
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


def test_what_is_said_to_be_in_the_pool_after_drafts_is_there(embedded, embedded_tokenizer):
    session, ids = Session(embedded, embedded_tokenizer), embedded_tokenizer.encode("1 2 3 1 2 3 1 2")
    job = Job(ids, Request(GREEDY, 20, speculate=True), after=session.sequence)
    list(session.scheduler.stream(job))
    follow = ids + job.result.token_ids
    assert session.sequence.length == len(follow) - 1
    again = Job(follow, Request(GREEDY, 10), after=session.sequence)
    list(session.scheduler.stream(again))
    assert again.result.reused_tokens == len(follow) - 1
    wanted = alone(embedded, embedded_tokenizer, Job(follow, Request(GREEDY, 10)))
    assert again.result.token_ids == wanted.token_ids


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


def batch(tmp_path, *lines, options=(), seed=("--seed", "0")):
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    return run_dsv2(
        "complete",
        "--batch",
        str(tmp_path / "in.jsonl"),
        "--output",
        str(tmp_path / "out.jsonl"),
        "-n",
        "3",
        *seed,
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


def answers_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


PAIR = ('{"prompt": "Once"}', '{"prompt": "The"}')


@pytest.mark.parametrize(
    ("lines", "options", "words"),
    [
        (('{"prompt": "New"}', *PAIR), (), "line 1 was answered with another prompt"),
        ((PAIR[1], PAIR[0]), (), "another prompt"),
        ((PAIR[0], '{"prompt": "These"}'), (), "line 2 was answered with another prompt"),
        ((PAIR[0], '{"prompt": "The", "temperature": 0.9}'), (), "another prompt"),
        (PAIR[:1], (), "more answers than there are prompts"),
        (PAIR, ("--temperature", "0.7"), "other options"),
        (PAIR, ("-n", "4"), "other options"),
        (PAIR, ("--seed", "5"), "other options"),
        (PAIR, ("--stop", "x"), "other options"),
        (PAIR, ("--logprobs", "1"), "other options"),
        (PAIR, ("--ignore-eos",), "other options"),
        (PAIR, ("--regex", "a+"), "other options"),
        (PAIR, ("--model", "copy"), "another model"),
        (PAIR, ("--dtype", "bfloat16"), "another model"),
    ],
)
def test_answers_to_other_prompts_options_or_models_are_refused_and_kept(tmp_path, lines, options, words):
    assert batch(tmp_path, *PAIR).returncode == 0
    before = (tmp_path / "out.jsonl").read_bytes()
    if "copy" in options:
        shutil.copytree(EMBEDDED, tmp_path / "copy")
        settings = json.loads((tmp_path / "copy" / "generation_config.json").read_text())
        (tmp_path / "copy" / "generation_config.json").write_text(json.dumps(settings, indent=3))
        options = ("--model", str(tmp_path / "copy"))
    done = batch(tmp_path, *lines, options=options)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert batch(tmp_path, *lines, options=(*options, "--restart")).returncode == 0
    assert len(answers_of(tmp_path)) == len(lines) and (tmp_path / "out.jsonl.1").read_bytes() == before


def test_more_prompts_and_no_chosen_seed_go_on_where_it_stopped(tmp_path):
    assert batch(tmp_path, PAIR[0], seed=()).returncode == 0
    first = (tmp_path / "out.jsonl").read_text()
    assert batch(tmp_path, *PAIR, seed=()).returncode == 0
    assert (tmp_path / "out.jsonl").read_text().startswith(first) and len(answers_of(tmp_path)) == 2


@pytest.mark.parametrize(
    "text",
    [
        "notes that somebody wrote\n",
        "notes without a line's end",
        '{"id": 1}\n',
        '{"id": 1, "x": "cut o',
        '{"id": 3, "line": 3, "text": "cut o',
        '{"id": "1", "line": 1, ',
        "\n\n",
        "\x00" * 40,
    ],
)
def test_what_was_in_the_output_is_never_destroyed(tmp_path, text):
    (tmp_path / "out.jsonl").write_text(text)
    done = batch(tmp_path, *PAIR)
    assert done.returncode == 2 and "something else" in done.stderr
    assert (tmp_path / "out.jsonl").read_text() == text


@pytest.mark.parametrize("length", [1, 7, 12, 30, 200])
def test_an_answer_that_a_kill_cut_off_is_made_again(tmp_path, length):
    assert batch(tmp_path, *PAIR).returncode == 0
    whole = (tmp_path / "out.jsonl").read_bytes()
    first = whole.index(b"\n") + 1
    (tmp_path / "out.jsonl").write_bytes(whole[: first + length])
    assert batch(tmp_path, *PAIR).returncode == 0
    assert [answer["text"] for answer in answers_of(tmp_path)] == [
        json.loads(line)["text"] for line in whole.splitlines()
    ]


def test_a_second_run_is_told_that_the_output_is_being_written(start, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "Once"}\n' * 3)
    out = tmp_path / "out.jsonl"
    with out.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for options in ((), ("--restart",)):
            done = batch(tmp_path, *PAIR, options=options)
            assert done.returncode == 2 and "Another run is writing" in done.stderr
    assert out.read_bytes() == b""
    assert batch(tmp_path, *PAIR).returncode == 0


def test_prompts_from_a_pipe_are_answered_before_the_last_has_come(start, tmp_path):
    process = start(
        "complete", "--batch", "-", "--output", "-", "-n", "2", "--seed", "1", stdin=subprocess.PIPE
    )
    said = []
    for text in ("Once", "The", "A"):
        process.stdin.write(json.dumps({"prompt": text}) + "\n")
        process.stdin.flush()
        said.append(json.loads(process.stdout.readline()))
    process.stdin.close()
    assert process.wait(timeout=60) == 0 and [answer["line"] for answer in said] == [1, 2, 3]
    done = run_dsv2(
        "complete",
        "--jsonl",
        "-n",
        "2",
        "--seed",
        "1",
        stdin="\n".join(json.dumps({"prompt": text}) for text in ("Once", "The", "A")),
    )
    assert [json.loads(line)["text"] for line in done.stdout.splitlines()] == [
        answer["text"] for answer in said
    ]


def test_a_bad_line_from_a_pipe_ends_it_after_those_before_it(tmp_path):
    stdin = "\n".join([*PAIR, '{"prompt": 5}', *PAIR])
    done = run_dsv2("complete", "--batch", "-", "--output", "-", "-n", "2", "--seed", "1", stdin=stdin)
    assert done.returncode == 2 and "line 3" in done.stderr
    assert [json.loads(line)["line"] for line in done.stdout.splitlines()] == [1, 2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_samples_that_are_interrupted_give_what_there_is(start, number):
    process = start(
        "complete", "Once", "--samples", "3", "--json", "-n", "4000", "--ignore-eos", "--seed", "1"
    )
    time.sleep(2.5)
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in errors
    answers = [json.loads(line) for line in out.splitlines()]
    assert len(answers) == 3 and {answer["finish_reason"] for answer in answers} == {"interrupted"}
    assert all(answer["prompt_ids"] for answer in answers)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "tool", "content": "x"}, "message 1 has the role 'tool'"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "message 1 has parts that are no text"),
        ({"role": "user", "content": None}, "message 1 has no text"),
        ({"role": "user"}, "message 1 has no text"),
        ({"role": "user", "content": []}, "message 1 has no text"),
        ("hello", "message 1 is no object"),
    ],
)
def test_a_message_that_can_not_be_one_is_named_by_its_place(tmp_path, message, words):
    (tmp_path / "m.json").write_text(json.dumps([{"role": "user", "content": "Hi"}, message]))
    done = run_dsv2("complete", "--messages", str(tmp_path / "m.json"))
    assert done.returncode in (1, 2) and words in done.stderr


def test_messages_may_be_written_as_openai_has_them(tmp_path):
    (tmp_path / "a.json").write_text(
        json.dumps(
            [
                {
                    "role": "developer",
                    "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}],
                },
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            ]
        )
    )
    (tmp_path / "b.json").write_text(
        json.dumps([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}])
    )
    one, other = (
        json.loads(run_dsv2("complete", "--messages", str(tmp_path / name), "--json", "-n", "1").stdout)
        for name in ("a.json", "b.json")
    )
    assert one["prompt_ids"] == other["prompt_ids"]


def test_the_last_newline_of_a_pipe_is_no_part_of_the_prompt():
    def ids(*arguments, stdin):
        return json.loads(run_dsv2("complete", *arguments, "--json", "-n", "1", stdin=stdin).stdout)[
            "prompt_ids"
        ]

    assert (
        ids(stdin="Once\n")
        == ids(stdin="Once")
        == ids(stdin="Once\r\n")
        != ids("--keep-newline", stdin="Once\n")
    )
    assert ids(stdin="Once\n\n") == ids("--keep-newline", stdin="Once\n")
    assert ids("upon", stdin="Once\n") == ids("--keep-newline", stdin="Once\nupon")
    assert ids("--chat", stdin="Hello\n") == ids("--chat", "Hello", stdin="")


def test_an_answer_joins_its_prefix_by_one_blank():
    def said(*arguments):
        return run_dsv2(
            "complete", "--chat", "Hello", *arguments, "-n", "6", "--temperature", "0", "--json"
        ).stdout

    plain = json.loads(said())
    assert not plain["text"].startswith(" ")
    word = plain["text"].split()[0]
    for prefix in (word, word + " "):
        joined = json.loads(said("--prefix", prefix))
        assert joined["text"].split()[:4] == plain["text"].split()[:4] and "  " not in joined["text"]
        text = run_dsv2(
            "complete", "--chat", "Hello", "--prefix", prefix, "-n", "6", "--temperature", "0"
        ).stdout
        assert text == joined["text"]


def test_a_stop_text_that_can_stop_nothing_is_refused(tmp_path):
    done = run_dsv2("complete", "Once", "--stop", "")
    assert done.returncode == 2 and "--stop is empty" in done.stderr
    done = run_dsv2("complete", "--prompt-ids", "1,2", "--model", V2, "--stop", "x")
    assert done.returncode == 2 and "needs a tokenizer" in done.stderr
    done = run_dsv2("complete", "-5 degrees")
    assert done.returncode == 2 and "-- '-5 degrees'" in done.stderr


def test_a_schema_may_come_from_stdin_and_may_be_true():
    done = run_dsv2(
        "complete", "Once", "--json-schema", "-", "-n", "30", "--seed", "1", stdin='{"type": "boolean"}'
    )
    assert done.stdout.strip() in ("true", "false")
    done = run_dsv2("complete", "Once", "--json-schema", "-", "-n", "3", "--seed", "1", stdin="true")
    assert done.returncode == 0, done.stderr
    done = run_dsv2("complete", "Once", "--json-schema", "-", "-n", "3", stdin="false")
    assert done.returncode == 2 and "--json-schema" in done.stderr


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
    scored = json.loads(run_dsv2("complete", "Once upon a time", *options, "--prompt-logprobs", "2").stdout)
    assert [each["token_id"] for each in scored["prompt_logprobs"]] == scored["prompt_ids"][1:]
    assert all(each["logprob"] <= each["top"][0][1] <= 0 for each in scored["prompt_logprobs"])
    assert scored["text"] == plain and scored["logprobs"] is None
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
