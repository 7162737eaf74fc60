"""The models that are on this machine's disks, wherever they lie: in the hub's cache, in ModelScope's, in
Ollama's, and the packed copies that this program made. Nothing is read but names, configs and first bytes.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dsv2cli import places
from dsv2cli.errors import Dsv2Error
from dsv2cli.formats import PACKED_BITS, PACKED_BY, PACKED_SIZES
from dsv2cli.hubs.gguf import FILE_TYPES, SPLIT, architecture, glance
from dsv2cli.hubs.hashes import OURS, SUMS, manifest_of
from dsv2cli.hubs.reference import LATEST, Reference
from dsv2cli.outside import parse_json, read_bytes, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
COMMIT = re.compile(r"[0-9a-f]{7,40}")  # or its beginning
OLLAMA_REGISTRY = "registry.ollama.ai"
OLLAMA_MODEL = "application/vnd.ollama.image.model"
OLLAMA_ADAPTER = "application/vnd.ollama.image.adapter"


@dataclass(frozen=True)
class Copy:
    """A model on disk."""

    reference: Reference  # its `source` is empty for a packed copy
    folder: Path  # of a checkpoint
    files: tuple[Path, ...]  # as they are named there
    root: Path = field(repr=False)  # what holds this copy alone, or the repository it is one revision of
    gguf: Path | None = None  # the file, where it is one
    lacks: str = ""  # what makes it incomplete

    @property
    def name(self) -> str:
        """As --model takes it; a GGUF file of a repository has its own name behind it."""
        of = self.reference
        if re.fullmatch(r"[0-9a-f]{40}", of.revision):
            of = replace(of, revision=of.revision[:12])
        name = str(of).removeprefix("hf:")
        return f"{name}/{self.gguf.name}" if self.gguf and self.reference.source != "ollama" else name

    @property
    def where(self) -> Path:
        return self.gguf or self.folder

    @cached_property
    def stats(self) -> dict[tuple[int, int], os.stat_result]:
        """Of the files that hold the bytes: one that two names lead to is there once."""
        found = {}
        for file in self.files:
            with contextlib.suppress(OSError):
                about = file.stat()
                found[about.st_dev, about.st_ino] = about
        return found

    @property
    def bytes(self) -> int:
        return sum(about.st_size for about in self.stats.values())

    @property
    def used(self) -> float | None:
        """When its largest file was read last, as the file system keeps that; seconds since 1970."""
        largest = max(self.stats.values(), key=lambda about: about.st_size, default=None)
        return None if largest is None else max(largest.st_atime, largest.st_mtime)

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json; empty where there is none."""
        with contextlib.suppress(Dsv2Error):
            return read_json(self.folder / "config.json", dict)
        return {}

    @cached_property
    def header(self) -> dict[str, Any]:
        """The first keys of a GGUF file."""
        return {} if self.gguf is None else glance(self.gguf)

    @property
    def format(self) -> str:
        """Of the weights: bfloat16, int4, awq, gguf and so on."""
        if self.gguf is not None:
            known = re.search(r"(?i)\b(i?q[1-8]_\w+|bf16|f16|f32)\b", self.gguf.name.replace(".", " "))
            number = None if known else self.header.get("general.file_type")
            kind = known[1] if known else FILE_TYPES.get(number if type(number) is int else -1, "")
            return f"gguf {kind}".rstrip()
        packing = self.config.get("quantization_config") or self.config.get("quantization")
        if not isinstance(packing, dict):
            return str(self.config.get("torch_dtype") or self.config.get("dtype") or "?")
        if packing.get("quant_method") != PACKED_BY:
            return str(packing.get("quant_method") or "mlx")
        bits = tuple(map(packing.get, PACKED_SIZES))
        label = str(packing.get("label") or "packed")  # of another program's codes
        return next((name for name, known in PACKED_BITS.items() if known == bits), label)

    @property
    def context(self) -> int | None:
        """The longest that the config allows."""
        longest = self.config.get("max_position_embeddings")
        if self.gguf is not None:
            longest = self.header.get("deepseek2.context_length")
        return longest if isinstance(longest, int) else None


