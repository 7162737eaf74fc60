"""Multi-head latent attention: over the compressed cache, or over keys and values expanded from it.

Both compute the same numbers from the same weights. A cached token is one row of `kv_lora_rank` latent
numbers and one rotated key of `qk_rope_head_dim` numbers shared by all heads. Letters: b batch, s new tokens,
t past and new tokens, h heads, c latent, d nope or value, r rope.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv2cli.formats import PAGE
from dsv2cli.kernels.linear import linear, multiplies_bf16

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
    if seq > 1:  # a lone newest token sees everything
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


def attend_page_by_page(
    q_nope: Tensor, q_rope: Tensor, cached: Tensor, kv_b_proj: Tensor, scale: float, piece: int = PIECE
) -> Tensor:
    """attend_in_pieces for one sequence, cut so that what a token gets follows from its position and what it
    sees alone, and not from which tokens were asked for together.

    Keys and values are expanded a page at a time, and a page of queries (those that are not new are zeros)
    attends to each piece at a time: the shapes of all products follow from positions.

    q_nope [1, s, h, d], q_rope [1, s, h, r], cached [1, t, c + r], kv_b_proj [h, d + v, c] -> [1, s, h, v].
    """
    seq, length, nope = q_nope.shape[1], cached.shape[1], q_nope.shape[-1]
    start, heads, rank = length - seq, kv_b_proj.shape[0], kv_b_proj.shape[2]
    first, pages = start // PAGE, -(-length // PAGE)
    queries = q_nope.new_zeros((pages - first) * PAGE, heads, nope + q_rope.shape[-1])
    queries[start - first * PAGE :][:seq] = torch.cat([q_nope, q_rope], dim=-1)[0]
    queries = queries.unflatten(0, (-1, PAGE)).transpose(1, 2)  # [pages of queries, h, PAGE, d + r]
    padded = F.pad(cached[0], (0, 0, 0, pages * PAGE - length)).unflatten(0, (-1, PAGE))  # [pages, PAGE, c+r]
    weight = kv_b_proj.flatten(0, 1)
    if not multiplies_bf16() and weight.dtype is torch.bfloat16:
        weight = weight.float()
    causal = torch.full((PAGE, PAGE), float("-inf"), dtype=cached.dtype).triu(1)
    mask = F.pad(causal, (piece - PAGE, 0))  # [PAGE, piece]: of the last page a query sees what is before it
    logs: list[Tensor | None] = [None] * len(queries)
    out = queries.new_zeros(*queries.shape, dtype=torch.float32)
    for begin in range(0, pages * PAGE, piece):
        end = min(begin + piece, pages * PAGE)
        keys = cached.new_empty(1, heads, end - begin, queries.shape[-1])
        values = torch.zeros_like(keys)  # padded to the keys' size, as in expand
        for page in range(begin // PAGE, end // PAGE):
            rows = slice(page * PAGE - begin, (page + 1) * PAGE - begin)
            latent, k_rope = padded[page].split([rank, padded.shape[-1] - rank], dim=-1)
            both = F.linear(latent.type_as(weight), weight).type_as(cached).unflatten(-1, (heads, -1))
            keys[0, :, rows, :nope] = both[..., :nope].transpose(0, 1)
            keys[0, :, rows, nope:] = k_rope
            values[0, :, rows, : both.shape[-1] - nope] = both[..., nope:].transpose(0, 1)
        for i, query in enumerate(queries):
            seen = min((first + i + 1) * PAGE, end) - begin
            if seen <= 0:
                continue
            own = begin + seen == (first + i + 1) * PAGE  # the piece with the page of the query itself
            more, more_logs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[None],
                keys[:, :, :seen],
                values[:, :, :seen],
                attn_mask=mask[:, piece - seen :] if own else None,
                scale=scale,
            )
            so_far = logs[i]
            both_logs = more_logs if so_far is None else torch.logaddexp(so_far, more_logs)
            if so_far is not None:
                out[i] *= (so_far - both_logs).exp()[0, ..., None]
            out[i] += more[0].float() * (more_logs - both_logs).exp()[0, ..., None]
            logs[i] = both_logs
    mixed = out.transpose(1, 2).flatten(0, 1)[start - first * PAGE :][:seq]
    return mixed[None, ..., : kv_b_proj.shape[1] - nope].type_as(q_nope)


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
    scale: float,
    path: str,
    by_pages: bool = False,
) -> Tensor:
    """MLA by the path named: `reference`, `absorbed`, `expanded`, or `auto` by the number of new tokens.

    q_nope [b, s, h, d], q_rope [b, s, h, r], cached [b, t, c + r], kv_b_proj [h, d + v, c] -> [b, s, h, v].
    The new tokens are the last of t. `by_pages`: as attend_page_by_page, which `auto` then takes.
    """
    seq, length = q_nope.shape[1], cached.shape[1]
    start = length - seq

    def mask() -> Tensor:
        positions = torch.arange(start, length, device=cached.device)
        return visible(positions[None], length)

    if by_pages and path in ("auto", "expanded"):
        return attend_page_by_page(q_nope, q_rope, cached, kv_b_proj, scale)
    if path == "expanded" or (path == "auto" and expanding_pays(seq, length, kv_b_proj, q_rope.shape[-1])):
        # A CPU is as fast with a mask, and a GPU is not.
        if start and (start >= PIECE or cached.device.type != "cpu"):
            return attend_in_pieces(q_nope, q_rope, cached, kv_b_proj, start, scale)
        return attend_expanded(q_nope, q_rope, cached, kv_b_proj, mask() if start else None, scale)
    w_uk, w_uv = kv_b_proj.split([q_nope.shape[-1], kv_b_proj.shape[1] - q_nope.shape[-1]], dim=1)
    q_latent = torch.einsum("bshd,hdc->bshc", q_nope, w_uk)
    attention = attend_reference if path == "reference" else attend_absorbed
    mixed = attention(q_latent, q_rope, cached, mask(), scale).flatten(0, 1)  # [b*s, h, c]
    # einsum would copy w_uv transposed, each time; in this order torch copies it as it lies, if at all.
    return (w_uv @ mixed.permute(1, 2, 0)).permute(2, 0, 1).unflatten(0, q_nope.shape[:2])
