"""`--api`: commands that let a server answer. The server is `dsv2 serve`, or one that does what servers do on
their bad days.
"""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from running import run_dsv2, run_process

from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.remote import server as remote
from dsv2cli.remote.calls import Call, ServerRequest
from dsv2cli.remote.server import Address, Server
from dsv2cli.serve.door import Door

KEY = "a-key-that-nobody-knows"
GREEDY = ("--temperature", "0", "-n", "12")
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def api(start_server):
    return f"localhost:{start_server(waiting=64)[1].port}"


@contextmanager
def odd_server(*answers, models=("odd",)):
    """Gives one after the other of these answers to POST requests, the last one for ever: (status, headers,
    body), where a body of several parts is a stream, and None in it the end of the connection. Yields its
    address and what it was asked. A number in a stream is a pause.
    """
    asked, left = [], list(answers)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *words):
            pass

        def do_GET(self):
            asked.append((self.path, dict(self.headers), None))
            self.send(200, {}, json.dumps({"data": [{"id": name} for name in models]}))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append((self.path, dict(self.headers), body))
            self.send(*(left.pop(0) if len(left) > 1 else left[0]))

        def send(self, status, headers, body):
            self.send_response(status)
            if isinstance(body, str):
                data = body.encode()
                self.send_header("content-length", str(len(data)))
            else:
                self.send_header("content-type", "text/event-stream")
                self.send_header("connection", "close")
                self.close_connection = True
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            for part in [data] if isinstance(body, str) else body:
                if part is None:
                    self.wfile.flush()
                    self.connection.close()
                    return
                if isinstance(part, float):
                    time.sleep(part)
                    continue
                self.wfile.write(part if isinstance(part, bytes) else part.encode())
                self.wfile.flush()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def event(text, **choice):
    """An event of a stream of a completion."""
    choice = {"index": 0, "finish_reason": None, "text": text} | choice
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


def chat_event(text):
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': {'content': text}}]})}\n\n"


WHOLE = (200, {}, [event(" upon"), event(" a time"), event("", finish_reason="stop"), "data: [DONE]\n\n"])
BUSY = (429, {"retry-after": "0"}, '{"error": {"message": "too many"}}')


@pytest.mark.parametrize(
    "asked",
    [
        ("Once upon a time",),
        ("--chat", "Hello"),
        ("--system", "You are a poet.", "Hello"),
        ("--prefix", "The cat", "--echo", "Tell me."),
        ("--stop", "a", "Once upon a time"),
        ("--prompt-ids", "7,8,9"),
    ],
)
def test_a_server_says_what_the_model_here_says(api, asked):
    here, there = run_dsv2("complete", *asked, *GREEDY), run_dsv2("complete", "--api", api, *asked, *GREEDY)
    assert (there.returncode, there.stdout) == (here.returncode, here.stdout) and here.stdout.strip()
    ours, theirs = (
        json.loads(run_dsv2("complete", *asked, *GREEDY, "--json", "--seed", "3", *more).stdout)
        for more in ((), ("--api", api))
    )
    assert ours.keys() == theirs.keys()
    for key in ("text", "finish_reason", "seed"):
        assert ours[key] == theirs[key]
    for key in ("prompt_tokens", "generated_tokens"):
        assert ours["usage"][key] == theirs["usage"][key]
    assert theirs["token_ids"] is None and theirs["model"] == "embedded"
    assert theirs["timing"]["decode_tokens_per_second"] > 0


def test_seeds_and_samples_are_the_servers(api):
    asked = ("complete", "--json", "--samples", "3", "--seed", "5", "-n", "8", "--temperature", "1", "Once")
    here, there = (run_dsv2(*asked, *more).stdout.splitlines() for more in ((), ("--api", api)))
    assert len(there) == 3
    for ours, theirs in zip(map(json.loads, here), map(json.loads, there), strict=True):
        assert (ours["text"], ours["seed"]) == (theirs["text"], theirs["seed"])


