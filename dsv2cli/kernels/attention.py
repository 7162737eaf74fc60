"""Multi-head latent attention: over the compressed cache, or over keys and values expanded from it.

Both compute the same numbers from the same weights. A cached token is one row of `kv_lora_rank` latent
numbers and one rotated key of `qk_rope_head_dim` numbers shared by all heads. Letters: b batch, s new tokens,
t past and new tokens, h heads, c latent, d nope or value, r rope.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv2cli.kernels.linear import linear

PIECE = 4096  # cached tokens whose keys and values are expanded at a time


def visible(positions: Tensor, length: int) -> Tensor:
    """Which cache slots each query may read: slot t holds position t, so t <= position.

    positions [b, s] -> [b, 1, s, length] bool
    """
    return (torch.arange(length, device=positions.device) <= positions[..., None])[:, None]


def attend_reference(q_latent: Tensor, q_rope: Tensor, cached: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention over the compressed cache: each head mixes latents, not values.

    q_latent [b, s, h, c], q_rope [b, s, h, r], cached [b, t, c + r], mask [b, 1, s, t] -> [b, s, h, c].
    """
    latent, k_rope = cached.split([q_latent.shape[-1], q_rope.shape[-1]], dim=-1)
    scores = torch.einsum("bshc,btc->bhst", q_latent, latent) + torch.einsum("bshr,btr->bhst", q_rope, k_rope)
    weights = (scores.float() * scale).masked_fill(~mask, float("-inf")).softmax(dim=-1).type_as(cached)
    return torch.einsum("bhst,btc->bshc", weights, latent)


def attend_absorbed(q_latent: Tensor, q_rope: Tensor, cached: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The same as attend_reference, shapes too, in two matrix products with the cache as the left factor.

    On a CPU cache @ queries is several times faster than queries @ cache, because the long side is cut into
    rows.
    """
    batch, seq, heads, rank = q_latent.shape
    queries = torch.cat([q_latent, q_rope], dim=-1).flatten(1, 2)  # [b, s*h, c+r]
    scores = (cached @ queries.transpose(1, 2)).transpose(1, 2)  # [b, s*h, t]
    scores = scores.float().view(batch, seq, heads, -1).mul_(scale)
    if seq > 1 or batch > 1:  # a lone newest token sees everything
        scores = scores.masked_fill(~mask.transpose(1, 2), float("-inf"))
    weights = scores.softmax(dim=-1).type_as(cached).flatten(1, 2)
    return (weights @ cached[..., :rank]).view(batch, seq, heads, rank)


def expand(cached: Tensor, kv_b_proj: Tensor, nope: int) -> tuple[Tensor, Tensor]:
    """Keys and values of all heads: cached [b, t, c + r], kv_b_proj [h, d + v, c] -> both [b, h, t, d + r].

    The values are padded with zeros to the keys' size, because the fast attention kernels want equal head
    sizes.
    """
    heads, _, rank = kv_b_proj.shape
    latent, k_rope = cached.split([rank, cached.shape[-1] - rank], dim=-1)
    expanded = linear(latent, kv_b_proj.flatten(0, 1)).unflatten(-1, (heads, -1))  # [b, t, h, d+v]
    k_nope, value = expanded.split([nope, expanded.shape[-1] - nope], dim=-1)
    key = torch.cat([k_nope, k_rope[:, :, None].expand(-1, -1, heads, -1)], dim=-1)
    value = F.pad(value, (0, max(0, key.shape[-1] - value.shape[-1])))
    return key.transpose(1, 2), value.transpose(1, 2)


def attend_expanded(
    q_nope: Tensor, q_rope: Tensor, cached: Tensor, kv_b_proj: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Ordinary attention over keys and values that kv_b_proj makes from the cached latents.

    q_nope [b, s, h, d], q_rope [b, s, h, r], cached [b, t, c + r], kv_b_proj [h, d + v, c] -> [b, s, h, v].
    `mask` None means causal with nothing before the new tokens, which lets SDPA skip the upper triangle.
    """
    query = torch.cat([q_nope, q_rope], dim=-1).transpose(1, 2)  # [b, h, s, d+r]
    key, value = expand(cached, kv_b_proj, q_nope.shape[-1])
    mixed = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale
    )
    return mixed[..., : kv_b_proj.shape[1] - q_nope.shape[-1]].transpose(1, 2)


