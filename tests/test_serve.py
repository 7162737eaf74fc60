"""The server as other programs meet it: over a socket, in OpenAI's words."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from regenerate import PAGE, with_hashes
from rows import answered
from running import run_dsv2
from serving import GREEDY, HELLO, Client

from dsv2cli.cli.serve import listen
from dsv2cli.engine.request import Request, SamplingParams
from dsv2cli.errors import Dsv2Error
from dsv2cli.serve.door import Door
from dsv2cli.serve.tools import in_words

DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
ADD = {"type": "function", "function": {"name": "add"}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Says how the weather is.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"$ref": "#/$defs/city"}},
                "required": ["city"],
                "additionalProperties": False,
                "$defs": {"city": {"enum": ["Rome", "Oslo"]}},
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "maximum": 9},
                    "b": {"type": "integer", "minimum": 5},
                },
                "required": ["a", "b"],
                "additionalProperties": False,
            },
        },
    },
]


def function(name, parameters):
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


KEY = "a-key-that-nobody-knows"


@pytest.fixture(scope="module")
def served(start_server):
    return start_server()


@pytest.fixture
def client(served):
    return served[1]


def test_a_chat_is_answered_as_the_command_line_answers_it(client):
    asked = ("complete", "--chat", "Hello", "-n", "12", "--temperature", "0", "--json")
    wanted = json.loads(run_dsv2(*asked).stdout)
    answer = client.chat(model="embedded", logprobs=True, top_logprobs=2)
    (choice,) = answer["choices"]
    assert answer["object"] == "chat.completion" and answer["model"] == "embedded"
    assert choice["message"]["role"] == "assistant" and choice["message"]["content"] == wanted["text"]
    assert choice["finish_reason"] == wanted["finish_reason"]
    usage = answer["usage"]
    assert usage["prompt_tokens"] == wanted["usage"]["prompt_tokens"]
    assert usage["completion_tokens"] == wanted["usage"]["generated_tokens"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    scores = choice["logprobs"]["content"]
    assert len(scores) == usage["completion_tokens"] and all(
        len(each["top_logprobs"]) == 2 for each in scores
    )
    assert all(each["logprob"] == each["top_logprobs"][0]["logprob"] for each in scores)
    spelled = b"".join(bytes(each["bytes"]) for each in scores).decode()
    assert spelled.removeprefix(" ").startswith(wanted["text"])


def test_a_stream_is_the_same_answer_piece_by_piece(client):
    whole = client.chat(logprobs=True, n=2, temperature=1, seed=3)
    pieces = client.events(
        "/v1/chat/completions",
        messages=HELLO,
        n=2,
        temperature=1,
        seed=3,
        logprobs=True,
        stream_options={"include_usage": True},
    )
    *pieces, usage = pieces
    assert usage["choices"] == [] and usage["usage"] == whole["usage"] | {
        "prompt_tokens_details": usage["usage"]["prompt_tokens_details"]
    }
    for index, choice in enumerate(whole["choices"]):
        mine = [each["choices"][0] for each in pieces if each["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(each["delta"].get("content", "") for each in mine)
        assert text == choice["message"]["content"]
        assert [each["finish_reason"] for each in mine] == [None] * (len(mine) - 1) + [
            choice["finish_reason"]
        ]
        scores = [score for each in mine if each["logprobs"] for score in each["logprobs"]["content"]]
        assert [each["token"] for each in scores] == [each["token"] for each in choice["logprobs"]["content"]]
    assert not any("usage" in each for each in client.events("/v1/chat/completions", messages=HELLO))


def test_texts_ids_and_lists_of_them_are_continued(client, embedded, embedded_tokenizer):
    texts = ["Once upon a time", "The owl said"]
    ids = [embedded_tokenizer.encode(text) for text in texts]
    wanted = [
        answered(embedded, each, Request(SamplingParams(0.0), 12), embedded_tokenizer).text for each in ids
    ]
    for prompt in (texts, ids):
        answer = client.complete(prompt=prompt)
        assert [each["text"] for each in answer["choices"]] == wanted
        assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))
        assert client.complete(prompt=prompt[0])["choices"][0]["text"] == wanted[0]
    pieces = client.events("/v1/completions", prompt=texts)
    for index, text in enumerate(wanted):
        mine = [each["choices"][0] for each in pieces if each["choices"][0]["index"] == index]
        assert "".join(each["text"] for each in mine) == text and mine[-1]["finish_reason"]


def test_echo_scores_the_prompt_as_harnesses_ask_for_it(client):
    """lm-eval's way: ids, echo, logprobs 1, one token; or none."""
    asked = ("complete", "The owl said", "-n", "1", "--temperature", "0", "--prompt-logprobs", "1", "--json")
    wanted = json.loads(run_dsv2(*asked).stdout)
    for most in (1, 0):
        answer = client.complete(prompt=wanted["prompt_ids"], echo=True, logprobs=1, max_tokens=most)
        (choice,) = answer["choices"]
        scores = choice["logprobs"]
        assert len(scores["tokens"]) == len(wanted["prompt_ids"]) + most
        assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
        known = [each["logprob"] for each in wanted["prompt_logprobs"]]
        assert scores["token_logprobs"][1 : len(known) + 1] == pytest.approx(known, abs=1e-4)
        assert choice["text"].startswith("The owl said") and (most or choice["text"] == "The owl said")
        words = [choice["text"][at:] for at in scores["text_offset"]]
        assert all(
            word.startswith(token) for word, token in zip(words[1:], scores["tokens"][1:], strict=True)
        )
    again = client.complete(prompt="The owl said", echo=True, max_tokens=3)["choices"][0]["text"]
    assert again.startswith("The owl said") and len(again) > len("The owl said")


