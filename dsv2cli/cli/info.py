"""`dsv2 info`: what a model is, from its config.json alone, and the embedded model's card."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv2cli.cli import options as opt
from dsv2cli.cli import ui
from dsv2cli.errors import UsageError
from dsv2cli.formats import ITEM_BYTES, PACKED_BITS
from dsv2cli.memory import Memory, detected, parse_gpus
from dsv2cli.model import predicted, size
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.outside import Number
from dsv2cli.run.machine import expected_from
from dsv2cli.run.plan import from_disk_line, refuse_cache
from dsv2cli.run.wish import CacheOption, DtypeOption, QuantizeOption, Wish

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

GB = 10**9
ONE_GPU = "predicted for one GPU like an H200, from compiled code that has never run; not measured"
GIGABYTES, BANDWIDTHS = Number(0, 1e9), Number(0, 1e9, above=True)


@dataclass(frozen=True)
class Subject:
    """Which model, in which formats."""

    heading = opt.TO_RUN

    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[DIR|FILE|REPO]",
            autocompletion=opt.models,
            help="A checkpoint, a config.json or a repository name. Default: the embedded model.",
        ),
    ] = None
    context: Annotated[
        int, typer.Option(min=1, help="Tokens a sequence, where sequences and speed are counted.")
    ] = 4096


@dataclass(frozen=True)
class Output:
    """How it is shown."""

    heading = opt.OUTPUT

    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False


@dataclass(frozen=True)
class Room:
    """Where and how it would run."""

    heading = Wish.heading

    dtype: DtypeOption = "auto"
    quantize: QuantizeOption = "none"
    cache: CacheOption = "auto"
    gpus: Annotated[
        str | None,
        typer.Option(
            metavar="NxSIZE",
            help="Memories to fit into instead of this machine's, such as 8x80GB or 24GB,2x16GB.",
        ),
    ] = None
    memory: Annotated[
        float | None,
        typer.Option(min=0, help="GB of one memory: say whether it fits and the longest context."),
    ] = None
    bandwidth: Annotated[
        float | None,
        typer.Option(
            min=0, help="GB/s of memory bandwidth: say the most tokens a second, and predict a GPU's."
        ),
    ] = None

    def __post_init__(self) -> None:
        """Raises UsageError for numbers of GB that can be none."""
        for option, value, known in (
            ("--memory", self.memory, GIGABYTES),
            ("--bandwidth", self.bandwidth, BANDWIDTHS),
        ):
            if value is not None and value not in known:
                raise UsageError(f"{option} {value} makes no sense", why=f"it must be {known}")

    def memories(self) -> list[Memory]:
        """Those to fit into: as given, or this machine's. Raises UsageError."""
        listed = parse_gpus(self.gpus) if self.gpus is not None else detected()
        return listed if self.memory is None else [Memory("memory", int(self.memory * GB))]


@opt.unfolded
def info(subject: Subject, output: Output, room: Room) -> None:
    """Say what a model is and what fits where. Loads nothing.

    Parameters by part, bytes in each format, what a token reads, the cache.
    """
    from dsv2cli.cli import offer
    from dsv2cli.hubs.find import EMBEDDED

    model = subject.model
    path = offer.config_of(model)
    config = DeepseekV2Config.load(path)
    dtype = config.torch_dtype if room.dtype == "auto" else room.dtype
    refuse_cache(config, room.cache)
    facts = describe(config, model or "embedded", dtype, subject.context, room.cache)
    formats = [format for format in facts["formats"] if room.quantize in ("none", format)]
    facts["fits"] = [fit(config, facts, place, format) for place in room.memories() for format in formats]
    facts["from_disk"] = from_disk(config, facts, room, path)
    facts["command"] = command(facts, model, bool(config.packed))
    facts["kept"] = kept(config)
    if room.bandwidth is not None:
        facts |= speeds(config, facts, room.bandwidth * GB, predict=room.gpus is not None)
    if output.json:
        ui.write_json(facts)
        return
    show(facts, here=room.gpus is None and room.memory is None)
    if model is None:
        show_card((EMBEDDED.parent / "MODEL_CARD.md").read_text(encoding="utf-8"))