def hub_cache() -> Path:
    """Of Hugging Face."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ValueError as error:
        why = str(error)
        raise Dsv2Error("HF_ENDPOINT is no address", why=why, fix="check it, or unset it") from None
    return Path(HF_HUB_CACHE)


def modelscope_cache() -> Path:
    """As modelscope-hub finds it."""
    return Path(os.path.expanduser(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope"))


def ollama_stores() -> list[Path]:
    """A person's own, and the one of the service that its installer makes."""
    if named := os.environ.get("OLLAMA_MODELS"):
        return [Path(named)]
    return [Path(os.path.expanduser("~/.ollama/models")), Path("/usr/share/ollama/.ollama/models")]


def hub_folder(name: str) -> Path:
    """A repository's in the cache of Hugging Face."""
    return hub_cache() / f"models--{name.replace('/', '--')}"


def modelscope_folder(name: str) -> Path:
    """A repository's in the cache of ModelScope."""
    return modelscope_cache() / "models" / name.replace("/", "--")


def packed_folder(reference: Reference) -> Path:
    """Where a packed copy of a repository belongs."""
    revision = reference.revision and f"@{reference.revision}"
    return places.models() / f"{f'{reference.name}{revision}'.replace('/', '--')}--{reference.format}"


def copies() -> list[Copy]:
    """All of this family, complete or not, by name. What can not be read is left out."""
    found: list[Copy] = []
    for look in (in_hub_cache, in_modelscope_cache, in_ollama, packed):
        with contextlib.suppress(OSError):
            found.extend(look())
    return sorted(found, key=lambda copy: (copy.reference.name.lower(), copy.name))


def readable(found: Iterator[Copy]) -> list[Copy]:
    """What was found, up to where something can not be read."""
    out: list[Copy] = []
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        for copy in found:
            out.append(copy)
    return out


def in_hub_cache() -> Iterator[Copy]:
    """Raises OSError."""
    for root in sorted(hub_cache().glob("models--*--*")):
        yield from readable(of_hub_root(root))


def of_hub_root(root: Path) -> Iterator[Copy]:
    """The revisions of one repository. Raises OSError."""
    name = root.name.removeprefix("models--").replace("--", "/", 1)
    main = commit_of(root, "main")
    for stage in stages(root):
        yield begun(Reference(name, "hf", "" if stage.name == main else stage.name), stage)
    for folder in sorted((root / "snapshots").glob("[!.]*/")):
        reference = Reference(name, "hf", "" if folder.name == main else folder.name)
        yield from readable(of_folder(reference, folder, root))


def in_modelscope_cache() -> Iterator[Copy]:
    """In the layout of today, and the two before. Raises OSError."""
    base = modelscope_cache()
    for root in sorted((base / "models").glob("*--*")):
        yield from readable(of_modelscope_root(root))
    for before in (base / "models", base / "hub" / "models", base / "hub", base):
        for folder in sorted(before.glob("[!._]*/[!._]*")):
            owner, name = folder.parent.name, folder.name.replace("___", ".")
            if "--" not in owner and owner not in ("hub", "models"):
                yield from readable(of_folder(Reference(f"{owner}/{name}", "ms"), folder, folder))


def of_modelscope_root(root: Path) -> Iterator[Copy]:
    """The branches of one repository; a branch may have slashes. Raises OSError."""
    name, snapshots = root.name.replace("--", "/", 1), root / "snapshots"
    for stage in stages(root):
        branch = stage.name.rpartition("-")[0].replace("--", "/")
        yield begun(Reference(name, "ms", "" if branch == "master" else branch), stage)
    kinds = ("config.json", "*.gguf")
    for folder in sorted({path.parent for kind in kinds for path in snapshots.glob(f"[!.]*/**/{kind}")}):
        branch = str(folder.relative_to(snapshots))
        reference = Reference(name, "ms", "" if branch == "master" else branch)
        yield from readable(of_folder(reference, folder, root))


