"""Options that several commands share, and opening the model they name. Nothing here imports torch at import time."""

from __future__ import annotations

import atexit
import os
import secrets
import sys
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv2cli.cli import launch, ui
from dsv2cli.errors import Dsv2Error, UsageError

if TYPE_CHECKING:
    import torch

    from dsv2cli.checkpoint.tokenizer import Tokenizer
    from dsv2cli.engine.generate import Request, Result
    from dsv2cli.kernels.native import Kernels
    from dsv2cli.model.config import DeepseekV2Config
    from dsv2cli.model.transformer import DeepseekV2
    from dsv2cli.team import Team


class Dtype(str, Enum):
    auto, float32, bfloat16, float16 = "auto", "float32", "bfloat16", "float16"


class AttentionPath(str, Enum):
    auto, absorbed, expanded, reference = "auto", "absorbed", "expanded", "reference"


class KernelsChoice(str, Enum):
    auto, triton, triton_eager, native, avx2, portable, off = (
        "auto",
        "triton",
        "triton-eager",
        "native",
        "avx2",
        "portable",
        "off",
    )


TRITON = (KernelsChoice.triton, KernelsChoice.triton_eager)


class Experts(str, Enum):
    auto, cpu = "auto", "cpu"


class Quantize(str, Enum):
    none, int8, int4, int4_all = "none", "int8", "int4", "int4-all"


class SplitAttention(str, Enum):
    heads, sequences = "heads", "sequences"


CURSOR = "<CURSOR>"  # where a file is to be filled in

# Steps of so small a model are shorter than waking a second thread, and on a busy machine they would wait for it.
SMALL_MODEL_BYTES = 64 * 2**20
OFF, TINY = "they are switched off", "the model is tiny"  # why no kernels run, and nobody needs to be told


def models(incomplete: str) -> list[str]:
    """For the shell's completion: folders that hold a checkpoint or lead on, and DeepSeek-V2 models already downloaded."""
    from dsv2cli.checkpoint.hub import known_models

    return known_models(incomplete)


def sessions(incomplete: str) -> list[str]:
    """For the shell's completion: saved conversations, the latest first."""
    from dsv2cli.places import session_names

    return [name for name in session_names() if name.startswith(incomplete)]


MODEL_HELP = "Folder with a checkpoint, or a Hugging Face repository name. Default: the small model inside the package."
ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", metavar="DIR|REPO", autocompletion=models, help=MODEL_HELP)
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DtypeOption = Annotated[
    Dtype, typer.Option(help="Number format of the weights; auto is the checkpoint's own.")
]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="CPU threads. Default: one a core; one for a tiny model.")
]
AttentionOption = Annotated[
    AttentionPath, typer.Option(help="Attention path; auto takes the one with less work.")
]
KernelsOption = Annotated[
    KernelsChoice,
    typer.Option(
        help="auto: Triton and CUDA graphs on a GPU (triton-eager: no graphs), C++ on a CPU, not for tiny models; off: plain torch."
    ),
]
GpusOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="GPUs that share the model, heads and experts split; with --device cpu, processes."
    ),
]
SplitAttentionOption = Annotated[
    SplitAttention,
    typer.Option(
        help="How --gpus share attention: some heads of every sequence each, or, for batches, some sequences each."
    ),
]
PlacementOption = Annotated[
    str | None,
    typer.Option(
        metavar="auto|FILE.json",
        help="Spread layers over GPUs, RAM and disk: auto, or a file that says which module goes where.",
    ),
]
MaxMemoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="0=75GB,cpu=200GB",
        help="Memory that --placement auto may fill on each device; the rest goes to disk.",
    ),
]
ExpertsOption = Annotated[
    Experts,
    typer.Option(
        help="cpu: keep routed experts in RAM and compute them there, as many as the GPU has no room for."
    ),
]
OffloadFolderOption = Annotated[
    Path | None, typer.Option(help="Folder for layers on disk. Default: the system's temporary one.")
]
QuantizeOption = Annotated[
    Quantize,
    typer.Option(help="Weights in 8 or 4 bits, made while loading; int4-all: attention in 4 bits too."),
]
TemperatureOption = Annotated[float | None, typer.Option(help="0 always takes the likeliest token.")]
TopPOption = Annotated[
    float | None, typer.Option(help="Sample from the likeliest tokens that hold this probability.")
]
TopKOption = Annotated[int | None, typer.Option(help="Sample from this many tokens; 0 is off.")]
MinPOption = Annotated[
    float | None, typer.Option(help="Drop tokens less likely than this share of the likeliest.")
]
RepetitionOption = Annotated[
    float | None, typer.Option(help="Above 1 discourages tokens that have occurred.")
]
SeedOption = Annotated[
    int | None, typer.Option(min=0, help="Same seed, same text. Default: a new one each time.")
]
StopOption = Annotated[
    list[str] | None, typer.Option(help="End before this text; may be given several times.")
]
MaxTokensOption = Annotated[
    int, typer.Option("--max-new-tokens", "-n", min=1, help="Most tokens to generate.")
]


