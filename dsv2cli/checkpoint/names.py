"""The checkpoint's names: where each stored tensor belongs in a model, or in one rank's part of it.

Every tensor is checked for presence, shape, type and length before a byte of it is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dsv2cli.checkpoint.blueprint import Codings, blueprint, state_of, weights_to_pack
from dsv2cli.checkpoint.formats.coded import Coded
from dsv2cli.checkpoint.formats.convert import ANEW, common, convert
from dsv2cli.checkpoint.formats.read import read_foreign
from dsv2cli.checkpoint.safetensors import DTYPES, INDEX, MAPPED, Stored, list_tensors
from dsv2cli.errors import Dsv2Error
from dsv2cli.formats import LANES, SUPER, Coding, own_coding
from dsv2cli.kernels.native import Kernels
from dsv2cli.kernels.quantized import Codes, Quantized, decode, interleave, interleaved_scales, pack_reference
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.model.share import cut
from dsv2cli.model.transformer import DeepseekV2

SLAB = 128  # blocks of rows that are packed at a time
# Rotary tables that old exports carry along; the numbers follow from the config.
IGNORED = "rotary_emb.inv_freq"


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

    def fill(self, tensor: Tensor, kernels: Kernels | None, first: int = 0) -> None:
        """Pack tensor [rows, cols] there, a place for codes of our own, from row `first` on; by the C++
        `kernels` where they can.
        """
        assert self.weight.coding == own_coding(self.weight.bits, self.weight.group)
        codes, scales, _ = self.rows(first, len(tensor))
        if kernels is not None and codes.device.type == "cpu":
            kernels.pack(tensor, self.weight.bits, self.weight.group, codes, scales)
            return
        for block in range(
            0, codes.shape[0], SLAB
        ):  # the search takes many times the memory of what it looks at
            rows = tensor[block * LANES : (block + SLAB) * LANES]
            packed = pack_reference(rows, self.weight.bits, self.weight.group)
            codes[block : block + SLAB], scales[block : block + SLAB] = packed

    def keep(self, read: Codes, coding: Coding, kernels: Kernels | None, first: int = 0) -> None:
        """Put codes of some rows there from row `first` on: as they are, or of a Coding that holds the same,
        or else packed anew.
        """
        held = convert(read, coding, self.weight.coding)
        if held is None:
            self.fill(decode(read, coding), kernels, first)
            return
        places = self.rows(first, len(held.values))
        if kernels is not None and places[0].device.type == "cpu":
            kernels.interleave(held.values, self.weight.coding, places[0])
            parts: tuple[Tensor | None, ...] = (None, *interleaved_scales(held, self.weight.coding))
        else:
            parts = interleave(held, self.weight.coding)
        for place, part in zip(places, parts, strict=True):
            if place is not None and part is not None:
                place.copy_(part)

    def takes(self, tensor: Coded) -> bool:
        """Whether the kernels can unpack it straight into its place."""
        return self.device.type == "cpu" and tensor.raw is not None and tensor.coding == self.weight.coding

    def unpack(self, tensor: Coded, begin: int, end: int, kernels: Kernels) -> None:
        """What `takes` allows, of some rows that begin with a block."""
        assert tensor.raw is not None
        places = self.rows(begin, end - begin)
        kernels.unpack(tensor.type, tensor.raw(begin, end), end - begin, self.weight, places)

    def rows(self, first: int, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes, scales and supers of some rows, which begin with a block."""
        codes, scales, supers = self.weight.part_with_supers(self.expert, self.part)
        blocks = slice(first // LANES, -(-(first + count) // LANES))
        return codes[blocks], scales[blocks], None if supers is None else supers[blocks]


def stored_as(name: str, weight: Tensor | Quantized) -> Iterator[tuple[str, int | None, int]]:
    """The names in a checkpoint of a weight here, each with its expert and its part of the rows."""
    base, _, leaf = name.rpartition(".")
    leaves = {"weight": ["weight"], "gate_up_proj": ["gate_proj.weight", "up_proj.weight"]}
    for e in range(weight.shape[0]) if len(weight.shape) == 3 else [None]:
        inner = base if e is None else f"{base}.{e}"
        for part, stored in enumerate(leaves.get(leaf, [f"{leaf}.weight"])):
            yield f"{inner}.{stored}", e, part


def kept_codings(
    config: DeepseekV2Config, stored: dict[str, Stored | Coded], device: torch.device
) -> Codings:
    """What each weight is to be held in so that the codes of another program are kept, on a CPU exactly."""
    model, out = blueprint(config), Codings()
    for name, box in weights_to_pack(model, embedding=True):
        found = [stored.get(each) for each, *_ in stored_as(name, getattr(box, name.rpartition(".")[2]))]
        coding = common([coding_of(each) for each in found])
        if coding is not None:
            out[name] = coding if device.type == "cpu" else coding.multiplied_out
    return out


def whole_columns(stored: dict[str, Stored | Coded]) -> int:
    """How many columns of what is stored must stay together where it is shared out."""
    codings = [tensor.coding for tensor in stored.values() if isinstance(tensor, Coded)]
    return max((coding.columns for coding in codings if coding is not None), default=1)


def coding_of(tensor: Stored | Coded | None) -> Coding | None:
    """What keeps a stored weight; None for numbers."""
    if not isinstance(tensor, Coded):
        return None
    return ANEW if tensor.anew else tensor.coding


def packings(module: nn.Module, prefix: str = "") -> dict[str, Packing]:
    """Where each tensor of a checkpoint is quantised to, by its name there."""
    places: dict[str, Packing] = {}
    for name, weight in module.named_modules(prefix=prefix):
        if isinstance(weight, Quantized):
            for stored, expert, part in stored_as(name, weight):
                places[stored] = Packing(weight, expert, part)
    return places


def destinations(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Where each tensor of a checkpoint belongs: its name -> a contiguous part of a parameter.

    `prefix` is the module's own name.
    """
    places: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters(prefix):  # a tied lm_head is listed once, as the embedding
        base, _, leaf = name.rpartition(".")
        if leaf not in ("gate_up_proj", "down_proj"):
            places[name] = parameter.data
            continue
        stack = {base: parameter.data}
        if parameter.dim() == 3:
            stack = {f"{base}.{e}": matrix for e, matrix in enumerate(parameter.data)}
        for inner, matrix in stack.items():
            if leaf == "down_proj":
                places[f"{inner}.down_proj.weight"] = matrix
            else:
                places[f"{inner}.gate_proj.weight"], places[f"{inner}.up_proj.weight"] = matrix.chunk(2)
    return places


def match(
    model: DeepseekV2, stored: dict[str, Stored | Coded], folder: Path
) -> list[tuple[Stored | Coded, Tensor | Packing]]:
    """Pair each stored tensor with its place. Raises Dsv2Error for the first that does not fit."""
    return paired(model, fitting(model, stored, folder))


def paired(
    model: DeepseekV2, fitted: dict[str, Stored | Coded]
) -> list[tuple[Stored | Coded, Tensor | Packing]]:
    """What `fitting` gives, with its places in the memory that the model has now."""
    places = places_of(model)
    return [(tensor, places[name]) for name, tensor in fitted.items()]


def places_of(model: DeepseekV2) -> dict[str, Tensor | Packing]:
    """Where each tensor of a checkpoint belongs or is quantised to, by its name there."""
    return {**destinations(model), **packings(model)}


def fitting(model: DeepseekV2, stored: dict[str, Stored | Coded], folder: Path) -> dict[str, Stored | Coded]:
    """What this rank reads of the stored tensors, by its names here, each checked against the model, which
    needs no memory for that. Raises Dsv2Error for the first that does not fit.
    """
    places = places_of(model)
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
    return stored


def own_parts(
    model: DeepseekV2, stored: dict[str, Stored | Coded], folder: Path
) -> dict[str, Stored | Coded]:
    """What this rank holds of the checkpoint, under the names it has here.

    Raises Dsv2Error where the whole is not right.
    """
    places = destinations(blueprint(model.config))
    if model.config.tie_word_embeddings:
        places.pop("lm_head.weight", None)
    refuse_strangers(stored, places.keys(), folder)
    out: dict[str, Stored | Coded] = {}
    for name, tensor in stored.items():
        check(tensor, places[name], DTYPES)
        mine = cut(name, model.config, model.share)
        if mine is not None and (mine.part is None or mine.part):  # a rank may hold nothing of it
            out[mine.name] = tensor if mine.part is None else tensor.slice_of(mine.dim, mine.part)
    return out


def own_codes(name: str, data: Tensor, model: DeepseekV2) -> Tensor:
    """This rank's part of a packed checkpoint's tensor: whole blocks of rows, whole groups of columns, whole
    experts.

    `data` is the tensor as it is stored; gives a view of it, or a copy.
    """
    base, _, kind = name.rpartition(".")
    if kind not in ("codes", "scales", "supers"):
        mine = cut(name, model.config, model.share)
        return data if mine is None or mine.part is None else data[mine.part.start : mine.part.stop]
    weight = model.get_submodule(base)
    assert isinstance(weight, Quantized)
    if len(weight.shape) == 3:
        return data[model.share.experts.start : model.share.experts.stop]
    # The name that such a matrix has in an unpacked checkpoint.
    stored = (
        f"{base}.weight" if base.endswith("down_proj") else base.replace("gate_up_proj", "up_proj.weight")
    )
    mine = cut(stored, model.config, model.share)
    if mine is None or mine.part is None:
        return data
    if mine.dim == 0:
        blocks = data.unflatten(0, (weight.parts, -1))
        return blocks[:, mine.part.start // LANES : -(-mine.part.stop // LANES)].flatten(0, 1)
    unit = SUPER if kind == "supers" else weight.group
    first, last = mine.part.start // unit, -(-mine.part.stop // unit)
    whole = -(-full_columns(base, model.config) // unit)
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


def tensors_of(folder: Path, config: DeepseekV2Config) -> dict[str, Stored | Coded]:
    """list_tensors of a checkpoint, or what another program has packed, that has the layers and experts that
    its config counts: said before a model of that size is made up.

    Raises Dsv2Error.
    """
    stored: dict[str, Stored | Coded] = {}
    if config.foreign is None:
        stored |= list_tensors(folder)
    else:
        stored |= read_foreign(folder, config)
    refuse_other_counts(stored, config, str(folder))
    return stored


def refuse_other_counts(names: Iterable[str], config: DeepseekV2Config, where: str) -> None:
    """Raises Dsv2Error unless tensors of these names are of as many layers and experts as a config counts."""
    counts: dict[str, int] = {}
    for what, number in set(re.findall(r"\b(layers|experts)\.(\d{1,9})\.", "\n".join(names))):
        counts[what] = max(counts.get(what, 0), 1 + int(number))
    wanted = {"layers": config.num_hidden_layers}
    if config.packed is None and config.moe_layers:
        wanted["experts"] = config.n_routed_experts or 0
    for what, count in wanted.items():
        if counts.get(what, 0) != count:
            why = f"config.json calls for {count:,}"
            raise Dsv2Error(f"The files in {where} hold {counts.get(what, 0):,} {what}", why=why)


def packed_tensors(config: DeepseekV2Config, folder: Path) -> list[Stored]:
    """The tensors of a packed checkpoint, each checked. Raises Dsv2Error for the first that does not fit."""
    stored = list_tensors(folder)
    refuse_other_counts(stored, config, str(folder))
    places = state_of(blueprint(config))
    refuse_strangers(stored, places.keys(), folder)
    for name, tensor in stored.items():
        check(tensor, places[name], MAPPED)
        if MAPPED[tensor.dtype] != places[name].dtype:
            raise Dsv2Error(
                f"{tensor.file}: tensor {name} has type {tensor.dtype}", why="config.json calls for another"
            )
    return list(stored.values())


def inspect(folder: Path, config: DeepseekV2Config) -> list[Stored | Coded]:
    """All tensors of a checkpoint, checked as load_model does, and not read. Raises Dsv2Error."""
    if config.packed is not None:
        return [*packed_tensors(config, folder)]
    stored = tensors_of(folder, config)
    return [tensor for tensor, _ in match(blueprint(config), stored, folder)]


def refuse_strangers(stored: Mapping[str, Stored | Coded], wanted: AbstractSet[str], folder: Path) -> None:
    """Raises Dsv2Error unless the stored tensors are those that the config calls for."""
    missing = sorted(wanted - stored.keys())
    if missing:
        files = {tensor.file for tensor in stored.values()}
        shard = files.pop() if len(files) == 1 else folder / INDEX
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise Dsv2Error(f"{shard} lacks the tensor {missing[0]}{more}", why="config.json calls for it")
    for name in stored.keys() - wanted:
        raise Dsv2Error(
            f"{stored[name].file} holds the extra tensor {name}", why="config.json has no place for it"
        )


def check(tensor: Stored | Coded, place: Tensor | Packing, dtypes: dict[str, torch.dtype]) -> None:
    """Raises Dsv2Error unless the tensor has the shape of its place, one of `dtypes`, and the length that
    follows.
    """
    if isinstance(tensor, Stored) and tensor.dtype not in dtypes:
        raise Dsv2Error(
            f"{tensor.file}: tensor {tensor.name} has type {tensor.dtype}",
            why=f"only {', '.join(dtypes)} are loaded",
        )
    if tensor.shape != tuple(place.shape):
        raise Dsv2Error(
            f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)}",
            why=f"config.json calls for {list(place.shape)}",
        )
    if (
        isinstance(tensor, Stored)
        and tensor.length != math.prod(tensor.shape) * dtypes[tensor.dtype].itemsize
    ):
        raise Dsv2Error(
            f"{tensor.file}: tensor {tensor.name} has {tensor.length:,} bytes",
            why=f"its shape {list(tensor.shape)} and type {tensor.dtype} call for another number",
            fix="download the file again",
        )


def seldom_read(name: str, config: DeepseekV2Config) -> bool:
    """Whether a token needs only a part of a tensor: of experts, and of an embedding that is no head."""
    embedding = name.startswith("model.embed_tokens.") and not config.tie_word_embeddings
    return embedding or ".mlp.experts." in name
