"""Damaged checkpoints: found, read, asked for three tokens."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv2cli.checkpoint.found import find
from dsv2cli.checkpoint.tokenizer import Tokenizer
from dsv2cli.cli.options import Sampling
from dsv2cli.engine.request import Request, Result, check_prompt
from dsv2cli.engine.scheduler import Job, Scheduler
from dsv2cli.run.open import Opened
from tests.fuzz import tiny
from tests.fuzz.case import compared, same
from tests.fuzz.strange import Mutation, alike, mutate_bytes, mutate_place, mutate_tree

MESSAGES = [{"role": "user", "content": "Hi é"}]
NULLABLE = {"q_lora_rank", "n_group", "topk_group", "rope_scaling", "eos_token_id", "bos_token_id"}
ENDLESS = "{% for i in range(99999) %}" * 4 + "x" + "{% endfor %}" * 4
TEMPLATES = [  # what it is, the template, whether its prompt may be another
    ("endless loops", ENDLESS, True),
    ("endless loops that write nothing", ENDLESS.replace("x", ""), True),
    ("a huge text", "{{ 'a' * 10**10 }}", True),
    ("a large text", "{{ 'a' * 10**8 }}", True),
    ("a huge number", "{{ 10 ** 10 ** 10 }}", True),
    ("a text of a huge number", "{{ 7 ** 99999 }}", True),
    ("a large list", "{{ [0] * 10**10 }}", True),
    ("a large range", "{{ range(10**9) | list }}", True),
    ("a wide format", "{{ '%1000000000d' % 1 }}", True),
    ("a centred text", "{{ 'a' | center(10**10) }}", True),
    (
        "a texts doubled",
        "{% set n = namespace(a='aa') %}{% for i in range(60) %}{% set n.a = n.a + n.a %}{% endfor %}",
        True,
    ),
    ("a refusal", "{{ raise_exception('no') }}", False),
    ("a division by zero", "{{ 1 / 0 }}", False),
    ("a sum of unlike things", "{{ 'a' + 1 }}", False),
    ("something undefined", "{{ nothing.there }}", False),
    ("a key that is missing", "{{ messages[9].content }}", False),
    ("an unknown filter", "{{ 'a' | surprise }}", False),
    ("an open block", "{% for m in messages %}", False),
    ("an open tag", "{{ messages", False),
    ("a private attribute", "{{ ''.__class__.__mro__[1].__subclasses__() }}", False),
    ("changed messages", "{{ messages.append(1) }}{{ messages }}", True),
    ("messages taken away", "{{ messages.clear() }}{{ bos_token }}x", True),
    ("an endless macro", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", False),
    ("another file", "{% include '/etc/passwd' %}", False),
    ("a base", "{% extends 'x' %}", False),
    ("lone surrogates", "{{ '\\ud800' }}", True),
    ("zeros", "\0{{ bos_token }}\0", True),
    ("nothing", "", True),
    ("spaces", "   \n", True),
    ("no message", "{{ bos_token }}Hello", True),
    ("two begins", "{{ bos_token }}{{ bos_token }}x", True),
    ("other words", "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", True),
    ("a date", "{{ strftime_now('%Y') }}x", True),
    ("a date of a strange form", "{{ strftime_now('%' * 9) }}{{ strftime_now(1) }}", False),
    ("tojson of itself", "{{ self | tojson }}", False),
    ("a generation block", "{% generation %}x{% endgeneration %}", True),
    ("deep brackets", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", False),
    ("deep blocks", "{% if 1 %}" * 500 + "x" + "{% endif %}" * 500, True),
    ("break", "{% for m in messages %}{% break %}{% endfor %}x", True),
    ("an unterminated text", "{{ 'a }}", False),
    ("bad types", "{{ bos_token | join(1) | int('x', base=99) }}", True),
    ("a dictionary called", "{{ messages[0]() }}", False),
    ("a prompt longer than the context", "{{ 'word ' * 999 }}", False),
]


class CheckpointDriver:
    """`find`, the tokenizer, the template, the weights, and three tokens.

    Of a checkpoint in one file, in two, and packed.
    """

    name = "checkpoint"

    def __init__(self, work: Path) -> None:
        self.whole = [work / "one", work / "two", work / "packed"]
        tiny.make(self.whole[0], 1)
        tiny.make(self.whole[1], 2)
        tiny.pack(self.whole[0], self.whole[2])
        self.reference = {folder.name: self.act(folder) for folder in self.whole}
        assert same(self.reference["one"], self.reference["two"])

    def prepare(self, folder: Path) -> None:
        """Nothing: which of the checkpoints it is decides `mutate`."""

    def mutate(self, folder: Path, numbers: random.Random) -> Mutation:
        folder.rmdir()
        which = numbers.choice(self.whole)
        shutil.copytree(which, folder)
        shards = sorted(folder.glob("*.safetensors"))
        ways: list[Callable[[], Mutation]] = [
            lambda: mutate_json(folder / "config.json", numbers, config_may_differ),
            lambda: mutate_json(folder / "config.json", numbers, config_may_differ),
            lambda: mutate_json(folder / "generation_config.json", numbers, settings_may_differ),
            lambda: mutate_json(folder / "tokenizer_config.json", numbers, tokenizer_may_differ),
            lambda: mutate_vocabulary(folder / "tokenizer.json", numbers),
            lambda: mutate_template(folder, numbers),
            lambda: mutate_header(numbers.choice(shards), numbers),
            lambda: mutate_header(numbers.choice(shards), numbers),
            lambda: mutate_body(numbers.choice(shards), numbers),
            lambda: mutate_place(numbers.choice(sorted(folder.iterdir())), numbers),
            lambda: mutate_text(numbers.choice(sorted(folder.glob("*.json"))), numbers),
        ]
        index = folder / "model.safetensors.index.json"
        if index.exists():
            ways += [lambda: mutate_json(index, numbers, never)] * 2
        mutation = numbers.choice(ways)()
        return Mutation(f"{which.name}: {mutation.what}", mutation.changes)

    def act(self, folder: Path) -> dict[str, Any]:
        """As `dsv2 complete --chat` does it, greedily, then with the checkpoint's own sampling."""
        found = find(str(folder))
        greedy = Sampling(max_new_tokens=3, temperature=0.0, seed=1).request(found, logprobs=tiny.WORDS + 2)
        own = Sampling(max_new_tokens=1, seed=1).request(found)
        tokenizer = found.tokenizer()
        ids = tokenizer.encode_chat(MESSAGES)
        check_prompt(found.config, ids)
        opened = tiny.opened(folder, found)
        likely, sampled = (self.answer(opened, tokenizer, ids, request) for request in (greedy, own))
        return {
            "prompt": ids,
            "greedy": [likely.text, likely.token_ids],
            "sampled": [sampled.text, sampled.token_ids],
            "scores": [list(pair) for token in likely.tokens for pair in sorted(token.top)],
        }

    def answer(self, opened: Opened, tokenizer: Tokenizer, ids: list[int], request: Request) -> Result:
        """All of an answer."""
        job = Job(ids, request)
        list(Scheduler(opened.runner, tokenizer).stream(job))
        return job.result

    def judge(self, answer: Any, mutation: Mutation) -> tuple[str, str]:
        return compared(answer, self.reference[mutation.what.partition(":")[0]], mutation)


