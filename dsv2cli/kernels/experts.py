"""Choosing experts and running them. Letters in shapes: n tokens, e routed experts, k experts per token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv2cli.kernels.linear import gated_mlp
from dsv2cli.kernels.quantized import Quantized


@dataclass(frozen=True)
class Routing:
    """How a router chooses: `top_k` experts, from the best `topk_group` of `n_group`.

    Names as in config.json.
    """

    top_k: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    scaling_factor: float


def route(router_logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """router_logits [n, e] in fp32 -> (expert index [n, k], weight [n, k] in fp32). Paper section 2.2.

    With n_group > 1 a group's score is its best expert's, and experts outside the best `topk_group` groups
    score 0. Normalised weights are not scaled: the official code does one or the other.
    """
    scores = router_logits.softmax(dim=-1)
    choose_from = scores
    if routing.n_group > 1:
        grouped = scores.unflatten(-1, (routing.n_group, -1))  # [n, groups, experts per group]
        best = grouped.amax(dim=-1).topk(routing.topk_group, dim=-1).indices
        kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(-1, best, True)
        choose_from = (grouped * kept[..., None]).flatten(-2)
    weight, index = choose_from.topk(routing.top_k, dim=-1)
    if routing.norm_topk_prob and routing.top_k > 1:
        return index, weight / (weight.sum(dim=-1, keepdim=True) + 1e-20)
    return index, weight * routing.scaling_factor


def experts_reference(
    x: Tensor, index: Tensor, weight: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """Each token's chosen experts, one by one, weighted and summed in fp32, rounded once.

    x [n, hidden], index and weight [n, k], gate_up_proj [e, 2*width, hidden], down_proj [e, hidden, width] ->
    [n, hidden].
    """
    rows = []
    for token, experts, weights in zip(x, index.tolist(), weight, strict=True):
        outputs = torch.stack([gated_mlp(token[None], gate_up_proj[e], down_proj[e])[0] for e in experts])
        rows.append((outputs.float() * weights[:, None]).sum(dim=0))
    return torch.stack(rows).type_as(x)


def run_experts(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    gate_up_proj: Tensor | Quantized,
    down_proj: Tensor | Quantized,
    first: int = 0,
) -> Tensor:
    """The same as experts_reference, with each expert run once over all of its tokens.

    x [n, hidden], index and weight [n, k], gate_up_proj [e, 2*width, hidden], down_proj [e, hidden, width] ->
    [n, hidden]. The e experts here are `first` and those after it; others are another rank's, and left out of
    the sum.
    """
    n, top_k = index.shape
    # unbind, not indexing: its gradient is one stack, not a full-size zero tensor per expert.
    gate_up, down = gate_up_proj.unbind(0), down_proj.unbind(0)
    here = len(gate_up)
    if n == 1:
        chosen = [(i, e - first) for i, e in enumerate(index[0].tolist()) if 0 <= e - first < here]
        if not chosen:
            return torch.zeros_like(x)
        outputs = torch.cat([gated_mlp(x, gate_up[e], down[e]) for _, e in chosen])  # [k, hidden]
        weight = weight if len(chosen) == top_k else weight[:, [i for i, _ in chosen]]
        return (weight @ outputs.float()).type_as(x)
    flat = index.flatten() - first
    flat = torch.where((flat >= 0) & (flat < here), flat, here)  # the last bucket is the others'
    order = flat.argsort()
    counts = flat.bincount(minlength=here + 1).tolist()
    tokens, weights = (order // top_k).split(counts), weight.flatten()[order, None].split(counts)
    total = torch.zeros_like(x, dtype=torch.float32)
    for e, count in enumerate(counts[:here]):
        if count:
            outputs = gated_mlp(x[tokens[e]], gate_up[e], down[e])  # [count, hidden]
            total.index_add_(0, tokens[e], outputs.float() * weights[e])
    return total.type_as(x)
