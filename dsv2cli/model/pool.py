"""What the model remembers: per token and layer one latent and one rope key, in pages of a pool.

A page holds 64 neighbouring tokens of one sequence in every layer. Which pages a sequence has is the engine's
to know (engine/pages.py); here they are memory.
"""

from __future__ import annotations

import copy
import mmap

import torch
from torch import Tensor

from dsv2cli.formats import PAGE
from dsv2cli.model.config import DeepseekV2Config


def pages_for(tokens: int) -> int:
    """How many pages so many tokens take."""
    return -(-tokens // PAGE)


class LatentPool:
    """Pages of latents, each layer's on its device: one allocation a device, that never moves or grows."""

    def __init__(
        self, config: DeepseekV2Config, pages: int, devices: list[torch.device], dtype: torch.dtype
    ) -> None:
        """`devices` are the layers'. In RAM a page takes memory from when it is first written."""
        self.pages = pages
        self.layers: list[Tensor] = []  # each [pages, PAGE, latent + rope], a part of its device's block
        self.blocks: list[Tensor] = []  # each [pages, layers there, PAGE, latent + rope]
        places: dict[torch.device, int] = {}
        for device in devices:
            if device not in places:
                places[device] = len(self.blocks)
                shape = (pages, devices.count(device), PAGE, config.cached_dim)
                self.blocks.append(memory(shape, device, dtype))
        used = [0] * len(self.blocks)
        for device in devices:
            place = places[device]
            self.layers.append(self.blocks[place][:, used[place]])
            used[place] += 1

    def write(self, layer: int, slots: Tensor, latents: Tensor) -> None:
        """Store latents [tokens, latent + rope] in slots [tokens]: slot i of page p is p * PAGE + i."""
        self.layers[layer][slots // PAGE, slots % PAGE] = latents

    def read(self, layer: int, pages: Tensor, length: int) -> Tensor:
        """The first `length` tokens in pages [n] of a layer. -> [length, latent + rope]"""
        return self.layers[layer][pages].flatten(0, 1)[:length]

    def copy_page(self, source: int, target: int) -> None:
        """Let page `target` hold what page `source` does."""
        for block in self.blocks:
            block[target] = block[source]

    def alias(self) -> LatentPool:
        """Another pool with the same pages in the same memory."""
        return copy.copy(self)

    def bytes_per_token(self) -> int:
        """Over all layers."""
        return sum(block[0].numel() * block.element_size() for block in self.blocks) // PAGE


def memory(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Zeros of any shape; in RAM it is only address space until it is written."""
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    size = dtype.itemsize
    for each in shape:
        size *= each
    reserve = getattr(mmap, "MAP_NORESERVE", 0)
    space = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve)
    return torch.frombuffer(space, dtype=dtype, count=size // dtype.itemsize).view(shape)
