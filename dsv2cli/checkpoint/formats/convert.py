"""Codes of one Coding as those of another that holds the same: for weights that share a matrix, and GPUs."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from dsv2cli.formats import Coding
from dsv2cli.kernels.quantized import SCALES, Codes, multiplied, values_of

ANEW = Coding(8, 32, "signed")  # what weights are packed in whose own codes no kernel takes


def common(codings: Collection[Coding | None]) -> Coding | None:
    """What holds all of several: themselves where they are alike, 8 bits with scales in fp32, or None where
    some are numbers, or 8-bit floats beside others. Beside some that are packed anew all are.
    """
    known = {coding for coding in codings if coding is not None}
    if len(known) < 2 and None not in codings:
        return next(iter(known), None)
    if ANEW in known and None not in codings:
        return ANEW
    if None in codings or any(coding.table == "e4m3" for coding in known):
        return None
    offset = any(coding.offset or (coding.bits, coding.table) == (8, "plain") for coding in known)
    group = min(coding.group for coding in known)
    return Coding(8, group, "signed", "F32", "added" if offset else "")


def convert(codes: Codes, source: Coding, target: Coding) -> Codes | None:
    """Codes of `source` as those of `target`, or None where that can not hold them."""
    if source == target:
        return codes
    alike = (source.bits, source.table) == (target.bits, target.table)
    widens = (target.bits, target.table, target.scale) == (8, "signed", "F32") and source.table != "e4m3"
    added = target.offset == "added"
    if source.group % target.group or not (alike or widens) or (source.offset != target.offset and not added):
        return None
    scales, *more = multiplied(*codes.both(source.offset), source).unbind(-1)
    offsets = more[0] if more else None
    values, shift = codes.values, 0
    if not alike:
        means = values_of(codes.values, source)
        shift = 128 if (source.bits, source.table) == (8, "plain") else 0
        values = (means - shift + 128).to(torch.uint8)
    if added:
        if source.offset == "zero":
            offsets = -offsets * scales  # type: ignore[operator]
        offsets = (torch.zeros_like(scales) if offsets is None else offsets) + shift * scales
    groups, dtype = -(-values.shape[1] // target.group), SCALES[target.scale]

    def spread(numbers: Tensor | None) -> Tensor | None:
        if numbers is None:
            return None
        return numbers.repeat_interleave(source.group // target.group, 1)[:, :groups].to(dtype)

    wide = spread(scales)
    assert wide is not None
    return Codes(values, wide, spread(offsets))
