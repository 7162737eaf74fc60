"""A checkpoint that is there: its folder and what it says about itself. Nothing is loaded, nor is torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv2cli.errors import Dsv2Error
from dsv2cli.hubs.find import find_config, find_model
from dsv2cli.hubs.hashes import edges
from dsv2cli.model.config import DeepseekV2Config, token_ids
from dsv2cli.outside import read_json

if TYPE_CHECKING:
    from dsv2cli.checkpoint.tokenizer import Tokenizer


@dataclass
class Checkpoint:
    """A model's folder and what it says about itself; nothing is loaded yet."""

    folder: Path
    name: str
    config: DeepseekV2Config
    settings: dict[str, Any]  # generation_config.json

    @property
    def eos_ids(self) -> frozenset[int]:
        """From generation_config.json, else config.json, else what the tokenizer calls the end; one id or
        several.

        Raises Dsv2Error where none of them names one that the model has.
        """
        name, source = "eos_token_id", str(self.folder / "generation_config.json")
        size = self.config.vocab_size
        for value in (self.settings.get(name), self.config.eos_token_id):
            if ids := token_ids(value, name, source, size):
                return frozenset(ids)
        tokenizer = self.tokenizer_if_any()
        end = None if tokenizer is None else tokenizer.fast.token_to_id(tokenizer.eos)
        if end is not None and end < size:
            return frozenset([end])
        raise Dsv2Error(
            f"Nothing in {self.folder} says which token ends a text",
            why="neither generation_config.json, config.json nor tokenizer_config.json names one that it has",
            fix="download these files again, or give --ignore-eos",
        )

    def mark(self) -> str:
        """Tells it from others, however often its files were copied or touched. Raises Dsv2Error."""
        foreign = self.config.foreign
        listed = foreign.entry.get("files") if foreign is not None and foreign.method == "gguf" else None
        return edges(self.folder, files=[Path(file) for file in listed or ()])

    def tokenizer(self) -> Tokenizer:
        """Raises Dsv2Error where there is none."""
        from dsv2cli.checkpoint.tokenizer import Tokenizer  # with it comes a library that takes its time

        return Tokenizer(self.folder, self.config.max_position_embeddings)

    def tokenizer_if_any(self) -> Tokenizer | None:
        """With token ids a checkpoint may do without."""
        return self.tokenizer() if os.path.lexists(self.folder / "tokenizer.json") else None


def find(name: str | None, random_weights: str | None = None) -> Checkpoint:
    """The checkpoint that a name means, or one of random weights whose config is named. Raises Dsv2Error."""
    if random_weights is not None:
        path = find_config(random_weights)
        config = replace(DeepseekV2Config.load(path), foreign=None)  # its weights are not looked at
        return Checkpoint(path, f"random weights of {random_weights}", config, {})
    folder = find_model(name)
    settings = read_json(folder / "generation_config.json", dict)
    return Checkpoint(folder, name or "embedded", DeepseekV2Config.load(folder), settings)