def test_the_same_seed_gives_the_same_answers_and_they_count_up(client):
    first, again = (client.complete(n=3, temperature=1, seed=5, max_tokens=8) for _ in range(2))
    texts = [each["text"] for each in first["choices"]]
    assert texts == [each["text"] for each in again["choices"]] and len(set(texts)) > 1
    alone = client.complete(temperature=1, seed=6, max_tokens=8)["choices"][0]["text"]
    assert alone == texts[1]
    assert len({client.complete(temperature=1, max_tokens=8)["choices"][0]["text"] for _ in range(4)}) > 1


def test_an_answer_is_held_to_a_form_and_ends_where_it_should(client):
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["Ann", "Bob"]}},
        "required": ["name"],
        "additionalProperties": False,
    }
    for form in (
        {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        {"type": "json_object"},
    ):
        answer = client.chat(response_format=form, max_tokens=200, temperature=1, seed=1)["choices"][0]
        if answer["finish_reason"] == "stop":
            assert isinstance(json.loads(answer["message"]["content"]), dict)
        else:
            assert form["type"] == "json_object"
    whole = client.complete(max_tokens=40)["choices"][0]["text"]
    word = whole.split()[4]
    cut = client.complete(max_tokens=40, stop=[word, "never said"])["choices"][0]
    assert cut["text"] == whole[: whole.index(word)] and cut["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("chat", {"messages": HELLO, "temprature": 1}, "temprature"),
        ("chat", {"messages": HELLO, "tools": [{"type": "function"}]}, "tools"),
        ("chat", {"messages": HELLO, "tools": [{"type": "web_search"}]}, "tools"),
        ("chat", {"messages": HELLO, "tools": TOOLS[:1] * 2}, "tools"),
        ("chat", {"messages": HELLO, "tool_choice": "required"}, "tool_choice"),
        (
            "chat",
            {"messages": HELLO, "tools": TOOLS, "tool_choice": {"function": {"name": "x"}}},
            "tool_choice",
        ),
        (
            "chat",
            {"messages": HELLO, "tools": [{"function": {"name": "f", "parameters": {"type": 5}}}]},
            "tools",
        ),
        ("chat", {"messages": [*HELLO, {"role": "assistant", "tool_calls": [{}]}]}, "messages"),
        ("chat", {"messages": HELLO, "logit_bias": {"5": 1}}, "logit_bias"),
        ("chat", {"messages": HELLO, "frequency_penalty": 0.5}, "frequency_penalty"),
        ("chat", {"messages": HELLO, "top_logprobs": 2}, "top_logprobs"),
        ("chat", {"messages": HELLO, "temperature": -1}, "temperature"),
        ("chat", {"messages": HELLO, "temperature": "hot"}, "temperature"),
        ("chat", {"messages": HELLO, "n": 0}, "n"),
        ("chat", {"messages": HELLO, "max_tokens": 2.5}, "max_tokens"),
        ("chat", {"messages": HELLO, "max_tokens": True}, "max_tokens"),
        ("chat", {"messages": HELLO, "stream": "yes"}, "stream"),
        ("chat", {"messages": HELLO, "stop": [""]}, "stop"),
        ("chat", {"messages": HELLO, "stop": [1]}, "stop"),
        ("chat", {"messages": HELLO, "response_format": {"type": "xml"}}, "response_format"),
        ("chat", {"messages": HELLO, "response_format": {"type": "json_schema"}}, "response_format"),
        ("chat", {"messages": HELLO, "stream_options": {"usage": True}}, "usage"),
        ("chat", {"messages": []}, "messages"),
        ("chat", {"messages": "Hello"}, "messages"),
        ("chat", {"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ("chat", {"messages": [{"role": "user", "content": "x", "mood": "good"}]}, "messages[0]"),
        ("chat", {}, "messages"),
        ("", {"prompt": "x", "best_of": 2}, "best_of"),
        ("", {"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ("", {"prompt": []}, "prompt"),
        ("", {"prompt": [1, "x"]}, "prompt"),
        ("", {"prompt": [10**9]}, "prompt"),
        ("", {"prompt": ["x"] * 129}, "prompt"),
        ("", {"prompt": "x", "suffix": "y"}, "suffix"),
        ("", {"prompt": "x", "messages": HELLO}, "messages"),
        ("", {"prompt": "x", "logprobs": True}, "logprobs"),
    ],
    ids=lambda each: json.dumps(each, default=str)[:60],
)
def test_what_can_not_be_done_is_refused_by_its_name(client, path, body, param):
    path = "/v1/chat/completions" if path == "chat" else "/v1/completions"
    error = client.post(path, status=400, **body)["error"]
    assert error["param"] == param and error["type"] == "invalid_request_error", error
    assert param.partition("[")[0] in error["message"] or param == "prompt", error


def test_messages_are_answered_as_anthropics_clients_expect(client):
    wanted = client.chat(messages=[{"role": "system", "content": "Be kind."}, *HELLO])
    text, used = wanted["choices"][0]["message"]["content"], wanted["usage"]
    parts = [{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}]
    for system in ("Be kind.", parts):
        answer = client.post("/v1/messages", messages=HELLO, system=system, **GREEDY)
        assert answer["content"] == [{"type": "text", "text": text}] and answer["role"] == "assistant"
        assert answer["stop_reason"] in ("end_turn", "max_tokens")
        total = answer["usage"]["input_tokens"] + answer["usage"]["cache_read_input_tokens"]
        assert (total, answer["usage"]["output_tokens"]) == (used["prompt_tokens"], used["completion_tokens"])
    start, block, *deltas, stop, last, end = client.named(
        "/v1/messages", messages=HELLO, system=parts, **GREEDY
    )
    assert [each["type"] for each in (start, block, stop, last, end)] == [
        "message_start",
        "content_block_start",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert "".join(each["delta"]["text"] for each in deltas) == text
    assert last["delta"]["stop_reason"] == answer["stop_reason"] and start["message"]["content"] == []
    word = text.split()[-1]
    cut = client.post("/v1/messages", messages=HELLO, system=parts, stop_sequences=["zzz", word], **GREEDY)
    assert (cut["stop_reason"], cut["stop_sequence"]) == ("stop_sequence", word)
    begun = [*HELLO, {"role": "assistant", "content": text.split()[0]}]
    rest = client.post("/v1/messages", messages=begun, system="Be kind.", **GREEDY)["content"][0]["text"]
    assert (text.split()[0] + rest).startswith(text)
    count = client.post("/v1/messages/count_tokens", messages=HELLO, system="Be kind.")
    assert count == {"input_tokens": used["prompt_tokens"]}
    for wrong, param in (
        ({"messages": HELLO}, "max_tokens"),
        ({"messages": HELLO, "max_tokens": 5, "tools": [{"type": "web", "name": "x"}]}, "tools"),
        ({"messages": HELLO, "max_tokens": 5, "tool_choice": {"type": "any"}}, "tool_choice"),
        ({"messages": HELLO[:0], "max_tokens": 5}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}], "max_tokens": 5}, "messages"),
        ({"messages": HELLO, "max_tokens": 5, "thinking": {"type": "enabled"}}, "thinking"),
        ({"messages": [{"role": "system", "content": "x"}, *HELLO], "max_tokens": 5}, "messages"),
        ({"messages": HELLO, "max_tokens": 5, "system": [{"type": "image"}]}, "system"),
    ):
        error = client.post("/v1/messages", status=400, **wrong)
        assert error["type"] == "error" and error["error"]["param"] == param, error


def test_responses_are_answered_and_nothing_is_kept(client):
    wanted = client.chat()
    text, used = wanted["choices"][0]["message"]["content"], wanted["usage"]
    parts = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]}]
    brief = {"temperature": 0, "max_output_tokens": 12}
    for given in ("Hello", HELLO, parts):
        answer = client.post("/v1/responses", input=given, tools=[{"type": "web_search"}], **brief)
        (item,) = answer["output"]
        assert item["content"][0]["text"] == text and item["role"] == "assistant"
        assert answer["usage"]["input_tokens"] == used["prompt_tokens"]
        assert answer["status"] == (
            "completed" if wanted["choices"][0]["finish_reason"] == "stop" else "incomplete"
        )
    events = client.named("/v1/responses", input="Hello", **brief)
    assert [each["sequence_number"] for each in events] == list(range(len(events)))
    assert [each["type"] for each in events[:4]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    deltas = [each["delta"] for each in events if each["type"] == "response.output_text.delta"]
    assert "".join(deltas) == text and events[-1]["response"]["output"] == [
        item | {"id": events[2]["item"]["id"]}
    ]
    instructed = client.post("/v1/responses", input="Hello", instructions="Be kind.", **brief)
    assert instructed["usage"]["input_tokens"] > used["prompt_tokens"]
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
    form = {
        "format": {"type": "json_schema", "name": "x", "schema": schema | {"additionalProperties": False}}
    }
    held = client.post("/v1/responses", input="Hello", text=form, temperature=0, max_output_tokens=200)
    assert json.loads(held["output"][0]["content"][0]["text"]) == {"a": 1}
    for wrong, param in (
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call_output"}]}, "input"),
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "x", "tools": [{"type": "function"}]}, "tools"),
        ({"input": "x", "tools": ["f"]}, "tools"),
        ({"input": "x", "tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"input": "x", "background": True}, "background"),
    ):
        assert client.post("/v1/responses", status=400, **wrong)["error"]["param"] == param


VALUES = [
    None,
    True,
    0,
    -1,
    2.5,
    1e400,
    10**30,
    "",
    "x",
    "\ud800",
    [],
    [[]],
    {},
    {"type": "x"},
    [1],
    ["x"],
    HELLO,
]
PATHS = {
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": 2},
    "/v1/completions": {"prompt": "x", "max_tokens": 2},
    "/v1/messages": {"messages": HELLO, "max_tokens": 2},
    "/v1/responses": {"input": "x", "max_output_tokens": 2},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1]},
}
NAMES = """
messages prompt input tokens model max_tokens max_output_tokens temperature top_p top_k seed stop n stream
stream_options logprobs top_logprobs response_format tools tool_choice echo suffix logit_bias system text
instructions stop_sequences thinking add_special_tokens nonsense
""".split()