def test_log_probabilities_are_told_in_texts(api):
    for more in ((), ("--chat",)):
        asked = ("complete", *more, *GREEDY, "--logprobs", "2", "Hello")
        ours, theirs = (json.loads(run_dsv2(*asked, *x).stdout)["logprobs"] for x in ((), ("--api", api)))
        assert [each["logprob"] for each in theirs] == pytest.approx(
            [each["logprob"] for each in ours], abs=1e-5
        )
        assert all(isinstance(each["token"], str) and len(each["top"]) == 2 for each in theirs)
    with odd_server(WHOLE) as (url, _):
        done = run_dsv2("complete", "--api", url, "--logprobs", "2", "Once")
        assert done.returncode == 1 and "gave no log probabilities" in done.stderr
        assert json.loads(done.stdout)["text"] == " upon a time"


def test_an_answer_is_held_to_a_schema(api, tmp_path):
    schema = {"enum": ["Rome", "Oslo"]}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    asked = ("complete", "--api", api, "--json-schema", str(tmp_path / "schema.json"), "-n", "20", "Where?")
    assert json.loads(run_dsv2(*asked, "--chat").stdout) in ("Rome", "Oslo")
    done = run_dsv2(*asked)
    assert done.returncode == 2 and "--chat" in done.stderr


def test_a_batch_is_answered_in_order_goes_on_and_says_what_the_server_refuses(api, tmp_path):
    lines = [{"prompt": f"The number {n} is", "id": n} for n in range(20)]
    lines += [{"messages": HELLO, "id": "hello"}, {"prompt_ids": [1, 2, 3], "max_new_tokens": 3, "id": "ids"}]
    lines += [
        {"prompt": "long " * 5000, "id": "long"},
        {"prompt": "", "id": "none"},
        {"prompt": "End", "id": "end"},
    ]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = ("complete", "--batch", str(source), "--output", str(out), *GREEDY, "--on-bad-line", "skip")
    assert run_dsv2(*asked, "--api", api).returncode == 0
    theirs = [json.loads(line) for line in out.read_text().splitlines()]
    assert [each["id"] for each in theirs] == [line["id"] for line in lines]
    assert "4,096" in theirs[22]["error"] and "no prompt" in theirs[23]["error"]
    kept = out.read_text()
    out.write_text("".join(line + "\n" for line in kept.splitlines()[:9]) + kept.splitlines()[9][:40])
    assert run_dsv2(*asked, "--api", api).returncode == 0
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert [each.get("text") for each in again] == [each.get("text") for each in theirs]
    assert "belongs to other prompts" in run_dsv2(*asked).stderr
    ours = tmp_path / "ours.jsonl"
    run_dsv2("complete", "--batch", str(source), "--output", str(ours), *GREEDY, "--on-bad-line", "skip")
    here = [json.loads(line).get("text") for line in ours.read_text().splitlines()]
    there = [each.get("text") for each in theirs]
    assert [text and text.strip() for text in here] == [text and text.strip() for text in there]


