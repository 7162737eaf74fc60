"""What the model remembers of a conversation: per token and layer one latent and one rope key."""

from __future__ import annotations

import copy

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
        """Latents lie on their layer's device.

        With split sequences this rank holds only its own rows, of `size` ranks.
        """
        self.lengths = [0] * batch
        self.rank, self.parts = (
            rank,
            [split(batch, 1, other, size) for other in range(size)],
        )  # the rows of each rank
        self.layers = [
            torch.empty(len(self.own), 0, config.cached_dim, device=device, dtype=dtype) for device in devices
        ]  # each [own rows, capacity, latent + rope]

    @property
    def own(self) -> range:
        """The rows whose latents are here."""
        return self.parts[self.rank]

    @property
    def capacity(self) -> int:
        """Tokens a row for which there is room."""
        return self.layers[0].shape[1]

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens a row, keeping what is there; grows by at least half, so rarely."""
        if length > self.capacity:
            wanted = max(length, self.capacity + self.capacity // 2)
            self.grow(-(-wanted // GRANULE) * GRANULE)

    def grow(self, capacity: int) -> None:
        """Make room for exactly `capacity` tokens a row, keeping what is there; every
        layer gets new memory.
        """
        for i, old in enumerate(self.layers):
            self.layers[i] = old.new_zeros(old.shape[0], capacity, old.shape[2])
            self.layers[i][:, : old.shape[1]] = old

    def append(self, layer: int, positions: Tensor, latents: Tensor, start: int | None) -> Tensor:
        """Store latents [batch, seq, latent + rope] at positions [batch, seq]; `start` if they are one run
        for all.

        Gives the whole layer [batch, capacity, latent + rope]
        """
        whole = self.layers[layer]
        if start is not None:
            whole[:, start : start + latents.shape[1]] = latents
        else:
            whole.scatter_(1, positions[..., None].expand_as(latents), latents)
        return whole

    def addresses(self, layers: range, seq: int) -> list[int]:
        """For kernels: where the row of each of `seq` tokens a row begins, layer after layer.

        [layers * rows * seq]
        """
        found = []
        for layer in self.layers[layers.start : layers.stop]:
            row = layer.stride(0) * layer.element_size()
            found += [layer.data_ptr() + i * row for i in range(layer.shape[0]) for _ in range(seq)]
        return found

    def latents(self, length: int) -> list[Tensor]:
        """The first `length` tokens of every row, layer by layer; each [own rows, length, latent + rope]"""
        return [layer[:, :length] for layer in self.layers]

    def alias(self) -> LatentCache:
        """Another cache with the same rows in the same memory."""
        return copy.copy(self)

    def row(self, index: int) -> LatentCache:
        """One row as an empty cache of its own that shares this one's memory; this one must have room
        already.
        """
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

    def fill(self, latents: list[Tensor]) -> None:
        """Take over the rows [1, length, latent + rope] of another cache, layer by layer."""
        length = latents[0].shape[1]
        self.reserve(length)
        for layer, rows in zip(self.layers, latents, strict=True):
            layer[:, :length] = rows.to(layer.device)
        self.lengths = [length]

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on."""
        self.lengths = [min(length, old) for old in self.lengths]

    def bytes_per_token(self) -> int:
        """Of one row, over all layers."""
        return sum(layer.shape[2] * layer.element_size() for layer in self.layers)