def test_malformed_bodies_are_refused_and_never_a_mistake_of_ours(client, capfd):
    numbers = random.Random(int(os.environ.get("SEED", "1")))
    for _ in range(int(os.environ.get("BODIES", "300"))):
        path, body = numbers.choice(list(PATHS.items()))
        body = dict(body)
        for _ in range(numbers.randrange(1, 4)):
            body[numbers.choice(NAMES)] = numbers.choice(VALUES)
        data = json.dumps(body).encode()
        if numbers.random() < 0.2:
            at = numbers.randrange(len(data))
            data = data[:at] + numbers.randbytes(numbers.randrange(4)) + data[at + numbers.randrange(3) :]
        status, _, content = client.ask("POST", path, data)
        assert status == 200 or (status in (400, 404) and content["error"]["message"]), (path, data, content)
    assert "Traceback" not in capfd.readouterr().err


def test_a_call_is_whole_and_valid_and_its_result_is_told(client):
    for choice, names in (
        ("required", {"weather", "add"}),
        ({"type": "function", "function": {"name": "add"}}, {"add"}),
    ):
        asked = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 200, "temperature": 1, "seed": 2}
        choices = client.chat(**asked, n=2)["choices"]
        ended = [each for each in choices if each["finish_reason"] == "tool_calls"]
        assert ended and all(each["message"]["content"] is None for each in ended)
        for each in ended:
            (call,) = each["message"]["tool_calls"]
            arguments = json.loads(call["function"]["arguments"])
            assert call["type"] == "function" and call["function"]["name"] in names
            if call["function"]["name"] == "add":
                assert arguments.keys() == {"a", "b"} and all(
                    type(value) is int for value in arguments.values()
                )
            else:
                assert arguments["city"] in ("Rome", "Oslo")
        for each in choices:
            assert each in ended or (
                each["finish_reason"] == "length" and "tool_calls" not in each["message"]
            )
        pieces = client.events("/v1/chat/completions", messages=HELLO, **asked, n=2)
        streamed = [
            each["choices"][0]["delta"]["tool_calls"]
            for each in pieces
            if "tool_calls" in each["choices"][0]["delta"]
        ]
        functions = [call["function"] for (call,) in streamed]
        assert sorted(map(json.dumps, functions)) == sorted(
            json.dumps(each["message"]["tool_calls"][0]["function"]) for each in ended
        )
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    talk = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
    ]
    for wrong in (5, {"a": 1}, [5], [{"type": "image_url"}]):
        bad = [*talk[:-1], talk[-1] | {"content": wrong}]
        refused = client.post("/v1/chat/completions", status=400, messages=bad, tools=TOOLS)
        assert refused["error"]["param"] == "messages"
    answer = client.chat(messages=talk, tools=TOOLS)["choices"][0]
    assert answer["message"]["content"] or answer["message"]["tool_calls"]
    words = client.chat(tools=TOOLS, tool_choice="none")["choices"][0]["message"]
    assert words == client.chat()["choices"][0]["message"]


