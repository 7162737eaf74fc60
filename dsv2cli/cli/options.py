"""Options that several commands share, and opening the model they name. Nothing here imports torch at import time."""

from __future__ import annotations

import os
import secrets
import sys
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv2cli.cli import ui
from dsv2cli.errors import Dsv2Error, UsageError

if TYPE_CHECKING:
    from dsv2cli.checkpoint.tokenizer import Tokenizer
    from dsv2cli.engine.generate import Request, Result
    from dsv2cli.kernels.native import Kernels
    from dsv2cli.model.transformer import DeepseekV2


class Dtype(str, Enum):
    auto, float32, bfloat16, float16 = "auto", "float32", "bfloat16", "float16"


class AttentionPath(str, Enum):
    auto, absorbed, expanded, reference = "auto", "absorbed", "expanded", "reference"


class KernelsChoice(str, Enum):
    auto, native, avx2, portable, off = "auto", "native", "avx2", "portable", "off"


class Quantize(str, Enum):
    none, int8, int4 = "none", "int8", "int4"


# Steps of so small a model are shorter than waking a second thread, and on a busy machine they would wait for it.
SMALL_MODEL_BYTES = 64 * 2**20

MODEL_HELP = "Folder with a checkpoint, or a Hugging Face repository name. Default: the small model inside the package."
ModelOption = Annotated[str | None, typer.Option("--model", "-m", metavar="DIR|REPO", help=MODEL_HELP)]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Number format of the weights; auto is the checkpoint's own.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: one a core; one for a tiny model.")]
AttentionOption = Annotated[AttentionPath, typer.Option(help="Attention path; auto takes the one with less work.")]
KernelsOption = Annotated[KernelsChoice, typer.Option(help="C++ kernels on a CPU; auto: for this processor, not for tiny models.")]
QuantizeOption = Annotated[Quantize, typer.Option(help="Weights in 8 or 4 bits, made while loading.")]
TemperatureOption = Annotated[float | None, typer.Option(help="0 always takes the likeliest token.")]
TopPOption = Annotated[float | None, typer.Option(help="Sample from the likeliest tokens that hold this probability.")]
TopKOption = Annotated[int | None, typer.Option(help="Sample from this many tokens; 0 is off.")]
MinPOption = Annotated[float | None, typer.Option(help="Drop tokens less likely than this share of the likeliest.")]
RepetitionOption = Annotated[float | None, typer.Option(help="Above 1 discourages tokens that have occurred.")]
SeedOption = Annotated[int | None, typer.Option(min=0, help="Same seed, same text. Default: a new one each time.")]
StopOption = Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")]
MaxTokensOption = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Most tokens to generate.")]


class Overflow(str, Enum):
    """What becomes of a conversation that fills the context."""

    ask, stop, drop, summarise = "ask", "stop", "drop", "summarise"


@dataclass
class Opened:
    """A model ready to run, with what its folder says about sampling."""

    model: DeepseekV2
    folder: Path
    name: str
    settings: dict[str, Any]
    load_seconds: float
    kernels: Kernels | None = None
    path: str = "plain torch"

    @property
    def format(self) -> str:
        """Of the weights: int4, int8, or the number format."""
        from dsv2cli.kernels.quantized import Quantized

        bits = [module.bits for module in self.model.modules() if isinstance(module, Quantized)]
        return f"int{min(bits)}" if bits else str(self.model.dtype).removeprefix("torch.")

    @property
    def eos_ids(self) -> frozenset[int]:
        """From generation_config.json, else config.json; one id or several."""
        value = self.settings.get("eos_token_id", self.model.config.eos_token_id)
        return frozenset(value if isinstance(value, list) else [] if value is None else [value])

    def tokenizer(self) -> Tokenizer:
        from dsv2cli.checkpoint.tokenizer import Tokenizer

        return Tokenizer(self.folder)

    def request(
        self, max_new_tokens: int | None, seed: int | None, stop: list[str] | None, logprobs: int | None = None,
        ignore_eos: bool = False, **sampling: float | None,
    ) -> Request:  # fmt: skip
        """The checkpoint's sampling defaults with the command line's on top. Raises UsageError for senseless values."""
        from dsv2cli.engine.generate import Request
        from dsv2cli.engine.sampling import SamplingParams

        return Request(
            SamplingParams.from_generation_config(self.settings, **sampling),
            max_new_tokens,
            frozenset() if ignore_eos else self.eos_ids,
            tuple(stop or ()),
            secrets.randbits(32) if seed is None else seed,
            logprobs,
        )


