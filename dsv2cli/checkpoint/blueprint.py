"""A model without memory: which tensors it has, and which of them hold codes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dsv2cli.errors import Dsv2Error
from dsv2cli.formats import GROUP, ITEM_BYTES, PACKED_BITS, Coding, own_coding
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.model.layers import MLP, Embedding, Experts, Linear, hold_codes
from dsv2cli.model.share import shares_of
from dsv2cli.model.transformer import DeepseekV2
from dsv2cli.team import ALONE, Team

Codings = dict[str, Coding]  # by the names that weights have in a model: model.layers.0.mlp.down_proj


def empty_model(
    config: DeepseekV2Config,
    device: torch.device,
    dtype: torch.dtype,
    team: Team = ALONE,
    group: int | None = None,
) -> DeepseekV2:
    """The model, or a rank's part, with uninitialised weights on `device`; routers stay in fp32.

    `group` is how many numbers are to share a scale, where there are to be any. Raises Dsv2Error for too
    little memory.
    """
    shares = shares_of(config, team.size, group, team.sequences)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return DeepseekV2(config, shares, team)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        with torch.device("meta"):
            model = DeepseekV2(config, shares, team)
        raise no_room(model, device, error) from None
    finally:
        torch.set_default_dtype(previous)


def blueprint(
    config: DeepseekV2Config,
    dtype: torch.dtype | None = None,
    team: Team = ALONE,
    format: str | None = None,
    group: int = GROUP,
    only_experts: bool = False,
    codings: Codings | None = None,
    columns: int = 1,
) -> DeepseekV2:
    """The model without memory, with places for codes where the checkpoint is packed, or is to be in
    `format`; or of the given `codings`, by the names of weights. So many `columns` stay together in a team.
    """
    if config.packed is not None:
        format, group, codings = config.packed.format, config.packed.group, config.packed.codings
    dtype = dtype or getattr(torch, config.torch_dtype)
    if codings is not None:
        group = max((coding.columns for coding in codings.values()), default=1)
    held = codings is not None or format is not None
    unit = max(group if held else 1, columns)
    model = empty_model(config, torch.device("meta"), dtype, team, unit if unit > 1 else None)
    if codings is not None:
        make_places(model, codings)
    elif format is not None:
        make_quantized(model, format, group, only_experts)
    return model


def make_places(model: DeepseekV2, codings: Codings) -> None:
    """Put an empty Quantized in the place of each of these weights.

    Raises Dsv2Error for a name that is none of a weight that may be packed.
    """
    known = {name for name, _ in weights_to_pack(model, embedding=True)}
    if strange := sorted(codings.keys() - known):
        raise Dsv2Error(f"config.json has a coding for {strange[0][:80]}", why="no such weight is packed")
    for name, coding in codings.items():
        box, _, leaf = name.rpartition(".")
        hold_codes(model.get_submodule(box), leaf, coding)


def make_quantized(model: DeepseekV2, format: str, group: int = GROUP, only_experts: bool = False) -> None:
    """The same for every weight that `format` packs, or for the routed experts'."""
    make_places(model, own_codings(model, format, group, only_experts))


def weights_to_pack(model: DeepseekV2, embedding: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """The large weights that are read whole for a token, by their names here, and the boxes they are in.

    kv_b_proj (which attention reads both ways), router and norms stay, and so does the embedding where it is
    not asked for.
    """
    tied = model.config.tie_word_embeddings
    for name, module in list(model.named_modules()):
        if isinstance(module, MLP | Experts):
            yield from ((f"{name}.{leaf}", module) for leaf in ("gate_up_proj", "down_proj"))
        elif module is model.lm_head or isinstance(module, Embedding):
            if not tied and (embedding or module is model.lm_head):
                yield f"{name}.weight", module
        elif isinstance(module, Linear) and not name.endswith("kv_b_proj"):
            yield f"{name}.weight", module


PARTS = {  # of names, the first that is found
    "embed_tokens": "embedding",
    "lm_head": "head",
    ".self_attn.": "attention",
    ".mlp.experts.": "routed experts",
    ".mlp.shared_experts.": "shared experts",
    ".mlp.": "dense layers",
}


def bits_by_part(config: DeepseekV2Config, codings: Codings) -> dict[str, float]:
    """Bits that a weight takes in memory, by the parts of model/size.py; without a coding it is a number."""
    model, sums = blueprint(config), dict[str, list[float]]()
    plain = 8 * ITEM_BYTES[config.torch_dtype]
    for name, box in weights_to_pack(model, embedding=True):
        count = getattr(box, name.rpartition(".")[2]).numel()
        bits = codings[name].bits_held if name in codings else plain
        part = next(part for words, part in PARTS.items() if words in name)
        total, weighted = sums.get(part, [0.0, 0.0])
        sums[part] = [total + count, weighted + bits * count]
    return {part: weighted / total for part, (total, weighted) in sums.items()}


def own_codings(model: DeepseekV2, format: str, group: int = GROUP, only_experts: bool = False) -> Codings:
    """What each weight is packed in by `dsv2 quantize` and --quantize."""
    mlp, attention, latent, head = (own_coding(bits, group) for bits in PACKED_BITS[format])
    out: Codings = {}
    for name, box in weights_to_pack(model):
        if only_experts and not isinstance(box, Experts):
            continue
        if isinstance(box, MLP | Experts):
            out[name] = mlp
        elif box is model.lm_head:
            out[name] = head
        else:
            out[name] = latent if "kv_a_proj" in name else attention
    return out


def allocate(module: nn.Module, device: torch.device, recurse: bool = True) -> nn.Module:
    """Give a module's weights uninitialised memory on `device`; gives the module. Raises as torch does.

    nn.Module.to_empty does the same by empty_like, which for tensors on meta imports sympy: a second at every
    start.
    """

    def empty(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    for box in module.modules() if recurse else [module]:
        for name, parameter in list(box.named_parameters(recurse=False)):
            setattr(box, name, nn.Parameter(empty(parameter), requires_grad=parameter.requires_grad))
        for name, buffer in list(box.named_buffers(recurse=False)):
            setattr(box, name, empty(buffer))
    return module


def pieces(config: DeepseekV2Config) -> list[str]:
    """The modules that are read, packed and placed one at a time, in order; a tied head is the embedding once
    more.
    """
    return [
        "model.embed_tokens",
        *(f"model.layers.{i}" for i in range(config.num_hidden_layers)),
        "model.norm",
        "lm_head",
    ]


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, a tied one once, and the codes and scales of what is quantised, by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def weights_bytes(module: nn.Module) -> int:
    """Of all that state_of names."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state_of(module).values())


def no_room(model: DeepseekV2, device: torch.device, error: Exception) -> Dsv2Error:
    """What to say where `device` has no memory for the model."""
    fix = "--quantize int4, a smaller checkpoint, or more memory"
    if device.type == "cuda":
        fix = "--quantize int4, --device cpu, or a smaller checkpoint"
    needed = f"its weights need {weights_bytes(model) / 2**30:.1f} GiB"
    what, why = f"Not enough memory on {device} for this model", f"{needed} ({str(error).splitlines()[0]})"
    return Dsv2Error(what, why=why, fix=fix)