@pytest.mark.parametrize("choice", ["add", "any", "auto"])
def test_agents_of_anthropics_kind_have_functions_called(client, choice):
    about = [tool["function"] for tool in TOOLS]
    tools = [
        {"name": each["name"], "input_schema": each["parameters"], "cache_control": {"type": "ephemeral"}}
        for each in about
    ]
    wanted = {"type": "tool", "name": "add"} if choice == "add" else {"type": choice}
    asked = {"tools": tools, "tool_choice": wanted, "max_tokens": 200, "temperature": 1, "seed": 2}
    answer = client.post("/v1/messages", messages=HELLO, **asked)
    (block,) = answer["content"]
    if choice != "auto":
        assert (block["type"], answer["stop_reason"]) == ("tool_use", "tool_use")
        assert choice == "any" or (block["name"] == "add" and block["input"]["a"] <= 9)
    start, begun, *deltas, _, last, _ = client.named("/v1/messages", messages=HELLO, **asked)
    assert begun["content_block"]["type"] == block["type"] and start["message"]["content"] == []
    assert last["delta"]["stop_reason"] == answer["stop_reason"]
    if block["type"] == "text":
        assert "".join(each["delta"]["text"] for each in deltas) == block["text"]
        return
    told = json.loads("".join(each["delta"]["partial_json"] for each in deltas))
    assert told == block["input"] and begun["content_block"]["name"] == block["name"]
    talk = [
        *HELLO,
        {"role": "assistant", "content": [{"type": "text", "text": "I will add."}, block]},
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": block["id"],
                    "content": [{"type": "text", "text": "14"}],
                },
                {"type": "text", "text": "And now?"},
            ],
        },
    ]
    brief = asked | {"tool_choice": {"type": "none"}, "max_tokens": 5}
    assert client.post("/v1/messages", messages=talk, **brief)["content"][0]["type"] == "text"
    counted = client.post("/v1/messages/count_tokens", messages=talk, tools=tools)["input_tokens"]
    assert counted > client.post("/v1/messages/count_tokens", messages=talk)["input_tokens"]
    talk[2]["content"][0]["tool_use_id"] = "another"
    assert (
        "nobody made" in client.post("/v1/messages", status=400, messages=talk, **brief)["error"]["message"]
    )


