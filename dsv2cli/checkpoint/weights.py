"""Safetensors shards read straight into the model's final tensors: no second copy, no memory map left behind.

A checkpoint that `dsv2 quantize` has packed lies in its file as it does in memory, and is mapped instead of read.
Peak memory is the model plus one staging buffer a reader. Every tensor is checked for presence, shape, type and
length before a byte of it is read. Pickle files are refused.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
import threading
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.formats import GROUP, LANES
from dsv2cli.kernels.native import Kernels
from dsv2cli.kernels.quantized import Quantized, pack_reference
from dsv2cli.model.conductor import Leader
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.model.fused import make_quantized
from dsv2cli.model.share import cut
from dsv2cli.model.transformer import DeepseekV2, MoE
from dsv2cli.team import ALONE, Team

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MAPPED = DTYPES | {"U8": torch.uint8}
READERS = 4
STAGING_BYTES = 32 * 2**20
SLAB = 128  # blocks of rows that are packed at a time
INDEX = "model.safetensors.index.json"
# Rotary tables that old exports carry along; the numbers follow from the config.
IGNORED = "rotary_emb.inv_freq"

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class Stored:
    """One tensor as a safetensors header describes it; `offset` counts from the start of the file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int
    columns: range | None = None  # the part of each row that is wanted; `shape` and `length` are of that part
    width: int = 0  # of a whole row, then

    def part(self, dim: int, wanted: range) -> Stored:
        """Some of its rows (dim 0) or columns (dim 1)."""
        shape = list(self.shape)
        shape[dim] = len(wanted)
        length = self.length // self.shape[dim] * len(wanted)
        if dim == 0:
            return replace(
                self,
                shape=tuple(shape),
                offset=self.offset + self.length // self.shape[0] * wanted.start,
                length=length,
            )
        return replace(self, shape=tuple(shape), length=length, columns=wanted, width=self.shape[1])


@torch.inference_mode(False)  # the readers are threads, and threads are not in the caller's inference mode
def load_model(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    format: str | None = None,
    kernels: Kernels | None = None,
    team: Team = ALONE,
    apart: int | None = None,
) -> DeepseekV2:
    """The checkpoint in `folder` as a model on `device`; dtype None keeps the checkpoint's own. A rank of a team reads its part.

    `format`, one of PACKED_BITS, quantises while reading, tensor by tensor (with `kernels` where given): no full copy is ever held.

    `apart` puts the routed experts into RAM, but for those of the first so many layers that have some; `format` is then theirs.

    Raises Dsv2Error naming file and tensor for anything missing, extra, truncated, wrongly shaped or typed.
    """
    config = DeepseekV2Config.load(folder)
    if config.packed is not None:
        if format not in (None, config.packed.format):
            raise UsageError(f"{folder} is packed in {config.packed.format}", fix="leave --quantize out")
        if apart is not None:
            raise UsageError(
                f"{folder} is packed whole",
                why="with --experts cpu only the experts are",
                fix="--quantize with the original",
            )
        if device.type == "cpu" or team.size > 1:
            return map_packed(folder, config, device, dtype, team)
        return read_packed(folder, config, device, dtype, progress)
    stored = list_tensors(folder)
    model = blueprint(config, dtype, team, format, only_experts=apart is not None)
    give_memory(model, device, apart)
    read_all(match(model, stored, folder), progress, kernels)
    return model.eval().requires_grad_(False)