def in_ollama() -> Iterator[Copy]:
    """Raises OSError."""
    for store in ollama_stores():
        base = store / "manifests"
        for manifest in sorted(base.glob("*/*/*/*")):
            registry, owner, model, tag = manifest.relative_to(base).parts
            name = f"{model}:{tag}" if owner == "library" else f"{owner}/{model}:{tag}"
            name = name if registry == OLLAMA_REGISTRY else f"{registry}/{name}"
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                layers = parse_json(read_bytes(manifest))["layers"]
                digests = [layer["digest"] for layer in layers if layer["mediaType"] == OLLAMA_MODEL]
                digest = digests[0] if digests else ""
                blob = store / "blobs" / str(digest).replace(":", "-")
                if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
                    continue
                lacks = "" if os.access(blob, os.R_OK) else f"{blob.name} is missing, or may not be read"
                if any(layer["mediaType"] == OLLAMA_ADAPTER for layer in layers):
                    lacks = "an adapter belongs to it, and none is run here"
                if architecture(blob) == "deepseek2" or (lacks and "deepseek" in name):
                    yield Copy(Reference(name, "ollama"), blob.parent, (blob,), manifest, blob, lacks)


def packed() -> Iterator[Copy]:
    """Copies that `dsv2 quantize` and `dsv2 pull` made. Raises OSError."""
    for folder in sorted(places.models().glob("*--*--*/")):
        whole, stage, _ = folder.name.removeprefix(".").partition(OURS)
        name, _, format = whole.rpartition("--")
        name, _, revision = name.partition("@")
        reference = Reference(name.replace("--", "/", 1), revision=revision.replace("--", "/"), format=format)
        if format in PACKED_BITS and stage and folder.name.startswith("."):
            yield begun(reference, folder)
        elif format in PACKED_BITS and not folder.name.startswith("."):
            yield from readable(of_folder(reference, folder, folder))


def stages(root: Path) -> list[Path]:
    """Where a repository's downloads grow. Raises OSError."""
    return sorted((root / OURS).glob("[!.]*/"))


def begun(reference: Reference, stage: Path) -> Copy:
    """A download that is under way or was interrupted. Raises OSError."""
    files = tuple(sorted(path for path in stage.rglob("*") if path.is_file()))
    again = f"dsv2 pull {replace(reference, format='')}"
    again += f" --quantize {reference.format}" if reference.format else ""
    lacks = f"its download is under way, or was interrupted: {again} goes on with it"
    return Copy(reference, stage, files, stage, lacks=lacks)


def of_folder(reference: Reference, folder: Path, root: Path) -> Iterator[Copy]:
    """What a folder holds of this family: a checkpoint, GGUF files, or nothing. Raises OSError."""
    files = tuple(sorted(path for path in folder.iterdir() if not path.is_dir()))
    for file in filter(begins_gguf, files):
        own = [each for each in files if each == file or is_part(each.name, file.name)]
        yield Copy(reference, folder, tuple(own), root, file)
    if is_family(folder):
        lacks = what_lacks(folder)
        own = [file for file in files if file.suffix != ".gguf"]
        if not lacks or any(file.suffix == ".safetensors" for file in own):
            yield Copy(reference, folder, tuple(own), root, lacks=lacks)


def is_part(name: str, first: str) -> bool:
    """Whether a GGUF file is a later part of one that was split."""
    one, other = SPLIT.fullmatch(name), SPLIT.fullmatch(first)
    return one is not None and other is not None and (one[1], one[3]) == (other[1], other[3])


def is_family(folder: Path) -> bool:
    """Whether a folder's config.json is one of DeepSeek-V2, or was when `dsv2 pull` fetched it."""
    if manifest_of(folder).exists() or (folder / SUMS).exists():
        return True
    with contextlib.suppress(Dsv2Error):
        return read_json(folder / "config.json", dict).get("model_type") == "deepseek_v2"
    return False


