"""Layers over devices of unequal size, the RAM and the disk, by accelerate: for models larger than one
device.

A layer that lies in RAM or on disk is brought to the device that computes it each time it runs, whole, and
dropped again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_max_memory, offload_weight

from dsv2cli.checkpoint.blueprint import blueprint, pieces, state_of
from dsv2cli.checkpoint.formats.coded import Coded
from dsv2cli.checkpoint.load import Progress, of_total, read_piece
from dsv2cli.checkpoint.names import kept_codings, match, packed_tensors, tensors_of
from dsv2cli.checkpoint.safetensors import Stored
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.memory import parse_size
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.model.transformer import DeepseekV2
from dsv2cli.outside import parse_json, read_bytes, reason
from dsv2cli.places import temporary_folder

# Modules that are in one place, and brought in with all they hold.
WHOLE = ["Layer", "Embedding", "Head", "RMSNorm"]
Places = dict[str, Any]  # module -> number of a GPU, "cpu" or "disk"


def parse_memory(text: str) -> dict[int | str, int]:
    """`0=75GB,1=75GB,cpu=200GB` to bytes by device. Raises UsageError for anything else."""
    found: dict[int | str, int] = {}
    for entry in text.split(","):
        device, _, size = (word.strip() for word in entry.partition("="))
        memory = parse_size(size)
        if memory is None or not (device.isdecimal() or device == "cpu"):
            why, fix = f"{entry!r} is no device with a size", "--max-memory 0=75GB,1=75GB,cpu=200GB"
            raise UsageError(f"--max-memory {text} can not be used", why=why, fix=fix)
        name = int(device) if device.isdecimal() else "cpu"
        if name in found:
            raise UsageError(f"--max-memory names {device} twice", fix="leave one of them out")
        found[name] = memory
    return found


def place(
    config: DeepseekV2Config, dtype: torch.dtype, format: str | None, wanted: str, memory: str | None
) -> Places:
    """Where each layer goes: as a file of JSON says, or for `auto` by filling device after device, RAM and
    then disk.

    Raises UsageError where the file or the memory makes no sense, or names a GPU that is not there.
    """
    names = pieces(config)
    if wanted != "auto":
        places = read_places(Path(wanted), names)
    else:
        given = parse_memory(memory) if memory is not None else None
        refuse_strange(list(given or ()))
        if format is None and (held := config.held_bits()):  # about as large, which is all that is asked here
            format = "int4-all" if max(held.values()) < 6 else "int8"
        model, limits = blueprint(config, dtype, format=format), get_max_memory(given)
        found = infer_auto_device_map(model, limits, no_split_module_classes=WHOLE)
        places = {name: inherited(found, name) for name in names}
    refuse_strange(list(places.values()))
    if config.tie_word_embeddings:
        places["lm_head"] = places["model.embed_tokens"]
    return places


def refuse_strange(places: list[Any]) -> None:
    """Raises UsageError for a place that is not there."""
    count = torch.cuda.device_count()
    strange = [p for p in places if p not in ("cpu", "disk") and not (type(p) is int and 0 <= p < count)]
    if strange:
        why, fix = f"{count} CUDA devices found", "cpu, disk, or the number of a GPU"
        raise UsageError(f"There is no device {strange[0]}", why=why, fix=fix)


def inherited(places: Places, name: str) -> Any:
    """The place of a module or of the nearest one around it; accelerate names the largest that are in one
    place.
    """
    while name not in places and name:
        name = name.rpartition(".")[0]
    return places[name]


def read_places(path: Path, names: list[str]) -> Places:
    """The place of each of `names` as a file says.

    Raises UsageError for what is no placement, or lacks one of them.
    """
    try:
        content = parse_json(read_bytes(path))
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError) as error:
        fix = 'a JSON object such as {"model": 0, "lm_head": "cpu"}'
        raise UsageError(f"{path} is no placement", why=reason(error), fix=fix) from None
    modules = {name.rpartition(".")[0] for name in names} | {"", "model", "model.layers", *names}
    if strange := sorted(content.keys() - modules):
        fix = f"places are given to {names[0]}, {names[1]} and so on to {names[-1]}"
        raise UsageError(f"{path}: there is no module {strange[0][:80]!r}", fix=fix)
    places = {}
    for name in names:
        try:
            places[name] = inherited(content, name)
        except KeyError:
            fix = 'each module needs a place: {"model.embed_tokens": 0, "model.layers.0": 0, ...}'
            raise UsageError(f"{path} places no {name}", fix=fix) from None
    return places


def layer_devices(places: Places, main: torch.device) -> list[torch.device]:
    """The device that computes each layer: what lies in RAM or on disk is brought to the main one."""
    layers = [where for name, where in places.items() if name.startswith("model.layers.")]
    return [torch.device("cuda", where) if isinstance(where, int) else main for where in layers]


@torch.inference_mode(False)
def load_placed(
    folder: Path,
    config: DeepseekV2Config,
    dtype: torch.dtype,
    format: str | None,
    places: Places,
    main: torch.device,
    scratch: Path | None = None,
    progress: Progress | None = None,
) -> DeepseekV2:
    """The checkpoint with every module where `places` has it; ids go in and scores come out on `main`.

    What is on disk is written below `scratch` first, a layer at a time. Raises Dsv2Error as load_model, and
    for a full disk.
    """
    if config.packed is not None:
        packed_tensors(config, folder)
        why = "its files are mapped as they lie, and the system pages them in"
        raise UsageError(f"{folder} is packed", why=why, fix="leave --placement out")
    stored = tensors_of(folder, config)
    codings = None
    if config.foreign is not None and format is None:
        codings = kept_codings(config, stored, main)
    model = blueprint(config, dtype, format=format, codings=codings)
    total = sum(tensor.length for tensor, _ in match(model, stored, folder))
    try:
        offload = Offload(scratch) if "disk" in places.values() else None
        read_to_places(model, stored, places, offload, of_total(progress, total))
    except OSError as error:
        why, fix = error.strerror or str(error), "--offload-folder on another disk"
        raise Dsv2Error("Layers could not be put on disk", why=why, fix=fix) from error
    model.eval().requires_grad_(False)
    model.tie()
    if set(places.values()) != {"cpu"}:
        send_out(model, places, main, offload)
    return model


class Offload:
    """A folder for layers on disk, gone when the program ends."""

    def __init__(self, scratch: Path | None) -> None:
        """Below `scratch`, or where the system keeps temporary files. Raises OSError."""
        self.folder = temporary_folder("dsv2-offload", scratch)
        self.index: dict[str, Any] = {}  # accelerate's own words about each file

    def write(self, name: str, module: torch.nn.Module) -> None:
        """A module's tensors to disk; it has none afterwards. Raises OSError."""
        for key, tensor in state_of(module).items():
            self.index = offload_weight(tensor.detach(), f"{name}.{key}", str(self.folder), self.index)
        module.to(torch.device("meta"))

    def link_tied_head(self) -> None:
        """The head is the embedding once more. Raises OSError."""
        (self.folder / "lm_head.weight.dat").symlink_to(self.folder / "model.embed_tokens.weight.dat")
        self.index["lm_head.weight"] = self.index["model.embed_tokens.weight"]