@pytest.mark.parametrize("choice", ["add", "required", "auto"])
def test_responses_have_functions_called(client, choice):
    tools = [{"type": "function", **tool["function"]} for tool in TOOLS] + [{"type": "web_search"}]
    wanted = {"type": "function", "name": "add"} if choice == "add" else choice
    asked = {"tools": tools, "tool_choice": wanted, "max_output_tokens": 200, "temperature": 1, "seed": 2}
    answer = client.post("/v1/responses", input="Hello", **asked)
    (item,) = answer["output"]
    events = client.named("/v1/responses", input="Hello", **asked)
    assert [each["sequence_number"] for each in events] == list(range(len(events)))
    (streamed,) = events[-1]["response"]["output"]
    if choice == "auto" and item["type"] == "message":
        assert streamed["content"] == item["content"]
        return
    assert (item["type"] == "function_call" and choice != "add") or item["name"] == "add"
    assert {key: streamed[key] for key in ("type", "name", "arguments", "status")} == {
        key: item[key] for key in ("type", "name", "arguments", "status")
    }
    assert [each["type"] for each in events[2:]] == [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    talk = [*HELLO, item, {"type": "function_call_output", "call_id": item["call_id"], "output": "14"}]
    brief = asked | {"tool_choice": "none", "max_output_tokens": 5}
    assert client.post("/v1/responses", input=talk, **brief)["output"][0]["type"] == "message"
    talk[2]["call_id"] = "another"
    assert client.post("/v1/responses", status=400, input=talk, **brief)["error"]["param"] == "input"


def test_a_call_that_is_cut_off_is_text_on_every_way(client):
    tools = [{"name": "add", "input_schema": TOOLS[1]["function"]["parameters"]}]
    asked = {"messages": HELLO, "tools": tools, "tool_choice": {"type": "any"}, "max_tokens": 4}
    answer = client.post("/v1/messages", **asked)
    assert answer["content"][0]["type"] == "text" and answer["stop_reason"] == "max_tokens"
    _, begun, delta, *_ = client.named("/v1/messages", **asked)
    assert begun["content_block"]["type"] == "text" and delta["delta"]["text"].startswith("{")
    tools = [{"type": "function", **TOOLS[1]["function"]}]
    asked = {"input": "Hello", "tools": tools, "tool_choice": "required", "max_output_tokens": 4}
    answer = client.post("/v1/responses", **asked)
    assert answer["status"] == "incomplete" and answer["output"][0]["type"] == "message"
    events = client.named("/v1/responses", **asked)
    (item,) = events[-1]["response"]["output"]
    deltas = [each["delta"] for each in events if each["type"] == "response.output_text.delta"]
    assert "".join(deltas) == item["content"][0]["text"] != ""


def test_tools_become_words_that_a_template_knows():
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    talk = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "Well:", "tool_calls": [call, call | {"id": "c2"}]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "4"}]},
        {"role": "user", "content": "y"},
    ]
    said = '{"name": "add", "arguments": {"a": 1}}'
    assert in_words(talk) == [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": f"Well:\n{said}\n{said}"},
        {"role": "user", "content": "add gave: 3\nadd gave: 4"},
        {"role": "user", "content": "y"},
    ]
    assert in_words(talk[:1]) == talk[:1] and in_words("x") == "x" and in_words([5]) == [5]