def test_each_line_of_a_pipe_is_answered_before_the_next_is_read(api, start):
    process = start("complete", "--api", api, "--jsonl", *GREEDY, stdin=-1)
    for n in range(3):
        process.stdin.write(json.dumps({"prompt": f"Once {n}", "id": n}) + "\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["id"] == n
    process.stdin.close()
    assert process.wait(10) == 0


def test_a_talk_from_a_pipe_is_the_same_talk(api):
    turns = "Hello\nWho are you?\nThank you\n"
    settings = ("--temperature", "0", "-n", "20", "--system", "Be kind.")
    here, there = (run_dsv2("chat", *settings, *more, stdin=turns) for more in ((), ("--api", api)))
    assert here.returncode == there.returncode == 0 and here.stdout == there.stdout != ""
    lists = json.dumps(HELLO) + "\n[]\n"
    ours, theirs = (
        run_dsv2("chat", "--json", *settings, *more, stdin=lists) for more in ((), ("--api", api))
    )
    assert [each.get("content") for each in map(json.loads, ours.stdout.splitlines())] == [
        each.get("content") for each in map(json.loads, theirs.stdout.splitlines())
    ]
    assert ours.returncode == theirs.returncode == 2


def test_a_person_talks_with_a_server_as_with_a_model_here(api, person, tmp_path):
    me = person(
        "chat", "--api", api, "--temperature", "0", "-n", "30", columns=200, XDG_DATA_HOME=str(tmp_path)
    )
    me.wait("> ")
    me.ask("Hello")
    me.wait(r"\d+ tokens .* prompt 8 .* stop")
    me.wait(r"embedded .* 24/4,096 tokens")
    me.type("/show\r")
    seen = me.wait(r"temperature 0.* stop none")
    assert f"embedded on http://{api}/v1" in seen and "top_p the server's own" in seen
    me.type("/tokens Hello there\r")
    me.wait(r"2 tokens: \[")
    me.type("/set max_new_tokens 3\r")
    me.ask("Tell me a story.")
    me.type("/continue\r")
    me.wait("/continue goes without --api")
    me.ask("/retry")
    me.leave()
    (file,) = (tmp_path / "dsv2" / "sessions").glob("*.jsonl")
    assert file.read_text().count('"assistant"') == 3
    done = run_dsv2("chat", "--api", api, "--resume", str(file), "-n", "5", stdin="And now?\n")
    assert done.returncode == 0 and done.stdout.strip()


def test_the_oldest_turns_are_left_out_where_the_server_counts_tokens(api):
    turns = "".join(f"Tell me about the number {n}. " * 60 + "\n" for n in range(9))
    asked = ("chat", "--api", api, "-n", "20", "--temperature", "0")
    done = run_dsv2(*asked, "--on-overflow", "drop", stdin=turns)
    assert done.returncode == 0 and done.stdout.count("\n") >= 9
    done = run_dsv2(*asked, stdin=turns)
    assert done.returncode == 2 and "4,096" in done.stderr


def test_models_of_a_server_are_listed(api, start_server):
    listed = json.loads(run_dsv2("models", "--api", api, "--json").stdout)["models"]
    assert [(each["name"], each["context"]) for each in listed] == [("embedded", 4096)]
    assert "in the package" in run_dsv2("models").stdout
    with odd_server(WHOLE, models=("one", "two")) as (url, asked):
        done = run_dsv2("complete", "--api", url, "Once")
        assert done.returncode == 2 and "one, two" in done.stderr and "--model" in done.stderr
        assert run_dsv2("complete", "--api", url, "-m", "two", "Once").stdout == " upon a time"
        assert asked[-1][2]["model"] == "two"


def test_a_server_is_measured_as_its_clients_see_it(api):
    asked = ("bench", "--api", api, "--concurrency", "1,3", "--prompt", "40", "--generate", "8", "-r", "1")
    told = json.loads(run_dsv2(*asked, "--json").stdout)
    assert [run["concurrency"] for run in told["runs"]] == [1, 3]
    for run in told["runs"]:
        assert run["requests"] == 4 * run["concurrency"] and run["output_tokens_per_second"]["median"] > 0
        new, every = (run[key]["median"] for key in ("output_tokens_per_second", "total_tokens_per_second"))
        assert every / new == pytest.approx((40 + 8) / 8, rel=0.2)
    assert run_dsv2(*asked).returncode == 0
    assert "--concurrency" in run_dsv2("bench", "--api", api).stderr


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (("complete", "x"), ("--regex", "a+")),
        (("complete", "x"), ("--speculate",)),
        (("complete", "x"), ("--prompt-logprobs", "1")),
        (("complete", "x"), ("--device", "cpu")),
        (("complete", "x"), ("--cache-store", "/tmp/x")),
        (("complete", "x", "--chat"), ("--prefix", "a")),
        (("chat",), ("--quantize", "int4")),
        (("bench", "--concurrency", "1"), ("--threads", "2")),
        (("bench", "--concurrency", "1"), ("--random-weights", "x")),
    ],
)
def test_what_a_server_can_not_do_is_said_by_name(api, command, option):
    done = run_dsv2(*command, "--api", api, *option)
    assert done.returncode == 2 and option[0] in done.stderr and "--api" in done.stderr


