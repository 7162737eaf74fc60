"""How a model will run: from what was asked and what is there, a Plan. Nothing is changed or loaded here.

A Plan holds names and numbers only, so that the leader of a team can hand it to the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.formats import PACKED_BITS
from dsv2cli.model import size
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.run.wish import TRITON, Wish

# Steps of so small a model are shorter than waking a second thread, and on a busy machine they would wait for
# it.
SMALL_MODEL_BYTES = 64 * 2**20
OFF, TINY = "they are switched off", "the model is tiny"  # why no kernels run, and nobody needs to be told
MOST_THREADS = 1024
SPARE = 0.9  # of a GPU's memory may be filled with weights
TALK = 4096  # tokens whose cache must find room beside experts on a GPU


@dataclass(frozen=True)
class Here:
    """What is there. The two functions are asked only where the answer matters, because
    looking takes time.
    """

    gpu_memories: tuple[int, ...]  # bytes of each CUDA device
    cores: int
    torchrun: int  # processes that torchrun has started
    no_triton: str  # why there is no triton, or empty
    interpreted: bool  # whether triton runs on the CPU
    cpu_kernels: Callable[[str], tuple[str, str]]  # for a target their name, or none and why
    places: Callable[[DeepseekV2Config, str, Wish], dict[str, Any]]  # for a number format: module -> device
    rocm: bool = False  # whether the GPUs are AMD's
    ram: int | None = None  # bytes that this process may use; None where that is not known


@dataclass(frozen=True)
class Plan:
    """Where and how a model will run."""

    device: str  # cpu or cuda:N
    dtype: str
    format: str  # of the weights: int4, int8, or the number format
    packing: str | None = None  # the format to pack them in while loading
    attention: str = "auto"
    threads: int | None = None  # on the CPU; None leaves torch its own
    ranks: int = 1  # processes that share the model
    cache: str = "auto"  # number format of the latents in the pool
    sequences: bool = False  # whether each rank attends to sequences of its own
    places: dict[str, Any] | None = None  # module -> device, where layers are spread
    offload_folder: str | None = None  # for those on disk
    experts_on_gpu: int | None = (
        None  # MoE layers whose experts fit on the GPU, where the others' stay in RAM
    )
    kernels: str | None = None  # the target of the C++ ones that run what lies in RAM
    triton: bool = False  # whether the Triton kernels run what lies on the GPU
    graphs: bool = False  # and whole decode steps as CUDA graphs
    early: bool = False  # and a kernel may be brought up while the one before runs
    rounds: bool = False  # and what goes into packed experts is rounded to 8 bits
    ahead: str | None = None  # which experts in a mapped file the system is asked for: chosen, or guess
    held: bool = False  # and whether what every token reads is read into memory, not mapped
    fits: bool = False  # whether all of a mapped file finds room in memory
    kernels_name: str = "plain torch"
    why_slower: str = ""  # completes "because ...", where other kernels might have been expected

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def apart(self) -> bool:
        """Whether routed experts lie in RAM, or run as if they did."""
        return self.experts_on_gpu is not None

    @property
    def surprising(self) -> bool:
        """Whether a person should be told why it is not faster."""
        return self.kernels_name == "plain torch" and self.why_slower not in ("", OFF, TINY)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def for_rank(self, local_rank: int) -> Plan:
        """The same for another rank of the team, by its number on its machine."""
        return replace(self, device=f"cuda:{local_rank}") if self.on_gpu and self.ranks > 1 else self


def make_plan(config: DeepseekV2Config, wish: Wish, here: Here) -> Plan:
    """Choose device, ranks, number format, kernels and threads.

    Raises Dsv2Error where what was asked for is not there.
    """
    device = pick_device(wish.device, here)
    dtype = config.torch_dtype if wish.dtype == "auto" else wish.dtype
    ranks = count_ranks(config, wish, here, device, dtype)
    if wish.sequences and ranks == 1:
        raise UsageError(
            "--split-attention sequences is for several ranks", fix="--gpus N with it, or leave it out"
        )
    refuse_cache(config, wish.cache)
    plan = Plan(
        device,
        dtype,
        format_of(config, wish, dtype),
        wish.packing,
        wish.attention,
        threads_of(config, wish, here, ranks),
        ranks,
        wish.cache,
        wish.sequences,
        offload_folder=None if wish.offload_folder is None else str(wish.offload_folder),
        experts_on_gpu=experts_that_fit(config, wish, here, device, dtype),
    )
    if wish.placed:
        return spread(config, wish, here, plan)
    plan = with_read_ahead(config, wish, here, with_kernels(config, wish, here, plan))
    if plan.on_gpu and not plan.apart:
        refuse_what_does_not_fit(config, plan, here.gpu_memories)
    return plan


def pick_device(name: str, here: Here) -> str:
    """`auto` takes the first CUDA device, else the CPU. Raises UsageError for a device that is not there."""
    count = len(here.gpu_memories)
    if name == "auto":
        return "cuda:0" if count else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()) or name.endswith(":"):
        raise UsageError(
            f"Unknown device {name!r}", why="devices are cpu, cuda and cuda:N", fix="--device auto"
        )
    if kind == "cpu":
        return "cpu"
    if int(index or 0) >= count:
        raise UsageError(
            f"Device {name!r} is not there", why=f"{count} CUDA devices found", fix="--device auto"
        )
    return f"cuda:{int(index or 0)}"


def is_small(config: DeepseekV2Config) -> bool:
    """Whether one thread and plain torch are the fastest for it."""
    return size.weights_bytes(config, "bfloat16") < SMALL_MODEL_BYTES


def threads_of(config: DeepseekV2Config, wish: Wish, here: Here, ranks: int) -> int | None:
    """CPU threads of each rank; None for torch's own number. Raises UsageError for too many."""
    if wish.threads is not None:
        if wish.threads > MOST_THREADS:
            raise UsageError(f"--threads {wish.threads} is too many", why=f"{MOST_THREADS} are the most")
        return wish.threads
    if is_small(config):
        return 1
    return max(1, here.cores // ranks) if ranks > 1 else None


def format_of(config: DeepseekV2Config, wish: Wish, dtype: str) -> str:
    """Of the weights. Raises UsageError where the checkpoint is packed otherwise."""
    if wish.packing is None:
        return dtype if not (config.packed or config.foreign) else size.own_format(config)
    if config.packed is not None and config.packed.format != wish.packing:
        raise UsageError(f"The checkpoint is packed in {config.packed.format}", fix="leave --quantize out")
    return wish.packing


def refuse_cache(config: DeepseekV2Config, cache: str) -> None:
    """Raises UsageError where codes of so many bits do not fill whole bytes."""
    unit = {"int6": 4, "int4": 2}.get(cache, 1)
    if config.kv_lora_rank % unit:
        why = f"kv_lora_rank is {config.kv_lora_rank}, which {unit} does not divide"
        raise UsageError(f"--cache {cache} does not fit this model", why=why, fix="--cache int8")


def count_ranks(config: DeepseekV2Config, wish: Wish, here: Here, device: str, dtype: str) -> int:
    """How many processes share the model: as many GPUs as its weights need, where nothing is said.

    Raises UsageError where there are not as many GPUs, or nothing to share out.
    """
    ranks, gpus = wish.gpus or 1, len(here.gpu_memories)
    alone = wish.experts == "cpu"  # what a GPU has no room for lies in RAM
    if wish.gpus is None and device != "cpu" and wish.device in ("auto", "cuda") and not alone:
        format = format_of(config, wish, dtype)
        ranks = ranks_needed(config, format, dtype, here.gpu_memories, wish.sequences)
    if here.torchrun > 1:
        if wish.gpus not in (None, here.torchrun):
            why = f"it has started {here.torchrun} processes"
            raise UsageError(f"--gpus {wish.gpus} under torchrun", why=why, fix="leave --gpus out")
        ranks = here.torchrun
    elif device != "cpu" and ranks > gpus:
        raise UsageError(f"There are no {ranks} GPUs", why=f"{gpus} CUDA devices found", fix=f"--gpus {gpus}")
    most = max(config.num_attention_heads, config.n_routed_experts or 0)
    if ranks > most:
        why = f"it has {most} heads or experts to share out"
        raise UsageError(f"{ranks} processes can not share this model", why=why, fix=f"--gpus {most}")
    return ranks


def ranks_needed(
    config: DeepseekV2Config, format: str, dtype: str, memories: tuple[int, ...], sequences: bool = False
) -> int:
    """The fewest GPUs whose memories [bytes each] hold the weights with a tenth to spare, or all of them."""
    for count in range(1, len(memories)):
        needed = size.bytes_by_rank(config, format, dtype, count, sequences, gpu=True)
        if all(need < SPARE * has for need, has in zip(needed, memories, strict=False)):
            return count
    return len(memories)


def experts_that_fit(config: DeepseekV2Config, wish: Wish, here: Here, device: str, dtype: str) -> int | None:
    """With --experts cpu, in how many layers the GPU has room for the routed experts beside all else; else
    None.

    Raises UsageError where it has no room for the rest, or the model no experts.
    """
    if wish.experts == "auto":
        return None
    if wish.placed or (wish.gpus or 1) > 1 or here.torchrun > 1:
        raise UsageError(
            "--experts cpu is for one device", fix="leave --gpus, --placement and --max-memory out"
        )
    if not config.moe_layers:
        raise UsageError("This model has no routed experts", fix="leave --experts out")
    if device == "cpu":
        return 0
    kept = config.foreign is not None and wish.packing is None
    own = size.own_format(config) if kept else dtype
    rest = sum(
        part.bytes for part in size.parts(config, own, dtype, gpu=True) if part.name != "routed experts"
    )
    routed = size.parts(config, wish.packing or own, dtype, gpu=True)
    each = sum(part.bytes for part in routed if part.name == "routed experts") // config.moe_layers
    memory = here.gpu_memories[int(device.removeprefix("cuda:"))]
    room = SPARE * memory - TALK * size.kv_bytes_per_token(config, dtype, wish.cache)
    if rest > room:
        why = f"the rest takes {rest / 1e9:.1f} GB of its {room / 1e9:.1f} GB"
        fix = "--device cpu --quantize int4"
        raise UsageError("The GPU is too small even without the experts", why=why, fix=fix)
    return min(config.moe_layers, int((room - rest) // each))


def spread(config: DeepseekV2Config, wish: Wish, here: Here, plan: Plan) -> Plan:
    """Layers over devices, RAM and disk. Raises UsageError where the places make no sense."""
    if (wish.gpus or 1) > 1 or here.torchrun > 1:
        raise UsageError(
            "--gpus and --placement do not go together",
            why="one splits each layer, the other puts whole layers in places",
            fix="leave one of them out",
        )
    places = here.places(config, plan.dtype, wish)
    numbers = [where for where in places.values() if isinstance(where, int)]
    main = f"cuda:{min(numbers)}" if numbers else "cpu"
    why = "layers are spread over devices"
    return replace(plan, device=main, ranks=1, places=places, why_slower=why)


def with_kernels(config: DeepseekV2Config, wish: Wish, here: Here, plan: Plan) -> Plan:
    """The same with the kernels that run it. Raises Dsv2Error where those asked for by
    name can not be had.
    """
    target, name, why = pick_cpp(config, wish, here, plan)
    no_triton = triton_refusal(config, wish, here, plan)
    triton = not no_triton and (plan.on_gpu or wish.kernels in TRITON)
    graphs = triton and plan.on_gpu and not plan.apart and wish.kernels != "triton-eager"
    names = [name] if target is not None else []
    rounds = triton and wish.kernels != "triton-exact"
    names += ["triton with CUDA graphs" if graphs else "triton"] if triton else []
    if rounds and plan.format.startswith("int"):
        names[-1] += ", activations of experts in 8 bits"
    why = no_triton if plan.on_gpu else "" if triton else why
    kernels_name = " and ".join(names) or "plain torch"
    early = triton and wish.kernels != "triton-eager"
    plan = replace(plan, kernels=target, triton=triton, graphs=graphs, early=early, rounds=rounds)
    return replace(plan, kernels_name=kernels_name, why_slower=why)


def with_read_ahead(config: DeepseekV2Config, wish: Wish, here: Here, plan: Plan) -> Plan:
    """The same with what is to be done about a mapped checkpoint that is larger than memory.

    Raises UsageError where that is asked for, and nothing is mapped.
    """
    in_file = config.packed is not None and not plan.on_gpu
    mapped = in_file and plan.ranks == 1 and not plan.apart
    named = wish.read_ahead not in ("auto", "off")
    if named and not (mapped and config.moe_layers and plan.kernels):
        why = "only there experts lie in a mapped file, and are run by kernels that know it"
        fix = "leave --read-ahead out"
        raise UsageError("--read-ahead is for packed checkpoints and C++ kernels", why=why, fix=fix)
    if not in_file or here.ram is None:
        return plan
    expected = size.from_disk(config, plan.format, plan.dtype, here.ram)
    plan = replace(plan, fits=expected.fits)
    if not mapped or wish.read_ahead == "off" or (expected.fits and not named):
        return plan
    which = wish.read_ahead if named else "chosen"
    return replace(plan, ahead=which if plan.kernels else None, held=expected.holds_rest)


def from_disk_line(expected: size.FromDisk, format: str) -> str:
    """What a person should know of a model that is read from disk while it runs."""
    there, missed = expected.memory_bytes / 1e9, expected.missed_bytes_per_token / 1e9
    said = f"{format} does not fit into {there:.2f} GB of memory: a token reads {missed:.2f} GB from disk"
    hits = f"{expected.hit_rate:.0%} of its experts are in memory already, if all are chosen equally often"
    if expected.disk_bytes_per_second is None or expected.tokens_per_second is None:
        return f"{said}; {hits}"
    speed = f"{expected.disk_bytes_per_second / 1e6:,.0f} MB a second, as measured just now"
    return f"{said} at {speed}: at most {expected.tokens_per_second:.2g} tokens a second; {hits}"


def pick_cpp(config: DeepseekV2Config, wish: Wish, here: Here, plan: Plan) -> tuple[str | None, str, str]:
    """Target and name of the C++ kernels, or None, nothing and why.

    Raises Dsv2Error where those named are not there.
    """
    device = "cpu" if plan.apart else plan.device.partition(":")[0]
    if wish.kernels == "off":
        return None, "", OFF
    named = wish.kernels not in ("auto", *TRITON)
    if not named and (device != "cpu" or is_small(config)):
        return None, "", TINY if is_small(config) else f"the model is on {device}"
    target = wish.kernels if named else "native"
    name, why = here.cpu_kernels(target)
    if not name and named:
        raise Dsv2Error(f"The {target} kernels are not there", why=why, fix="--kernels off")
    why = why or cpp_refusal(config, device, plan.dtype)
    return (None, "", why) if why else (target, name, "")


def cpp_refusal(config: DeepseekV2Config, device: str, dtype: str) -> str:
    """Why the C++ kernels can not run such a model, as words to follow 'because'; empty if they can."""
    if device != "cpu":
        return f"the model is on {device}"
    if dtype != "bfloat16":
        return f"they compute in bfloat16, and the model is {dtype}"
    if config.kv_lora_rank % 2:
        return "they read the latent in pairs, and kv_lora_rank is odd"
    return "they know no attention_bias" if config.attention_bias else ""


def triton_refusal(config: DeepseekV2Config, wish: Wish, here: Here, plan: Plan) -> str:
    """Why the Triton kernels can not run what lies on the device; empty if they can.

    Raises UsageError where they are asked for by name and can not.
    """
    if wish.kernels not in ("auto", *TRITON):
        return OFF
    why = here.no_triton or ("they know no attention_bias" if config.attention_bias else "")
    if not plan.on_gpu and not here.interpreted:
        why = "the model is on cpu"
    if here.rocm and wish.kernels == "auto":
        why = "the Triton kernels have never run on an AMD GPU; --kernels triton tries them"
    if why and wish.kernels in TRITON:
        raise UsageError("The Triton kernels can not run this", why=why, fix="--kernels auto, or off")
    return why


def refuse_what_does_not_fit(config: DeepseekV2Config, plan: Plan, memories: tuple[int, ...]) -> None:
    """Raises UsageError with the nearest plan that does, where the ranks' weights are larger than their
    memories.
    """

    def largest(format: str, ranks: int) -> int:
        return max(size.bytes_by_rank(config, format, plan.dtype, ranks, plan.sequences, gpu=True))

    most, has = largest(plan.format, plan.ranks), min(memories)
    if most <= has:
        return
    formats, counts = (plan.format, *PACKED_BITS), range(plan.ranks, max(8, len(memories)) + 1)
    tries = [(ranks, format) for format in formats for ranks in counts]
    fits = [(ranks, format) for ranks, format in tries if largest(format, ranks) < SPARE * has]
    fits.sort(key=lambda each: (each[0] > len(memories), tries.index(each)))
    fix = "a smaller checkpoint"
    if fits:
        ranks, format = fits[0]
        options = [f"--gpus {ranks}"] if ranks > 1 else []
        fix = " ".join([*options, *([f"--quantize {format}"] if format in PACKED_BITS else [])])
    raise UsageError(
        f"The weights do not fit on {plan.ranks} cuda device{'s' if plan.ranks > 1 else ''}",
        why=f"{plan.format} takes {most / 1e9:.1f} GB of the {has / 1e9:.1f} GB of each",
        fix=fix,
    )


def apart_line(config: DeepseekV2Config, plan: Plan) -> str:
    """Where the routed experts are, in one line."""
    on_gpu = plan.experts_on_gpu or 0
    rest = f"of {on_gpu} on {plan.device}; all else on {plan.device}"
    return f"routed experts of {config.moe_layers - on_gpu} layers in RAM, {rest}"


def places_line(places: dict[str, Any]) -> str:
    """Where the modules are, in a few words: runs of them with their place."""
    runs: list[tuple[Any, list[str]]] = []
    for name, where in places.items():
        if runs and runs[-1][0] == where:
            runs[-1][1].append(name)
        else:
            runs.append((where, [name]))
    told = []
    for where, names in runs:
        which = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        told.append(f"{which.replace('model.', '')} on {'GPU ' if isinstance(where, int) else ''}{where}")
    return ", ".join(told)
