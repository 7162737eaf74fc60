"""The boxes a DeepSeek-V2 is built of: their weights, and how one product is computed on this machine and in
this team.

Weights carry the checkpoint's names. Each box may be told of a faster kernel for its product
(`compute_with`); without one, plain torch computes the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv2cli.formats import Coding
from dsv2cli.kernels import experts
from dsv2cli.kernels.linear import gated_mlp, linear, rms_norm
from dsv2cli.kernels.quantized import Quantized
from dsv2cli.team import Team

Weight = Tensor | Quantized
OneProduct = Callable[[Tensor], Tensor]  # x [tokens or ..., in] -> [the same, out]
ExpertProduct = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # x [tokens, hidden], index, weight [tokens, k] -> as x


class Products(Protocol):
    """Faster kernels for single products.

    Each gives None for a weight that it can not or need not multiply with.
    """

    def linear(self, weight: Weight) -> OneProduct | None: ...

    def mlp(self, gate_up: Weight, down: Weight) -> OneProduct | None: ...

    def experts(self, gate_up: Weight, down: Weight) -> ExpertProduct | None:
        """Indices count the experts that are here; one below 0 is left out of the sum."""
        ...


def hold_codes(box: nn.Module, leaf: str, coding: Coding) -> None:
    """Put an empty Quantized in the place of a box's weight; gate and up are packed each alone."""
    weight = getattr(box, leaf)
    delattr(box, leaf)
    parts = 2 if leaf == "gate_up_proj" else 1
    setattr(box, leaf, Quantized(tuple(weight.shape), coding, parts, weight.device))


class Linear(nn.Module):
    """y = x W^T + b. x [..., in] -> [..., out]"""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.product: OneProduct | None = None

    def compute_with(self, products: Products | None) -> None:
        self.product = None if products is None or self.bias is not None else products.linear(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias) if self.product is None else self.product(x)


class SummedLinear(Linear):
    """A Linear whose columns are shared out over a team: the ranks' products are summed, and then the bias is
    added.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, team: Team) -> None:
        super().__init__(in_features, out_features, bias)
        self.team = team

    def forward(self, x: Tensor) -> Tensor:
        if self.team.size == 1:
            return super().forward(x)
        if x.shape[-1] == 0:  # a rank without columns
            product = x.new_zeros(*x.shape[:-1], self.weight.shape[0])
        else:
            product = linear(x, self.weight) if self.product is None else self.product(x)
        out = self.team.sum(product)
        return out if self.bias is None else out + self.bias


class Embedding(nn.Module):
    """Rows of a table, of which a team's rank holds some. ids [...] -> [..., size]"""

    def __init__(self, rows: range, size: int, team: Team) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(len(rows), size)
        )  # nn.Embedding would fill it with random numbers
        self.rows, self.team, self.dtype = rows, team, self.weight.dtype

    def find(self, ids: Tensor) -> Tensor:
        """Rows of what is here."""
        weight: Weight = self.weight
        return weight.rows(ids, self.dtype) if isinstance(weight, Quantized) else F.embedding(ids, weight)

    def forward(self, ids: Tensor) -> Tensor:
        if self.team.size == 1:
            return self.find(ids)
        here = (ids >= self.rows.start) & (ids < self.rows.stop)
        found = self.find(torch.where(here, ids - self.rows.start, 0))
        return self.team.sum(found.masked_fill(~here[..., None], 0))


class Head(Linear):
    """Scores for the whole vocabulary in fp32, of which a team's rank computes some.

    x [..., hidden] -> [..., vocab]
    """

    def __init__(self, hidden: int, widths: list[int], team: Team) -> None:
        super().__init__(hidden, widths[team.rank])
        self.widths, self.team = widths, team

    def forward(self, x: Tensor) -> Tensor:
        scores = super().forward(x).float()
        if self.team.size == 1:
            return scores
        return self.team.join(scores.flatten(0, -2), self.widths, dim=1).unflatten(0, x.shape[:-1])


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension. x [..., size] -> the same shape"""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one matrix, read in one go.

    x [tokens, hidden] -> the same shape

    In a team it is this rank's summand.
    """

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(hidden, width))
        self.product: OneProduct | None = None

    def compute_with(self, products: Products | None) -> None:
        self.product = None if products is None else products.mlp(self.gate_up_proj, self.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        return gated_mlp(x, self.gate_up_proj, self.down_proj) if self.product is None else self.product(x)


class Experts(nn.Module):
    """The routed experts of one layer, stacked; a team's rank has those whose numbers are in `here`.

    Tokens go to the device where the experts lie, which may be the RAM, and come back. Weights never travel.
    """

    def __init__(self, hidden: int, width: int, here: range) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(len(here), 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(len(here), hidden, width))
        self.here = here
        self.product: ExpertProduct | None = None

    def compute_with(self, products: Products | None) -> None:
        self.product = None if products is None else products.experts(self.gate_up_proj, self.down_proj)

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """x [tokens, hidden], index and weight [tokens, k] -> the weighted sum of the experts here [tokens,
        hidden]
        """
        home = self.down_proj.device
        tokens, index, weight = x.to(home), index.to(home), weight.to(home)
        if self.product is None:
            gate_up, down = self.gate_up_proj, self.down_proj
            return experts.run_experts(tokens, index, weight, gate_up, down, self.here.start).to(x.device)
        index = index - self.here.start
        inside = (index >= 0) & (index < len(self.here))
        return self.product(tokens, torch.where(inside, index, -1), weight).to(x.device)