def test_the_key_comes_from_the_environment_and_is_shown_nowhere(start_server, tmp_path):
    port = start_server(Door((KEY,)))[1].port
    asked = ("complete", "--api", f"localhost:{port}", *GREEDY, "Once")
    for names in (
        {"DSV2_API_KEY": KEY},
        {"OPENAI_API_KEY": KEY},
        {"DSV2_API_KEY": KEY, "OPENAI_API_KEY": "no"},
    ):
        done = run_dsv2(*asked, **names)
        assert done.returncode == 0 and KEY not in done.stdout + done.stderr
    for names in ({}, {"DSV2_API_KEY": "wrong" + KEY}):
        done = run_dsv2(*asked, **names)
        assert done.returncode == 1 and "DSV2_API_KEY=..." in done.stderr and KEY not in done.stderr
    config = tmp_path / "config.toml"
    config.write_text(f'[servers.mine]\nurl = "localhost:{port}"\nkey-env = "MINE"\n[servers]\n')
    asked = ("complete", "--api", "mine", *GREEDY, "Once")
    assert run_dsv2(*asked, DSV2_CONFIG=str(config), MINE=KEY).returncode == 0
    assert "MINE is not set" in run_dsv2(*asked, DSV2_CONFIG=str(config), DSV2_API_KEY=KEY).stderr
    config.write_text(f'[complete]\napi = "mine"\n[servers]\nmine = "http://localhost:{port}/v1/"\n')
    done = run_dsv2("complete", *GREEDY, "Once", DSV2_CONFIG=str(config), DSV2_API_KEY=KEY)
    assert done.returncode == 0, done.stderr
    for wrong in (
        "[servers]\nmine = 5",
        '[servers.mine]\nmodel = "x"',
        '[servers.mine]\nurl = "x"\nkey = "y"',
    ):
        config.write_text(wrong + "\n")
        assert "servers.mine makes no sense" in run_dsv2(*asked, DSV2_CONFIG=str(config)).stderr


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("localhost:8000", "http://localhost:8000/v1"),
        ("http://10.0.0.1:8000/", "http://10.0.0.1:8000/v1"),
        ("https://a.example/v1/", "https://a.example/v1"),
        ("https://a.example/api/v3", "https://a.example/api/v3"),
        ("https://a.example/v1/chat/completions", "https://a.example/v1"),
        ("http://[::1]:80", "http://[::1]/v1"),
    ],
)
def test_an_address_is_what_people_type(text, url):
    assert Address.of(text).url == url


@pytest.mark.parametrize(
    "text",
    [
        "http://",
        "ftp://a",
        "http://me:secret@a",
        "http://a/?b",
        "http://a/#b",
        "http://[::1",
        "http://a:b",
        "http://a:99999",
    ],
)
def test_what_is_no_address_is_said(text):
    with pytest.raises(UsageError) as caught:
        Address.of(text)
    assert "secret" not in caught.value.sentence.replace(text, "") or "password" in caught.value.sentence


def test_settings_are_sent_as_they_were_given():
    with odd_server(WHOLE) as (url, asked):
        for given, field, value in (
            (("--seed", str(2**64 - 1)), "seed", 2**63 - 1),
            (("-n", "512"), "max_tokens", 512),
            (("--top-k", "5"), "top_k", 5),
            (("--ignore-eos",), "ignore_eos", True),
        ):
            assert run_dsv2("complete", "--api", url, *given, "--chat", "Once").returncode == 0
            assert asked[-1][2][field] == value and len(asked[-1][2]) == 5
        done = run_dsv2("complete", "--api", url, "--seed", "1", "--samples", "2", "--json", "Once")
        assert sorted(each[2]["seed"] for each in asked[-2:]) == [1, 2] and done.returncode == 0
        done = run_dsv2("complete", "--api", url, "--stop", "\udcff", "Once")
        assert done.returncode == 2 and "can be sent" in done.stderr
    with odd_server((400, {}, "no")) as (url, _):
        assert run_dsv2("complete", "--api", url, "--samples", "2", "--json", "Once").returncode == 2
        done = run_dsv2("bench", "--api", url, "--concurrency", "2")
        assert done.returncode == 2 and "Traceback" not in done.stderr