def never(path: tuple[Any, ...], old: Any, text: str) -> bool:
    """Nothing in a file may have another meaning."""
    return False


def config_may_differ(path: tuple[Any, ...], old: Any, text: str) -> bool:
    """A config with another number is another model; one that leaves a value out has the default."""
    return text == "" or alike(old, text) or (text == "null" and path[-1] in NULLABLE)


def settings_may_differ(path: tuple[Any, ...], old: Any, text: str) -> bool:
    """Of generation_config.json: null leaves a value out, and an id may stand alone or in a list."""
    ids = "eos_token_id" in path and text.strip("[]0123456789, ") == ""
    return text in ("", "null") or alike(old, text) or ids


def tokenizer_may_differ(path: tuple[Any, ...], old: Any, text: str) -> bool:
    """Of tokenizer_config.json: what is left out has the default."""
    return text in ("", "null") or alike(old, text)


def mutate_json(
    path: Path, numbers: random.Random, may_differ: Callable[[tuple[Any, ...], Any, str], bool]
) -> Mutation:
    """One value of a JSON file."""
    data, mutation = mutate_tree(json.loads(path.read_text(encoding="utf-8")), numbers, may_differ)
    path.write_bytes(data)
    return Mutation(f"{path.name}: {mutation.what}", mutation.changes)


