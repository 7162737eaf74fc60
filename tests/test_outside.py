"""What comes from outside: files, JSON, tensors, tokenizers, templates, text and paths that are not what they
should be end in a sentence.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import DATA, load
from rows import scores_of
from running import run_dsv2
from safetensors.torch import load_file, save_file

from dsv2cli import outside
from dsv2cli.checkpoint.found import find
from dsv2cli.checkpoint.safetensors import read_header
from dsv2cli.checkpoint.template import renderer
from dsv2cli.checkpoint.tokenizer import Tokenizer
from dsv2cli.cli.doctor import checkpoint as look_at
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.hubs.find import EMBEDDED
from dsv2cli.hubs.hashes import write_sums
from dsv2cli.model.config import DeepseekV2Config

HELLO = [{"role": "user", "content": "Hello there"}]


def change(path: Path, **values: object) -> None:
    """Put values into a JSON file; ... takes one away."""
    content = json.loads(path.read_text(encoding="utf-8")) | values
    kept = {name: value for name, value in content.items() if value is not ...}
    path.write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")


@pytest.fixture
def talker(tmp_path):
    """The embedded model's files, to damage: a link to its weights would be one out of the folder."""
    return Path(shutil.copytree(EMBEDDED, tmp_path / "talker"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"[" * 100_000, "nested"),
        (b"[" * 65 + b"]" * 65, "nested more than 64"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1e400}', "too large"),
        (b'{"a": ' + b"9" * 300 + b"}", "64 bits"),
        (b'{"a": 18446744073709551616}', r"64 bits \(a\)"),
        (b'{"a": 1, "a": 2}', "'a' twice"),
        (b'{"a": "\\ud800"}', "half a character"),
        (b'{"\\udc00": 1}', "half a character"),
        ('{"a": 1}'.encode("utf-16"), "UTF-16"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"", "Expecting value"),
        (b'{"a": 1', "delimiter"),
    ],
)
def test_json_that_is_none_or_no_good_is_refused_in_words(data, words):
    with pytest.raises(ValueError, match=words):
        outside.parse_json(data)


def test_json_may_begin_with_a_byte_order_mark_and_hold_all_of_unicode():
    assert outside.parse_json(b'\xef\xbb\xbf{"a": "\\ud83d\\ude42", "b": 18446744073709551615}') == {
        "a": "🙂",
        "b": 2**64 - 1,
    }
    assert outside.parse_json(b'["\\ud800x\xed\xa0\x80"]', mend=True) == ["\ufffdx\ufffd"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": True}, "rope_theta"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"hidden_size": 64.0}, "hidden_size"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace"),
        ({"eos_token_id": "1"}, "eos_token_id"),
        ({"bos_token_id": [0, None]}, "bos_token_id"),
        ({"rope_scaling": {"factor": 40}}, "rope_scaling.type"),
        ({"rope_scaling": 0}, "rope_scaling"),
        ({"rope_scaling": False}, "rope_scaling"),
        ({"rope_scaling": None, "rope_parameters": []}, "rope_parameters"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "yarn", "factor": "40"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": 0}}, "rope_scaling.beta_fast"),
        ({"mlp_bias": 0}, "mlp_bias"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 4}}, "rope_scaling.rope_type"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 3}}, "rope_parameters"),
        ({"torch_dtype": ["bfloat16"]}, "torch_dtype"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor"),
    ],
)
def test_a_field_of_the_config_that_makes_no_sense_is_named(copy_of_v2, changes, words):
    change(copy_of_v2 / "config.json", **changes)
    with pytest.raises(Dsv2Error) as caught:
        DeepseekV2Config.load(copy_of_v2)
    assert words in caught.value.what and str(copy_of_v2) in caught.value.what
    assert any(finding.state == "bad" for finding in look_at(str(copy_of_v2)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", 5.0),
        ("top_k", -1),
        ("temperature", "0.5"),
        ("temperature", -1),
        ("top_p", 0),
        ("top_p", [1]),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("do_sample", "yes"),
        ("eos_token_id", 1.5),
        ("eos_token_id", {"id": 1}),
    ],
)
def test_generation_config_is_blamed_for_its_own_values(talker, name, value):
    change(talker / "generation_config.json", **{name: value})
    done = run_dsv2("complete", "Once", "--model", str(talker), "-n", "2")
    assert done.returncode == 1 and done.stdout == ""
    assert (
        f"generation_config.json: {name} = " in done.stderr and "--" + name not in done.stderr.splitlines()[0]
    )
    assert any(
        "generation_config" in finding.text for finding in look_at(str(talker)) if finding.state == "bad"
    )


