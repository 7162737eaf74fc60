"""`dsv2 doctor`: what works here and what does not, and for a model whether its files are
whole and sensible.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv2cli import places
from dsv2cli.cli import options as opt
from dsv2cli.cli import ui
from dsv2cli.errors import Dsv2Error

if TYPE_CHECKING:
    from dsv2cli.checkpoint.found import Checkpoint

ROUND_TRIP = "hello world\n  你好 é 🙂 12345"
LITTLE_DISK = 10**9


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `state` is ok, note (it works, and could be better) or bad (it does not work)."""

    name: str
    state: str
    text: str
    fix: str = ""


@dataclass(frozen=True)
class Subject:
    """What is looked at."""

    heading = opt.TO_RUN

    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[DIR|REPO]",
            autocompletion=opt.models,
            help="Also look at this checkpoint. Default: the embedded model.",
        ),
    ] = None
    hash: Annotated[
        bool, typer.Option("--hash", help="Read all of its files, and compare them with what was published.")
    ] = False


@dataclass(frozen=True)
class Output:
    """How the findings are shown."""

    heading = opt.OUTPUT

    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False


@opt.unfolded
def doctor(subject: Subject, output: Output) -> None:
    """Look at this machine and a model, and say what works.

    And what does not, and why. Exit code 1 where something is wrong.
    """
    findings = []
    for finding in (*machine(), *checkpoint(subject.model, subject.hash)):
        findings.append(finding)
        if not output.json:
            ui.write(f"{finding.state:4} {finding.name}: {ui.harmless(finding.text)}\n")
            if finding.fix:
                ui.write(f"     fix: {ui.harmless(finding.fix)}\n")
    bad = [finding for finding in findings if finding.state == "bad"]
    if output.json:
        ui.write_json({"healthy": not bad, "findings": [asdict(finding) for finding in findings]})
    elif not bad:
        ui.write("nothing is wrong\n")
    if bad:
        raise typer.Exit(1)


def machine() -> Iterator[Finding]:
    from importlib.metadata import version

    yield Finding("python", "ok", f"{platform.python_version()} at {sys.executable}")
    yield Finding("dsv2", "ok", version("dsv2cli"))
    try:
        import torch
    except Exception as error:  # a broken install raises whatever its libraries raise
        yield Finding("torch", "bad", f"it can not be imported ({error})", "install dsv2 again")
        return
    yield Finding(
        "torch",
        "ok",
        f"{torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
    )
    seen = look_for_gpus()
    yield gpu_finding(seen)
    yield from cpu_kernels()
    yield triton_finding(seen, importlib.util.find_spec("triton") is not None)
    yield from extras()
    yield from disks()


@dataclass(frozen=True)
class Gpus:
    """What torch and NVIDIA's driver say of GPUs."""

    names: tuple[str, ...] = ()  # of the devices that torch calls cuda, which AMD's are, too
    cuda: str | None = None  # the version that torch is built for
    rocm: str | None = None
    intel: tuple[str, ...] = ()
    driver: str = ""  # the first card that the driver knows


def look_for_gpus() -> Gpus:
    import torch

    from dsv2cli import memory

    driver = memory.gpus()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0  # the driver may count more
    intel = torch.xpu.device_count() if torch.xpu.is_available() else 0
    return Gpus(
        tuple(map(torch.cuda.get_device_name, range(count))),
        torch.version.cuda,
        torch.version.hip,
        tuple(map(torch.xpu.get_device_name, range(intel))),
        driver[0].label if driver else "",
    )


def gpu_finding(seen: Gpus) -> Finding:
    """What torch sees, held against what the driver sees, and what would run there."""
    names = ", ".join(seen.names or seen.intel)
    if seen.names and seen.rocm:
        text = f"{names}, ROCm {seen.rocm}, as --device cuda: plain torch should run there; never tried"
        return Finding("gpu", "note", text, "--kernels off, or --device cpu")
    if seen.names:
        return Finding("gpu", "ok", f"{names}, CUDA {seen.cuda}")
    if seen.driver:
        why = f"CUDA {seen.cuda} does not start: the driver may be too old"
        if seen.cuda is None:
            why = "this torch is a CPU build" if seen.rocm is None else "this torch is a build for AMD's"
        return Finding(
            "gpu",
            "bad",
            f"{seen.driver} is there, and torch can not use it: {why}",
            "install torch's CUDA build, or use --device cpu",
        )
    if seen.intel:
        return Finding("gpu", "note", f"{names}, which nothing here uses: models run on the CPU")
    return Finding("gpu", "ok", "none; models run on the CPU")