def give_memory(model: DeepseekV2, device: torch.device, apart: int | None = None) -> None:
    """Uninitialised, for a model on meta: on `device`, but with `apart` routed experts in RAM after the first so many layers'.

    Raises Dsv2Error where there is too little.
    """
    in_ram = set()
    if apart is not None:
        for moe in [layer.mlp for layer in model.model.layers if isinstance(layer.mlp, MoE)][apart:]:
            moe.apart = True
            in_ram |= set(moe.experts.modules())
    try:
        for module in model.modules():
            module.to_empty(device=torch.device("cpu") if module in in_ram else device, recurse=False)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        raise no_room(model, device, error) from None
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def map_packed(
    folder: Path,
    config: DeepseekV2Config,
    device: torch.device,
    dtype: torch.dtype | None,
    team: Team = ALONE,
) -> DeepseekV2:
    """The model of a packed checkpoint, whose tensors are the mapped files themselves where the device is a CPU.

    Nothing is read before it is used. Changes stay private. `dtype` converts what is not packed. Raises Dsv2Error as load_model.
    """
    model, state, files = blueprint(config, team=team), {}, {}
    for tensor in packed_tensors(blueprint(config), folder):
        if tensor.file not in files:
            files[tensor.file] = map_file(tensor.file)
        data = files[tensor.file][tensor.offset : tensor.offset + tensor.length]
        data = data.view(MAPPED[tensor.dtype]).view(tensor.shape)
        if team.size > 1:
            data = own_codes(tensor.name, data, model)
        data = data.contiguous().to(device)
        keeps_type = tensor.name.endswith((".codes", ".scales", "gate.weight")) or dtype is None
        state[tensor.name] = data if keeps_type else data.to(dtype)
    model.load_state_dict(state, strict=False, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval().requires_grad_(False)


def read_packed(
    folder: Path,
    config: DeepseekV2Config,
    device: torch.device,
    dtype: torch.dtype | None,
    progress: Progress | None = None,
) -> DeepseekV2:
    """The same for a GPU, where nothing can be mapped: read by several threads, as load_model reads."""
    stored, model = packed_tensors(blueprint(config), folder), blueprint(config, dtype)
    give_memory(model, device)
    places = state_of(model)
    read_all([(tensor, places[tensor.name].data) for tensor in stored], progress)
    return model.eval().requires_grad_(False)


def own_codes(name: str, data: Tensor, model: DeepseekV2) -> Tensor:
    """This rank's part of a tensor of a packed checkpoint: whole blocks of rows, whole groups of columns, whole experts."""
    base, _, kind = name.rpartition(".")
    if kind not in ("codes", "scales"):
        mine = cut(name, model.config, model.share)
        return data if mine is None or mine.part is None else data[mine.part.start : mine.part.stop]
    weight = model.get_submodule(base)
    assert isinstance(weight, Quantized)
    if len(weight.shape) == 3:
        return data[model.share.experts.start : model.share.experts.stop]
    # The names that the columns and rows of such a matrix have in an unpacked checkpoint.
    stored = (
        f"{base}.weight" if base.endswith("down_proj") else base.replace("gate_up_proj", "up_proj.weight")
    )
    mine = cut(stored, model.config, model.share)
    if mine is None or mine.part is None:
        return data
    if mine.dim == 0:
        blocks = data.unflatten(0, (weight.parts, -1))
        return blocks[:, mine.part.start // LANES : -(-mine.part.stop // LANES)].flatten(0, 1)
    first, last = mine.part.start // weight.group, -(-mine.part.stop // weight.group)
    whole = -(-full_columns(base, model.config) // weight.group)
    grouped = data.unflatten(1, (whole, -1)) if kind == "codes" else data
    part = grouped[:, first:last]
    return part.flatten(1) if kind == "codes" else part


def full_columns(base: str, config: DeepseekV2Config) -> int:
    """Of a matrix whose columns are shared out, in the whole model."""
    if base.endswith("o_proj.weight"):
        return config.num_attention_heads * config.v_head_dim
    if "shared_experts" in base:
        return config.moe_intermediate_size * (config.n_shared_experts or 0)
    return config.intermediate_size


def blueprint(
    config: DeepseekV2Config,
    dtype: torch.dtype | None = None,
    team: Team = ALONE,
    format: str | None = None,
    group: int = GROUP,
    only_experts: bool = False,
) -> DeepseekV2:
    """The model without memory, with places for codes where the checkpoint is packed, or is to be in `format`."""
    if config.packed is not None:
        format, group = config.packed.format, config.packed.group
    dtype = dtype or getattr(torch, config.torch_dtype)
    model = empty_model(config, torch.device("meta"), dtype, team, None if format is None else group)
    if format is not None:
        make_quantized(model, format, group, only_experts)
    return model


def packed_tensors(model: DeepseekV2, folder: Path) -> list[Stored]:
    """The tensors of a packed checkpoint, each checked. Raises Dsv2Error for the first that does not fit."""
    stored, places = list_tensors(folder), state_of(model)
    refuse_strangers(stored, places.keys(), folder)
    for name, tensor in stored.items():
        check(tensor, places[name], MAPPED)
        if MAPPED[tensor.dtype] != places[name].dtype:
            raise Dsv2Error(
                f"{tensor.file}: tensor {name} has type {tensor.dtype}", why="config.json calls for another"
            )
    return list(stored.values())


def inspect(folder: Path, config: DeepseekV2Config) -> list[Stored]:
    """All tensors of a checkpoint, checked as load_model does, and not read. Raises Dsv2Error."""
    model = blueprint(config)
    if config.packed is not None:
        return packed_tensors(model, folder)
    return [tensor for tensor, _ in match(model, list_tensors(folder), folder)]


def map_file(file: Path) -> Tensor:
    """The bytes of a file without reading them; what is written to them stays in this process. [size] uint8"""
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    return torch.frombuffer(mapped, dtype=torch.uint8)


@torch.inference_mode(False)
def random_model(
    config: DeepseekV2Config,
    device: torch.device,
    dtype: torch.dtype | None,
    format: str | None,
    team: Team = ALONE,
    apart: int | None = None,
) -> DeepseekV2:
    """A model with random weights, made where they lie: for measuring speed without a checkpoint. Routing is even."""
    model = blueprint(config, dtype, team, format, only_experts=apart is not None)
    give_memory(model, device, apart)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(0, 1.0 if name == "model.embed_tokens.weight" else 0.02)
    for module in model.modules():
        if isinstance(module, Quantized):
            module.codes.view(torch.int64).random_()
            module.scales.fill_(0.02 / 70)  # the root mean square of a code
    return model.eval().requires_grad_(False)


def empty_model(
    config: DeepseekV2Config,
    device: torch.device,
    dtype: torch.dtype,
    team: Team = ALONE,
    group: int | None = None,
) -> DeepseekV2:
    """The model, or a rank's part, with uninitialised weights on `device`; routers stay in fp32."""
    kind = Leader if team.size > 1 and team.rank == 0 else DeepseekV2
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return kind(config, team, group)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        with torch.device("meta"):
            model = kind(config, team, group)
        raise no_room(model, device, error) from None
    finally:
        torch.set_default_dtype(previous)


def state_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters, a tied one once, and the codes and scales of what is quantised, by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def weights_bytes(module: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state_of(module).values())


def no_room(model: DeepseekV2, device: torch.device, error: Exception) -> Dsv2Error:
    return Dsv2Error(
        f"Not enough memory on {device} for this model",
        why=f"its weights need {weights_bytes(model) / 2**30:.1f} GiB ({str(error).splitlines()[0]})",
        fix="--quantize int4, --device cpu, or a smaller checkpoint"
        if device.type == "cuda"
        else "--quantize int4, a smaller checkpoint, or more memory",
    )


@dataclass(frozen=True)
class Packing:
    """A tensor's place among quantised weights: one part of one matrix."""

    weight: Quantized
    expert: int | None
    part: int

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[-2] // self.weight.parts, self.weight.shape[-1]

    def fill(self, tensor: Tensor, kernels: Kernels | None) -> None:
        codes, scales = self.weight.part(self.expert, self.part)
        if kernels is not None and codes.device.type == "cpu":
            kernels.pack(tensor, self.weight.bits, self.weight.group, codes, scales)
            return
        for block in range(
            0, codes.shape[0], SLAB
        ):  # the search takes many times the memory of what it looks at
            rows = tensor[block * LANES : (block + SLAB) * LANES]
            packed = pack_reference(rows, self.weight.bits, self.weight.group)
            codes[block : block + SLAB], scales[block : block + SLAB] = packed


def packings(module: nn.Module, prefix: str = "") -> dict[str, Packing]:
    """Where each tensor of a checkpoint is quantised to, by its name there."""
    places: dict[str, Packing] = {}
    for name, weight in module.named_modules(prefix=prefix):
        if not isinstance(weight, Quantized):
            continue
        base, _, leaf = name.rpartition(".")
        experts = range(weight.shape[0]) if len(weight.shape) == 3 else [None]
        for e in experts:
            inner = base if e is None else f"{base}.{e}"
            leaves = {"weight": ["weight"], "gate_up_proj": ["gate_proj.weight", "up_proj.weight"]}.get(
                leaf, [f"{leaf}.weight"]
            )
            places |= {f"{inner}.{stored}": Packing(weight, e, part) for part, stored in enumerate(leaves)}
    return places


def destinations(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Where each tensor of a checkpoint belongs: its name -> a contiguous part of a parameter. `prefix` is the module's own name."""
    places: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters(prefix):  # a tied lm_head is listed once, as the embedding
        base, _, leaf = name.rpartition(".")
        if leaf not in ("gate_up_proj", "down_proj"):
            places[name] = parameter.data
            continue
        stack = (
            {f"{base}.{e}": part for e, part in enumerate(parameter.data)} if parameter.dim() == 3 else None
        )
        for inner, matrix in (stack or {base: parameter.data}).items():
            if leaf == "down_proj":
                places[f"{inner}.down_proj.weight"] = matrix
            else:
                places[f"{inner}.gate_proj.weight"], places[f"{inner}.up_proj.weight"] = matrix.chunk(2)
    return places


def list_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the checkpoint by name, from the index if there is one, else from the one file."""
    index_path = folder / INDEX
    if not index_path.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise no_safetensors(folder)
        return read_header(single)
    try:
        weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
        wanted = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise Dsv2Error(
            f"{index_path} cannot be read", why=repr(error), fix="download the file again"
        ) from None
    stored: dict[str, Stored] = {}
    for file in sorted(set(wanted.values())):
        if Path(file).name != file:
            raise Dsv2Error(f"{index_path} points outside its folder", why=f"it names the file {file!r}")
        if not (folder / file).exists():
            raise Dsv2Error(
                f"{folder / file} is missing", why=f"{INDEX} names it", fix="download the file again"
            )
        header = read_header(folder / file)
        listed = {name for name, where in wanted.items() if where == file}
        for name in sorted(listed - header.keys()):
            raise Dsv2Error(f"{folder / file} lacks the tensor {name}", why=f"{INDEX} places it there")
        for name in sorted(header.keys() - listed):
            raise Dsv2Error(
                f"{folder / file} holds the extra tensor {name}", why=f"{INDEX} does not place it there"
            )
        stored |= header
    return stored


def no_safetensors(folder: Path) -> Dsv2Error:
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        return Dsv2Error(
            f"{folder} holds pickle files ({pickles[0]}), which can run code when opened, and no safetensors",
            why="only safetensors are loaded",
            fix="convert it where you trust it: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)",
        )
    return Dsv2Error(f"{folder} holds no safetensors", why=f"neither {INDEX} nor model.safetensors is there")


def read_header(file: Path) -> dict[str, Stored]:
    """The header of one safetensors file, checked against the file's length. Format: huggingface/safetensors."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (header_size,) = struct.unpack("<Q", stream.read(8))
            if header_size > size - 8:
                raise truncated(file, size, header_size + 8)
            header = json.loads(stream.read(header_size))
            header.pop("__metadata__", None)
            start = 8 + header_size
            tensors = {
                name: Stored(
                    file,
                    name,
                    str(entry["dtype"]),
                    tuple(int(n) for n in entry["shape"]),
                    start + int(entry["data_offsets"][0]),
                    int(entry["data_offsets"][1]) - int(entry["data_offsets"][0]),
                )
                for name, entry in header.items()
            }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error) as error:
        raise Dsv2Error(
            f"{file} is not a safetensors file",
            why=f"its header is unreadable ({error})",
            fix="download the file again",
        ) from None
    for tensor in tensors.values():
        if tensor.offset < start or tensor.length < 0:
            raise Dsv2Error(
                f"{file}: tensor {tensor.name} lies outside the file", fix="download the file again"
            )
        if tensor.offset + tensor.length > size:
            raise truncated(file, size, tensor.offset + tensor.length, tensor.name)
    return tensors


def truncated(file: Path, size: int, needed: int, name: str = "") -> Dsv2Error:
    where = f"tensor {name} ends" if name else "its header ends"
    return Dsv2Error(
        f"{file} is truncated",
        why=f"{where} at byte {needed:,}, the file has {size:,}",
        fix="download the file again",
    )


def match(
    model: DeepseekV2, stored: dict[str, Stored], folder: Path
) -> list[tuple[Stored, Tensor | Packing]]:
    """Pair each stored tensor with its place. Raises Dsv2Error for the first that does not fit."""
    places: dict[str, Tensor | Packing] = {**destinations(model), **packings(model)}
    stored = {name: tensor for name, tensor in stored.items() if not name.endswith(IGNORED)}
    if model.config.tie_word_embeddings:  # it is the embedding, whether stored again or not
        stored.pop("lm_head.weight", None)
        places.pop("lm_head.weight", None)
    if model.team.size > 1:
        stored = own_parts(model, stored, folder)
        places = {name: place for name, place in places.items() if math.prod(place.shape)}
    refuse_strangers(stored, places.keys(), folder)
    for name, tensor in stored.items():
        check(tensor, places[name], DTYPES)
    return [(tensor, places[name]) for name, tensor in stored.items()]


def own_parts(model: DeepseekV2, stored: dict[str, Stored], folder: Path) -> dict[str, Stored]:
    """What this rank holds of the checkpoint, under the names it has here. The whole is checked first. Raises Dsv2Error."""
    whole = empty_model(model.config, torch.device("meta"), model.dtype)
    places = destinations(whole)
    if model.config.tie_word_embeddings:
        places.pop("lm_head.weight", None)
    refuse_strangers(stored, places.keys(), folder)
    out = {}
    for name, tensor in stored.items():
        check(tensor, places[name], DTYPES)
        mine = cut(name, model.config, model.share)
        if mine is not None and (mine.part is None or mine.part):  # a rank may hold nothing of it
            out[mine.name] = tensor if mine.part is None else tensor.part(mine.dim, mine.part)
    return out


def refuse_strangers(stored: dict[str, Stored], wanted: AbstractSet[str], folder: Path) -> None:
    """Raises Dsv2Error unless the stored tensors are those that the config calls for."""
    missing = sorted(wanted - stored.keys())
    if missing:
        shard = (
            next(iter(stored.values())).file
            if len({t.file for t in stored.values()}) == 1
            else folder / INDEX
        )
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise Dsv2Error(f"{shard} lacks the tensor {missing[0]}{more}", why="config.json calls for it")
    for name in stored.keys() - wanted:
        raise Dsv2Error(
            f"{stored[name].file} holds the extra tensor {name}", why="config.json has no place for it"
        )


def check(tensor: Stored, place: Tensor | Packing, dtypes: dict[str, torch.dtype]) -> None:
    if tensor.dtype not in dtypes:
        raise Dsv2Error(
            f"{tensor.file}: tensor {tensor.name} has type {tensor.dtype}",
            why=f"only {', '.join(dtypes)} are loaded",
        )
    if tensor.shape != tuple(place.shape):
        raise Dsv2Error(
            f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)}",
            why=f"config.json calls for {list(place.shape)}",
        )
    if tensor.length != math.prod(tensor.shape) * dtypes[tensor.dtype].itemsize:
        raise Dsv2Error(
            f"{tensor.file}: tensor {tensor.name} has {tensor.length:,} bytes",
            why=f"its shape {list(tensor.shape)} and type {tensor.dtype} call for another number",
            fix="download the file again",
        )


def pieces(config: DeepseekV2Config) -> list[str]:
    """The modules that are read, packed and placed one at a time, in order; a tied head is the embedding once more."""
    return [
        "model.embed_tokens",
        *(f"model.layers.{i}" for i in range(config.num_hidden_layers)),
        "model.norm",
        "lm_head",
    ]


def read_piece(
    model: DeepseekV2,
    name: str,
    stored: dict[str, Stored],
    device: torch.device,
    progress: Progress | None = None,
    kernels: Kernels | None = None,
) -> int:
    """Give one piece of a model on meta its memory and its weights, which `match` has checked; gives the bytes read."""
    module = model.get_submodule(name).to_empty(device=device)
    places: dict[str, Tensor | Packing] = {**destinations(module, name), **packings(module, name)}
    pairs = [(stored[key], place) for key, place in places.items()]
    read_all(pairs, progress, kernels)
    return sum(tensor.length for tensor, _ in pairs)


def read_all(
    pairs: list[tuple[Stored, Tensor | Packing]], progress: Progress | None, kernels: Kernels | None = None
) -> None:
    """Read with several threads; a read that fails ends the others and is raised here, as Dsv2Error."""
    total, done, lock = sum(tensor.length for tensor, _ in pairs), 0, threading.Lock()
    staging = threading.local()
    # From memory that stays where it is a GPU fetches by itself; what is packed there is read there, one matrix a thread.
    pinned = any(place.device.type == "cuda" for _, place in pairs)

    def read(pair: tuple[Stored, Tensor | Packing]) -> None:
        nonlocal done
        tensor, place = pair
        into = (
            place
            if isinstance(place, Tensor)
            else torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device=place.device)
        )
        if not hasattr(staging, "buffer"):
            staging.buffer = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=pinned)
        for count in read_tensor(tensor, into, staging.buffer):
            with lock:
                done += count
                if progress is not None:
                    progress(done, total)
        if isinstance(place, Packing):
            place.fill(into, kernels)

    with ThreadPoolExecutor(READERS) as pool:
        futures = [pool.submit(read, pair) for pair in sorted(pairs, key=lambda p: (p[0].file, p[0].offset))]
        try:
            for future in futures:
                future.result()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, OSError):
                raise Dsv2Error(
                    f"Reading {pairs[0][0].file.parent} failed",
                    why=str(error),
                    fix="check the disk, then run again",
                ) from None
            raise


def read_tensor(tensor: Stored, place: Tensor, staging: Tensor) -> Iterator[int]:
    """Fill `place` piece by piece; yields the bytes read. Straight in where type and device agree."""
    dtype, flat = MAPPED[tensor.dtype], place.view(-1)
    direct = place.dtype == dtype and place.device.type == "cpu"
    per_piece = STAGING_BYTES // dtype.itemsize
    with tensor.file.open("rb", buffering=0) as stream:
        stream.seek(tensor.offset)
        if tensor.columns is not None:
            whole = map_file(tensor.file)[tensor.offset :][
                : tensor.width * tensor.shape[0] * dtype.itemsize
            ].view(dtype)
            place.copy_(whole.view(-1, tensor.width)[:, tensor.columns.start : tensor.columns.stop])
            yield tensor.length
            return
        for piece in flat.split(per_piece):
            target = piece if direct else staging[: piece.numel() * dtype.itemsize].view(dtype)
            view = memoryview(target.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
            filled = 0
            while filled < len(view):
                count = stream.readinto(view[filled:])
                if not count:
                    raise truncated(
                        tensor.file, tensor.offset + filled, tensor.offset + tensor.length, tensor.name
                    )
                filled += count
            if not direct:
                piece.copy_(target)
            yield filled