def test_an_option_stands_in_for_a_senseless_value_of_generation_config(talker):
    change(talker / "generation_config.json", temperature="hot")
    assert (
        run_dsv2("complete", "Once", "--model", str(talker), "-n", "2", "--temperature", "0").returncode == 0
    )


@pytest.mark.parametrize("value", [None, ..., 10**6, [], [10**6]])
def test_the_end_of_a_text_is_found_in_another_file(talker, value):
    change(talker / "generation_config.json", eos_token_id=value)
    assert find(str(talker)).eos_ids == {4095}
    change(talker / "config.json", eos_token_id=None if value is ... else value)
    assert find(str(talker)).eos_ids == {4095}, "the tokenizer's own"
    change(talker / "tokenizer_config.json", eos_token=None)
    with pytest.raises(Dsv2Error, match="which token ends a text"):
        _ = find(str(talker)).eos_ids
    assert any("ends a text" in finding.text for finding in look_at(str(talker)) if finding.state == "bad")


@pytest.mark.parametrize("value", [None, ..., 7, True, [], {}, {"content": 5}, "", "<no such token>", 1e3])
def test_the_begin_of_a_text_is_found_in_another_file_or_missed(talker, value):
    change(talker / "tokenizer_config.json", bos_token=value)
    assert Tokenizer(talker).encode("hello")[0] == 4094
    change(talker / "config.json", bos_token_id=None)
    with pytest.raises(Dsv2Error, match="begins a text"):
        Tokenizer(talker)
    change(talker / "tokenizer_config.json", add_bos_token=False)
    assert 4094 not in Tokenizer(talker).encode("hello")