def cpu_kernels() -> Iterator[Finding]:
    """The compiler, and the kernels it makes: compiled here if they are not yet."""
    from dsv2cli.kernels import build, native

    compiler = build.compiler()
    if compiler is None:
        yield Finding(
            "compiler",
            "note",
            "none (c++, g++ or clang++): plain torch runs instead of the C++ kernels, at a fraction of the "
            "speed",
            "install g++ or clang++",
        )
    else:
        yield Finding("compiler", "ok", compiler)
    library, why = native.load()
    if library is None:
        yield Finding(
            "cpu kernels",
            "note",
            f"off, because {why}; plain torch computes the same",
            "" if compiler is None else "a newer compiler",
        )
    else:
        yield Finding(
            "cpu kernels",
            "ok",
            f"{library.path}, for bfloat16, int8 and int4 models; off for tiny models and fp32",
        )


def triton_finding(seen: Gpus, installed: bool) -> Finding:
    if seen.names and not installed:
        return Finding(
            "triton kernels",
            "note",
            "off, because triton is not installed; plain torch computes the same, slowly",
            "pip install triton",
        )
    if seen.names and seen.rocm:
        text = (
            "never tried on an AMD GPU; those for codes of a table (int4 and int4-all, GGUF's IQ4_NL) hold "
        )
        return Finding("triton kernels", "note", f"{text}NVIDIA's instructions", "--kernels off")
    if seen.names:
        return Finding("triton kernels", "ok", "on")
    there = "triton is installed, and there is no GPU for it"
    return Finding("triton kernels", "ok", there if installed else "off: there is no GPU")


def extras() -> Iterator[Finding]:
    for module, use, fix in (
        ("llguidance", "--json-schema and --regex", 'pip install "llguidance>=1.7"'),
        ("modelscope_hub", "dsv2 pull --source ms", 'pip install "modelscope-hub>=0.5"'),
    ):
        if importlib.util.find_spec(module) is None:
            yield Finding(module, "note", f"not installed: no {use}", fix)
        else:
            yield Finding(module, "ok", f"installed, for {use}")


def disks() -> Iterator[Finding]:
    """The places that are written to."""
    from huggingface_hub.constants import HF_HUB_CACHE

    written: dict[str, Callable[[], Path]] = {
        "conversations": places.sessions,
        "compiled kernels": places.compiled_kernels,
        "downloads": lambda: Path(HF_HUB_CACHE),
    }
    for name, place in written.items():
        try:
            path = place()
            there = next(folder for folder in (path, *path.parents) if os.path.exists(folder))
            free = shutil.disk_usage(there).free
        except (Dsv2Error, OSError) as error:
            yield Finding(name, "bad", str(error))
            continue
        if not os.access(there, os.W_OK):
            yield Finding(name, "bad", f"{path} can not be written", f"chmod u+w {there}")
        elif free < LITTLE_DISK:
            yield Finding(name, "note", f"{path} has {free / 1e9:.2f} GB left", "make room")
        else:
            yield Finding(name, "ok", f"{path}, {free / 1e9:.0f} GB free")


def checkpoint(model: str | None, hashed: bool = False) -> Iterator[Finding]:
    """Config, files, tokenizer and template; the weights' names, shapes and lengths are
    checked and not read, or read only to be `hashed`.
    """
    found: list[Checkpoint] = []
    yield attempt("config", lambda: config_of(model, found))
    if found:
        yield attempt("weights", lambda: weights_of(found[0]))
        yield attempt("sampling", lambda: settings_of(found[0]))
        yield from tokenizer_of(found[0])
        if hashed:
            yield from hashes_of(found[0])