def from_disk(
    config: DeepseekV2Config, facts: dict[str, Any], room: Room, path: Path
) -> dict[str, Any] | None:
    """What to expect of a packed checkpoint that is here and larger than this machine's memory, or the one
    of --memory; else None.
    """
    places = [place for place in room.memories() if room.memory is not None or place.kind == "cpu"]
    if config.packed is None or not places or not path.is_dir():
        return None
    (format,), speed = facts["formats"], None if room.bandwidth is None else room.bandwidth * GB
    cached = facts["context"] * facts["kv_bytes_per_token"]
    expected = expected_from(config, format, facts["dtype"], places[0].bytes, path, cached, speed)
    return None if expected is None else asdict(expected)


def kept(config: DeepseekV2Config) -> dict[str, Any]:
    """Of what another program has packed: for each part what it is in, and bits of a weight in memory."""
    found = config.foreign.entry.get("kinds") if config.foreign is not None else None
    kinds = found if isinstance(found, dict) else {}
    return {part: stored(kinds.get(part)) | {"bits_held": bits} for part, bits in config.held_bits().items()}


def stored(kinds: Any) -> dict[str, Any]:
    """The types of a GGUF file's part, from so many weights of each, and bits of a weight there; nothing for
    what says none.
    """
    from dsv2cli.hubs.gguf import TYPES

    bits = {name: 8 * size / count for name, count, size in TYPES.values()}
    listed = kinds.items() if isinstance(kinds, dict) else ()
    counts = {kind: count for kind, count in listed if kind in bits and type(count) is int and count > 0}
    whole = sum(bits[kind] * count for kind, count in counts.items())
    return {"stored_as": sorted(counts), "bits_stored": whole / sum(counts.values()) if counts else None}


def speeds(
    config: DeepseekV2Config, facts: dict[str, Any], bytes_per_second: float, predict: bool
) -> dict[str, Any]:
    """The most tokens a second that a memory allows, what one GPU is predicted to reach, and where asked for
    the same for GPUs that share the model.
    """
    dtype, context, cache = facts["dtype"], facts["context"], facts["cache"]
    shared = {}
    for place in facts["fits"]:
        if predict and place["fits"]:
            seconds = size.predicted_step_seconds(
                config, place["format"], dtype, place["count"], bytes_per_second
            )
            shared[f"{place['label']}, {place['format']}"] = 1 / seconds
    return {
        "ceiling_context": context,
        "decode_ceiling_tokens_per_second": {
            format: size.decode_ceiling(config, format, dtype, bytes_per_second, context, cache)
            for format in facts["formats"]
        },
        "predicted_decode_tokens_per_second": {
            format: 1 / predicted.step_seconds(config, format, dtype, bytes_per_second)
            for format in facts["formats"]
        },
        "predicted_tokens_per_second": shared,
    }


def describe(
    config: DeepseekV2Config, name: str, dtype: str, context: int = 4096, cache: str = "auto"
) -> dict[str, Any]:
    """The numbers that follow from a config; sizes in bytes."""
    formats = [dtype, *PACKED_BITS]
    if config.packed is not None:
        formats = [size.own_format(config)]
    elif config.foreign is not None:
        formats = [size.own_format(config), *PACKED_BITS]
    by_format = {format: size.parts(config, format, dtype) for format in formats}
    counted = by_format[formats[0]]
    cached = size.kv_bytes_per_token(config, dtype, cache)
    of_numbers = size.kv_bytes_per_token(config, dtype) / ITEM_BYTES[dtype]  # how many there are
    return {
        "model": name,
        "dtype": dtype,
        "layers": config.num_hidden_layers,
        "moe_layers": config.moe_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "n_routed_experts": config.n_routed_experts or 0,
        "num_experts_per_tok": config.num_experts_per_tok or 0,
        "n_shared_experts": config.n_shared_experts or 0,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "context": min(context, config.max_position_embeddings),
        "parameters": sum(part.parameters for part in counted),
        "parameters_read_per_token": sum(part.read for part in counted),
        "formats": {
            format: {
                "weights_bytes": sum(part.bytes for part in listed),
                "read_bytes_per_token": sum(part.read_bytes for part in listed),
            }
            for format, listed in by_format.items()
        },
        "cache": cache,
        "kv_bytes_per_token": cached,
        "kv_bytes_per_token_expanded": size.expanded_kv_bytes_per_token(config, dtype),
        "kv_saving_against_67b": 1 - cached / size.DENSE_67B_KV_BYTES,
        # As the paper counts: 6 bits a number.
        "kv_saving_against_67b_at_6_bits": 1 - of_numbers * 6 / 8 / size.DENSE_67B_KV_BYTES,
        "parts": {
            part.name: {
                "parameters": part.parameters,
                "read_per_token": part.read,
                "bytes": {format: listed[i].bytes for format, listed in by_format.items()},
            }
            for i, part in enumerate(counted)
        },
    }