def test_log_probabilities_of_an_odd_shape_are_none():
    for odd in (5, [], {"content": 5}, {"content": [{"token": "a", "top_logprobs": 5}]}, {"tokens": 5}):
        scored = event(" upon", logprobs=odd, finish_reason="stop")
        with odd_server((200, {}, [scored, "data: [DONE]\n\n"])) as (url, _):
            done = run_dsv2("complete", "--api", url, "--logprobs", "1", "Once")
            assert done.returncode in (0, 1) and "Traceback" not in done.stderr


def test_a_key_goes_unencrypted_only_with_a_word():
    assert Address.of("http://10.0.0.1", "k").open and not Address.of("http://10.0.0.1").open
    assert not Address.of("http://localhost:1", "k").open and not Address.of("https://a.example", "k").open
    for key in ("ä", "a b\n", " a"):
        with pytest.raises(UsageError, match="key"):
            Address.of("localhost:1", key)


# Bad days.


def test_a_busy_server_is_asked_again(monkeypatch):
    with odd_server(BUSY, (503, {}, "no"), (200, {}, [None]), WHOLE) as (url, asked):
        done = run_dsv2("complete", "--api", url, "Once")
        assert (done.returncode, done.stdout) == (0, " upon a time") and len(asked) == 5
    monkeypatch.setattr(remote, "TRIES", 3)
    with odd_server(BUSY) as (url, asked):
        done = run_dsv2("complete", "--api", url, "Once")
        assert done.returncode == 1 and "429: too many" in done.stderr and len(asked) == 1 + 3


def test_a_cut_stream_keeps_its_text_and_is_no_success():
    cut = (200, {}, [event(" upon"), event(" a"), None])
    with odd_server(cut) as (url, asked):
        done = run_dsv2("complete", "--api", url, "Once")
        assert (done.returncode, done.stdout) == (1, " upon a") and "cut off" in done.stderr
        assert len(asked) == 2  # it is not asked for again: somebody has seen it
        done = run_dsv2("complete", "--api", url, "--json", "Once")
        told = json.loads(done.stdout)
        assert done.returncode == 1 and told["text"] == " upon a" and told["finish_reason"] == "error"
        assert "cut off" in told["error"]
    for late in (["data: [DONE]\n\n"], [event("", finish_reason="stop"), None]):
        with odd_server((200, {}, [event(" upon"), *late])) as (url, _):
            assert run_dsv2("complete", "--api", url, "Once").returncode == 0  # it said that it is the end
    with odd_server((200, {}, [event(" upon")])) as (url, _):
        assert run_dsv2("complete", "--api", url, "Once").returncode == 1
    with odd_server((200, {}, [event(" upon"), 'data: {"error": {"message": "out of memory"}}\n\n'])) as (
        url,
        _,
    ):
        done = run_dsv2("complete", "--api", url, "Once")
        assert (done.returncode, done.stdout) == (1, " upon") and "out of memory" in done.stderr


def test_in_a_batch_what_was_cut_is_asked_for_again(tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "Once"}\n')
    asked = ("--batch", str(source), "--output", str(out))
    with odd_server((200, {}, [event(" upon"), event(" a"), None]), WHOLE) as (url, _):
        assert run_dsv2("complete", "--api", url, *asked).returncode == 0
    assert json.loads(out.read_text())["text"] == " upon a time"


