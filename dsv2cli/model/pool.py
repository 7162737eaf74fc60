"""What the model remembers: per token and layer one latent and one rope key, in pages of a pool.

A page holds 64 neighbouring tokens of one sequence in every layer. Which pages a sequence has is the engine's
to know (engine/pages.py); here they are memory.
"""

from __future__ import annotations

import copy
import mmap
import sys

import torch
from torch import Tensor

from dsv2cli.formats import CACHE_BITS, PAGE
from dsv2cli.kernels.latents import Packing
from dsv2cli.model.config import DeepseekV2Config

# Address space that is promised no memory, so that what else the process does (a fork, say) is not refused
# for it; Python names the flag from 3.13 on.
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


def pages_for(tokens: int) -> int:
    """How many pages so many tokens take."""
    return -(-tokens // PAGE)


class LatentPool:
    """Pages of latents, each layer's on its device: one allocation a device, that never moves or grows."""

    def __init__(
        self,
        config: DeepseekV2Config,
        pages: int,
        devices: list[torch.device],
        dtype: torch.dtype,
        cache: str = "auto",
    ) -> None:
        """`devices` are the layers', `dtype` is that of the activations, and `cache` how latents are held, as
        --cache names it: in fewer than 16 bits as codes (kernels/latents.py). In RAM a page takes memory from
        when it is first written.
        """
        self.pages, self.dtype, self.bits = pages, dtype, CACHE_BITS.get(cache, 16)
        self.packing, held = None, torch.bfloat16 if cache == "bf16" else dtype
        if self.bits < 16:
            self.packing = Packing(self.bits, config.kv_lora_rank, config.qk_rope_head_dim)
            held = torch.uint8
        # Each a part of its device's block: [pages, PAGE, latent + rope], or with codes [pages, bytes].
        self.layers: list[Tensor] = []
        self.blocks: list[Tensor] = []  # each [pages, layers there, ...]
        places: dict[torch.device, int] = {}
        for device in devices:
            if device not in places:
                places[device] = len(self.blocks)
                shape: tuple[int, ...] = (pages, devices.count(device), PAGE, config.cached_dim)
                if self.packing is not None:
                    shape = (*shape[:2], self.packing.page_bytes)
                self.blocks.append(memory(shape, device, held))
        used = [0] * len(self.blocks)
        for device in devices:
            place = places[device]
            self.layers.append(self.blocks[place][:, used[place]])
            used[place] += 1

    def write(self, layer: int, slots: Tensor, latents: Tensor) -> None:
        """Store latents [tokens, latent + rope] in slots [tokens]: slot i of page p is p * PAGE + i."""
        if self.packing is None:
            whole = self.layers[layer]
            whole[slots // PAGE, slots % PAGE] = latents.to(whole.dtype)
            return
        planes = self.packing.planes(self.layers[layer])
        for plane, each in zip(planes, self.packing.encode(latents), strict=True):
            plane[slots // PAGE, slots % PAGE] = each

    def read(self, layer: int, pages: Tensor, length: int) -> Tensor:
        """The first `length` tokens in pages [n] of a layer. -> [length, latent + rope]"""
        found = self.layers[layer][pages]
        if self.packing is None:
            return found.flatten(0, 1)[:length].to(self.dtype)
        codes, keys, scales = (plane.flatten(0, 1)[:length] for plane in self.packing.planes(found))
        return self.packing.decode((codes, keys, scales), self.dtype)

    def copy_page(self, source: int, target: int) -> None:
        """Let page `target` hold what page `source` does."""
        for block in self.blocks:
            block[target] = block[source]

    def page(self, page: int) -> Tensor:
        """What a page holds, layer by layer, as it lies there. -> [bytes] on the CPU"""
        layers = [layer[page].contiguous().view(-1).view(torch.uint8).cpu() for layer in self.layers]
        return torch.cat(layers)

    def set_page(self, page: int, held: Tensor) -> None:
        """Let a page hold `held` [bytes], as `page` gave it."""
        for layer, mine in zip(self.layers, held.chunk(len(self.layers)), strict=True):
            place = layer[page]
            place.copy_(mine.view(layer.dtype).view(place.shape))

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
    space = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    return torch.frombuffer(space, dtype=dtype, count=size // dtype.itemsize).view(shape)
