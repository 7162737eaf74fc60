"""`dsv2 info`: what a model is, from its config.json alone, and the embedded model's card."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from dsv2cli.checkpoint.hub import EMBEDDED, find_config
from dsv2cli.cli import options as opt
from dsv2cli.cli import ui
from dsv2cli.model import size
from dsv2cli.model.config import DeepseekV2Config

GB = 10**9
CONTEXT = 4096


def info(
    model: Annotated[
        str | None, typer.Argument(metavar="[DIR|FILE|REPO]", help="A checkpoint, a config.json or a repository name. Default: the embedded model.")
    ] = None,
    dtype: opt.DtypeOption = opt.Dtype.auto,
    memory: Annotated[float | None, typer.Option(min=0, help="GB of memory: say whether it fits and the longest context.")] = None,
    bandwidth: Annotated[float | None, typer.Option(min=0, help="GB/s of memory bandwidth: say the most tokens a second.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:  # fmt: skip
    """Say what a model is: parameters by part, what a token reads, cache size, and whether it fits. Loads nothing."""
    path = find_config(model)
    config = DeepseekV2Config.load(path)
    facts = describe(config, model or "embedded", config.torch_dtype if dtype is opt.Dtype.auto else dtype.value)
    if memory is not None:
        fits = memory * GB >= facts["weights_bytes"]
        facts |= {"memory_bytes": memory * GB, "fits": fits}
        facts["longest_context"] = size.longest_context(config, facts["dtype"], memory * GB)
    if bandwidth is not None:
        facts["ceiling_context"] = min(CONTEXT, config.max_position_embeddings)
        facts["decode_ceiling_tokens_per_second"] = size.decode_ceiling(
            config, facts["dtype"], bandwidth * GB, facts["ceiling_context"]
        )
    if json:
        ui.write_json(facts)
        return
    show(facts)
    if model is None:
        show_card((EMBEDDED.parent / "MODEL_CARD.md").read_text(encoding="utf-8"))


def describe(config: DeepseekV2Config, name: str, dtype: str) -> dict[str, Any]:
    """The numbers that follow from a config; sizes in bytes."""
    parts = size.parts(config)
    total, read = sum(part.parameters for part in parts), sum(part.read for part in parts)
    item = size.ITEM_BYTES[dtype]
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
        "parameters": total,
        "parameters_read_per_token": read,
        "weights_bytes": total * item,
        "read_bytes_per_token": read * item,
        "kv_bytes_per_token": size.kv_bytes_per_token(config, dtype),
        "kv_bytes_per_token_expanded": size.expanded_kv_bytes_per_token(config, dtype),
        "parts": {part.name: {"parameters": part.parameters, "read_per_token": part.read, "bytes": part.parameters * item} for part in parts},
    }  # fmt: skip


def show(facts: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("part")
    for column in ("parameters", "read a token", facts["dtype"]):
        table.add_column(column, justify="right", no_wrap=True)
    for name, part in facts["parts"].items():
        table.add_row(name, f"{part['parameters']:,}", f"{part['read_per_token']:,}", readable(part["bytes"]))
    total = (f"{facts['parameters']:,}", f"{facts['parameters_read_per_token']:,}", readable(facts["weights_bytes"]))
    table.add_row("total", *total, style="bold")
    console = ui.stdout()
    experts = (
        f" · {facts['n_routed_experts']} experts, {facts['num_experts_per_tok']} a token, {facts['n_shared_experts']} shared"
        if facts["moe_layers"]
        else ""
    )
    console.print(
        f"{ui.harmless(facts['model'])} · {facts['layers']} layers, {facts['moe_layers']} with experts · "
        f"hidden {facts['hidden_size']} · {facts['heads']} heads · latent {facts['kv_lora_rank']} + "
        f"{facts['qk_rope_head_dim']}{experts} · vocabulary {facts['vocab_size']:,} · context {facts['max_position_embeddings']:,}\n"
    )
    console.print(table)
    saved = 1 - facts["kv_bytes_per_token"] / facts["kv_bytes_per_token_expanded"]
    console.print(
        f"\ncache {facts['kv_bytes_per_token']:,} bytes a token, {saved:.1%} less than full keys and values "
        f"({facts['kv_bytes_per_token_expanded']:,})"
    )
    if "fits" in facts:
        room = f"fits, with a context of up to {facts['longest_context']:,} tokens" if facts["fits"] else "does not fit"
        console.print(f"in {readable(facts['memory_bytes'])} of memory: {room} (working memory not counted)")
    if "decode_ceiling_tokens_per_second" in facts:
        console.print(
            f"at most {facts['decode_ceiling_tokens_per_second']:,.1f} tokens a second at a context of "
            f"{facts['ceiling_context']:,}, if reading were the only cost"
        )


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
    for unit, scale in (("GB", GB), ("MB", 10**6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1000:.1f} kB"
