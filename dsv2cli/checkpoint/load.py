"""Safetensors shards read straight into the model's final tensors: no second copy, no memory map left behind.

A checkpoint that `dsv2 quantize` has packed lies in its file as it does in memory, and is mapped instead of
read. Peak memory is the model plus one staging buffer a reader.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dsv2cli.checkpoint.blueprint import allocate, blueprint, no_room, state_of
from dsv2cli.checkpoint.formats.coded import Coded
from dsv2cli.checkpoint.names import (
    Packing,
    destinations,
    fitting,
    kept_codings,
    own_codes,
    packed_tensors,
    packings,
    paired,
    seldom_read,
    tensors_of,
    whole_columns,
)
from dsv2cli.checkpoint.safetensors import DTYPES, MAPPED, Stored, map_file, read_into, typed
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.kernels.native import Kernels
from dsv2cli.kernels.quantized import Codes, Quantized
from dsv2cli.memory import give_back
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.model.transformer import DeepseekV2, MoE
from dsv2cli.outside import AGAIN
from dsv2cli.team import ALONE, Team

READERS = 4
TILE = 2**22  # numbers drawn at random for a tensor in RAM, and then repeated
STAGING_BYTES = 32 * 2**20
SMALL = ("gate.weight", ".scales", ".supers")  # ends of the names of what is little, besides norms and biases

Progress = Callable[[int, int], None]  # bytes done, bytes in all


def of_total(progress: Progress | None, total: int) -> Callable[[int], None] | None:
    """What is told only of the bytes done, of `total`."""
    return None if progress is None else lambda done: progress(done, total)


@torch.inference_mode(False)  # the readers are threads, and threads are not in the caller's inference mode
def load_model(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    format: str | None = None,
    kernels: Kernels | None = None,
    team: Team = ALONE,
    experts_on_gpu: int | None = None,
    held: bool = False,
    copied: bool = False,
) -> DeepseekV2:
    """The checkpoint in `folder` as a model on `device`; dtype None keeps the checkpoint's own.

    A rank of a team reads its part.

    - `format`, one of PACKED_BITS, quantises while reading, tensor by tensor (by `kernels` where given): no
      full copy is ever held.
    - `experts_on_gpu` puts the routed experts into RAM from that MoE layer on; `format` is then theirs alone.
    - `held` reads of a mapped checkpoint what every token needs, for it is larger than memory: the system
      would give that up for experts. `copied` reads all of it: its pages lie near whoever read them first.

    Raises Dsv2Error naming file and tensor for anything missing, extra, truncated, wrongly shaped or typed.
    """
    config = DeepseekV2Config.load(folder)
    if config.packed is not None:
        refuse_other_packing(folder, config.packed.format, format, experts_on_gpu)
        if device.type == "cpu" or team.size > 1:
            return map_packed(folder, config, device, dtype, progress, team, held, copied)
        return read_packed(folder, config, device, dtype, progress)
    stored = tensors_of(folder, config)
    codings = None
    if config.foreign is not None and format is None:
        codings = kept_codings(config, stored, device)
    apart = experts_on_gpu is not None
    columns = whole_columns(stored)
    model = blueprint(config, dtype, team, format, only_experts=apart, codings=codings, columns=columns)
    fitted = fitting(model, stored, folder)  # before any memory is taken
    give_memory(model, device, experts_on_gpu)
    read_all(paired(model, fitted), progress, kernels)
    if config.foreign is not None:
        give_back()
    refuse_bad_numbers(model, folder)
    return model.eval().requires_grad_(False)


def refuse_other_packing(folder: Path, packed: str, format: str | None, experts_on_gpu: int | None) -> None:
    """Raises UsageError where a checkpoint packed in the format `packed` is to be packed otherwise."""
    if format not in (None, packed):
        raise UsageError(f"{folder} is packed in {packed}", fix="leave --quantize out")
    if experts_on_gpu is not None:
        why, fix = "with --experts cpu only the experts are", "--quantize with the original"
        raise UsageError(f"{folder} is packed whole", why=why, fix=fix)


def give_memory(model: DeepseekV2, device: torch.device, experts_on_gpu: int | None = None) -> None:
    """Allocate a meta model's weights on `device`, but routed experts in RAM from MoE layer `experts_on_gpu`
    on.

    Raises Dsv2Error where there is too little.
    """
    in_ram: set[nn.Module] = set()
    if experts_on_gpu is not None:
        for moe in [layer.mlp for layer in model.layers if isinstance(layer.mlp, MoE)][experts_on_gpu:]:
            in_ram |= set(moe.experts.modules())
    try:
        for module in model.modules():
            allocate(module, torch.device("cpu") if module in in_ram else device, recurse=False)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        raise no_room(model, device, error) from None
    model.tie()


def refuse_bad_numbers(model: DeepseekV2, folder: Path) -> None:
    """Raises Dsv2Error for NaN or infinity in norms, biases, routers and scales: what is little and every
    token meets. The rest shows in the first scores, where engine/sampling.py looks.
    """
    for name, tensor in state_of(model).items():
        if (tensor.dim() == 1 or name.endswith(SMALL)) and not tensor.isfinite().all():
            raise no_numbers(folder, name, tensor)


def no_numbers(folder: Path, name: str, tensor: Tensor) -> Dsv2Error:
    """What to say of a tensor of any shape that holds NaN or infinity."""
    why = f"{name} holds NaN or infinity" + (" in float16" if tensor.dtype == torch.float16 else "")
    return Dsv2Error(f"{folder} has weights that are no numbers", why=why, fix=AGAIN)


def look_at_small(folder: Path, tensors: Sequence[Stored | Coded]) -> None:
    """refuse_bad_numbers for files of which nothing else is read. Raises Dsv2Error."""
    staging = torch.empty(STAGING_BYTES, dtype=torch.uint8)
    for tensor in tensors:
        if isinstance(tensor, Coded):
            if len(tensor.shape) == 1 and not tensor.weights(0, 1).isfinite().all():
                raise no_numbers(folder, tensor.name, tensor.weights(0, 1))
        elif len(tensor.shape) == 1 or tensor.name.endswith(SMALL):
            read = torch.empty(tensor.shape, dtype=MAPPED[tensor.dtype])
            for _ in read_tensor(tensor, read, staging):
                pass
            if not read.isfinite().all():
                raise no_numbers(folder, tensor.name, read)


def map_packed(
    folder: Path,
    config: DeepseekV2Config,
    device: torch.device,
    dtype: torch.dtype | None,
    progress: Progress | None = None,
    team: Team = ALONE,
    held: bool = False,
    copied: bool = False,
) -> DeepseekV2:
    """The model of a packed checkpoint, whose tensors are the mapped files themselves where the device is a
    CPU.

    Nothing is read before it is used, but for what is `held` or `copied`. Changes stay private. `dtype`
    converts what is not packed. Raises as load_model.
    """
    model, state, files = blueprint(config, dtype, team), {}, {}
    stored, done = packed_tensors(config, folder), 0
    tell = of_total(progress if copied else None, sum(tensor.length for tensor in stored))
    for tensor in stored:
        if tensor.file not in files:
            files[tensor.file] = map_file(tensor.file)
        data = files[tensor.file][tensor.offset : tensor.offset + tensor.length]
        data = typed(data, MAPPED[tensor.dtype]).view(tensor.shape)
        if team.size > 1:
            data = own_codes(tensor.name, data, model)
        own = copied or (held and not seldom_read(tensor.name, config))
        data = data.clone(memory_format=torch.contiguous_format) if own else data.contiguous()
        keeps_type = tensor.name.endswith((".codes", ".scales", ".supers", "gate.weight")) or dtype is None
        state[tensor.name] = data if keeps_type else data.to(dtype)
        done += tensor.length
        if tell is not None:
            tell(done)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie()
    if device.type != "cpu":
        multiply_out(model)
        model.to(device)
        refuse_bad_numbers(model, folder)
    return model.eval().requires_grad_(False)


def read_packed(
    folder: Path,
    config: DeepseekV2Config,
    device: torch.device,
    dtype: torch.dtype | None,
    progress: Progress | None = None,
) -> DeepseekV2:
    """The same for a GPU, where nothing can be mapped: read by several threads, as load_model reads.

    Raises as it does.
    """
    packed = config.packed
    if packed is not None and any(coding.scale == "I8" for coding in (packed.codings or {}).values()):
        return map_packed(folder, config, device, dtype)
    stored, model = packed_tensors(config, folder), blueprint(config, dtype)
    give_memory(model, device)
    places = state_of(model)
    read_all([(tensor, places[tensor.name].data) for tensor in stored], progress)
    refuse_bad_numbers(model, folder)
    return model.eval().requires_grad_(False)


def multiply_out(model: DeepseekV2) -> None:
    """Take the scales of scales out of a model that is to lie on a GPU: see Coding.multiplied_out."""
    for box in list(model.modules()):
        for name, weight in list(box.named_children()):
            if isinstance(weight, Quantized):
                setattr(box, name, weight.multiplied_out())
    model.tie()


@torch.inference_mode(False)
def random_model(
    config: DeepseekV2Config,
    device: torch.device,
    dtype: torch.dtype | None,
    format: str | None,
    team: Team = ALONE,
    experts_on_gpu: int | None = None,
) -> DeepseekV2:
    """A model with random weights, made where they lie: for measuring speed without a checkpoint.

    Routing is even.

    The arguments are those of load_model.
    """
    model = blueprint(config, dtype, team, format, only_experts=experts_on_gpu is not None)
    give_memory(model, device, experts_on_gpu)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1.0)
        else:
            size = 1.0 if name == "model.embed_tokens.weight" else 0.02
            tile(parameter.data, partial(Tensor.normal_, mean=0, std=size))
    for module in model.modules():
        if isinstance(module, Quantized):
            tile(module.codes.view(torch.int64), Tensor.random_)
            if module.coding.table == "e4m3":
                module.codes.clamp_(max=126)  # one more is no number
            size = 0.02 / 70  # over the root mean square of a code
            module.scales.fill_(size if module.supers is None else 1)
            if module.supers is not None:
                module.supers.fill_(size)
    return model.eval().requires_grad_(False)


def tile(whole: Tensor, draw: Callable[[Tensor], Tensor]) -> None:
    """Random numbers all over a tensor: on a CPU, which takes its time, those of a first piece again and
    again.
    """
    flat = whole.view(-1)
    first = flat[: TILE if whole.device.type == "cpu" else len(flat)]
    draw(first)
    for at in range(len(first), len(flat), max(1, len(first))):
        piece = flat[at : at + len(first)]
        piece.copy_(first[: len(piece)])


def read_piece(
    model: DeepseekV2,
    name: str,
    stored: dict[str, Stored | Coded],
    device: torch.device,
    progress: Progress | None = None,
    kernels: Kernels | None = None,
) -> int:
    """Give one piece of a model on meta its memory and its weights, which `match` has checked; gives the
    bytes read.
    """
    module = allocate(model.get_submodule(name), device)
    places: dict[str, Tensor | Packing] = {**destinations(module, name), **packings(module, name)}
    pairs = [(stored[key], place) for key, place in places.items()]
    read_all(pairs, progress, kernels)
    return sum(tensor.length for tensor, _ in pairs)


class Reader:
    """What the threads share that read tensors to their places."""

    def __init__(
        self, pairs: list[tuple[Stored | Coded, Tensor | Packing]], progress: Progress | None
    ) -> None:
        self.progress = progress
        self.total, self.done, self.lock = sum(tensor.length for tensor, _ in pairs), 0, threading.Lock()
        self.staging = threading.local()
        # From memory that stays where it is a GPU fetches by itself; what is packed there is read there, one
        # matrix a thread.
        self.pinned = any(place.device.type == "cuda" for _, place in pairs)

    def count(self, count: int) -> None:
        """Bytes that were read."""
        with self.lock:
            self.done += count
            if self.progress is not None:
                self.progress(self.done, self.total)

    def read(self, tensor: Stored | Coded, place: Tensor | Packing, kernels: Kernels | None) -> None:
        """One tensor, into its place or through memory of its own into codes."""
        if isinstance(tensor, Coded):
            self.read_coded(tensor, place, kernels)
            return
        into = place if isinstance(place, Tensor) else None
        if into is None:
            into = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device=place.device)
        if not hasattr(self.staging, "buffer"):
            self.staging.buffer = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=self.pinned)
        for count in read_tensor(tensor, into, self.staging.buffer):
            self.count(count)
        if isinstance(place, Packing):
            place.fill(into, kernels)

    def read_coded(self, tensor: Coded, place: Tensor | Packing, kernels: Kernels | None) -> None:
        """What another program has packed, some rows at a time."""
        rows = tensor.pieces()[-1][1]
        for begin, end in tensor.pieces():
            if isinstance(place, Packing) and kernels is not None and place.takes(tensor):
                place.unpack(tensor, begin, end, kernels)
            else:
                put(tensor, place, begin, end, kernels)
            self.count(tensor.length * end // rows - tensor.length * begin // rows)


def put(tensor: Coded, place: Tensor | Packing, begin: int, end: int, kernels: Kernels | None) -> None:
    """Some rows of what another program has packed into their place. Raises OSError, and Dsv2Error."""
    read = tensor.read(begin, end)
    if isinstance(place, Packing) and isinstance(read, Codes):
        assert tensor.coding is not None
        place.keep(read, tensor.coding, kernels, begin)
        return
    numbers = tensor.numbers(read)
    if isinstance(place, Packing):
        place.fill(numbers.to(place.device), kernels, begin)
    else:
        (place[begin:end] if place.dim() == 2 else place[None]).copy_(numbers)


def read_all(
    pairs: Sequence[tuple[Stored | Coded, Tensor | Packing]],
    progress: Progress | None,
    kernels: Kernels | None = None,
) -> None:
    """Read with several threads; a read that fails ends the others and is raised here, as Dsv2Error."""
    reader = Reader(list(pairs), progress)
    ordered = sorted(pairs, key=lambda pair: (pair[0].file, pair[0].offset))
    unpacks = any(isinstance(tensor, Coded) for tensor, _ in pairs)  # that takes a core, and memory
    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1) if unpacks else READERS) as pool:
        futures = [pool.submit(reader.read, tensor, place, kernels) for tensor, place in ordered]
        try:
            for future in futures:
                future.result()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, OSError):
                what, fix = f"Reading {pairs[0][0].file.parent} failed", "check the disk, then run again"
                raise Dsv2Error(what, why=str(error), fix=fix) from None
            raise


def read_tensor(tensor: Stored, place: Tensor, staging: Tensor) -> Iterator[int]:
    """Fill `place` piece by piece; yields the bytes read. Straight in where type and device agree.

    `staging` [bytes] uint8 holds a piece elsewhere. Raises OSError, and Dsv2Error for a file that ends too
    soon.
    """
    dtype, flat = MAPPED[tensor.dtype], place.view(-1)
    if tensor.columns is not None:
        rows = map_file(tensor.file)[tensor.offset :][: tensor.width * tensor.shape[0] * dtype.itemsize]
        place.copy_(typed(rows, dtype).view(-1, tensor.width)[:, tensor.columns.start : tensor.columns.stop])
        yield tensor.length
        return
    direct = place.dtype == dtype and place.device.type == "cpu"
    with tensor.file.open("rb", buffering=0) as stream:
        stream.seek(tensor.offset)
        for piece in flat.split(STAGING_BYTES // dtype.itemsize):
            target = piece if direct else staging[: piece.numel() * dtype.itemsize].view(dtype)
            read_into(stream, target, tensor.file, tensor.offset + tensor.length, tensor.name)
            if not direct:
                piece.copy_(target)
            yield target.numel() * target.element_size()
