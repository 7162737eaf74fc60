"""Which reader a checkpoint of another program wants."""

from __future__ import annotations

from pathlib import Path

from dsv2cli.checkpoint.formats import awq, compressed, fp8, gguf, gptq, mlx
from dsv2cli.checkpoint.formats.coded import Coded
from dsv2cli.checkpoint.safetensors import Stored, list_tensors
from dsv2cli.hubs.gguf_settings import require_unchanged
from dsv2cli.model.config import DeepseekV2Config

READERS = {
    "awq": awq.read,
    "gptq": gptq.read,
    "fp8": fp8.read,
    "compressed-tensors": compressed.read,
    "mlx": mlx.read,
}


def read_foreign(folder: Path, config: DeepseekV2Config) -> dict[str, Stored | Coded]:
    """The tensors that another program has packed, by their names in a checkpoint. Raises Dsv2Error."""
    assert config.foreign is not None
    entry, source = config.foreign.entry, str(folder / "config.json")
    if config.foreign.method != "gguf":
        return READERS[config.foreign.method](list_tensors(folder), entry, source)
    return {**gguf.read(require_unchanged(entry, source), config)}