def rewritten(path: Path, edit, body: bytes | None = None) -> None:
    """A safetensors file with its header edited, and perhaps another body."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + (data[8 + size :] if body is None else body))


def first(header: dict) -> dict:
    """The tensor that lies first."""
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    return min(entries, key=lambda entry: entry["data_offsets"])


def last(header: dict) -> dict:
    return max(
        (entry for name, entry in header.items() if name != "__metadata__"), key=lambda e: e["data_offsets"]
    )


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda h: first(h).update(shape=[-1, *first(h)["shape"][1:]]), "no proper shape"),
        (lambda h: first(h).update(shape=[2**40, 2**40]), "another number"),
        (lambda h: first(h).update(shape=[2**62]), "no proper shape"),
        (lambda h: first(h).update(shape=[0]), "another number"),
        (lambda h: first(h).update(shape="8"), "no proper shape"),
        (lambda h: first(h).update(dtype=5), "no proper type"),
        (lambda h: first(h).update(dtype="F64"), "another number"),
        (lambda h: first(h).update(data_offsets=[0, 1.5]), "no proper shape or offsets"),
        (lambda h: first(h).update(data_offsets=[0, 1, 2]), "no proper type or offsets"),
        (lambda h: first(h).update(data_offsets=first(h)["data_offsets"][::-1]), "no proper"),
        (lambda h: h.update(extra={"dtype": "U8", "shape": [4], "data_offsets": [8, 12]}), "overlaps"),
        (lambda h: h.pop(next(name for name in h if h[name] == first(h))), "a hole behind the header"),
        (lambda h: last(h).update(shape=[0], data_offsets=[last(h)["data_offsets"][0]] * 2), "no tensor"),
        (lambda h: h.update(more={"dtype": "U8", "shape": [8], "data_offsets": [10**9, 10**9 + 8]}), "hole"),
        (lambda h: h.update(x=[]), "no proper"),
    ],
)
def test_a_header_must_tile_its_file(smallest, tmp_path, edit, words):
    file = Path(shutil.copy(smallest / "model.safetensors", tmp_path))
    assert read_header(file)
    rewritten(file, edit)
    with pytest.raises(Dsv2Error) as caught:
        read_header(file)
    assert words in caught.value.sentence, caught.value.sentence


@pytest.mark.parametrize("at", [0, 7, 4000, -1])
def test_a_byte_put_into_a_file_or_taken_out_of_it_is_seen(smallest, tmp_path, at):
    file = Path(shutil.copy(smallest / "model.safetensors", tmp_path))
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    body, at = data[8 + size :], at % (len(data) - 8 - size)
    for damaged in (body[:at] + b"x" + body[at:], body[:at] + body[at + 1 :]):
        rewritten(file, lambda header: None, damaged)
        with pytest.raises(Dsv2Error):
            read_header(file)


@pytest.mark.parametrize("packed", [False, True])
def test_tensors_that_no_word_of_the_file_aligns_are_read_right(smallest, tmp_path, packed):
    """Their bytes begin at an odd place: the format allows it."""
    folder = Path(shutil.copytree(smallest, tmp_path / "model"))
    if packed:
        assert run_dsv2("quantize", str(smallest), str(tmp_path / "packed")).returncode == 0
        folder = tmp_path / "packed"
    wanted = None
    for _ in range(2):
        model = load(folder)
        scores = scores_of(model, [1, 2, 3])
        assert wanted is None or torch.equal(scores, wanted)
        wanted = scores
        for file in folder.glob("*.safetensors"):
            data = file.read_bytes()
            (size,) = struct.unpack("<Q", data[:8])
            text = data[8 : 8 + size].rstrip() + b" "
            text += b" " * (1 - len(text) % 2)
            file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def other_shard(folder: Path, name: str) -> None:
    """An index that names `name` for every tensor."""
    weight_map = dict.fromkeys(load_file(folder / "model.safetensors"), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("../outside.safetensors", None),
        ("/etc/passwd", None),
        ("x/../../outside.safetensors", None),
        ("a\0b", None),
        ("n" * 300, None),
        ("link.safetensors", lambda path: path.symlink_to("../outside.safetensors")),
        ("absolute.safetensors", lambda path: path.symlink_to(path.parent.parent / "outside.safetensors")),
        ("dangling.safetensors", lambda path: path.symlink_to("nothing")),
        ("loop.safetensors", lambda path: path.symlink_to(path.name)),
        ("fifo.safetensors", os.mkfifo),
        ("folder.safetensors", os.mkdir),
        ("device.safetensors", lambda path: path.symlink_to("/dev/zero")),
        (7, None),
    ],
)
def test_a_shard_is_a_file_in_its_folder(smallest, tmp_path, name, make):
    folder = Path(shutil.copytree(smallest, tmp_path / "model"))
    shutil.copy(smallest / "model.safetensors", tmp_path / "outside.safetensors")
    other_shard(folder, name)
    if make is not None:
        make(folder / name)
    began = time.monotonic()
    done = run_dsv2("complete", "--prompt-ids", "1,2", "--model", str(folder), "-n", "1")
    assert done.returncode == 1 and "error:" in done.stderr and "Traceback" not in done.stderr
    assert time.monotonic() - began < 10
    assert any(finding.state == "bad" for finding in look_at(str(folder)))


def test_the_links_of_the_hubs_cache_and_those_within_a_folder_are_followed(smallest, tmp_path):
    for inside in (False, True):
        snapshot = tmp_path / str(inside) / "snapshots" / "1234"
        blobs = snapshot / "own" if inside else snapshot.parents[1] / "blobs"
        for folder in (snapshot, blobs):
            folder.mkdir(parents=True)
        for file in smallest.iterdir():
            shutil.copy(file, blobs / f"of-{file.name}")
            (snapshot / file.name).symlink_to(os.path.relpath(blobs / f"of-{file.name}", snapshot))
        assert load(snapshot)


def test_a_tensor_in_two_shards_is_refused(smallest, tmp_path):
    folder = Path(shutil.copytree(smallest, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    name = min(tensors)
    save_file({name: tensors[name]}, folder / "second.safetensors")
    weight_map = dict.fromkeys(tensors, "model.safetensors") | {name: "second.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(Dsv2Error, match="extra tensor"):
        load(folder)


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 900}, {"n_routed_experts": 16000}, {"hidden_size": 2**23}]
)
def test_a_config_of_a_giant_takes_no_memory_for_a_dwarfs_weights(smallest, tmp_path, changes):
    folder = Path(shutil.copytree(smallest, tmp_path / "model"))
    change(folder / "config.json", **changes)
    began = time.monotonic()
    with pytest.raises(Dsv2Error) as caught:
        load(folder)
    assert "config.json calls for" in caught.value.why
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("name", "at_load"),
    [("model.norm.weight", True), ("model.layers.1.mlp.gate.weight", True), ("lm_head.weight", False)],
)
def test_weights_that_are_no_numbers_give_a_sentence_and_no_text(smallest, tmp_path, name, at_load, value):
    folder = Path(shutil.copytree(smallest, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, folder / "model.safetensors")
    assert at_load == any("NaN" in finding.text for finding in look_at(str(folder)))
    arguments = ("complete", "--prompt-ids", "1,2", "--model", str(folder), "-n", "4", "--json")
    for more in ((), ("--temperature", "0"), ("--speculate",), ("--samples", "2"), ("--logprobs", "2")):
        done = run_dsv2(*arguments, *more)
        assert done.returncode == 1 and "NaN" in done.stderr, done.stderr
        assert (done.stdout == "") == at_load
        for line in done.stdout.splitlines():
            answer = json.loads(line, parse_constant=pytest.fail)
            assert answer["finish_reason"] == "error" and "NaN" in answer["error"] and not answer["token_ids"]


def test_float16_that_overflows_is_said_and_not_answered(smallest, tmp_path):
    folder = Path(shutil.copytree(smallest, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] *= 1e6
    save_file(tensors, folder / "model.safetensors")
    arguments = ("complete", "--prompt-ids", "1,2", "--model", str(folder), "-n", "2", "--seed", "1")
    assert run_dsv2(*arguments).returncode == 0
    done = run_dsv2(*arguments, "--dtype", "float16")
    assert done.returncode == 1 and "--dtype float32" in done.stderr


def edited(folder: Path, **values: object) -> Path:
    change(folder / "tokenizer.json", **values)
    return folder


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    "values",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"normalizer": {"type": "NFKC"}},
        {"normalizer": {"type": "NFC"}},
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"normalizer": {"type": "Replace", "pattern": {"String": "o"}, "content": "0"}},
        {"normalizer": {"type": "Prepend", "prepend": "_"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                           "use_regex": True}},
        {"pre_tokenizer": {**SPLIT, "behavior": "Removed", "pattern": {"String": " "}}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "(a+"}}},
        {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}},
        {"decoder": None},
        {"added_tokens": [{"id": 4094, "content": "<｜begin▁of▁sentence｜>", "single_word": False,
                           "lstrip": True, "rstrip": True, "normalized": False, "special": True}]},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}},
        {"model": []},
    ],
)  # fmt: skip
def test_a_tokenizer_that_changes_the_text_is_refused(talker, values):
    with pytest.raises(Dsv2Error) as caught:
        Tokenizer(edited(talker, **values))
    assert "tokenizer.json" in caught.value.what
    assert any(finding.state == "bad" for finding in look_at(str(talker)))


def test_two_tokens_of_one_id_are_refused(talker):
    model = json.loads((talker / "tokenizer.json").read_text())["model"]
    model["vocab"]["zzzz"] = 7
    with pytest.raises(Dsv2Error, match="one id to two tokens"):
        Tokenizer(edited(talker, model=model))


def test_what_cuts_pads_or_drops_at_random_is_switched_off(talker, embedded_tokenizer):
    text = "Once upon a time there was a boy. " * 30
    wanted = embedded_tokenizer.encode(text)
    cut = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 900}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    pad |= {"pad_type_id": 0, "pad_token": "a"}
    model = json.loads((talker / "tokenizer.json").read_text())["model"] | {"dropout": 0.5}
    assert Tokenizer(edited(talker, truncation=cut, padding=pad, model=model)).encode(text) == wanted


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(.*)*x\1", r"(?:a|aa|aaa)+b"])
def test_a_pattern_that_goes_on_and_on_or_panics_ends_in_a_sentence(talker, capfd, pattern):
    tokenizer = edited(talker, pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {**SPLIT, "pattern": {"Regex": pattern}},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]})  # fmt: skip
    began = time.monotonic()
    with pytest.raises(Dsv2Error):
        Tokenizer(tokenizer).encode("a" * 60 + "c")
        raise Dsv2Error("some patterns the library carries out")
    assert time.monotonic() - began < 11
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "longer than 5"),
        ("{{ 'a' * 10**10 }}", "Memory"),
        (
            "{% set n = namespace(a='aa') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
            "emory",
        ),
        ("{{ '%1000000000d' % 1 }}", "emory"),
        ("\n\n{{ messages[9].content }}", "line 3"),
        ("\n{% if %}", "line 2"),
        ("{{ raise_exception('only two roles') }}", "only two roles"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "rejected"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ strftime_now(1) }}", "str"),
        ("{{ range(10**9) | list }}", "Range"),
        ("{{ bos_token }}Hello", "leaves out"),
        (" ", "leaves out"),
    ],
)
def test_a_template_that_goes_wrong_is_a_sentence_within_limits(talker, template, words):
    change(talker / "tokenizer_config.json", chat_template=template)
    began = time.monotonic()
    with pytest.raises(Dsv2Error) as caught:
        Tokenizer(talker).encode_chat(HELLO)
    assert words in caught.value.sentence, caught.value.sentence
    assert time.monotonic() - began < 10


def test_one_process_runs_a_template_again_and_again_and_is_replaced_when_it_went_wrong(talker):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ 1 // m.content|length }}{% endfor %}"
    change(talker / "tokenizer_config.json", chat_template=template)
    tokenizer, process = Tokenizer(talker), lambda: renderer().process

    def text(content):
        return tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": content}])[1:])

    assert text("a") == "a1"
    first = process()
    assert [text("b"), text("cd")] == ["b1", "cd0"]
    assert process() is first
    with pytest.raises(Dsv2Error, match="rejected"):
        text("")
    assert first.returncode == -signal.SIGKILL
    assert text("e") == "e1"
    assert text("x" * 300_000).startswith("xxx")
    process().kill()
    time.sleep(0.2)
    assert text("f") == "f1"
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(text, ["g", "hi"] * 20)) == ["g1", "hi0"] * 20


TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", TEMPLATE),
        (
            "tokenizer_config.json",
            [{"name": "default", "template": TEMPLATE}, {"name": "b", "template": "x"}],
        ),
        ("tokenizer_config.json", [{"name": "tools", "template": TEMPLATE}]),
        (
            "tokenizer_config.json",
            [{"name": ["x"], "template": "y"}, {"name": "tools", "template": TEMPLATE}],
        ),
        ("tokenizer_config.json", {"default": TEMPLATE, "b": "x"}),
        ("tokenizer_config.json", {"chat": TEMPLATE}),
        ("chat_template.json", TEMPLATE),
        ("chat_template.json", {"default": TEMPLATE}),
        ("chat_template.jinja", TEMPLATE),
    ],
)
def test_templates_are_found_in_all_their_forms(talker, file, content):
    if file.endswith("jinja"):
        (talker / file).write_text(content)
    elif file == "chat_template.json":
        (talker / file).write_text(json.dumps({"chat_template": content}))
    else:
        change(talker / file, chat_template=content)
    tokenizer = Tokenizer(talker)
    assert tokenizer.decode(tokenizer.encode_chat(HELLO)) == "user: Hello there"


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"\x80", "é".encode("latin-1")])
def test_a_template_that_is_no_text_is_refused(talker, data):
    (talker / "chat_template.jinja").write_bytes(data)
    with pytest.raises(Dsv2Error, match=r"chat_template\.jinja"):
        Tokenizer(talker)


def test_templates_have_what_transformers_gives_them(talker, real_tokenizer):
    from transformers.utils.chat_template_utils import render_jinja_template

    source = (
        "{{ bos_token }}\n{%- for m in messages %}\n  {% if loop.first %}{% continue %}{% endif %}\n"
        "{{ m | tojson }}{{ m | tojson(indent=2) }}{{ m.content }}\n    {% endfor %}{{ '<&>' | tojson }}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    )
    messages = [{"role": "system", "content": "é <b>"}, {"role": "user", "content": 'say "hi" <3'}]
    wanted, _ = render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=True, bos_token=real_tokenizer.bos
    )
    real_tokenizer.chat_template, own = source, real_tokenizer.chat_template
    try:
        ids = real_tokenizer.encode_chat(messages)
    finally:
        real_tokenizer.chat_template = own
    assert real_tokenizer.fast.decode(ids, skip_special_tokens=False) == wanted[0]


@pytest.mark.parametrize("mark", ["<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"])
@pytest.mark.parametrize("text", ["{}", "a{}b", "{0}{0}", "<{}>", "{0} twice {0}", "\n{}\n", "<｜{}"])
def test_a_special_token_that_a_message_spells_stays_text(embedded_tokenizer, real_tokenizer, mark, text):
    text = text.format(mark)
    for tokenizer in (embedded_tokenizer, real_tokenizer):
        special = {tokenizer.fast.token_to_id(tokenizer.bos), tokenizer.fast.token_to_id(tokenizer.eos)}
        messages = [
            {"role": "system", "content": text},
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": text},
            {"role": "user", "content": text},
        ]
        ids = tokenizer.encode_chat(messages, prefix=text)
        plain = tokenizer.encode_chat(messages[1:2])
        assert [token for token in ids if token in special] == [
            tokenizer.bos_id,
            tokenizer.fast.token_to_id(tokenizer.eos),
        ]
        assert [token for token in plain if token in special] == [tokenizer.bos_id]
        assert tokenizer.decode(ids).count(text) == 4, "as text it is shown"
        assert not special & set(tokenizer.encode_plain(text)), "as in a file that is filled in"
        assert special & set(tokenizer.encode("x" + text)), "a prompt of complete may spell them"


@pytest.mark.parametrize(
    "path",
    [
        "~nosuchuser/x",
        "n" * 300,
        "a\0b",
        "/dev/null/x/y",
        "x/" * 3000,
        "\udcff",
        "'quoted'",
        "a\\ b",
        "[red]",
        "",
    ],
)
@pytest.mark.parametrize("option", ["--model", "--messages", "--json-schema"])
def test_a_strange_path_is_a_sentence(path, option):
    arguments = ("complete", "hi") if option != "--messages" else ("complete",)
    done = run_dsv2(*arguments, option, path, "-n", "1")
    assert done.returncode in (0, 1, 2) and "Traceback" not in done.stderr
    assert done.returncode == 0 or "rror" in done.stderr


@pytest.mark.parametrize("form", ["{}", "'{}'", '"{}"', "file://{}"])
def test_paths_are_taken_as_terminals_paste_them(tmp_path, form):
    file = tmp_path / "it is 'one' file.txt"
    file.write_text("x")
    plain = tmp_path / "two words.txt"
    plain.write_text("x")
    assert outside.pasted_path(str(file)) == file
    assert outside.pasted_path(form.format(plain)) == plain
    assert outside.pasted_path(str(file).replace(" ", "\\ ").replace("'", "\\'")) == file


def test_a_file_that_a_person_made_may_begin_with_a_byte_order_mark(tmp_path):
    options = ("--json", "-n", "1", "--seed", "0")
    wanted = json.loads(run_dsv2("complete", "--chat", "Hello", *options).stdout)["prompt_ids"]
    messages = tmp_path / "messages.json"
    messages.write_text("\ufeff" + json.dumps([{"role": "user", "content": "Hello"}]), encoding="utf-8")
    done = run_dsv2("complete", "--messages", str(messages), *options)
    assert json.loads(done.stdout)["prompt_ids"] == wanted
    for stdin in ("Hello", "\ufeffHello"):
        assert (
            json.loads(run_dsv2("complete", "--chat", *options, stdin=stdin).stdout)["prompt_ids"] == wanted
        )


@pytest.mark.parametrize("data", [b"\xff\xfeH\x00", b"Hel\xfflo", b"\xed\xa0\x80", b"\xc0\x80"])
def test_bytes_that_are_no_text_are_refused_wherever_they_come_from(tmp_path, data):
    file = tmp_path / "file"
    file.write_bytes(data)
    for option in ("--messages", "--fim-file", "--json-schema"):
        text = ("hi",) if option == "--json-schema" else ()
        done = run_dsv2("complete", *text, option, str(file), "-n", "1")
        assert done.returncode == 2 and "UTF-" in done.stderr
    assert run_dsv2("complete", "-n", "1", stdin=data).returncode == 2
    argument = run_dsv2("complete", os.fsdecode(data), "-n", "1")
    assert argument.returncode == 2 and "half a character" in argument.stderr
    assert run_dsv2("chat", "--system-file", str(file), stdin="x\n").returncode == 2


def test_hashes_that_were_published_find_a_flipped_bit(smallest, tmp_path):
    folder = Path(shutil.copytree(smallest, tmp_path / "model"))
    assert not [finding for finding in hashes(folder) if finding.state == "bad"]
    assert any("can not be found" in finding.text for finding in hashes(folder))
    write_sums(folder)
    assert any("to the bit" in finding.text for finding in hashes(folder))
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    assert any(finding.state == "bad" and "model.safetensors" in finding.text for finding in hashes(folder))
    assert "hashes" in run_dsv2("doctor", str(folder), "--hash").stdout


def hashes(folder: Path) -> list:
    return [finding for finding in look_at(str(folder), hashed=True) if finding.name == "hashes"]


def test_the_hubs_own_hashes_are_known(smallest, tmp_path):
    import hashlib

    snapshot, blobs = tmp_path / "snapshots" / "1", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in smallest.iterdir():
        data = file.read_bytes()
        git = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
        name = git if file.suffix == ".json" else hashlib.sha256(data).hexdigest()
        (blobs / name).write_bytes(data)
        (snapshot / file.name).symlink_to(f"../../blobs/{name}")
    assert any("2 files are what was published" in finding.text for finding in hashes(snapshot))
    (snapshot / "config.json").resolve().write_bytes((smallest / "config.json").read_bytes() + b" ")
    assert any(finding.state == "bad" and "config.json" in finding.text for finding in hashes(snapshot))


def test_a_repository_of_which_only_the_config_is_here_says_so(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "refs").mkdir()
    (tmp_path / "models--a--b" / "refs" / "main").write_text("1")
    shutil.copy(DATA / "golden" / "v2" / "config.json", snapshot)
    from huggingface_hub import constants

    before = constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE
    constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = str(tmp_path), True
    try:
        with pytest.raises(Dsv2Error) as caught:
            find("a/b")
    finally:
        constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = before
    assert "is not on this machine" in caught.value.what and "dsv2 pull a/b" in caught.value.fix


def test_a_number_says_what_it_may_be():
    assert str(outside.Number(1, 16384, whole=True)) == "a whole number from 1 to 16,384"
    assert str(outside.Number(0, 1, above=True)) == "a number above 0, at most 1"
    rule = outside.Number(0, 1, above=True)
    assert [value in rule for value in (0, 1e-9, 1, 1.1, True, "1", None, float("nan"))] == [
        False, True, True, False, False, False, False, False,
    ]  # fmt: skip
    with pytest.raises(UsageError):
        outside.path_of("~nosuchuser/x")