def test_what_says_nothing_changes_nothing(client):
    plain = client.chat()["choices"][0]["message"]
    harmless = {
        "user": "me",
        "metadata": {"a": "b"},
        "tools": [],
        "logit_bias": {},
        "presence_penalty": 0,
        "stop": None,
        "stream_options": None,
        "response_format": {"type": "text"},
        "n": 1,
        "max_completion_tokens": 12,
    }
    assert client.chat(**harmless)["choices"][0]["message"] == plain
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]
    assert client.chat(messages=parts)["choices"][0]["message"] == plain


def test_what_does_not_fit_says_both_numbers_and_what_is_not_there_is_404(client):
    error = client.post("/v1/completions", status=400, prompt="word " * 6000)["error"]
    assert "4,096" in error["message"] and error["code"] == "context_length_exceeded"
    error = client.post("/v1/completions", status=400, prompt="x", max_tokens=5000)["error"]
    assert "4,096" in error["message"] and "5,000" in error["message"]
    error = client.post("/v1/chat/completions", status=404, messages=HELLO, model="gpt-4")["error"]
    assert error["code"] == "model_not_found" and "embedded" in error["message"]
    assert client.chat(model="other-name")["model"] == "embedded"
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)):
        found, _, content = client.ask(method, path)
        assert found == status and content["error"]["message"]
    for body in (b"", b"{", b"[]", b'"x"', b"\xff", b'{"messages": ' + b"[" * 1000):
        found, _, content = client.ask("POST", "/v1/chat/completions", body)
        assert found == 400 and content["error"]["message"], body


def test_models_tokens_health_and_metrics(client, embedded_tokenizer):
    (model,) = client.ask("GET", "/v1/models")[2]["data"]
    assert model["id"] == "embedded" and model["max_model_len"] == 4096
    assert client.ask("GET", "/v1/models/embedded")[2]["id"] == "embedded"
    assert client.ask("GET", "/v1/models/nothing")[0] == 404
    text = "Grüße, 世界"
    ids = client.post("/tokenize", prompt=text)
    assert ids["tokens"] == embedded_tokenizer.encode(text) and ids["count"] == len(ids["tokens"])
    bare = client.post("/tokenize", prompt=text, add_special_tokens=False)["tokens"]
    assert client.post("/detokenize", tokens=bare)["prompt"] == text
    spelled = client.post("/tokenize", messages=HELLO, return_token_strs=True)
    assert spelled["tokens"] == embedded_tokenizer.encode_chat(HELLO)
    assert "Hello" in "".join(spelled["token_strs"])
    for wrong in ([10**8], [-1], ["x"], [HELLO], "x"):
        assert client.post("/detokenize", status=400, tokens=wrong)["error"]["param"] == "tokens"
    info = client.ask("GET", "/tokenizer_info")[2]
    assert info["bos_token"] == embedded_tokenizer.bos and info["chat_template"]
    assert client.ask("GET", "/health")[2]["status"] == "ok"
    client.complete()
    text = client.ask("GET", "/metrics")[2]
    values = dict(line.split() for line in text.splitlines() if not line.startswith("#"))
    assert float(values["dsv2_requests_total"]) >= 1 and float(values["dsv2_generated_tokens_total"]) >= 12
    assert "dsv2_cache_pages" in values