def attend_in_pieces(
    q_nope: Tensor,
    q_rope: Tensor,
    cached: Tensor,
    kv_b_proj: Tensor,
    start: int,
    scale: float,
    piece: int = PIECE,
) -> Tensor:
    """attend_expanded, shapes too, where all rows' new tokens begin at `start`: no mask, little memory.

    What lies before `start` is attended to piece by piece, each with a softmax of its own; the log of a
    softmax's sum is its weight among the others. So memory does not grow with the context.
    """
    query = torch.cat([q_nope, q_rope], dim=-1).transpose(1, 2)
    mixed, logs = attend_with_logs(
        query, *expand(cached[:, start:], kv_b_proj, q_nope.shape[-1]), True, scale
    )
    mixed = mixed.float()
    for first in range(0, start, piece):
        past = cached[:, first : min(first + piece, start)]
        more, more_logs = attend_with_logs(query, *expand(past, kv_b_proj, q_nope.shape[-1]), False, scale)
        both = torch.logaddexp(logs, more_logs)
        mixed = mixed * (logs - both).exp()[..., None] + more * (more_logs - both).exp()[..., None]
        logs = both
    return mixed[..., : kv_b_proj.shape[1] - q_nope.shape[-1]].transpose(1, 2).type_as(q_nope)


def attend_with_logs(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention, and the log of each softmax's sum in fp32.

    query [b, h, s, size], key and value [b, h, t, size] -> [b, h, s, size] and [b, h, s].
    torch's public function keeps the logs to itself, so this calls what it would call.
    """
    ops = torch.ops.aten
    if query.device.type == "cpu":
        mixed, logs = ops._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, scale=scale
        )
    elif query.dtype == torch.float32:
        mixed, logs, *_ = ops._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, causal, scale=scale
        )
    else:
        mixed, logs, *_ = ops._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)
    return mixed, logs[..., : query.shape[2]].float()  # some pad the logs


def expanding_pays(seq: int, length: int, kv_b_proj: Tensor, rope: int) -> bool:
    """Whether it takes fewer multiplications to expand all `length` latents and attend to short keys than to
    absorb `seq` queries and attend to long ones. kv_b_proj [h, d + v, c]. A first prefill expands, a decode
    step absorbs."""
    out, rank = kv_b_proj.shape[1:]
    expanded = length * out * rank + seq * length * (out + rope)
    absorbed = seq * out * rank + seq * length * (2 * rank + rope)
    return seq > 1 and expanded <= absorbed


def attend(
    q_nope: Tensor,
    q_rope: Tensor,
    cached: Tensor,
    kv_b_proj: Tensor,
    mask: Callable[[], Tensor],
    scale: float,
    path: str,
    start: int | None = None,
) -> Tensor:
    """MLA by the path named: `reference`, `absorbed`, `expanded`, or `auto` by the number of new tokens.

    q_nope [b, s, h, d], q_rope [b, s, h, r], cached [b, t, c + r], kv_b_proj [h, d + v, c] -> [b, s, h, v].
    `mask()` [b, 1, s, t] says what each new token sees; `start` is where they begin, if that is one place for
    all rows.
    """
    seq, length = q_nope.shape[1], cached.shape[1]
    if path == "expanded" or (path == "auto" and expanding_pays(seq, length, kv_b_proj, q_rope.shape[-1])):
        # A CPU is as fast with a mask, and a GPU is not.
        if start and (start >= PIECE or cached.device.type != "cpu"):
            return attend_in_pieces(q_nope, q_rope, cached, kv_b_proj, start, scale)
        return attend_expanded(q_nope, q_rope, cached, kv_b_proj, None if seq == length else mask(), scale)
    w_uk, w_uv = kv_b_proj.split([q_nope.shape[-1], kv_b_proj.shape[1] - q_nope.shape[-1]], dim=1)
    q_latent = torch.einsum("bshd,hdc->bshc", q_nope, w_uk)
    attention = attend_reference if path == "reference" else attend_absorbed
    mixed = attention(q_latent, q_rope, cached, mask(), scale).flatten(0, 1)  # [b*s, h, c]
    # einsum would copy w_uv transposed, each time; in this order torch copies it as it lies, if at all.
    return (w_uv @ mixed.permute(1, 2, 0)).permute(2, 0, 1).unflatten(0, q_nope.shape[:2])
