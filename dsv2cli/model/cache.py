"""What the model remembers of a conversation: per token and layer one latent and one rope key."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.model.share import split

GRANULE = 256  # capacity grows in steps of this many tokens


class LatentCache:
    """Slot t of a row holds the token at position t, so rows of different lengths need no padding rule.

    `lengths` counts the valid slots of each row; slots beyond are rewritten before any query may see them.
    """

    def __init__(
        self,
        config: DeepseekV2Config,
        batch: int,
        devices: list[torch.device],
        dtype: torch.dtype,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        """Each layer's on the device that computes it. Of `size` ranks that attend for sequences of their own, `rank` has its rows."""
        self.lengths = [0] * batch
        self.rank, self.parts = (
            rank,
            [split(batch, 1, other, size) for other in range(size)],
        )  # the rows of each rank
        self.steps: dict[tuple[int, int], Callable[..., Tensor]] = {}  # made for where the layers lie now
        self.layers = [
            torch.empty(
                len(self.own), 0, config.cached_dim, device=device, dtype=dtype
            )  # [batch, capacity, latent + rope]
            for device in devices
        ]

    @property
    def own(self) -> range:
        """The rows whose latents are here."""
        return self.parts[self.rank]

    @property
    def capacity(self) -> int:
        return self.layers[0].shape[1]

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens a row, keeping what is there; grows by at least half, so rarely."""
        if length > self.capacity:
            wanted = max(length, self.capacity + self.capacity // 2)
            self.grow(-(-wanted // GRANULE) * GRANULE)

    def grow(self, capacity: int) -> None:
        """Make room for exactly `capacity` tokens a row, keeping what is there."""
        self.steps = {}
        for i, old in enumerate(self.layers):
            self.layers[i] = old.new_zeros(old.shape[0], capacity, old.shape[2])
            self.layers[i][:, : old.shape[1]] = old

    def write(self, layer: int, positions: Tensor, rows: Tensor, start: int | None) -> None:
        """Store rows [batch, seq, latent + rope] at positions [batch, seq]; `start` if they are one run for all."""
        if start is not None:
            self.layers[layer][:, start : start + rows.shape[1]] = rows
        else:
            self.layers[layer].scatter_(1, positions[..., None].expand_as(rows), rows)

    def alias(self) -> LatentCache:
        """Another cache with the same rows in the same memory."""
        other = copy.copy(self)
        other.steps = {}
        return other

    def row(self, index: int) -> LatentCache:
        """One row as an empty cache of its own that shares this one's memory; this one must have room already."""
        row = self.alias()
        row.parts = [range(int(index in part)) for part in self.parts]
        first = index - self.own.start if index in self.own else len(self.own)
        row.lengths, row.layers = [0], [layer[first : first + 1] for layer in self.layers]
        return row

    def repeated(self, count: int) -> LatentCache:
        """`count` rows, each a copy of the one row here."""
        assert len(self.parts) == 1, "another rank may have it"
        many = self.alias()
        many.parts = [range(count)]
        many.lengths, many.layers = self.lengths * count, [layer.repeat(count, 1, 1) for layer in self.layers]
        return many

    def fill(self, layers: list[Tensor]) -> None:
        """Take over the rows [1, length, latent + rope] of another cache."""
        length = layers[0].shape[1]
        self.reserve(length)
        for layer, rows in zip(self.layers, layers, strict=True):
            layer[:, :length] = rows.to(layer.device)
        self.lengths = [length]

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on."""
        self.lengths = [min(length, old) for old in self.lengths]

    def bytes_per_token(self) -> int:
        return sum(layer.shape[2] * layer.element_size() for layer in self.layers)
