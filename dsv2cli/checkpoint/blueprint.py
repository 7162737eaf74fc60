"""A model without memory: which tensors it has, and which of them hold codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv2cli.errors import Dsv2Error
from dsv2cli.formats import GROUP, HEAD_BITS, PACKED_BITS
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.model.layers import MLP, Experts, Linear
from dsv2cli.model.share import shares_of
from dsv2cli.model.transformer import DeepseekV2
from dsv2cli.team import ALONE, Team


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
) -> DeepseekV2:
    """The model without memory, with places for codes where the checkpoint is packed, or is to be in
    `format`.
    """
    if config.packed is not None:
        format, group = config.packed.format, config.packed.group
    dtype = dtype or getattr(torch, config.torch_dtype)
    model = empty_model(config, torch.device("meta"), dtype, team, None if format is None else group)
    if format is not None:
        make_quantized(model, format, group, only_experts)
    return model


def make_quantized(model: DeepseekV2, format: str, group: int = GROUP, only_experts: bool = False) -> None:
    """Put an empty Quantized in the place of every large weight that is read whole for a token, or of the
    routed experts.

    The head gets 8 bits always; embedding, kv_b_proj (which attention reads both ways), router and norms
    stay.
    """
    mlp, attention = PACKED_BITS[format]
    for name, module in list(model.named_modules()):
        if only_experts and not isinstance(module, Experts):
            continue
        if isinstance(module, MLP | Experts):
            module.hold_codes(mlp, group)
        elif module is model.lm_head:
            if not model.config.tie_word_embeddings:
                module.hold_codes(HEAD_BITS, group)
        elif isinstance(module, Linear) and not name.endswith("kv_b_proj"):
            module.hold_codes(attention, group)


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