def test_the_page_is_one_file_that_runs_its_own_scripts_alone(client):
    found, headers, page = client.ask("GET", "/")
    assert found == 200 and headers["content-type"].startswith("text/html")
    assert headers["x-frame-options"] == "DENY" and "default-src 'none'; connect-src 'self'" in page
    assert with_hashes(page) == page and page.count("<script>") == 3
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page.partition("<script>")[0])
    for name in ("marked", "dompurify"):
        assert (PAGE.parent / "licenses" / f"{name}.txt").stat().st_size > 1000


def test_only_this_machines_programs_come_in_and_no_page_from_elsewhere(client):
    port = client.port
    for host, status in (
        (f"127.0.0.1:{port}", 200),
        (f"localhost:{port}", 200),
        (f"LOCALHOST:{port}", 200),
        (f"[::1]:{port}", 200),
        ("evil.example", 403),
        (f"evil.example:{port}", 403),
        (f"127.0.0.1.evil.example:{port}", 403),
        ("", 403),
    ):
        assert client.ask("GET", "/v1/models", Host=host)[0] == status, host
    here = f"http://127.0.0.1:{port}"
    for origin, status in (
        (here, 200),
        ("http://evil.example", 403),
        ("null", 403),
        (f"{here}.evil", 403),
        ("http://[", 403),
    ):
        found, headers, _ = client.ask("GET", "/v1/models", Host=f"127.0.0.1:{port}", Origin=origin)
        assert found == status and "access-control-allow-origin" not in headers
    assert client.ask("OPTIONS", "/v1/chat/completions", Origin="http://evil.example")[0] == 403


def test_who_has_a_key_comes_in_and_a_page_that_is_allowed(start_server, capfd):
    page = "https://chat.example.org"
    _, client = start_server(Door((KEY,), (), (page,), most_bytes=10_000))
    assert client.ask("GET", "/health")[0] == 200
    for headers in ({}, {"authorization": "Bearer x"}, {"authorization": f"Basic {KEY}"}, {"x_api_key": "é"}):
        found, _, content = client.ask("GET", "/v1/models", **headers)
        assert found == 401 and KEY not in json.dumps(content)
    for headers in ({"authorization": f"Bearer {KEY}"}, {"x_api_key": KEY}):
        assert client.ask("GET", "/v1/models", Host="anything", **headers)[0] == 200
    found, headers, _ = client.ask("OPTIONS", "/v1/models", Origin=page)
    assert found == 204 and headers["access-control-allow-origin"] == page
    found, headers, _ = client.ask("GET", "/v1/models", Origin=page, authorization=f"Bearer {KEY}")
    assert found == 200 and headers["access-control-allow-origin"] == page
    assert client.ask("GET", "/v1/models", Origin=page)[0] == 401
    large = {"messages": [{"role": "user", "content": "x" * 20_000}]}
    found, _, content = client.ask("POST", "/v1/chat/completions", large, authorization=f"Bearer {KEY}")
    assert found == 413 and "too large" in content["error"]["message"]
    assert KEY not in "".join(capfd.readouterr())


def until(true, seconds=20.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.01)


LONG = {"prompt": "Once", "max_tokens": 4000, "ignore_eos": True, "temperature": 0}


@pytest.mark.parametrize("stream", ["", "at once", "begun"])
def test_who_goes_away_frees_the_place_at_once(start_server, stream):
    server, client = start_server(width=1, waiting=0)
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(LONG | {"stream": bool(stream)}))
    until(lambda: server.desk.counts.generated_tokens == 0 and server.desk.held == 1)
    if stream == "begun":
        assert connection.getresponse().read(200)
    found, headers, content = client.ask("POST", "/v1/completions", {"prompt": "x"})
    assert found == 429 and int(headers["retry-after"]) > 0 and content["error"]["code"] == "queue_full"
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    until(lambda: server.desk.held == 0, 5.0)
    assert client.complete()["choices"][0]["text"]
    assert server.desk.counts.refused == 1 and server.desk.counts.generated_tokens < 2000