def fit(config: DeepseekV2Config, facts: dict[str, Any], place: Memory, format: str) -> dict[str, Any]:
    """Whether the weights in one format fit into a memory, or shared out over several, of which each holds
    the whole cache.
    """
    share = max(size.bytes_by_rank(config, format, facts["dtype"], place.count, gpu=place.kind == "gpu"))
    room = size.room(config, share, facts["dtype"], place.bytes, facts["context"], facts["cache"])
    counts = {
        "name": place.name,
        "kind": place.kind,
        "count": place.count,
        "memory_bytes": place.bytes,
        "label": place.label,
    }
    return counts | {"format": format, "weights_bytes_each": share} | asdict(room)


def command(facts: dict[str, Any], model: str | None, packed: bool) -> str:
    """What to type for the widest format that fits with a tenth to spare, in the first
    memory that holds one.
    """
    gpus = any(place["kind"] == "gpu" for place in facts["fits"])
    for place in facts["fits"]:
        if place["weights_bytes_each"] >= 0.9 * place["memory_bytes"] or not place["sequences"]:
            continue
        words, format = ["dsv2 chat"], place["format"]
        if model is not None:
            words.append(f"--model {shlex.quote(model)}")
        if place["count"] > 1:
            words.append(f"--gpus {place['count']}")
        if format in PACKED_BITS and not packed:
            words.append(f"--quantize {format}")
        if format in ("float32", "float16") and not packed and model:
            words.append(f"--dtype {format}")
        if place["kind"] == "cpu" and gpus:
            words.append("--device cpu")
        return " ".join(words)
    return ""


def show(facts: dict[str, Any], here: bool) -> None:
    """The facts on stdout; `here`: the memories are this machine's."""
    console, formats = ui.stdout(), facts["formats"]
    console.print(f"{headline(facts)}\n")
    console.print(sizes(facts))
    show_kept(console, facts)
    saved = 1 - facts["kv_bytes_per_token"] / facts["kv_bytes_per_token_expanded"]
    less = f"{saved:.1%} less than full keys and values ({facts['kv_bytes_per_token_expanded']:,})"
    named = "" if facts["cache"] == "auto" else f" in {facts['cache']}"
    console.print(f"\ncache {facts['kv_bytes_per_token']:,} bytes a token{named}, {less}")
    if facts["kv_lora_rank"] >= 512:  # of tiny models it says nothing
        by_6_bits = (
            f"{facts['kv_saving_against_67b_at_6_bits']:.1%} as the paper counts, with the latent in 6 bits"
        )
        less = f"{facts['kv_saving_against_67b']:.1%} less, {by_6_bits}"
        console.print(f"against DeepSeek 67B's {size.DENSE_67B_KV_BYTES:,} bytes: {less}")
    console.print()
    console.print(rooms(facts))
    console.print(
        "(weights and cache; the working memory of a forward pass and the system's own are not counted)"
    )
    if any(place["count"] > 1 for place in facts["fits"]):
        console.print("several GPUs: the largest rank's part of the weights, and the whole cache on each")
    if facts["from_disk"] is not None:
        (format,) = formats
        console.print(f"on a CPU: {from_disk_line(size.FromDisk(**facts['from_disk']), format)}")
    if facts["command"]:
        console.print(f"to type: {ui.harmless(facts['command'])}")
    elif here and facts["from_disk"] is None:
        least = min(formats, key=lambda format: formats[format]["weights_bytes"])
        needed = readable(formats[least]["weights_bytes"])
        console.print(f"nothing fits here: {least} needs {needed} and some room")
    show_speeds(console, facts)