def open_model(
    name: str | None, device: str, dtype: Dtype, threads: int | None, attention: AttentionPath = AttentionPath.auto,
    kernels: KernelsChoice = KernelsChoice.auto, quantize: Quantize = Quantize.none, random_weights: str | None = None,
) -> Opened:  # fmt: skip
    """Find, load and report progress; `random_weights` names a config to make a model from. Raises Dsv2Error for whatever
    stands in the way."""
    from dsv2cli.checkpoint.hub import find_config, find_model

    folder = find_model(name) if random_weights is None else find_config(random_weights)
    shown = random_weights or name or "the embedded model"
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch then takes huge pages for weights: reading them is 1.08x faster
    import torch

    from dsv2cli.checkpoint.tokenizer import read_json
    from dsv2cli.checkpoint.weights import load_model, random_model
    from dsv2cli.device import DTYPES, pick_device
    from dsv2cli.model.config import DeepseekV2Config
    from dsv2cli.model.fused import refusal, use_kernels
    from dsv2cli.model.size import parts

    place = pick_device(device)
    config = DeepseekV2Config.load(folder)
    small = 2 * sum(part.parameters for part in parts(config)) < SMALL_MODEL_BYTES
    if threads is not None or small:
        torch.set_num_threads(threads or 1)
    library, why = pick_kernels(kernels, place.type, small)
    bits = None if quantize is Quantize.none else int(quantize.value[3:])
    began = time.perf_counter()
    with ui.loading(shown) as progress:
        if random_weights is None:
            model = load_model(folder, place, DTYPES.get(dtype.value), progress, bits, library)
        else:
            model = random_model(config, place, DTYPES.get(dtype.value), bits)
    if library is not None:
        why = refusal(model)
        library = None if why else library
    if library is None and kernels is not KernelsChoice.off and not small and sys.stderr.isatty():
        typer.echo(f"plain torch instead of the C++ kernels, because {why}", err=True)
    use_kernels(model, library)
    model.use_attention(attention.value)
    settings = read_json(folder / "generation_config.json")
    path = "plain torch" if library is None else library.path
    shown = name or "embedded" if random_weights is None else f"random weights of {random_weights}"
    return Opened(model, folder, shown, settings, time.perf_counter() - began, library, path)


def pick_kernels(choice: KernelsChoice, device: str, small: bool) -> tuple[Kernels | None, str]:
    """The C++ kernels to use, or None and why. Raises Dsv2Error where those asked for by name can not be had."""
    from dsv2cli.kernels.native import load

    if choice is KernelsChoice.off:
        return None, "they are switched off"
    if choice is KernelsChoice.auto and (device != "cpu" or small):
        return None, "the model is tiny" if small else f"the model is on {device}"
    library, why = load("native" if choice is KernelsChoice.auto else choice.value)
    if library is None and choice is not KernelsChoice.auto:
        raise Dsv2Error(f"The {choice.value} kernels are not there", why=why, fix="--kernels off")
    return library, why


def parse_ids(text: str) -> list[int]:
    """`1,2,3` to token ids. Raises UsageError for anything else."""
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise UsageError(f"--prompt-ids {text!r} is not a list of numbers", fix='--prompt-ids "1,2,3"') from None


def stats_line(result: Result) -> str:
    """One line on how it went, for stderr."""
    parts = [f"{len(result.tokens)} tokens"]
    if result.decode_tokens_per_second:
        parts.append(f"{result.decode_tokens_per_second:.1f} tok/s")
    parts.append(f"first after {result.ttft_seconds:.2f} s")
    parts.append(f"prompt {len(result.prompt_ids)}" + (f", {result.reused_tokens} reused" if result.reused_tokens else ""))
    return " · ".join([*parts, result.finish_reason])
