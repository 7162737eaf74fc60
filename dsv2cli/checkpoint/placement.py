"""Layers over devices of unequal size, the RAM and the disk, by accelerate: for models larger than one device.

A layer that lies in RAM or on disk is brought to the device that computes it each time it runs, whole, and dropped again.
"""

from __future__ import annotations

import atexit
import json
import logging
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_max_memory, offload_weight

from dsv2cli.checkpoint.weights import (
    Progress,
    blueprint,
    list_tensors,
    match,
    packed_tensors,
    pieces,
    read_piece,
    state_of,
)
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.model.transformer import DeepseekV2

WHOLE = [
    "Layer",
    "Embedding",
    "Linear",
    "RMSNorm",
]  # modules that are in one place, and brought in with all they hold
Places = dict[str, Any]  # module -> number of a GPU, "cpu" or "disk"
UNITS = {
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_memory(text: str) -> dict[int | str, int]:
    """`0=75GB,1=75GB,cpu=200GB` to bytes by device. Raises UsageError for anything else."""
    found: dict[int | str, int] = {}
    for part in text.split(","):
        matched = re.fullmatch(r"\s*(\d+|cpu)\s*=\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", part)
        unit = UNITS.get(matched[3].upper()) if matched else None
        if matched is None or unit is None:
            raise UsageError(
                f"--max-memory {text} can not be used",
                why=f"{part!r} is no device with a size",
                fix="--max-memory 0=75GB,1=75GB,cpu=200GB",
            )
        found[int(matched[1]) if matched[1].isdigit() else "cpu"] = int(float(matched[2]) * unit)
    return found


def place(
    config: DeepseekV2Config, dtype: torch.dtype, format: str | None, wanted: str, memory: str | None
) -> Places:
    """Where each layer goes: as a file of JSON says, or for `auto` by filling device after device, RAM and then disk.

    Raises UsageError where the file or the memory makes no sense, or names a GPU that is not there.
    """
    names = pieces(config)
    if wanted != "auto":
        places = read_places(Path(wanted), names)
    else:
        given = parse_memory(memory) if memory is not None else None
        refuse_strange(list(given or ()))
        limits = get_max_memory(given)
        found = infer_auto_device_map(
            blueprint(config, dtype, format=format), limits, no_split_module_classes=WHOLE
        )
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
        raise UsageError(
            f"There is no device {strange[0]}",
            why=f"{count} CUDA devices found",
            fix="cpu, disk, or the number of a GPU",
        )


def inherited(places: Places, name: str) -> Any:
    """The place of a module or of the nearest one around it; accelerate names the largest that are in one place."""
    while name not in places and name:
        name = name.rpartition(".")[0]
    return places[name]


def read_places(path: Path, names: list[str]) -> Places:
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
        return {name: inherited(content, name) for name in names}
    except KeyError:
        missing = next(
            name
            for name in names
            if not any(name == key or name.startswith(f"{key}.") or key == "" for key in content)
        )
        raise UsageError(
            f"{path} places no {missing}",
            fix='each module needs a place: {"model.embed_tokens": 0, "model.layers.0": 0, ...}',
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} is no placement",
            why=str(error),
            fix='a JSON object such as {"model": 0, "lm_head": "cpu"}',
        ) from None


def main_device(places: Places) -> torch.device:
    """Where ids go in and scores come out: the first GPU that holds something."""
    numbers = [where for where in places.values() if isinstance(where, int)]
    return torch.device("cuda", min(numbers)) if numbers else torch.device("cpu")


def summary(places: Places) -> str:
    """In a few words: runs of layers with their place."""
    runs: list[tuple[Any, list[str]]] = []
    for name, where in places.items():
        if runs and runs[-1][0] == where:
            runs[-1][1].append(name)
        else:
            runs.append((where, [name]))
    shown = [
        (names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}").replace("model.", "")
        for _, names in runs
    ]
    return ", ".join(
        f"{what} on {'GPU ' if isinstance(where, int) else ''}{where}"
        for what, (where, _) in zip(shown, runs, strict=True)
    )


@torch.inference_mode(False)
def load_placed(
    folder: Path,
    config: DeepseekV2Config,
    dtype: torch.dtype,
    format: str | None,
    places: Places,
    scratch: Path | None = None,
    progress: Progress | None = None,
) -> DeepseekV2:
    """The checkpoint with every module where `places` has it; what is on disk is written below `scratch` first, a layer at a time.

    Raises Dsv2Error as load_model does, and for a full disk.
    """
    model = blueprint(config, dtype, format=format)
    stored = list_tensors(folder)
    if config.packed is not None:
        packed_tensors(model, folder)
        raise UsageError(
            f"{folder} is packed",
            why="its files are mapped as they lie, and the system pages them in",
            fix="leave --placement out",
        )
    main = main_device(places)
    on_disk: dict[str, Any] = {}
    try:
        offload = (
            Path(tempfile.mkdtemp(prefix="dsv2-offload-", dir=scratch)) if "disk" in places.values() else None
        )
        if offload is not None:
            atexit.register(shutil.rmtree, offload, ignore_errors=True)
        total, done = sum(tensor.length for tensor, _ in match(model, stored, folder)), 0
        for name, where in places.items():
            if name == "lm_head" and config.tie_word_embeddings:
                continue
            done += read_piece(model, name, stored, torch.device("cpu" if where == "disk" else where))
            if progress is not None:
                progress(done, total)
            if where == "disk":
                assert offload is not None
                module = model.get_submodule(name)
                for key, tensor in state_of(module).items():
                    on_disk = offload_weight(tensor.detach(), f"{name}.{key}", str(offload), on_disk)
                module.to(torch.device("meta"))
        if config.tie_word_embeddings and offload is not None and places["lm_head"] == "disk":
            (offload / "lm_head.weight.dat").symlink_to(offload / "model.embed_tokens.weight.dat")
            on_disk["lm_head.weight"] = on_disk["model.embed_tokens.weight"]
    except OSError as error:
        raise Dsv2Error(
            "Layers could not be put on disk",
            why=error.strerror or str(error),
            fix="--offload-folder on another disk",
        ) from error
    model.eval().requires_grad_(False)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.run_on(
        main,
        [
            torch.device("cuda", where) if isinstance(where, int) else main
            for name, where in places.items()
            if name.startswith("model.layers.")
        ],
    )
    if set(places.values()) != {"cpu"}:
        logging.getLogger("accelerate.big_modeling").setLevel(
            logging.ERROR
        )  # that weights are not loaded yet is the point
        dispatch_model(
            model,
            places,
            main_device="cpu" if main.type == "cpu" else main.index,
            offload_dir=str(offload) if offload else None,
            offload_index=on_disk or None,
            offload_buffers=True,
            preload_module_classes=WHOLE,
            force_hooks=True,
        )
    return model
