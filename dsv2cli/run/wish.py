"""What may be asked about where and how a model runs.

Each field is an option of the command line, said here once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from typer import Option

from dsv2cli import places

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Packing = Literal["none", "int8", "int4", "int4-all"]
Cache = Literal["auto", "bf16", "int8", "int6", "int4"]
KernelsChoice = Literal["auto", "triton", "triton-eager", "triton-exact", "native", "avx2", "portable", "off"]
ReadAhead = Literal["auto", "chosen", "guess", "off"]
TRITON = ("triton", "triton-eager", "triton-exact")

DtypeOption = Annotated[Dtype, Option(help="Number format of the weights; auto is the checkpoint's own.")]
QuantizeOption = Annotated[
    Packing, Option(help="Weights in 8 or 4 bits, made while loading; int4-all: head and latents in 4, too.")
]
CacheOption = Annotated[
    Cache,
    Option(
        help="Number format of the latent cache; auto is that of the activations. int6 halves it, and more."
    ),
]
KernelsOption = Annotated[
    KernelsChoice,
    Option(
        help="auto: Triton and CUDA graphs on a GPU (triton-eager: kernel by kernel; triton-exact: what goes "
        "into packed experts is not rounded to 8 bits), C++ on a CPU, not for tiny models; off: plain torch."
    ),
]


@dataclass(frozen=True)
class Wish:
    """What was asked; the defaults ask for nothing in particular."""

    heading = "Where and how it runs"

    device: Annotated[str, Option(help="auto, cpu, cuda or cuda:N.")] = "auto"
    dtype: DtypeOption = "auto"
    quantize: QuantizeOption = "none"
    cache: CacheOption = "auto"
    gpus: Annotated[
        int | None,
        Option(
            min=1, help="GPUs that share the model, heads and experts split; with --device cpu, processes."
        ),
    ] = None
    experts: Annotated[
        Literal["auto", "cpu"],
        Option(
            help="cpu: keep routed experts in RAM and compute them there, as many as the GPU has no room for."
        ),
    ] = "auto"
    placement: Annotated[
        str | None,
        Option(
            metavar="auto|FILE.json",
            help="Spread layers over GPUs, RAM and disk: auto, or a file that says which module goes where.",
        ),
    ] = None
    max_memory: Annotated[
        str | None,
        Option(
            metavar="0=75GB,cpu=200GB",
            help="Memory that --placement auto may fill on each device; the rest goes to disk.",
        ),
    ] = None
    offload_folder: Annotated[
        Path | None, Option(help="Folder for layers on disk. Default: the system's temporary one.")
    ] = None
    read_ahead: Annotated[
        ReadAhead,
        Option(
            help="Which experts of a packed checkpoint the system is asked for before they are needed: those "
            "chosen, or those too that the next layer is likely to choose (guess); auto: those chosen, where "
            "it is larger than memory."
        ),
    ] = "auto"
    kernels: KernelsOption = "auto"
    attention: Annotated[
        Literal["auto", "absorbed", "expanded", "reference"],
        Option(help="Attention path; auto takes the one with less work."),
    ] = "auto"
    threads: Annotated[
        int | None, Option(min=1, help="CPU threads. Default: one a core; one for a tiny model.")
    ] = None

    @property
    def kept(self) -> tuple[Path, int] | None:
        """The folder where pages of latents are kept, and how many bytes of them."""
        return None

    @property
    def sequences(self) -> bool:
        """Whether each rank is to attend to sequences of its own."""
        return False

    @property
    def packing(self) -> str | None:
        """The format to pack the weights in while loading."""
        return None if self.quantize == "none" else self.quantize

    @property
    def placed(self) -> bool:
        """Whether layers are to be spread over devices."""
        return self.placement is not None or self.max_memory is not None


@dataclass(frozen=True)
class KeepingWish(Wish):
    """The same for commands that may go on with what was read before."""

    cache_store: Annotated[
        str,
        Option(
            metavar="DIR|auto|off",
            help="Keep the latents of prompts in a folder (auto: one of our own): a prompt that begins like "
            "an earlier one, today or tomorrow, is read from there on.",
        ),
    ] = "off"
    cache_store_gb: Annotated[
        int, Option(min=1, help="GB that --cache-store may hold; the least recently used go first.")
    ] = 20

    @property
    def kept(self) -> tuple[Path, int] | None:
        if self.cache_store == "off":
            return None
        if self.cache_store == "auto":
            return places.pages(), self.cache_store_gb * 10**9
        return Path(self.cache_store).expanduser(), self.cache_store_gb * 10**9


@dataclass(frozen=True)
class BatchWish(Wish):
    """The same for commands that run many sequences at once."""

    split_attention: Annotated[
        Literal["heads", "sequences"],
        Option(
            help="How --gpus share attention: some heads of every sequence each, or, for batches, some "
            "sequences each."
        ),
    ] = "heads"

    @property
    def sequences(self) -> bool:
        return self.split_attention == "sequences"


@dataclass(frozen=True)
class CompleteWish(KeepingWish, BatchWish):
    """Both."""