def test_many_at_once_get_what_each_gets_alone(client):
    prompts = [f"{i} {'and ' * (i % 7)}the" for i in range(12)]
    alone = [client.complete(prompt=each)["choices"][0]["text"] for each in prompts]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda each: client.complete(prompt=each)["choices"][0]["text"], prompts))
    assert together == alone


def test_an_answer_ends_when_its_time_is_over(start_server):
    _, client = start_server(seconds=0.3)
    answer = client.post("/v1/completions", **LONG)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert 0 < answer["usage"]["completion_tokens"] < 3000


def test_a_mistake_of_ours_is_told_and_the_next_request_is_answered(start_server, capfd):
    server, client = start_server()
    for error, said in (
        (ZeroDivisionError("oh"), "mistake"),
        (Dsv2Error("The disk is gone"), "disk is gone"),
    ):

        def broken(error=error):
            raise error

        server.desk.scheduler.step = broken
        content = client.post("/v1/completions", status=500, prompt="x")
        assert said in content["error"]["message"] and content["error"]["type"] == "server_error"
        assert client.complete()["choices"][0]["text"]
    assert "ZeroDivisionError" in capfd.readouterr().err


def started(start, *arguments, **environment):
    """A server in a process of its own, and its port."""
    process = start("serve", "--port", "0", *arguments, **environment)
    line = process.stderr.readline()
    assert line.startswith("listening on http://"), line + process.stderr.read()
    return process, int(line.split()[2].rpartition(":")[2])


def test_sigterm_lets_open_answers_end(start):
    process, port = started(
        start, "--concurrency", "2", "--queue", "3", "--max-body-mb", "1", "--grace", "30"
    )
    client = Client(port)
    connection, response = client.open(
        "POST", "/v1/completions", {"prompt": "Once", "max_tokens": 60, "ignore_eos": True, "stream": True}
    )
    assert response.status == 200 and response.read(10)
    process.send_signal(signal.SIGTERM)
    assert response.read().decode().rstrip().endswith("data: [DONE]")
    connection.close()
    assert process.wait(30) == 0 and process.stderr.read() == "" and process.stdout.read() == ""


@pytest.mark.parametrize("seconds", [0.0, 0.02, 0.1])
def test_a_server_that_is_killed_leaves_a_store_that_loads(start, tmp_path, seconds):
    keep = ("--cache-store", str(tmp_path / "store"))
    prompts = [f"{n} " + "The cat sat on the mat. " * 40 for n in range(4)]
    process, port = started(start, *keep)
    client = Client(port)
    client.complete(prompt=prompts[0])
    for prompt in prompts[1:]:  # whose pages are being written when it is killed
        client.complete(prompt=prompt, max_tokens=1)
    time.sleep(seconds)
    process.kill()
    process.wait()
    asked = ("complete", "-n", "12", "--temperature", "0", "--json")
    for prompt in prompts:
        kept = json.loads(run_dsv2(*asked, *keep, prompt).stdout)
        assert kept["text"] == json.loads(run_dsv2(*asked, prompt).stdout)["text"]
    process, port = started(start, *keep)
    used = Client(port).complete(prompt=prompts[0])["usage"]
    assert used["prompt_tokens_details"]["cached_tokens"] > 100
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0


def test_a_key_from_the_environment_opens_an_address_and_no_key_is_refused(start):
    done = run_dsv2("serve", "--host", "0.0.0.0", "--port", "0")
    assert done.returncode == 2 and "--no-auth" in done.stderr
    process, port = started(start, "--host", "0.0.0.0", "--name", "mine", DSV2_API_KEY=KEY)
    assert Client(port).ask("GET", "/v1/models")[0] == 401
    found, _, content = Client(port, authorization=f"Bearer {KEY}").ask("GET", "/v1/models")
    assert found == 200 and content["data"][0]["id"] == "mine"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0 and KEY not in process.stderr.read()


def test_what_can_not_be_served_is_said_at_once():
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        done = run_dsv2("serve", "--port", port)
        assert done.returncode == 2 and f"127.0.0.1:{port}" in done.stderr
    for wrong in (
        ("--api-key", ""),
        ("--api-key", "schlüssel"),
        ("--allow-origin", "example.org"),
        ("--allow-origin", "https://example.org/page"),
        ("--host", "no.such.host.invalid", "--no-auth"),
        ("--max-seconds", "0"),
    ):
        done = run_dsv2("serve", *wrong)
        assert done.returncode == 2 and done.stderr and not done.stdout, wrong
