"""Ways of asking: held answers, holes filled, answers begun, lines from a program that waits."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from rows import answered
from running import run_dsv2
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from dsv2cli.engine.fill import FIM_TOKENS
from dsv2cli.engine.grammar import Grammar, closed
from dsv2cli.engine.request import Request, SamplingParams
from dsv2cli.engine.scheduler import Job, Scheduler
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.hubs.find import EMBEDDED

EOS = frozenset({4095})
SCHEMA = {
    "type": "object",
    "properties": {
        "animal": {"enum": ["owl", "bear"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "friends": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 3},
    },
    "required": ["animal", "age", "friends"],
    "additionalProperties": False,
}


def held(tokenizer, start="", **form):
    return Grammar(tokenizer, 4096, EOS, form.get("regex"), form.get("schema"), start)


def answers(model, tokenizer, request, count):
    ids = tokenizer.encode("A bear: ")
    jobs = [Job(ids, Request(**{**vars(request), "seed": seed})) for seed in range(count)]
    return [job.result for job in Scheduler(model, tokenizer).samples(jobs)]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_every_answer_that_ends_matches_the_schema(embedded, embedded_tokenizer, temperature):
    """At temperature 3 the model is all but random: only the grammar keeps it in form."""
    request = Request(
        SamplingParams(temperature), 200, EOS, grammar=held(embedded_tokenizer, schema=json.dumps(SCHEMA))
    )
    results = answers(embedded, embedded_tokenizer, request, 8)
    ended = [json.loads(result.text) for result in results if result.finish_reason == "stop"]
    assert len(ended) >= 6
    for value in ended:
        assert set(value) == {"animal", "age", "friends"} and value["animal"] in ("owl", "bear")
        assert isinstance(value["age"], int) and 0 <= value["age"] <= 99
        assert len(value["friends"]) <= 3 and all(
            isinstance(friend, str) and len(friend) <= 8 for friend in value["friends"]
        )


def test_an_object_has_the_members_that_its_schema_names_unless_it_speaks_of_others():
    open_one = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    shut = open_one | {"additionalProperties": False}
    for schema, wanted in (
        (open_one, shut),
        ({"items": open_one, "$defs": {"x": open_one}}, {"items": shut, "$defs": {"x": shut}}),
        ({"anyOf": [open_one, {"type": "null"}]}, {"anyOf": [shut, {"type": "null"}]}),
        (open_one | {"properties": {"a": open_one}}, shut | {"properties": {"a": shut}}),
    ):
        assert json.loads(closed(json.dumps(schema))) == wanted
    for schema in (
        open_one | {"additionalProperties": {"type": "string"}},
        open_one | {"patternProperties": {"b": {}}},
        open_one | {"minProperties": 2},
        open_one | {"required": ["a", "b"]},
        open_one | {"anyOf": [{"required": ["b"]}]},
        {"allOf": [open_one, {"properties": {"b": {}}}]},
        {"oneOf": [open_one, {"properties": {"b": {}}}]},
        {"type": "object"},
        open_one | {"required": [[]]},
        {"required": ["a"], "anyOf": [{"properties": {"b": {}}}]},
        {"$ref": "#/$defs/x", "properties": {"a": {}}},
        {"enum": [open_one]},
        True,
    ):
        assert json.loads(closed(json.dumps(schema))) == schema
    assert closed("{nonsense") == "{nonsense"


def test_every_answer_matches_the_expression_whole(embedded, embedded_tokenizer):
    pattern = r"[A-Z][a-z]{2,5}, (é|🙂){1,3} [0-9]{3}"
    request = Request(SamplingParams(2.0), 60, EOS, grammar=held(embedded_tokenizer, regex=pattern))
    results = answers(embedded, embedded_tokenizer, request, 12)
    assert all(result.finish_reason == "stop" and re.fullmatch(pattern, result.text) for result in results)
    assert len({result.text for result in results}) > 6


def test_a_held_answer_is_the_same_alone_in_a_batch_and_with_drafts(embedded, embedded_tokenizer):
    grammar = held(embedded_tokenizer, regex=r"( (one|two) and){3,9} three")
    texts = []
    for speculate in (False, True):
        request = Request(SamplingParams(1.0), 60, EOS, seed=5, speculate=speculate, grammar=grammar)
        ids = embedded_tokenizer.encode("1 2")
        texts.append(answered(embedded, ids, request, embedded_tokenizer).text)
    job = Job(
        embedded_tokenizer.encode("1 2"), Request(SamplingParams(1.0), 60, EOS, seed=5, grammar=grammar)
    )
    other = Job(
        embedded_tokenizer.encode("The"), Request(SamplingParams(1.0), 30, EOS, seed=1, grammar=grammar)
    )
    list(Scheduler(embedded, embedded_tokenizer, 2).in_order([other, job]))
    assert texts[0] == texts[1] == job.result.text and texts[0].endswith("three")


def test_a_form_that_can_not_be_is_refused_in_a_sentence(embedded_tokenizer):
    for form in ({"regex": "("}, {"schema": "{"}, {"schema": '{"type": "nonsense"}'}):
        with pytest.raises(UsageError) as caught:
            held(embedded_tokenizer, **form)
        assert "can not be used" in caught.value.what and caught.value.why
    with pytest.raises(UsageError, match="prefix"):
        held(embedded_tokenizer, start="no", regex="yes")
    with pytest.raises(UsageError, match="end"):
        Grammar(embedded_tokenizer, 4096, frozenset(), "a", None)


def test_without_the_library_it_says_what_to_install(embedded_tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(Dsv2Error) as caught:
        held(embedded_tokenizer, regex="a")
    assert "llguidance" in caught.value.fix


@pytest.fixture(scope="module")
def coder(tmp_path_factory):
    """The embedded model with three more tokens, as the Coder-V2 tokenizers have them."""
    folder = tmp_path_factory.mktemp("coder")
    tokenizer = FastTokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in FIM_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text((EMBEDDED / "tokenizer_config.json").read_text())
    config = json.loads((EMBEDDED / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 4099}))
    tensors = {
        name: tensor for file in EMBEDDED.glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    torch.manual_seed(0)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = torch.cat(
                [tensors[name], torch.randn(3, tensors[name].shape[1], dtype=tensors[name].dtype) * 0.02]
            )
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def test_a_hole_is_filled_in_the_order_prefix_suffix_middle(coder, embedded_tokenizer, tmp_path):
    def encode(text):
        return embedded_tokenizer.encode(text, add_bos=False)

    options = ("--model", coder, "--temperature", "0", "-n", "4")
    out = json.loads(
        run_dsv2(
            "complete", "--fim-prefix", "Once upon", "--fim-suffix", "a bear.", *options, "--json"
        ).stdout
    )
    assert out["prompt_ids"] == [4094, 4096, *encode("Once upon"), 4097, *encode("a bear."), 4098]
    (tmp_path / "story.txt").write_text("Once upon<CURSOR>a bear.")
    plain = run_dsv2("complete", "--fim-file", str(tmp_path / "story.txt"), *options)
    assert plain.returncode == 0 and plain.stdout == out["text"]
    whole = run_dsv2("complete", "--fim-file", "-", "--echo", *options, stdin="Once upon<CURSOR>a bear.")
    assert whole.stdout == f"Once upon{out['text']}a bear."
    shown = run_dsv2("complete", "--fim-prefix", "x", "--model", coder, "--dry-run").stdout
    assert shown.startswith("<｜begin▁of▁sentence｜><｜fim▁begin｜>x<｜fim▁hole｜><｜fim▁end｜>\n")


def test_an_answer_that_is_begun_goes_on_from_there(embedded_tokenizer):
    options = ("--json", "--temperature", "0", "-n", "6")
    out = json.loads(run_dsv2("complete", "--chat", "Hello", "--prefix", " I am", *options).stdout)
    start = embedded_tokenizer.encode_chat([{"role": "user", "content": "Hello"}], " I am")
    assert out["prompt_ids"] == start and out["text"].startswith(" I am") and len(out["token_ids"]) == 6
    assert run_dsv2("complete", "--chat", "Hello", "--prefix", " I am", *options[1:]).stdout == out["text"]


def test_lines_are_answered_one_by_one_to_a_program_that_waits(start):
    process = start("complete", "--jsonl", "-n", "3", "--seed", "0", stdin=subprocess.PIPE)
    said = ""
    for i in range(3):
        process.stdin.write(json.dumps({"id": i, "prompt": "Once" + said}) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        assert answer["id"] == i and len(answer["token_ids"]) == 3
        said += answer["text"]
    process.stdin.close()
    assert process.wait(60) == 0


def test_a_dry_run_loads_no_weights(copy_of_v2):
    for shard in copy_of_v2.glob("*.safetensors"):
        shard.unlink()
    done = run_dsv2("complete", "--prompt-ids", "1,2", "--model", str(copy_of_v2), "--dry-run")
    assert done.returncode == 0 and "ids: 1,2\n" in done.stdout
    assert run_dsv2("complete", "--prompt-ids", "1,2", "--model", str(copy_of_v2)).returncode == 1


@pytest.mark.parametrize(
    "wrong",
    [
        ("a", "--regex", "a", "--json-schema", "x"),
        ("--fim-prefix", "a", "b"),
        ("--fim-file", "x", "--fim-suffix", "a"),
        ("--prompt-ids", "1", "--prefix", "a"),
        ("--jsonl", "--dry-run"),
        ("--batch", "x", "--output", "y", "--echo"),
        ("a", "--json-schema", "/nowhere"),
        ("--chat",),
        ("--fim-prefix", "", "--fim-suffix", ""),
        ("--messages", "-"),
    ],
    ids=" ".join,
)
def test_what_makes_no_prompt_is_wrong_usage(wrong):
    done = run_dsv2("complete", *wrong)
    assert (
        done.returncode == 2
        and done.stdout == ""
        and "error:" in done.stderr
        and "Traceback" not in done.stderr
    )
