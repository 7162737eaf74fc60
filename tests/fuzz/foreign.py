"""Damaged weights of other programs: found, read, and run by plain torch and by the C++ kernels."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv2cli.checkpoint.found import find
from dsv2cli.checkpoint.load import load_model
from dsv2cli.engine.request import Request, SamplingParams, check_prompt
from dsv2cli.engine.scheduler import Job, Scheduler
from dsv2cli.hubs.gguf_settings import folder_of
from dsv2cli.hubs.shelf import SINGLE
from dsv2cli.kernels import native
from dsv2cli.run.cpu import CppRunner
from dsv2cli.run.runner import PlainRunner, Runner
from tests import foreign
from tests.fuzz import tiny
from tests.fuzz.case import compared
from tests.fuzz.checkpoint import (
    config_may_differ,
    mutate_body,
    mutate_header,
    mutate_json,
    mutate_text,
    tokenizer_may_differ,
)
from tests.fuzz.gguf_header import mutate_gguf, parse, split
from tests.fuzz.strange import Mutation, alike, mutate_place

GGUF = Path(__file__).parents[1] / "data" / "gguf"
FILES = ("lite-Q4_0", "tied-Q4_1", "norm_topk-Q5_0-old", "random-Q2_K", "random-Q3_K_M", "random-Q5_K_M")
FILES += ("random-IQ4_XS",)
SPLIT, OTHER = "v25-Q5_1", "lite-Q4_0"  # a file that is split, and one whose parts are not its own
WRITERS: dict[str, Callable[[Path, Path], Any]] = {
    "awq": lambda plain, out: foreign.write_awq(plain, out, 16),
    "gptq": lambda plain, out: foreign.write_gptq(plain, out, 4, 16),
    "gptq-act-order": lambda plain, out: foreign.write_gptq(plain, out, 4, 16, False, True),
    "gptq-8-bit": lambda plain, out: foreign.write_gptq(plain, out, 8, -1, False, version=2),
    "fp8": lambda plain, out: foreign.write_fp8(plain, out, "tensor"),
    "fp8-blocks": lambda plain, out: foreign.write_fp8(plain, out, "block"),
    "compressed-int4": lambda plain, out: foreign.write_compressed(plain, out, "int4-asymmetric"),
    "compressed-act-order": lambda plain, out: foreign.write_compressed(plain, out, "int4-act-order"),
    "compressed-int8": lambda plain, out: foreign.write_compressed(plain, out, "int8"),
    "compressed-fp8": lambda plain, out: foreign.write_compressed(plain, out, "fp8"),
    "mlx": lambda plain, out: foreign.write_mlx(plain, out, 4, 32),
    "mlx-6-bit": lambda plain, out: foreign.write_mlx(plain, out, 6, 32),
}
PROMPT, TEXT = [1, 5, 250, 42, 7], "Hi ab"
SCORES = 257  # as many as the smallest of these models gives
HOW = "how.json"  # beside a case's folder: the path in it, and whether the kernels run it too
DEFAULTS = {"zero_point", "sym", "desc_act", "symmetric"}  # where true and false are different models
PARTS = ("weight", "qweight", "qzeros", "scales", "g_idx", "biases", "bias", "weight_scale", "weight_shape")
PARTS += ("weight_scale_inv", "weight_packed", "weight_zero_point", "weight_g_idx", "input_scale", "surprise")


class ForeignDriver:
    """A model by another program: its path, its settings, its tokenizer, its weights, and three tokens.

    GGUF files whole and split; AWQ, GPTQ, FP8, compressed-tensors and MLX.
    """

    name = "foreign"

    def __init__(self, work: Path) -> None:
        self.whole, self.plain = work / "whole", work / "plain"
        self.kernels = native.load()[0]
        self.reference: dict[
            tuple[str, bool], dict[str, Any]
        ] = {}  # by a model's name, and whether kernels run it too
        tiny.make(self.plain, 1)

    def source(self, name: str) -> Path:
        """A folder with what is not damaged, made at its first use."""
        folder = self.whole / name
        if not folder.exists():
            self.whole.mkdir(exist_ok=True)
            if name in WRITERS:
                WRITERS[name](self.plain, folder)
            elif name == "split":
                folder.mkdir()
                split(parse((GGUF / f"{SPLIT}.gguf").read_bytes()), folder, "model")
            else:
                folder.mkdir()
                shutil.copy(GGUF / f"{name}.gguf", folder / "model.gguf")
        return folder

    def prepare(self, folder: Path) -> None:
        """Nothing: which of the models it is decides `mutate`."""

    def mutate(self, folder: Path, numbers: random.Random) -> Mutation:
        folder.rmdir()
        name = numbers.choice([*FILES, "split", "split", *WRITERS])
        shutil.copytree(self.source(name), folder)
        files = sorted(folder.glob("*.gguf"))
        within = numbers.choice(["", *(file.name for file in files)])
        fast = self.kernels is not None and numbers.random() < 0.5
        (folder.parent / HOW).write_text(json.dumps([within, fast]))
        if numbers.random() < 0.02:
            mutation = mutate_place(numbers.choice(sorted(folder.iterdir())), numbers)
        elif name == "split" and numbers.random() < 0.3:
            mutation = mutate_parts(folder, numbers)
        elif files and numbers.random() < 0.1:
            mutation = mutate_settings(files[0], numbers)
        elif files:
            mutation = mutate_gguf(numbers.choice(files), numbers)
        else:
            mutation = mutate_checkpoint(folder, numbers)
        return Mutation(f"{name}: {mutation.what}", mutation.changes)

    def act(self, folder: Path) -> dict[str, Any]:
        within, fast = json.loads((folder.parent / HOW).read_text())
        torch.set_num_threads(1)  # after a fork torch makes its threads anew, which several may not ask for
        return self.answer(folder / within, fast)

    def answer(self, path: Path, fast: bool) -> dict[str, Any]:
        """What a person gets: `fast`, from the kernels in bf16 too."""
        with own_cache(path.parent if path.is_dir() else path.parents[1]):
            found = find(str(path))
            answer: dict[str, Any] = {"text": found.tokenizer().encode(TEXT)}
            check_prompt(found.config, PROMPT)
            plain = load_model(found.folder, torch.device("cpu"), torch.float32)
            answer |= tokens(PlainRunner(plain), "plain")
            if fast:
                assert self.kernels is not None
                half = load_model(found.folder, torch.device("cpu"), torch.bfloat16, kernels=self.kernels)
                answer |= tokens(CppRunner(half, self.kernels), "kernels")
        return answer

    def judge(self, answer: Any, mutation: Mutation) -> tuple[str, str]:
        if not all(math.isfinite(number) for number in numbers_in(answer)):
            return "wrong", "scores that are no numbers"
        name, fast = mutation.what.partition(":")[0], "kernels scores" in answer
        if (name, fast) not in self.reference:
            self.reference[name, fast] = self.answer(self.source(name), fast)
        return compared(answer, self.reference[name, fast], mutation)


def own_cache(home: Path) -> AbstractContextManager[Any]:
    """What GGUF files say is kept beside a case's folder, where no other case finds it."""
    return mock.patch.dict(os.environ, {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")})


def tokens(runner: Runner, name: str) -> dict[str, Any]:
    """Three tokens and their scores."""
    job = Job(PROMPT, Request(SamplingParams(temperature=0.0), 3, logprobs=SCORES))
    list(Scheduler(runner).in_order([job]))
    if job.failure is not None:
        raise job.failure
    scores = [list(pair) for token in job.result.tokens for pair in sorted(token.top)]
    return {f"{name} tokens": job.result.token_ids, f"{name} scores": scores}


def numbers_in(answer: Any) -> Iterator[float]:
    """All of them."""
    if isinstance(answer, dict | list):
        for each in answer.values() if isinstance(answer, dict) else answer:
            yield from numbers_in(each)
    else:
        yield answer


def mutate_settings(path: Path, numbers: random.Random) -> Mutation:
    """What was kept of what a GGUF file says, after its first use."""
    with own_cache(path.parents[1]):
        kept = folder_of(path)
    file = kept / numbers.choice(["config.json"] * 3 + ["tokenizer.json", "tokenizer_config.json"])
    if numbers.random() < 0.1:
        mutation = mutate_place(file, numbers)
    elif numbers.random() < 0.1:
        mutation = mutate_text(file, numbers)
    elif file.name == "config.json" and numbers.random() < 0.5:
        mutation = mutate_entry(file, numbers)
    else:
        may_differ = config_may_differ if file.name == "config.json" else tokenizer_may_differ
        mutation = mutate_json(file, numbers, may_differ)
    return Mutation(f"kept, {mutation.what}", mutation.changes)


def mutate_parts(folder: Path, numbers: random.Random) -> Mutation:
    """The files of a model that was split."""
    first, second = sorted(folder.glob("*.gguf"))
    strange = folder.parent / "strange"
    strange.mkdir()
    split(parse((GGUF / f"{OTHER}.gguf").read_bytes()), strange, "model")
    ways: dict[str, Callable[[], Any]] = {
        "the first is missing": first.unlink,
        "the second is missing": second.unlink,
        "the first is the second": lambda: shutil.copy(second, first),
        "the second is the first": lambda: shutil.copy(first, second),
        "the first is another model's": lambda: shutil.copy(strange / first.name, first),
        "the second is another model's": lambda: shutil.copy(strange / second.name, second),
        "the second is a whole one": lambda: shutil.copy(GGUF / f"{SPLIT}.gguf", second),
        "the second is named the third": lambda: second.rename(folder / "model-00003-of-00002.gguf"),
        "both are named of 3": lambda: [
            each.rename(folder / each.name.replace("of-00002", "of-00003")) for each in (first, second)
        ],
        "the first is named otherwise": lambda: first.rename(folder / "model.gguf"),
    }
    what = numbers.choice(sorted(ways))
    ways[what]()
    return Mutation(what)


def mutate_checkpoint(folder: Path, numbers: random.Random) -> Mutation:
    """config.json, or the tensors in their file."""
    config, file = folder / "config.json", folder / SINGLE
    way = numbers.choice(["entry"] * 5 + ["config"] * 2 + ["header"] * 4 + ["tensor"] * 8 + ["body", "text"])
    if way == "entry":
        return mutate_entry(config, numbers)
    if way == "config":
        return mutate_json(config, numbers, config_may_differ)
    if way == "text":
        return mutate_text(config, numbers)
    if way == "body":
        return mutate_body(file, numbers)
    if way == "header":
        mutation = mutate_header(file, numbers)
        unseen = mutation.what.endswith(("another type", "exchanges its place"))  # they may be of one length
        return Mutation(mutation.what, mutation.changes or unseen)
    return mutate_tensors(file, numbers)


def mutate_entry(path: Path, numbers: random.Random) -> Mutation:
    """A value of what config.json says of the quantisation."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    name = numbers.choice([each for each in ("quantization", "quantization_config") if each in tree])
    inner = path.with_name("entry.json")
    inner.write_text(json.dumps(tree[name]), encoding="utf-8")
    mutation = mutate_json(inner, numbers, entry_may_differ)
    text = inner.read_bytes()
    inner.unlink()
    written = json.dumps(tree | {name: "@@entry@@"}).encode().replace(b'"@@entry@@"', text)
    path.write_bytes(written)
    return Mutation(f"{name} in {mutation.what}", mutation.changes)


def entry_may_differ(path: tuple[Any, ...], old: Any, text: str) -> bool:
    """What is left out has the default; true and false are both good where a format has both."""
    return text in ("", "null") or (path[-1] in DEFAULTS and alike(old, text))


def mutate_tensors(path: Path, numbers: random.Random) -> Mutation:
    """A file that is right as a file, and wrong in what it holds."""
    held = load_file(path)
    quantised = [name for name in held if not name.endswith(("norm.weight", "gate.weight"))]
    name = numbers.choice(quantised)
    tensor, module = held[name], name.rpartition(".")[0]
    like = [each for each in held if same_form(held[each], tensor) and each != name]
    other = numbers.choice(like or sorted(held))
    part = numbers.choice(PARTS)
    floats = tensor.dtype in (torch.float16, torch.bfloat16, torch.float32)
    type = numbers.choice(
        [torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.uint8, torch.int32]
    )
    bad = numbers.choice([float("nan"), float("inf"), -float("inf")])
    changes = False

    def put(changed: Tensor, differs: bool = False) -> None:
        nonlocal changes
        held[name], changes = changed.contiguous(), differs

    def exchange() -> None:
        put(held[other], bool(like))
        held[other] = tensor

    def fill(number: float) -> None:
        put(torch.full_like(tensor.float(), number).to(tensor.dtype), not floats or math.isfinite(number))

    def spoil() -> None:
        changed = tensor.clone()
        changed.view(-1)[numbers.randrange(tensor.numel())] = bad if floats else 0
        put(changed, not floats or module.endswith(("embed_tokens", "lm_head")))

    def gone() -> None:
        nonlocal changes
        del held[name]
        changes = name.endswith("weight_g_idx")  # its writers leave it out where the columns are in order

    def rename(taken: str) -> None:
        nonlocal changes
        changes = taken in held and same_form(held[taken], tensor)  # whose place it takes
        held[taken] = held.pop(name)

    def add(beside: str) -> None:
        nonlocal changes
        changes = part == "weight_zero_point"  # which may be there or not
        held.setdefault(beside, tensor.clone())

    ways: dict[str, Callable[[], Any]] = {
        "gone": gone,
        f"named .{part}": lambda: rename(f"{module}.{part}"),
        f"exchanged with {other}": exchange,
        f"as {other}": lambda: put(held[other], bool(like)),
        f"a copy of it named .{part}": lambda: add(f"{module}.{part}"),
        "a copy of it elsewhere": lambda: add(f"{module}.surprise.weight"),
        f"of type {type}": lambda: put(tensor.float().to(type), True),
        "of 64 bits": lambda: put(tensor.float().long(), False),
        "turned": lambda: put(tensor.movedim(0, -1) if tensor.dim() else tensor, len({*tensor.shape}) == 1),
        "in one dimension": lambda: put(tensor.reshape(-1)),
        "in three dimensions": lambda: put(tensor.reshape(1, *tensor.shape)),
        "without its last row": lambda: put(tensor[:-1] if tensor.dim() else tensor),
        "without its last column": lambda: put(tensor[..., :-1] if tensor.dim() else tensor),
        "with a row more": lambda: put(torch.cat([tensor, tensor[:1]]) if tensor.dim() else tensor),
        "empty": lambda: put(tensor[:0] if tensor.dim() else tensor),
        "nothing but zeros": lambda: fill(0),
        "nothing but ones": lambda: fill(1),
        f"nothing but {bad}": lambda: fill(bad),
        f"{bad} in it": spoil,
        "its rows turned round": lambda: put(tensor.flip(0) if tensor.dim() else tensor, True),
    }
    what = numbers.choice(sorted(ways))
    ways[what]()
    save_file({each: kept.clone() for each, kept in held.items()}, path)  # none may share its memory
    return Mutation(f"{name} {what}", changes)


def same_form(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype
