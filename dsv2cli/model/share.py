"""Which part of a model each rank of a team holds: heads, columns of the MLPs, routed experts and vocabulary.

What is left over goes to some ranks and not to others, so nothing needs to be divisible; a rank may hold no
head at all. The latent cache, the router and the norms are in every rank. Groups of packed numbers stay
whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsv2cli.formats import LANES
from dsv2cli.model.config import DeepseekV2Config


@dataclass(frozen=True)
class Share:
    """One rank's part, as ranges of the whole."""

    heads: range
    dense: range  # columns of the dense layers' MLP
    shared: range  # of the shared experts
    experts: range
    vocab: range


def split(total: int, unit: int, rank: int, size: int) -> range:
    """The rank's run of 0..total, cut between units only and as evenly as that allows."""
    units = -(-total // unit)
    return range(min(total, units * rank // size * unit), min(total, units * (rank + 1) // size * unit))


def share_of(
    config: DeepseekV2Config, rank: int = 0, size: int = 1, group: int | None = None, sequences: bool = False
) -> Share:
    """The part of `rank` among `size`; `group` is how many numbers share a scale, where the weights are
    packed.

    With `sequences` every rank has all heads, because it attends for sequences of its own.
    """
    columns, rows = group or 1, LANES if group else 1
    heads = 1
    if group:  # rows of the query and value heads fill whole blocks, columns of o_proj whole groups
        heads = math.lcm(
            *(
                width // math.gcd(each, width)
                for each, width in ((config.qk_head_dim, LANES), (config.v_head_dim, group))
            )
        )
    unit = math.lcm(columns, rows)
    return Share(
        range(config.num_attention_heads)
        if sequences
        else split(config.num_attention_heads, heads, rank, size),
        split(config.intermediate_size, unit, rank, size),
        split(config.moe_intermediate_size * (config.n_shared_experts or 0), unit, rank, size),
        split(config.n_routed_experts or 0, 1, rank, size),
        split(config.vocab_size, rows, rank, size),
    )


def shares_of(
    config: DeepseekV2Config, size: int = 1, group: int | None = None, sequences: bool = False
) -> list[Share]:
    """The parts of all `size` ranks, in order; the rest as for share_of."""
    return [share_of(config, rank, size, group, sequences) for rank in range(size)]


@dataclass(frozen=True)
class Cut:
    """The part of a stored tensor that a rank holds: indices along `dim`, or all of it for None; kept under
    `name`.
    """

    name: str
    part: range | None = None
    dim: int = 0


def cut(name: str, config: DeepseekV2Config, share: Share) -> Cut | None:
    """What a rank keeps of the checkpoint's tensor `name`; None for another rank's expert."""
    pieces = name.split(".")
    leaf, parent = pieces[-2], pieces[-3] if len(pieces) > 2 else ""
    heads = share.heads
    widths = {
        "q_proj": config.qk_head_dim,
        "q_b_proj": config.qk_head_dim,
        "kv_b_proj": config.qk_nope_head_dim + config.v_head_dim,
        "o_proj": config.v_head_dim,
    }
    if leaf in widths and pieces[-1] == "weight":
        return Cut(name, range(heads.start * widths[leaf], heads.stop * widths[leaf]), int(leaf == "o_proj"))
    if leaf in ("embed_tokens", "lm_head"):
        return Cut(name, share.vocab)
    if len(pieces) > 3 and pieces[-4] == "experts":
        expert = int(parent)
        if expert not in share.experts:
            return None
        pieces[-3] = str(expert - share.experts.start)
        return Cut(".".join(pieces))
    if leaf in ("gate_proj", "up_proj", "down_proj"):
        return Cut(
            name, share.shared if parent == "shared_experts" else share.dense, int(leaf == "down_proj")
        )
    return Cut(name)