class Overflow(str, Enum):
    """What becomes of a conversation that fills the context."""

    ask, stop, drop, summarise = "ask", "stop", "drop", "summarise"


@dataclass(frozen=True)
class Compute:
    """What the command line says about where and how to run."""

    device: str = "auto"
    dtype: Dtype = Dtype.auto
    threads: int | None = None
    attention: AttentionPath = AttentionPath.auto
    kernels: KernelsChoice = KernelsChoice.auto
    quantize: Quantize = Quantize.none
    gpus: int | None = None
    placement: str | None = None
    max_memory: str | None = None
    offload_folder: Path | None = None
    experts: Experts = Experts.auto
    split_attention: SplitAttention = SplitAttention.heads

    @property
    def sequences(self) -> bool:
        return self.split_attention is SplitAttention.sequences

    @property
    def packing(self) -> str | None:
        """The format to pack the weights in while loading."""
        return None if self.quantize is Quantize.none else self.quantize.value

    def as_json(self) -> dict[str, Any]:
        return {key: value.value if isinstance(value, Enum) else value for key, value in vars(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Compute:
        kinds = {
            "experts": Experts,
            "dtype": Dtype,
            "attention": AttentionPath,
            "kernels": KernelsChoice,
            "quantize": Quantize,
            "split_attention": SplitAttention,
        }
        return cls(**{key: kinds[key](value) if key in kinds else value for key, value in values.items()})


@dataclass
class Checkpoint:
    """A model's folder and what it says about itself; nothing is loaded yet."""

    folder: Path
    name: str
    config: DeepseekV2Config
    settings: dict[str, Any]

    @property
    def eos_ids(self) -> frozenset[int]:
        """From generation_config.json, else config.json; one id or several."""
        value = self.settings.get("eos_token_id", self.config.eos_token_id)
        return frozenset(value if isinstance(value, list) else [] if value is None else [value])

    def tokenizer(self) -> Tokenizer:
        from dsv2cli.checkpoint.tokenizer import Tokenizer

        return Tokenizer(self.folder)

    def tokenizer_if_any(self) -> Tokenizer | None:
        """With token ids a checkpoint may do without."""
        return self.tokenizer() if (self.folder / "tokenizer.json").exists() else None

    def request(
        self,
        max_new_tokens: int | None,
        seed: int | None,
        stop: list[str] | None,
        logprobs: int | None = None,
        ignore_eos: bool = False,
        **sampling: float | None,
    ) -> Request:
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


@dataclass
class Plan:
    """Where and how a model will run."""

    device: torch.device
    dtype: torch.dtype
    format: str  # of the weights: int4, int8, or the number format
    kernels: Kernels | None  # the C++ ones
    path: str  # which kernels
    why: str  # they are not others, as words to follow 'because'
    ranks: int = 1  # processes that share the model
    places: dict[str, Any] | None = None  # module -> device, where layers are spread
    apart: int | None = None  # with the routed experts in RAM: in how many layers they are not
    triton: bool = False  # whether the Triton kernels run what lies on the GPU
    graphs: bool = False  # and whole decode steps as CUDA graphs
    sequences: bool = False  # whether each rank attends for sequences of its own


@dataclass
class Opened(Checkpoint):
    """A model ready to run."""

    model: DeepseekV2
    plan: Plan
    load_seconds: float


def find(name: str | None, random_weights: str | None = None) -> Checkpoint:
    """The checkpoint that a name means, or one of random weights whose config is named. Raises Dsv2Error."""
    from dsv2cli.checkpoint.hub import find_config, find_model
    from dsv2cli.checkpoint.tokenizer import read_json
    from dsv2cli.model.config import DeepseekV2Config

    if random_weights is not None:
        path = find_config(random_weights)
        return Checkpoint(path, f"random weights of {random_weights}", DeepseekV2Config.load(path), {})
    folder = find_model(name)
    return Checkpoint(
        folder,
        name or "embedded",
        DeepseekV2Config.load(folder),
        read_json(folder / "generation_config.json"),
    )


def make_plan(config: DeepseekV2Config, compute: Compute, local_rank: int = 0) -> Plan:
    """Choose device, ranks, number format, kernels and threads. Raises Dsv2Error where what was asked for is not there."""
    os.environ.setdefault(
        "THP_MEM_ALLOC_ENABLE", "1"
    )  # torch then takes huge pages for weights: reading them is 1.08x faster
    import torch

    from dsv2cli.device import DTYPES, gpu_memories, pick_device
    from dsv2cli.model.fused import refusal
    from dsv2cli.model.size import weights_bytes

    device = pick_device(compute.device)
    dtype = DTYPES.get(compute.dtype.value) or getattr(torch, config.torch_dtype)
    small = weights_bytes(config, "bfloat16") < SMALL_MODEL_BYTES
    format = format_of(config, compute, dtype)
    ranks = count_ranks(config, compute, device, format, str(dtype).removeprefix("torch."))
    if compute.sequences and ranks == 1:
        raise UsageError(
            "--split-attention sequences is for several ranks", fix="--gpus N with it, or leave it out"
        )
    if device.type == "cuda" and ranks > 1:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if compute.threads is not None or small or ranks > 1:
        torch.set_num_threads(compute.threads or (1 if small else max(1, (os.cpu_count() or 1) // ranks)))
    apart = None if compute.experts is Experts.auto else experts_that_stay(config, compute, device, dtype)
    if compute.placement is not None or compute.max_memory is not None:
        return spread(config, compute, dtype, format)
    library, why = pick_kernels(compute.kernels, "cpu" if apart is not None else device.type, small)
    if library is not None:
        why = refusal(config, device if apart is None else torch.device("cpu"), dtype)
        library = None if why else library
    triton, no_triton = pick_triton(compute.kernels, config, device)
    graphs = (
        triton
        and device.type == "cuda"
        and apart is None
        and compute.kernels is not KernelsChoice.triton_eager
    )
    names = [library.path] if library is not None else []
    names += ["triton with CUDA graphs" if graphs else "triton"] if triton else []
    why = no_triton if device.type == "cuda" else "" if triton else why
    plan = Plan(
        device,
        dtype,
        format,
        library,
        " and ".join(names) or "plain torch",
        why,
        ranks,
        apart=apart,
        triton=triton,
        graphs=graphs,
        sequences=compute.sequences,
    )
    if device.type == "cuda" and apart is None:
        refuse_what_does_not_fit(config, plan, gpu_memories())
    return plan


def experts_that_stay(
    config: DeepseekV2Config, compute: Compute, device: torch.device, dtype: torch.dtype
) -> int:
    """In how many layers the GPU has room for the routed experts, beside all else and the cache of a 4,096-token talk.

    Raises UsageError where it has no room for the rest, or the model no experts.
    """
    from dsv2cli.device import gpu_memories
    from dsv2cli.model import size

    if compute.placement or compute.max_memory or (compute.gpus or 1) > 1 or launch.torchrun_size() > 1:
        raise UsageError(
            "--experts cpu is for one device", fix="leave --gpus, --placement and --max-memory out"
        )
    if not config.moe_layers:
        raise UsageError("This model has no routed experts", fix="leave --experts out")
    if device.type == "cpu":
        return 0
    name = str(dtype).removeprefix("torch.")
    rest = sum(part.bytes for part in size.parts(config, name) if part.name != "routed experts")
    format = name if compute.quantize is Quantize.none else compute.quantize.value
    each = (
        sum(part.bytes for part in size.parts(config, format, name) if part.name == "routed experts")
        // config.moe_layers
    )
    room = 0.9 * gpu_memories()[device.index or 0] - 4096 * size.kv_bytes_per_token(config, name)
    if rest > room:
        raise UsageError(
            "The GPU is too small even without the experts",
            why=f"the rest takes {rest / 1e9:.1f} GB of its {room / 1e9:.1f} GB",
            fix="--device cpu --quantize int4",
        )
    return min(config.moe_layers, int((room - rest) // each))


def spread(config: DeepseekV2Config, compute: Compute, dtype: torch.dtype, format: str) -> Plan:
    """Layers over devices, RAM and disk. Raises UsageError where the places make no sense."""
    from dsv2cli.checkpoint.placement import main_device, place

    if (compute.gpus or 1) > 1 or launch.torchrun_size() > 1:
        raise UsageError(
            "--gpus and --placement do not go together",
            why="one splits each layer, the other puts whole layers in places",
            fix="leave one of them out",
        )
    places = place(config, dtype, compute.packing, compute.placement or "auto", compute.max_memory)
    return Plan(
        main_device(places), dtype, format, None, "plain torch", "layers are spread over devices", 1, places
    )


def format_of(config: DeepseekV2Config, compute: Compute, dtype: torch.dtype) -> str:
    """Of the weights. Raises UsageError where the checkpoint is packed otherwise."""
    from dsv2cli.model.size import own_format

    if compute.quantize is Quantize.none:
        return own_format(config) if config.packed is not None else str(dtype).removeprefix("torch.")
    if config.packed is not None and own_format(config) != compute.quantize.value:
        raise UsageError(f"The checkpoint is packed in {own_format(config)}", fix="leave --quantize out")
    return compute.quantize.value


def ranks_needed(
    config: DeepseekV2Config, format: str, dtype: str, memories: list[int], sequences: bool = False
) -> int:
    """The fewest GPUs whose memories [bytes each] hold the weights with a tenth to spare, or all of them."""
    from dsv2cli.model.size import bytes_by_rank

    for count in range(1, len(memories)):
        if all(
            need < 0.9 * has
            for need, has in zip(
                bytes_by_rank(config, format, dtype, count, sequences), memories, strict=False
            )
        ):
            return count
    return len(memories)


def refuse_what_does_not_fit(config: DeepseekV2Config, plan: Plan, memories: list[int]) -> None:
    """Raises UsageError with the nearest plan that does, where the ranks' weights are larger than their memories."""
    from dsv2cli.formats import PACKED_BITS
    from dsv2cli.model.size import bytes_by_rank

    dtype = str(plan.dtype).removeprefix("torch.")
    most = max(bytes_by_rank(config, plan.format, dtype, plan.ranks, plan.sequences))
    if most <= min(memories):
        return
    tries = [
        (ranks, format)
        for format in (plan.format, *PACKED_BITS)
        for ranks in range(plan.ranks, max(8, len(memories)) + 1)
    ]
    fits = [
        (ranks, format)
        for ranks, format in tries
        if max(bytes_by_rank(config, format, dtype, ranks, plan.sequences)) < 0.9 * min(memories)
    ]
    fits.sort(key=lambda plan: (plan[0] > len(memories), tries.index(plan)))
    nearest = fits[0] if fits else None
    fix = "a smaller checkpoint"
    if nearest is not None:
        options = [f"--gpus {nearest[0]}"] if nearest[0] > 1 else []
        fix = " ".join([*options, *([f"--quantize {nearest[1]}"] if nearest[1] in PACKED_BITS else [])])
    raise UsageError(
        f"The weights do not fit on {plan.ranks} {plan.device.type} device{'s' if plan.ranks > 1 else ''}",
        why=f"{plan.format} takes {most / 1e9:.1f} GB of the {min(memories) / 1e9:.1f} GB of each",
        fix=fix,
    )


def count_ranks(
    config: DeepseekV2Config, compute: Compute, device: torch.device, format: str, dtype: str
) -> int:
    """How many processes share the model: as many GPUs as its weights need, where nothing is said.

    Raises UsageError where there are not as many GPUs, or nothing to share out.
    """
    import torch

    from dsv2cli.device import gpu_memories

    ranks = compute.gpus or 1
    if compute.gpus is None and device.type == "cuda" and compute.device in ("auto", "cuda"):
        ranks = ranks_needed(config, format, dtype, gpu_memories(), compute.sequences)
    if (there := launch.torchrun_size()) > 1:
        if compute.gpus not in (None, there):
            raise UsageError(
                f"--gpus {compute.gpus} under torchrun",
                why=f"it has started {there} processes",
                fix="leave --gpus out",
            )
        ranks = there
    elif device.type == "cuda" and ranks > torch.cuda.device_count():
        raise UsageError(
            f"There are no {ranks} GPUs",
            why=f"{torch.cuda.device_count()} CUDA devices found",
            fix=f"--gpus {torch.cuda.device_count()}",
        )
    most = max(config.num_attention_heads, config.n_routed_experts or 0)
    if ranks > most:
        raise UsageError(
            f"{ranks} processes can not share this model",
            why=f"it has {most} heads or experts to share out",
            fix=f"--gpus {most}",
        )
    return ranks


def open_model(
    name: str | None, compute: Compute, random_weights: str | None = None, found: Checkpoint | None = None
) -> Opened:
    """Find, load and report progress; `random_weights` names a config to make a model from. `found` is what the name
    means, where that is known already. Raises Dsv2Error for whatever stands in the way."""
    found = found or find(name, random_weights)
    plan = make_plan(found.config, compute)

    from dsv2cli.team import ALONE

    if plan.why and plan.path == "plain torch" and plan.why not in (OFF, TINY) and sys.stderr.isatty():
        typer.echo(
            f"plain torch instead of the {'Triton' if plan.device.type == 'cuda' else 'C++'} kernels, because {plan.why}",
            err=True,
        )
    if plan.apart is not None:
        ui.note(apart_line(found.config, plan))
    began = time.perf_counter()
    team = ALONE
    if plan.ranks > 1:
        orders = {"model": name, "random_weights": random_weights, "compute": compute.as_json()}
        team = launch.gather(plan.ranks, orders, plan.device, plan.triton, plan.sequences)
    model = load(found, plan, compute, random_weights is not None, team)
    return Opened(**vars(found), model=model, plan=plan, load_seconds=time.perf_counter() - began)


def apart_line(config: DeepseekV2Config, plan: Plan) -> str:
    """Where the routed experts are, in one line."""
    return f"routed experts of {config.moe_layers - (plan.apart or 0)} layers in RAM, of {plan.apart} on {plan.device}; all else on {plan.device}"


def load(found: Checkpoint, plan: Plan, compute: Compute, random: bool, team: Team) -> DeepseekV2:
    """The model, or this rank's part of it, as planned; in a team this ends when all have loaded theirs."""
    from dsv2cli.checkpoint.weights import load_model, random_model
    from dsv2cli.model.fused import use_kernels

    if plan.places is not None:
        from dsv2cli.checkpoint.placement import load_placed

        if random:
            raise UsageError("--placement is for checkpoints", fix="leave --random-weights out")
        with ui.loading(found.name) as progress:
            model = load_placed(
                found.folder,
                found.config,
                plan.dtype,
                compute.packing,
                plan.places,
                compute.offload_folder,
                progress,
            )
    elif random:
        model = random_model(found.config, plan.device, plan.dtype, compute.packing, team, plan.apart)
    else:
        with ui.loading(found.name) as progress:
            model = load_model(
                found.folder,
                plan.device,
                plan.dtype,
                progress,
                compute.packing,
                plan.kernels,
                team,
                plan.apart,
            )
    use_kernels(model, plan.kernels, plan.triton, plan.graphs)
    model.use_attention(compute.attention.value)
    if team.size > 1:
        import torch.distributed as dist

        from dsv2cli.model.conductor import Leader, whole

        with whole():
            dist.barrier()
        if isinstance(model, Leader) and launch.torchrun_size() > 1:
            atexit.register(model.stop)
    return model


def pick_kernels(choice: KernelsChoice, device: str, small: bool) -> tuple[Kernels | None, str]:
    """The C++ kernels to use, or None and why. Raises Dsv2Error where those asked for by name can not be had."""
    from dsv2cli.kernels.native import load

    if choice is KernelsChoice.off:
        return None, OFF
    named = choice not in (KernelsChoice.auto, *TRITON)
    if not named and (device != "cpu" or small):
        return None, TINY if small else f"the model is on {device}"
    library, why = load(choice.value if named else "native")
    if library is None and named:
        raise Dsv2Error(f"The {choice.value} kernels are not there", why=why, fix="--kernels off")
    return library, why


def pick_triton(choice: KernelsChoice, config: DeepseekV2Config, device: torch.device) -> tuple[bool, str]:
    """Whether the Triton kernels run what lies on `device`, or why not. Raises UsageError where they are asked for and can not."""
    from dsv2cli.model.fused import triton_refusal

    if choice not in (KernelsChoice.auto, *TRITON):
        return False, OFF
    why = triton_refusal(config, device)
    if why and choice in TRITON:
        raise UsageError("The Triton kernels can not run this", why=why, fix="--kernels auto, or off")
    return not why and (device.type == "cuda" or choice in TRITON), why


def parse_ids(text: str) -> list[int]:
    """`1,2,3` to token ids. Raises UsageError for anything else."""
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise UsageError(
            f"--prompt-ids {text!r} is not a list of numbers", fix='--prompt-ids "1,2,3"'
        ) from None


def stats_line(result: Result) -> str:
    """One line on how it went, for stderr."""
    parts = [f"{len(result.tokens)} tokens"]
    if result.decode_tokens_per_second:
        parts.append(f"{result.decode_tokens_per_second:.1f} tok/s")
    parts.append(f"first after {result.ttft_seconds:.2f} s")
    parts.append(
        f"prompt {len(result.prompt_ids)}"
        + (f", {result.reused_tokens} reused" if result.reused_tokens else "")
    )
    return " · ".join([*parts, result.finish_reason])