def attempt(name: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(name, "ok", look())
    except Dsv2Error as error:
        return Finding(name, "bad", error.sentence, error.fix)


def config_of(model: str | None, found: list[Checkpoint]) -> str:
    """What the checkpoint says of itself; puts it into `found`. Raises Dsv2Error."""
    from dsv2cli.checkpoint.found import find
    from dsv2cli.model import size

    found.append(find(model))
    config, format = found[0].config, size.own_format(found[0].config)
    weights = f"{size.weights_bytes(config, format) / 1e9:.2f} GB of weights"
    return f"{found[0].name}: {config.num_hidden_layers} layers, {format}, {weights}"


def settings_of(checkpoint: Checkpoint) -> str:
    """What generation_config.json says, and which tokens end a text. Raises Dsv2Error."""
    request = opt.Sampling().request(checkpoint)
    ends = ", ".join(map(str, sorted(request.eos_ids)))
    params = request.sampling
    return f"temperature {params.temperature:g}, top_p {params.top_p:g}, text ends with {ends}"


def hashes_of(checkpoint: Checkpoint) -> Iterator[Finding]:
    """A finding for each file that is not what was published, or one for all that are."""
    from dsv2cli.hubs.hashes import published, refuse_other

    try:
        known = published(checkpoint.folder)
    except (OSError, Dsv2Error) as error:
        yield Finding("hashes", "bad", str(error))
        return
    bad = 0
    for path, wanted in known.items():
        try:
            refuse_other(path, wanted)
        except Dsv2Error as error:
            bad += 1
            yield Finding("hashes", "bad", error.sentence, error.fix)
    if not known:
        text = "nothing here says what was published: a flipped bit in the weights can not be found"
        yield Finding(
            "hashes", "note", text, "download it by its repository's name, or put a SHA256SUMS beside it"
        )
    elif not bad:
        yield Finding("hashes", "ok", f"{len(known)} files are what was published, to the bit")


def weights_of(checkpoint: Checkpoint) -> str:
    from dsv2cli.checkpoint.load import look_at_small
    from dsv2cli.checkpoint.names import inspect

    tensors = inspect(checkpoint.folder, checkpoint.config)
    look_at_small(checkpoint.folder, tensors)
    files = {tensor.file for tensor in tensors}
    return f"{len(tensors):,} tensors in {len(files)} files, all there and of the right shape and length"


def tokenizer_of(checkpoint: Checkpoint) -> Iterator[Finding]:
    try:
        tokenizer = checkpoint.tokenizer()
    except Dsv2Error as error:
        yield Finding("tokenizer", "bad", error.sentence, error.fix)
        return
    ids = tokenizer.encode(ROUND_TRIP)
    if (again := tokenizer.decode(ids)) == ROUND_TRIP:
        yield Finding("tokenizer", "ok", "text comes back as it was")
    else:
        yield Finding(
            "tokenizer", "bad", f"{ROUND_TRIP!r} comes back as {again!r}", "download tokenizer.json again"
        )
    largest = tokenizer.fast.get_vocab_size() - 1
    if largest >= checkpoint.config.vocab_size:
        yield Finding(
            "vocabulary",
            "bad",
            f"the tokenizer knows id {largest}, the model {checkpoint.config.vocab_size} ids",
            "a tokenizer.json of this model",
        )
    yield bos_of(
        tokenizer.special("bos_token"),
        tokenizer.fast.token_to_id(tokenizer.special("bos_token")),
        ids,
        checkpoint,
    )
    try:
        chat: list[int] = tokenizer.encode_chat([{"role": "user", "content": "Hello"}])
    except Dsv2Error as error:
        rejected = tokenizer.chat_template is not None
        yield Finding("template", "bad" if rejected else "note", error.sentence, error.fix)
        return
    twice = len(chat) > 1 and chat[0] == chat[1]
    yield Finding(
        "template",
        "bad" if twice else "ok",
        "it begins twice" if twice else f"a first message takes {len(chat)} tokens",
    )


def bos_of(text: str, bos: int | None, ids: list[int], checkpoint: Checkpoint) -> Finding:
    wanted: Any = checkpoint.config.bos_token_id
    if bos is None:
        return Finding(
            "begin of text", "note", "tokenizer_config.json names no bos_token: prompts begin without one"
        )
    if wanted is not None and bos != wanted:
        return Finding(
            "begin of text",
            "bad",
            f"the tokenizer's {text} is {bos}, config.json says {wanted}",
            "files of one and the same model",
        )
    return Finding("begin of text", "ok", f"{text}, {'once' if ids.count(bos) == 1 else 'not added'}")
