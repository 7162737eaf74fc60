"""Logits to one token. No state but the generator that is handed in."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv2cli.engine.request import SamplingParams
from dsv2cli.errors import Dsv2Error

# Temperatures below TINY take the likeliest: in fp32 they would divide by nothing.
TINY = 1e-6
NO_TOKEN = -1


def seeded(device: torch.device, seed: int) -> torch.Generator:
    """Random numbers that follow from a seed, of which 64 bits count."""
    return torch.Generator(device).manual_seed(seed % 2**64)


def sample(logits: Tensor, params: SamplingParams, seen: Tensor, generator: torch.Generator | None) -> int:
    """One token from logits [vocab], fp32. `seen` [n] are the ids so far, for the repetition penalty.

    Order: repetition penalty, temperature, top-k, top-p, min-p, as in transformers.
    """
    if params.repetition_penalty != 1.0:
        logits = penalise(logits, seen, params.repetition_penalty)
    if params.temperature < TINY:
        return int(logits.argmax())
    return int(torch.multinomial(distribution(logits, params), 1, generator=generator))


def sample_rows(logits: Tensor, params: SamplingParams, generators: list[torch.Generator]) -> Tensor:
    """A token for each row of logits [rows, vocab], by the row's own generator, left where they are: nothing
    waits for the device.

    The largest of p / e, with e drawn from an exponential distribution, is distributed as p. No repetition
    penalty. A row whose scores are no numbers gets NO_TOKEN, for its reader to refuse. -> [rows]
    """
    return torch.where(logits.isfinite().all(dim=-1), chosen_of(logits, params, generators), NO_TOKEN)


def chosen_of(logits: Tensor, params: SamplingParams, generators: list[torch.Generator]) -> Tensor:
    """sample_rows for scores that are numbers. -> [rows]"""
    if params.temperature < TINY:
        return logits.argmax(dim=-1)
    noise = torch.empty_like(logits)
    for row, generator in zip(noise, generators, strict=True):
        row.exponential_(generator=generator)
    return (distribution(logits, params) / noise).argmax(dim=-1)


def no_numbers() -> Dsv2Error:
    """What to say of scores with NaN or infinity in them."""
    return Dsv2Error(
        "The model's scores are no numbers (NaN or infinity)",
        why="weights are damaged, or too large for the number format",
        fix="--dtype float32, or download the weights again",
    )


def distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    """What is sampled from, up to a factor, for a temperature above 0. logits and result [..., vocab]"""
    # The likeliest moves to 0 first, so that a tiny temperature cannot overflow.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / params.temperature
    if 0 < params.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(params.top_k).values[..., -1:], float("-inf"))
    if params.top_p < 1:
        logits = keep_nucleus(logits, params.top_p)
    probabilities = logits.softmax(dim=-1)
    if params.min_p > 0:
        probabilities = probabilities.masked_fill(
            probabilities < params.min_p * probabilities.amax(dim=-1, keepdim=True), 0.0
        )
    return probabilities


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Push down every token that has occurred: divide what is positive, multiply what is negative (CTRL
    paper).

    logits [vocab], seen [n] -> [vocab]
    """
    scores = logits[seen]
    return logits.scatter(0, seen, torch.where(scores > 0, scores / penalty, scores * penalty))


def keep_nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Drop the least likely tokens that together hold at most 1 - top_p; the likeliest always stays.

    logits and result [..., vocab]
    """
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    dropped = probabilities.cumsum(dim=-1) - probabilities >= top_p
    dropped[..., 0] = False  # also where top_p is nothing in fp32
    return logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), float("-inf"))
