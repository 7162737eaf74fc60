"""Packing a repository while it comes: what was read of a shard is packed, and the shard is deleted.

The full weights are never on the disk whole: packed files, and three shards at most, lie there, as long as no
piece of the model lies in more of them. What is packed when somebody ends it, by whatever means, is kept, and
the next run goes on behind it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from dsv2cli.checkpoint.blueprint import blueprint, weights_bytes
from dsv2cli.checkpoint.formats.coded import Coded
from dsv2cli.checkpoint.load import read_piece
from dsv2cli.checkpoint.names import IGNORED, check, destinations, packings, places_of, refuse_other_counts
from dsv2cli.checkpoint.pack import complete, file_of, packed_pieces, sizes_of, write_piece
from dsv2cli.checkpoint.safetensors import DTYPES, INDEX, Stored, read_header, read_index
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.hubs.download import PART, Download
from dsv2cli.hubs.pull import (
    Bar,
    Folder,
    downloaded,
    packed_place,
    refuse_full_disk,
    refuse_other_folder,
    useful,
)
from dsv2cli.hubs.remote import Listing, RemoteFile, Tell
from dsv2cli.hubs.shelf import SINGLE
from dsv2cli.kernels.native import Kernels
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.model.transformer import DeepseekV2
from dsv2cli.outside import AGAIN, STALL, read_json, reason

SHARDS = 3  # that may lie on the disk at once


@torch.inference_mode(False)
def pull_packed(
    listing: Listing,
    out: Path,
    format: str,
    group: int,
    kernels: Kernels | None,
    bar: Bar,
    tell: Tell,
    stall: float = STALL,
) -> None:
    """Pack a repository into the new folder `out`. Raises Dsv2Error."""
    place = packed_place(listing, out, format, group)
    packer = Packer(listing, place, format, group, kernels, tell)
    try:
        if not (out / "config.json").exists() and not packer.done.exists():
            refuse_other_folder(out)
        with place.held(tell):
            if not (out / "config.json").exists():
                if not packer.done.exists():
                    packer.begin_with(stall)
                    packer.run(bar, stall)
                move_in(packer.packed, out)
            refuse_other_packing(place.listing, out, sizes_of(format, group))
            shutil.rmtree(place.stage, ignore_errors=True)
            place.end()
    except OSError as error:
        raise Dsv2Error(
            f"Writing {out} failed", why=reason(error), fix="make room, or choose another disk"
        ) from None


def move_in(packed: Path, out: Path) -> None:
    """Let a folder be `out`, or its files move there where that is a folder. Raises OSError."""
    if not out.exists():
        packed.rename(out)
        return
    for path in sorted(packed.iterdir(), key=lambda path: path.name == "config.json"):
        path.rename(out / path.name)


def refuse_other_packing(listing: Listing, out: Path, sizes: dict[str, Any]) -> None:
    """Raises UsageError unless a folder is packed so, from these very files."""
    packing = read_json(out / "config.json").get("quantization_config")
    made = packing if isinstance(packing, dict) else {}
    wanted = made.get("source_sha256")
    shards = {file.name: file.hash for file in listing.files if file.name.endswith(".safetensors")}
    if isinstance(wanted, dict):  # of shards and a whole file beside one another, one was packed
        shards = {name: shards[name] for name in wanted if name in shards}
    if wanted != shards or any(made.get(name) != value for name, value in sizes.items()):
        why = f"it is not what {listing.reference} gives today, packed in this format"
        raise UsageError(f"{out} exists already", why=why, fix="remove it first (dsv2 models rm), or --to")


class Packer:
    """One repository on its way into a folder `packed` in the stage of its place."""

    def __init__(
        self, listing: Listing, place: Folder, format: str, group: int, kernels: Kernels | None, tell: Tell
    ) -> None:
        self.listing, self.place, self.stage = listing, place, place.stage
        self.format, self.group, self.kernels, self.tell = format, group, kernels, tell
        self.packed, self.done = self.stage / "packed", self.stage / "done"

    def begin_with(self, stall: float) -> None:
        """Fetch all but the weights, and look at it. Raises Dsv2Error, OSError."""
        try:
            refuse_full_disk(self.place, 2**20)
            useful(self.place, self.tell, stall)
            if {"quantization_config", "quantization"} & read_json(self.stage / "config.json").keys():
                raise UsageError(f"{self.listing.reference} is quantised already", fix="leave --quantize out")
        except Dsv2Error:
            self.place.tidy()
            raise
        self.listing = self.place.listing
        small = [file for file in self.listing.files if not file.name.endswith(".safetensors")]
        downloaded(self.listing, small, self.stage, None, self.tell, stall)

    def run(self, bar: Bar, stall: float) -> None:
        """Raises Dsv2Error, OSError."""
        shards = [file for file in self.listing.files if file.name.endswith(".safetensors")]
        config = DeepseekV2Config.load(self.stage)
        if (self.stage / INDEX).exists():
            refuse_other_counts(read_index(self.stage / INDEX), config, str(self.listing.reference))
        sizes = sizes_of(self.format, self.group)
        model = blueprint(config, format=self.format, group=self.group)
        self.begin(sizes)
        names = packed_pieces(model)
        wanted = {name: set(places_of_piece(model, name)) for name in names}
        where = self.shard_of(wanted)
        needs = {name: {where[tensor] for tensor in wanted[name]} for name in names}
        left = [name for number, name in enumerate(names, 1) if not self.file(number, names).exists()]
        order = list(dict.fromkeys(shard for name in left for shard in sorted(needs[name])))
        window = max(SHARDS, most_at_once(left, needs, order))
        by_name = {file.name: file for file in shards}
        todo = [by_name[shard] for shard in order]
        for name in by_name.keys() - set(order):  # packed, and then killed before it was deleted
            (self.stage / name).unlink(missing_ok=True)
            (self.stage / f"{name}{PART}").unlink(missing_ok=True)
        self.refuse_full_disk(model, todo, window)
        if window > SHARDS:
            self.tell(f"a layer lies in {window} shards at once: so many are on the disk at the same time")
        with bar(str(self.listing.reference)) as progress:
            download = Download(self.listing.of(todo), self.stage, self.tell, progress, window, stall)
            download.start()
            try:
                for number, name in enumerate(names, 1):
                    if name in left:
                        download.wait(needs[name])
                        self.pack(model, name, wanted[name], where, self.file(number, names), sizes)
                        left.remove(name)
                        still = {shard for each in left for shard in needs[each]}
                        for shard in sorted(needs[name] - still):
                            download.drop(shard)
            finally:
                download.stop()
        weight_map: dict[str, str] = {}
        for number in range(1, len(names) + 1):
            file = self.file(number, names)
            weight_map |= dict.fromkeys(read_header(file), file.name)
        complete(self.stage, self.packed, weight_map, sizes, {file.name: file.hash for file in shards})
        self.done.touch()

    def file(self, number: int, names: list[str]) -> Path:
        return self.packed / file_of(number, len(names))

    def begin(self, sizes: dict[str, Any]) -> None:
        """Keep what an earlier run packed of the same shards in the same way, and nothing else."""
        mark = self.stage / "packing"
        sources = sorted((file.name, file.hash) for file in self.listing.files)
        now = f"{sorted(sizes.items())} {sources}".encode()
        if not mark.exists() or mark.read_bytes() != now:
            shutil.rmtree(self.packed, ignore_errors=True)
            mark.write_bytes(now)
        self.packed.mkdir(exist_ok=True)

    def shard_of(self, wanted: dict[str, set[str]]) -> dict[str, str]:
        """Where each tensor of the model lies, by the index. Raises Dsv2Error for one that fits not."""
        tensors = {tensor for names in wanted.values() for tensor in names}
        if not (self.stage / INDEX).exists():
            return dict.fromkeys(tensors, SINGLE)
        where = read_index(self.stage / INDEX)
        if lacking := sorted(tensors - where.keys()):
            raise Dsv2Error(
                f"{self.listing.reference} lacks the tensor {lacking[0]}", why="its config calls for it"
            )
        for tensor in where:
            if tensor not in tensors and not tensor.endswith(IGNORED) and tensor != "lm_head.weight":
                why = "its config has no place for it"
                raise Dsv2Error(f"{self.listing.reference} has the extra tensor {tensor}", why=why)
        return where

    def refuse_full_disk(self, model: DeepseekV2, todo: list[RemoteFile], window: int) -> None:
        """Raises Dsv2Error where the packed files and the shards in between have no room."""
        there = sum(path.stat().st_size for path in self.stage.rglob("*") if path.is_file())
        largest = sorted((file.size for file in todo), reverse=True)[:window]
        refuse_full_disk(self.place, max(0, weights_bytes(model) + sum(largest) - there))

    def pack(
        self,
        model: DeepseekV2,
        name: str,
        wanted: set[str],
        where: dict[str, str],
        path: Path,
        sizes: dict[str, Any],
    ) -> None:
        """One piece, whose shards are there. Raises Dsv2Error, OSError."""
        stored: dict[str, Stored | Coded] = {}
        for shard in sorted({where[tensor] for tensor in wanted}):
            header = read_header(self.stage / shard)
            listed = {tensor for tensor, file in where.items() if file == shard}
            if lacking := sorted((listed & wanted) - header.keys()):
                why = f"{INDEX} places it there"
                raise Dsv2Error(f"{self.stage / shard} lacks the tensor {lacking[0]}", why=why, fix=AGAIN)
            stored |= {tensor: header[tensor] for tensor in listed & wanted}
        places = places_of(model)
        for tensor in wanted:
            check(stored[tensor], places[tensor], DTYPES)
        read_piece(model, name, stored, torch.device("cpu"), None, self.kernels)
        unfinished = path.with_name(path.name + PART)
        write_piece(model, name, unfinished, sizes)
        unfinished.rename(path)


def places_of_piece(model: DeepseekV2, name: str) -> list[str]:
    """The names that a piece's tensors have in an unpacked checkpoint."""
    module = model.get_submodule(name)
    return [*destinations(module, name), *packings(module, name)]


def most_at_once(pieces: list[str], needs: dict[str, set[str]], order: list[str]) -> int:
    """How many shards must lie there at once, where they come in `order` and stay until no piece needs
    them.
    """
    last = {shard: index for index, name in enumerate(pieces) for shard in needs[name]}
    most, seen = 0, set[str]()
    for index, name in enumerate(pieces):
        seen |= needs[name]
        most = max(most, sum(last[shard] >= index for shard in seen))
    return most