def mutate_text(path: Path, numbers: random.Random) -> Mutation:
    """The bytes of a JSON file: a flipped bit may be another valid value, but for the index."""
    data, mutation = mutate_bytes(path.read_bytes(), numbers, "index" not in path.name)
    path.write_bytes(data)
    return Mutation(f"{path.name}: {mutation.what}", mutation.changes)


def mutate_vocabulary(path: Path, numbers: random.Random) -> Mutation:
    """tokenizer.json: what is valid is another vocabulary; most often beside its long list of words."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    if numbers.random() < 0.3:
        return mutate_json(path, numbers, tokenizer_may_differ)
    words, merges = tree["model"]["vocab"], tree["model"]["merges"]
    ways: dict[str, Callable[[], Any]] = {
        "an id twice": lambda: words.update({"the": 5}),
        "an id beyond the model's": lambda: words.update({"H": numbers.choice([9999, 2**31, 2**32 - 1])}),
        "a negative id": lambda: words.update({"H": -1}),
        "a word missing": lambda: words.pop(numbers.choice(["H", "Ã", "z", "!"])),
        "no words": words.clear,
        "a merge of what is no word": lambda: merges.append(["qq", "zz"]),
        "a merge of three": lambda: merges.append(["a", "b", "c"]),
        "a merge as a text": lambda: merges.append("h e"),
        "an added token of an id that is a word's": lambda: tree["added_tokens"][0].update(id=5),
        "an added token beyond": lambda: tree["added_tokens"][0].update(
            id=numbers.choice([400, 99999, 2**32])
        ),
        "no added tokens": lambda: tree.update(added_tokens=[]),
        "an empty added token": lambda: tree["added_tokens"][0].update(content=""),
        "another type of model": lambda: tree["model"].update(
            type=numbers.choice(["WordPiece", "Unigram", "x"])
        ),
        "no decoder": lambda: tree.update(decoder=None),
        "truncation": lambda: tree.update(
            truncation={"max_length": 3, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
        ),
        "truncation with a wide stride": lambda: tree.update(
            truncation={"max_length": 2, "stride": 9, "strategy": "LongestFirst", "direction": "Right"}
        ),
        "padding": lambda: tree.update(
            padding={
                "strategy": {"Fixed": numbers.choice([64, 10**10])},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "!",
            }
        ),
        "a normalizer": lambda: tree.update(normalizer={"type": "Lowercase"}),
        "a bad pattern": lambda: tree.update(
            normalizer={"type": "Replace", "pattern": {"Regex": "(((("}, "content": ""}
        ),
        "a slow pattern": lambda: tree.update(
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": "(.|.|.)*(.|.|.)*(.|.|.)*x"},
                "behavior": "Isolated",
                "invert": False,
            }
        ),
        "text made long": lambda: tree.update(
            normalizer={"type": "Replace", "pattern": {"String": "U"}, "content": "U" * 10**4}
        ),
        "dropout": lambda: tree["model"].update(dropout=numbers.choice([0.5, 1.0, 2.0, -1.0])),
        "an unknown word": lambda: tree["model"].update(unk_token="nothing", fuse_unk=True),
        "another version": lambda: tree.update(version=numbers.choice(["2.0", "", 1])),
    }
    name = numbers.choice(sorted(ways))
    ways[name]()
    path.write_text(json.dumps(tree), encoding="utf-8")
    return Mutation(f"{path.name}: {name}", True)


def mutate_template(folder: Path, numbers: random.Random) -> Mutation:
    """Another chat template, in each of the places where one may stand."""
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    good = settings["chat_template"]
    what, template, changes = numbers.choice(TEMPLATES)
    forms: dict[str, Any] = {
        "a text": template,
        "a file": template,
        "a file of other bytes": template,
        "a list": [{"name": "default", "template": template}, {"name": "tool_use", "template": good}],
        "a list of other names": [{"name": "tool_use", "template": good}],
        "a list of strange things": [None, 3, {"name": ["default"], "template": 1}, {"name": "default"}],
        "a name that is no text": [{"name": [], "template": good}, {"name": {}, "template": good}],
        "two of one name": [{"name": "default", "template": good}, {"name": "default", "template": template}],
        "a dictionary": {"default": template},
        "a number": 5,
    }
    form = numbers.choice(["a text"] * 6 + ["a file"] * 4 + sorted(forms))
    if form.startswith("a file"):
        data = template.encode("utf-8", "surrogatepass")
        data = data if form == "a file" else numbers.choice([data.decode().encode("utf-16"), b"\xff\xfe\x80"])
        (folder / "chat_template.jinja").write_bytes(data)
    else:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": forms[form]}))
    if numbers.random() < 0.05:
        mutate_place(folder / "tokenizer_config.json", numbers)
        what += " and something else in the place of tokenizer_config.json"
    return Mutation(f"template: {what}, as {form}", changes)


def mutate_header(path: Path, numbers: random.Random) -> Mutation:
    """The header of a safetensors file; what differs is damage, unless tensors changed places."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    text, body = data[8 : 8 + size], data[8 + size :]
    way = numbers.choice(["tree"] * 3 + ["entry"] * 8 + ["bytes"] * 2 + ["length"] * 2 + ["huge"])
    mutation = Mutation("nothing")
    if way == "tree":
        text, mutation = mutate_tree(json.loads(text), numbers, never)
    elif way == "entry":
        text, body, mutation = mutate_entry(json.loads(text), body, numbers)
    elif way == "bytes":
        text, mutation = mutate_bytes(text, numbers, False)
    elif way == "huge":
        text, mutation = text + b" " * 3_000_000, Mutation("three million spaces")
    size = len(text)
    if way == "length":
        wrong = [0, 1, size - 1, size + 1, size + 8, size // 2, len(data), 2**31, 2**40, 2**63, 2**64 - 1]
        size = numbers.choice(wrong)
        mutation = Mutation(f"a length of {size}")
    path.write_bytes(struct.pack("<Q", size) + text + body)
    return Mutation(f"{path.name}, header: {mutation.what}", mutation.changes)


def mutate_entry(
    header: dict[str, Any], body: bytes, numbers: random.Random
) -> tuple[bytes, bytes, Mutation]:
    """A tensor's name, type, shape or place."""
    names = sorted(set(header) - {"__metadata__"})
    name, other = numbers.choice(names), numbers.choice(names)
    entry, begin, end = header[name], *header[name]["data_offsets"]
    one = numbers.choice([1, 2, 4, 64, -1, -4, 2**31, 2**63, 2**64, -(2**63), 10**300])
    shift = numbers.choice([4, 1, 64, -4])
    like = [each for each in names if header[each]["shape"] == entry["shape"] and each != name]
    changes = False

    def exchange() -> None:
        nonlocal changes
        twin = numbers.choice(like or [other])
        changes = bool(like)
        header[name]["data_offsets"], header[twin]["data_offsets"] = (
            header[twin]["data_offsets"],
            header[name]["data_offsets"],
        )

    def shift_all() -> None:
        for each in names:
            header[each]["data_offsets"] = [n + shift for n in header[each]["data_offsets"]]

    def shift_later() -> None:
        nonlocal body
        for each in names:
            first, last = header[each]["data_offsets"]
            if first >= begin:
                header[each]["data_offsets"] = [first + 8, last + 8]
        body = body[:begin] + b"\1" * 8 + body[begin:]

    ways: dict[str, Callable[[], Any]] = {
        f"begins at +{one}": lambda: entry.update(data_offsets=[begin + one, end]),
        f"ends at +{one}": lambda: entry.update(data_offsets=[begin, end + one]),
        f"lies at +{one}": lambda: entry.update(data_offsets=[begin + one, end + one]),
        f"lies at +{shift}": lambda: entry.update(data_offsets=[begin + shift, end + shift]),
        "begins and ends exchanged": lambda: entry.update(data_offsets=[end, begin]),
        "lies where another lies": lambda: entry.update(data_offsets=header[other]["data_offsets"]),
        "exchanges its place": exchange,
        f"all lie at +{shift}": shift_all,
        "a hole before it": shift_later,
        "places as decimals": lambda: entry.update(data_offsets=[begin + 0.5, end + 0.5]),
        "places as texts": lambda: entry.update(data_offsets=[str(begin), str(end)]),
        "places three": lambda: entry.update(data_offsets=[begin, end, end]),
        "places as an object": lambda: entry.update(data_offsets={"0": begin, "1": end}),
        "place not finite": lambda: entry.update(data_offsets=[float("nan"), float("inf")]),
        "another type": lambda: entry.update(
            dtype=numbers.choice(
                ["F16", "BF16", "F64", "I32", "U8", "F8_E4M3", "f32", "", "F32 ", None, 5, ["F32"]]
            )
        ),
        "another shape": lambda: entry.update(
            shape=numbers.choice(
                [[], [0], [-1], entry["shape"][::-1], [1, *entry["shape"]], [2**62, 4], [2**40] * 3]
            )
        ),
        "a shape of texts": lambda: entry.update(shape=[str(n) for n in entry["shape"]]),
        "a shape of decimals": lambda: entry.update(shape=[n + 0.5 for n in entry["shape"]]),
        "a shape of negative numbers": lambda: entry.update(shape=[-n for n in entry["shape"]]),
        "no axis of size": lambda: entry.update(shape=[0, *entry["shape"][1:]], data_offsets=[begin, begin]),
        "a shape of many axes": lambda: entry.update(shape=[1] * 10_000 + entry["shape"]),
        "a shape that is a text": lambda: entry.update(shape="".join(str(n % 10) for n in entry["shape"])),
        "a tensor named otherwise": lambda: header.update({name + ".x": header.pop(name)}),
        "a tensor gone": lambda: header.pop(name),
        "a tensor more": lambda: header.update({"model.surprise": dict(entry)}),
        "an empty name": lambda: header.update({"": header.pop(name)}),
        "an entry that is a list": lambda: header.update({name: [1]}),
        "an unknown key": lambda: entry.update(surprise=[[1]]),
        "metadata of numbers": lambda: header.update(__metadata__={"a": 1}),
        "metadata that are none": lambda: header.update(__metadata__=numbers.choice([1, None, [], "x"])),
    }
    what = numbers.choice(sorted(ways))
    ways[what]()
    return json.dumps(header).encode(), body, Mutation(f"{name}: {what}", changes)


def mutate_body(path: Path, numbers: random.Random) -> Mutation:
    """The weights: those that flip are other weights, but none may be lost, added, or shifted."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    start = 8 + size
    at = start + numbers.randrange((len(data) - start) // 4) * 4
    number = numbers.choice([float("nan"), float("inf"), -float("inf"), 1e38, 1e-45])
    ways: dict[str, Callable[[], tuple[bytes, bool]]] = {
        f"{number} put in": lambda: (data[:at] + struct.pack("<f", number) + data[at + 4 :], True),
        "a bit flipped": lambda: (
            data[:at] + bytes([data[at] ^ 1 << numbers.randrange(8)]) + data[at + 1 :],
            True,
        ),
        "all zeros": lambda: (data[:start] + bytes(len(data) - start), True),
        "all NaN": lambda: (data[:start] + b"\xff" * (len(data) - start), True),
        "random": lambda: (data[:start] + numbers.randbytes(len(data) - start), True),
        "a byte put in": lambda: (data[:at] + b"\1" + data[at:], False),
        "a byte taken away": lambda: (data[:at] + data[at + 1 :], False),
        "a byte put in, another taken away": lambda: (data[:start] + b"\1" + data[start:-1], True),
        "cut off": lambda: (data[:at], False),
        "the last byte cut off": lambda: (data[:-1], False),
        "longer": lambda: (data + numbers.randbytes(numbers.choice([1, 8, 100_000])), False),
    }
    what = numbers.choice(sorted(ways))
    changed, changes = ways[what]()
    path.write_bytes(changed)
    return Mutation(f"{path.name}, body: {what} at {at}", changes)