def what_lacks(folder: Path) -> str:
    """Why a folder is no complete checkpoint; empty where it is one."""
    if not (folder / "config.json").exists():
        return "config.json is missing"
    try:
        read_json(folder / "config.json")
    except Dsv2Error as error:
        return f"config.json can not be read ({error.why})"
    if not (folder / INDEX).exists():
        return "" if (folder / SINGLE).exists() else "of its weights there is nothing"
    named = named_by(folder / INDEX)
    missing = sorted(name for name in named if not there(folder / name))
    if not named:
        return f"{INDEX} names no files"
    return f"{len(missing)} of its {len(named)} files are missing, first {missing[0]}" if missing else ""


def named_by(index: Path) -> set[str]:
    """The files that an index names; none where it is damaged."""
    try:
        placed = read_json(index).get("weight_map")
    except Dsv2Error:
        return set()
    names = list(placed.values()) if isinstance(placed, dict) else []
    return set(names) if all(isinstance(name, str) for name in names) else set()


def there(path: Path) -> bool:
    """Whether a file is there; no for a name that can be none."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def gguf_files(folder: Path) -> list[Path]:
    """The GGUF files of this family in a folder, of one that was split the first part; none where it can not
    be read.
    """
    with contextlib.suppress(OSError):
        return [file for file in sorted(folder.iterdir()) if begins_gguf(file)]
    return []


def begins_gguf(file: Path) -> bool:
    """Whether a GGUF file of this family begins here."""
    part = SPLIT.fullmatch(file.name)
    first = part is None or int(part[2]) == 1
    return file.suffix == ".gguf" and first and architecture(file) == "deepseek2"


def find_copy(reference: Reference) -> Copy | None:
    """The complete one that a name means; of several sources Hugging Face's, of several revisions the hub's
    own choice, else the latest; of Ollama's without a tag the only one there. None where there is none.
    """

    whole = [copy for copy in copies() if not copy.lacks]
    found = [copy for copy in whole if is_meant(copy, reference)]
    if not found and reference.source == "ollama" and reference.name.endswith(LATEST):
        bare = reference.name.removesuffix(LATEST)
        tags = [copy for copy in whole if copy.reference.name.rpartition(":")[0].lower() == bare.lower()]
        found = tags if len(tags) == 1 else []
    order = ["hf", "ms", "ollama", ""]
    return min(
        found,
        key=lambda copy: (
            bool(copy.gguf),
            order.index(copy.reference.source),
            bool(copy.reference.revision),
            -(copy.used or 0),
        ),
        default=None,
    )


def is_meant(copy: Copy, reference: Reference) -> bool:
    """Whether a name means a copy, complete or not."""
    of, wanted = copy.reference, reference.revision
    if of.name.lower() != reference.name.lower() or of.format != reference.format:
        return False
    if reference.source and of.source != reference.source and not of.format:
        return False
    if not wanted:
        return not (of.format and of.revision)  # a packed copy of some revision is that revision's
    begins = bool(COMMIT.fullmatch(wanted)) and of.source == "hf" and copy.folder.name.startswith(wanted)
    return begins or of.revision == wanted or commit_of(copy.root, wanted) == copy.folder.name


def commit_of(root: Path, wanted: str) -> str:
    """The commit that a branch or tag of a repository was when it was fetched; else what was asked for."""
    with contextlib.suppress(OSError, ValueError):
        return (root / "refs" / wanted).read_text().strip() or wanted
    return wanted


def page_bytes() -> int:
    """Of the pages of prompts that --cache-store auto keeps."""
    return size_below(places.pages())


def size_below(folder: Path) -> int:
    """Bytes of all files in a folder and below; a link has none."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # it may be going
            about = path.lstat()
            total += about.st_size if stat.S_ISREG(about.st_mode) else 0
    return total