def show_kept(console: Console, facts: dict[str, Any]) -> None:
    """What the codes of another program become, and what that costs."""
    if not facts["kept"]:
        return
    console.print()
    for part, each in facts["kept"].items():
        said = f"{each['bits_held']:.2f} bits a weight in memory"
        if each["stored_as"]:
            stored = f"{', '.join(each['stored_as'])} ({each['bits_stored']:.2f} bits)"
            said = f"{stored}, {said}"
        console.print(f"{part}: {ui.harmless(said)}")
    console.print("codes and scales are kept as they are; kv_b_proj, norms and router are numbers")


def headline(facts: dict[str, Any]) -> str:
    """The model and its sizes, in a line."""
    told = [
        ui.harmless(facts["model"]),
        f"{facts['layers']} layers, {facts['moe_layers']} with experts",
        f"hidden {facts['hidden_size']}",
        f"{facts['heads']} heads",
        f"latent {facts['kv_lora_rank']} + {facts['qk_rope_head_dim']}",
    ]
    if facts["moe_layers"]:
        counts = f"{facts['n_routed_experts']} experts, {facts['num_experts_per_tok']} a token"
        told.append(f"{counts}, {facts['n_shared_experts']} shared")
    told += [f"vocabulary {facts['vocab_size']:,}", f"context {facts['max_position_embeddings']:,}"]
    return " · ".join(told)


def sizes(facts: dict[str, Any]) -> Table:
    """Parameters and bytes by part."""
    from rich.table import Table

    formats = facts["formats"]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))  # six numbers a row fit into 80 columns
    table.add_column("part")
    for column in ("parameters", "read a token", *formats):
        table.add_column(column, justify="right", no_wrap=True)
    for name, part in facts["parts"].items():
        counts = (f"{part['parameters']:,}", f"{part['read_per_token']:,}")
        table.add_row(name, *counts, *map(readable, part["bytes"].values()))
    counts = (f"{facts['parameters']:,}", f"{facts['parameters_read_per_token']:,}")
    table.add_row(
        "total", *counts, *(readable(each["weights_bytes"]) for each in formats.values()), style="bold"
    )
    table.add_row(
        "a token reads", "", "", *(readable(each["read_bytes_per_token"]) for each in formats.values())
    )
    return table


def show_speeds(console: Console, facts: dict[str, Any]) -> None:
    """What --bandwidth asks for."""
    for format, rate in facts.get("decode_ceiling_tokens_per_second", {}).items():
        most = f"at most {rate:,.1f} tokens a second at a context of {facts['ceiling_context']:,}"
        console.print(f"{format}: {most}, if reading one such memory were the only cost")
        console.print(
            f"{' ' * len(format)}  some {facts['predicted_decode_tokens_per_second'][format]:,.0f} {ONE_GPU}"
        )
    for place, rate in facts.get("predicted_tokens_per_second", {}).items():
        said = f"some {rate:,.0f} tokens a second predicted at a short context, not measured"
        console.print(f"{ui.harmless(place)}: {said}, with kernels as fast as others have published")


def rooms(facts: dict[str, Any]) -> Table:
    """Which format fits into which memory, with how long a context and how many sequences."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    columns = ("memory", "format", "weights each", "longest context", f"sequences of {facts['context']:,}")
    for column in columns:
        table.add_column(column, justify="left" if column in ("memory", "format") else "right", no_wrap=True)
    before = ""
    for place in facts["fits"]:
        what = ["does not fit", "-"]
        if place["fits"]:
            what = [f"{place['longest_context']:,}", f"{place['sequences']:,}"]
        label, each = ui.harmless(place["label"]), readable(place["weights_bytes_each"])
        table.add_row("" if label == before else label, place["format"], each, *what)
        before = label
    return table


def show_card(card: str) -> None:
    """Markdown drawn on a terminal, and as it stands into a pipe."""
    if not sys.stdout.isatty():
        ui.emit("\n" + card)
        return
    from rich.markdown import Markdown

    console = ui.stdout(wrap=True)
    console.print()
    console.print(Markdown(card))


def readable(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, scale in (("GB", GB), ("MB", 10**6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1000:.1f} kB"