def read_to_places(
    model: DeepseekV2,
    stored: dict[str, Stored | Coded],
    places: Places,
    offload: Offload | None,
    counted: Callable[[int], None] | None,
) -> None:
    """Each module's weights to its place; `counted` is told the bytes read so far.

    Raises OSError, and Dsv2Error as read_piece.
    """
    done, tied = 0, model.config.tie_word_embeddings
    for name, where in places.items():
        if name == "lm_head" and tied:
            continue
        done += read_piece(model, name, stored, torch.device("cpu" if where == "disk" else where))
        if counted is not None:
            counted(done)
        if where == "disk":
            assert offload is not None
            offload.write(name, model.get_submodule(name))
    if tied and offload is not None and places["lm_head"] == "disk":
        offload.link_tied_head()


def send_out(model: DeepseekV2, places: Places, main: torch.device, offload: Offload | None) -> None:
    """Let accelerate bring each module's input to it, or the module to the device that computes it."""
    # That weights are not loaded yet is the point.
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
    dispatch_model(
        model,
        places,
        main_device="cpu" if main.type == "cpu" else main.index,
        offload_dir=None if offload is None else str(offload.folder),
        offload_index=None if offload is None else offload.index or None,
        offload_buffers=True,
        preload_module_classes=WHOLE,
        force_hooks=True,
    )
