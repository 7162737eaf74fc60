"""Multi-head latent attention: over the compressed cache, or over keys and values expanded from it.

Both compute the same numbers from the same weights. A cached token is one row of `kv_lora_rank` latent numbers
and one rotated key of `qk_rope_head_dim` numbers shared by all heads. Letters: b batch, s new tokens, t past and
new tokens, h heads, c latent, d nope or value, r rope.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def visible(positions: Tensor, length: int) -> Tensor:
    """Which cache slots each query may read: slot t holds position t, so t <= position. [batch, 1, seq, length]"""
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
    """The same as attend_reference in two matrix products, with the cache as the left factor.

    On a CPU cache @ queries is several times faster than queries @ cache, because the long side is cut into rows.
    """
    batch, seq, heads, rank = q_latent.shape
    queries = torch.cat([q_latent, q_rope], dim=-1).flatten(1, 2)  # [b, s*h, c+r]
    scores = (cached @ queries.transpose(1, 2)).transpose(1, 2)  # [b, s*h, t]
    scores = scores.float().view(batch, seq, heads, -1).mul_(scale)
    if seq > 1 or batch > 1:  # a lone newest token sees everything
        scores = scores.masked_fill(~mask.transpose(1, 2), float("-inf"))
    weights = scores.softmax(dim=-1).type_as(cached).flatten(1, 2)
    return (weights @ cached[..., :rank]).view(batch, seq, heads, rank)


def attend_expanded(
    q_nope: Tensor, q_rope: Tensor, cached: Tensor, kv_b_proj: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Ordinary attention over keys and values that kv_b_proj makes from the cached latents.

    q_nope [b, s, h, d], q_rope [b, s, h, r], cached [b, t, c + r], kv_b_proj [h, d + v, c] -> [b, s, h, v].
    `mask` None means causal with nothing before the new tokens, which lets SDPA skip the upper triangle.
    """
    heads, _, rank = kv_b_proj.shape
    latent, k_rope = cached.split([rank, cached.shape[-1] - rank], dim=-1)
    expanded = F.linear(latent, kv_b_proj.flatten(0, 1)).unflatten(-1, (heads, -1))  # [b, t, h, d+v]
    k_nope, value = expanded.split([q_nope.shape[-1], expanded.shape[-1] - q_nope.shape[-1]], dim=-1)
    query = torch.cat([q_nope, q_rope], dim=-1).transpose(1, 2)  # [b, h, s, d+r]
    key = torch.cat([k_nope, k_rope[:, :, None].expand(-1, -1, heads, -1)], dim=-1).transpose(1, 2)
    # The fast attention kernels want equal head sizes: pad the values with zeros and cut them off again.
    value_dim, pad = value.shape[-1], query.shape[-1] - value.shape[-1]
    value = F.pad(value, (0, pad)) if pad > 0 else value
    mixed = F.scaled_dot_product_attention(
        query, key, value.transpose(1, 2), attn_mask=mask, is_causal=mask is None, scale=scale
    )
    return mixed[..., :value_dim].transpose(1, 2)


def expanding_pays(seq: int, length: int, kv_b_proj: Tensor, rope: int) -> bool:
    """Which path takes fewer multiplications: expanding all `length` latents and attending to short keys, or
    absorbing `seq` queries and attending to long ones. A first prefill expands, a decode step absorbs."""
    out, rank = kv_b_proj.shape[1:]
    expanded = length * out * rank + seq * length * (out + rope)
    absorbed = seq * out * rank + seq * length * (2 * rank + rope)
    return seq > 1 and expanded <= absorbed


def attend(
    q_nope: Tensor, q_rope: Tensor, cached: Tensor, kv_b_proj: Tensor, mask: Tensor, scale: float, path: str
) -> Tensor:
    """MLA by the path named: `absorbed`, `expanded`, or `auto` by the number of new tokens. -> [b, s, h, v]"""
    seq, length = q_nope.shape[1], cached.shape[1]
    if path == "expanded" or (path == "auto" and expanding_pays(seq, length, kv_b_proj, q_rope.shape[-1])):
        return attend_expanded(q_nope, q_rope, cached, kv_b_proj, None if seq == length else mask, scale)
    w_uk, w_uv = kv_b_proj.split([q_nope.shape[-1], kv_b_proj.shape[1] - q_nope.shape[-1]], dim=1)
    q_latent = torch.einsum("bshd,hdc->bshc", q_nope, w_uk)
    attention = attend_reference if path == "reference" else attend_absorbed
    mixed = attention(q_latent, q_rope, cached, mask, scale).flatten(0, 1)  # [b*s, h, c]
    # einsum would copy w_uv transposed, each time; in this order torch copies it as it lies, if at all.
    return (w_uv @ mixed.permute(1, 2, 0)).permute(2, 0, 1).unflatten(0, q_nope.shape[:2])