def test_a_batch_ends_where_the_server_does_and_goes_on_later(api, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "TRIES", 1)
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "Once"}\n' * 6)
    asked = ("--batch", str(source), "--output", str(out), "--batch-size", "2")
    with odd_server(WHOLE, WHOLE, WHOLE, (401, {}, "no key")) as (url, _):
        done = run_dsv2("complete", "--api", url, *asked)
        assert done.returncode == 1 and "does not let us in" in done.stderr
        texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
        assert texts == [" upon a time"] * len(texts) and 2 <= len(texts) <= 3


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((200, {"content-type": "application/json"}, "[]"), "no object"),
        ((200, {"content-type": "application/json"}, "{"), "can not be read"),
        ((200, {}, ["data: {nonsense\n\n"]), "can not be read"),
        ((200, {}, ["data: " + "x" * 17_000_000]), "line without end"),
        ((200, {}, ['data: {"choices": 5}\n\n']), "can not be read"),
        ((200, {"content-encoding": "gzip"}, "no gzip"), "does not answer"),
        ((301, {"location": "https://elsewhere.example/v1"}, ""), "elsewhere.example"),
        ((500, {}, "<html>" + "x" * 100_000), "500"),
    ],
)
def test_an_answer_that_is_none_is_an_error_in_words(answer, words, monkeypatch):
    monkeypatch.setattr(remote, "TRIES", 2)
    with odd_server(answer) as (url, _):
        done = run_dsv2("complete", "--api", url, "Once")
    assert done.returncode == 1 and words in done.stderr and done.stdout == ""
    assert len(done.stderr) < 2000 and "\x1b" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((404, {}, '{"detail": "Not Found"}'), "Not Found"),
        ((400, {}, '{"error": {"message": "\\u001b]0;owned\\u0007 bad"}}'), "bad"),
        ((422, {}, '{"detail": [{"msg": "seed"}]}'), "seed"),
        ((413, {}, "too large"), "too large"),
    ],
)
def test_what_a_server_refuses_is_wrong_usage(answer, words):
    with odd_server(answer) as (url, _):
        done = run_dsv2("complete", "--api", url, "Once")
    assert done.returncode == 2 and words in done.stderr and "\x1b" not in done.stderr


def test_a_server_that_answers_at_once_or_without_counts_is_understood():
    whole = {"choices": [{"index": 0, "message": {"content": "Good day"}, "finish_reason": "stop"}]}
    with odd_server((200, {"content-type": "application/json"}, json.dumps(whole))) as (url, _):
        assert run_dsv2("complete", "--api", url, "--chat", "Hello").stdout == "Good day"
    with odd_server(WHOLE) as (url, asked):
        told = json.loads(run_dsv2("complete", "--api", url, "--json", "Once").stdout)
        assert set(told["usage"].values()) == {None} and told["text"] == " upon a time"
        sent = asked[-1][2]
        assert sent.keys() == {"model", "prompt", "max_tokens", "stream", "stream_options"}
    picky = (400, {}, '{"error": "unknown field stream_options"}')
    with odd_server(picky, WHOLE) as (url, asked):
        assert run_dsv2("complete", "--api", url, "Once").stdout == " upon a time"
        assert "stream_options" not in asked[-1][2]


def test_pieces_may_be_cut_anywhere_and_end_their_lines_as_they_like():
    data = "".join(WHOLE[2]).replace("\n", "\r\n").encode() + b": a remark\r\n"
    with odd_server((200, {}, [data[i : i + 7] for i in range(0, len(data), 7)])) as (url, _):
        assert run_dsv2("complete", "--api", url, "Once").stdout == " upon a time"


def test_text_of_a_server_moves_no_cursor(in_terminal):
    evil = (200, {}, [event("\x1b[2J\x07bad"), event("", finish_reason="stop"), "data: [DONE]\n\n"])
    with odd_server(evil, models=("\x1b[31mred",)) as (url, _):
        screen = in_terminal("complete", "--api", url, "Once")
        screen.expect("bad")
        assert "\x1b[2J" not in screen.before + screen.after
        listed = in_terminal("models", "--api", url)
        listed.expect("red")
        assert "\x1b[31m" not in listed.before + listed.after


def test_no_server_is_said_at_once():
    began = time.monotonic()
    done = run_dsv2("complete", "--api", "127.0.0.1:9", "Once")
    assert done.returncode == 1 and "There is no server" in done.stderr and time.monotonic() - began < 5
    done = run_dsv2("chat", "--api", "127.0.0.1:9", stdin="Hello\n")
    assert done.returncode == 1 and "There is no server" in done.stderr and done.stdout == ""


def test_who_goes_away_ends_the_servers_work(start_server, start):
    server, client = start_server()
    process = start("complete", "--api", f"localhost:{client.port}", "-n", "4000", "--ignore-eos", "Once")
    assert process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    limit = time.monotonic() + 10
    while server.desk.held and time.monotonic() < limit:
        time.sleep(0.02)
    assert server.desk.held == 0


def test_a_message_that_gets_no_answer_is_back_at_the_prompt(person):
    with odd_server((500, {}, "no")) as (url, _):
        me = person("chat", "--api", url, "--no-save")
        me.wait("> ")
        me.type("Hello there, server\r")
        me.wait("failed")
        me.wait("your message is back at the prompt")
        me.wait(lambda text: text.count("> Hello there, server") == 2)


def test_an_answer_that_does_not_come_can_be_stopped(person):
    with odd_server((200, {}, [30.0])) as (url, _):
        me = person("chat", "--api", url, "--no-save")
        me.wait("> ")
        me.type("Hello\r")
        me.wait("waiting for the server")
        me.interrupt()
        me.wait("your message is back at the prompt")


def test_an_answer_that_breaks_off_is_kept(person, tmp_path):
    with odd_server((200, {}, [chat_event("Good "), chat_event("day"), None])) as (url, _):
        me = person("chat", "--api", url, XDG_DATA_HOME=str(tmp_path))
        me.wait("> ")
        me.type("Hello\r")
        me.wait("The answer was cut off")
        assert "Good day" in me.look()
        me.leave()
    done = run_dsv2("sessions", "--find", "Good day", XDG_DATA_HOME=str(tmp_path))
    assert "Good day" in done.stdout


def test_in_order_keeps_the_order_and_the_width():
    running, most, lock = [0], [0], threading.Lock()

    class Counting(Server):
        async def answer(self, call, tell=None):
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])
            await asyncio.sleep(float(call.prompt["prompt"]))
            running[0] -= 1
            call.result.finish_reason = "stop"
            if call.prompt["prompt"] == "0.001":
                raise Dsv2Error("refused")

    server = Counting(Address.of("localhost:1"))
    times = ["0.2", "0.01", "0.001", "0.05", "0.02"] * 4
    for between in ((), (None,)):
        calls = [Call({"prompt": each}, ServerRequest()) for each in times]
        done = list(server.in_order([each for call in calls for each in (*between, call)], 3))
        assert done == calls
        assert [call.error for call in done] == ["refused" if each == "0.001" else "" for each in times]
    assert most[0] == 3


def test_a_batch_goes_on_in_another_process(api, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "Once"}\n' * 3)
    asked = (
        "complete",
        "--api",
        api,
        "--batch",
        str(source),
        "--output",
        str(out),
        *GREEDY,
        "--top-p",
        "0.9",
    )
    for seed in ("1", "2", "3"):
        done = run_process(*asked, "--min-p", "0.1", PYTHONHASHSEED=seed)
        assert done.returncode == 0, done.stderr
    assert len(out.read_text().splitlines()) == 3


@pytest.mark.parametrize("variable", ["ALL_PROXY", "SSL_CERT_FILE"])
def test_variables_that_lead_nowhere_are_named(variable):
    done = run_process("complete", "--api", "https://localhost:9", "Once", **{variable: "/nowhere"})
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr and done.stderr.startswith("error")


def test_a_server_that_lists_nothing_still_answers_to_a_name():
    with odd_server(WHOLE, models=()) as (url, _):
        done = run_dsv2("complete", "--api", url, "Once")
        assert done.returncode == 2 and "0 models" in done.stderr
        assert run_dsv2("complete", "--api", url, "-m", "x", "Once").stdout == " upon a time"
