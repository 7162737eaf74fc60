"""From the name a user types to a folder with a checkpoint on this machine. Nobody is asked for it."""

from __future__ import annotations

import contextlib
from pathlib import Path

from dsv2cli.errors import UsageError
from dsv2cli.hubs import shelf
from dsv2cli.hubs.gguf import MAGIC
from dsv2cli.hubs.gguf_settings import folder_of
from dsv2cli.hubs.reference import ALIASES, Reference, nearest, parse, short
from dsv2cli.outside import path_of

EMBEDDED = Path(__file__).parents[1] / "demo" / "checkpoint"


class NotHere(UsageError):
    """A model that could be downloaded."""

    def __init__(self, reference: Reference, typed: str) -> None:
        self.reference = reference
        packed = reference.format and f" --quantize {reference.format}"
        source = f"{reference.source}:" if reference.source else ""
        name = f"{source}{short(reference.name)}{reference.revision and '@' + reference.revision}"
        known = known_here()
        near = nearest(typed, known)
        packed_here = [each for each in known if each.startswith(f"{reference.name}:")]
        if packed_here:
            why = f"of it only {packed_here[0]} is here"
        else:
            why = f"it is no folder, and in no cache{here_are(near, reference.name)}"
        super().__init__(f"{typed} is not on this machine", why=why, fix=f"dsv2 pull {name}{packed}")


def here_are(near: list[str], name: str) -> str:
    """A hint at names that were perhaps meant, where the given one is none that is known."""
    others = [each for each in near if each != name]
    return "" if name in ALIASES.values() or not others else f"; did you mean {' or '.join(others)}?"


def find_model(name: str | None) -> Path:
    """A folder for `name`: the embedded model for None, a folder on disk, or what parse() knows and shelf.py
    finds.

    Raises NotHere for what could be downloaded, UsageError for a name that is none, Dsv2Error for a copy that
    can not be used.
    """
    if name is None:
        return EMBEDDED
    folder = path_of(name)
    if folder.is_dir():
        return with_gguf(folder)
    if folder.is_file() and is_gguf(folder):
        return folder_of(folder)
    if folder.exists():
        fix = str(folder.parent) if folder.is_file() else "check the path"
        kind = "is a file" if folder.is_file() else "is no folder"
        raise UsageError(f"{name} {kind}", why="a model is a folder, or a GGUF file", fix=fix)
    refuse_missing_file(name, folder)
    repository, _, file = name.rpartition("/")
    if file.endswith(".gguf") and (reference := parse(repository)) is not None:
        return folder_of(file_of(reference, file, name))
    reference = parse(name)
    if reference is None:
        raise no_model(name)
    copy = shelf.find_copy(reference)
    if copy is None:
        raise lacking(reference, name)
    if copy.gguf is None:
        return copy.folder
    names = [each.name for each in ggufs_of(reference)]
    if len(names) > 1 and reference.source != "ollama":
        raise several(name, names, names[0])
    return folder_of(copy.gguf)


def ggufs_of(reference: Reference) -> list[shelf.Copy]:
    """The GGUF files that a name may mean."""
    return [copy for copy in shelf.copies() if copy.gguf is not None and shelf.is_meant(copy, reference)]


def several(where: object, names: list[str], first: object) -> UsageError:
    """What to say where one of several GGUF files must be named."""
    why, fix = ", ".join(names[:4]), f"name one, such as {first}"
    return UsageError(f"{where} holds {len(names)} GGUF files", why=why, fix=fix)


def refuse_missing_file(name: str, path: Path) -> None:
    """Raises UsageError for a GGUF file that is not there, by a name that can be no repository's."""
    repository = parse(name.rpartition("/")[0])
    local = repository is None or path.is_absolute() or path.parent.is_dir() or path.is_symlink()
    if name.endswith(".gguf") and local:
        why = "it is a link to nothing" if path.is_symlink() else f"{path.parent} has none of that name"
        raise UsageError(f"There is no file {name}", why=why, fix="check the path")


def is_gguf(path: Path) -> bool:
    """Whether a file is meant to be one, by its name or its first bytes."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return path.suffix == ".gguf" or file.read(len(MAGIC)) == MAGIC
    return False


def with_gguf(folder: Path) -> Path:
    """A folder as it is; or where it has no safetensors and one GGUF file, that one's settings.

    Raises UsageError where it has several.
    """
    if any((folder / name).exists() for name in (shelf.INDEX, shelf.SINGLE)):
        return folder
    files = shelf.gguf_files(folder)
    if len(files) > 1:
        raise several(folder, [file.name for file in files], files[0])
    return folder_of(files[0]) if files else folder


def file_of(reference: Reference, file: str, typed: str) -> Path:
    """A GGUF file of a repository. Raises UsageError where it is not on this machine."""
    for copy in ggufs_of(reference):
        if copy.gguf is not None and copy.gguf.name == file:
            return copy.gguf
    why, fix = "it is in no cache", f"dsv2 pull {reference} --gguf {file}"
    raise UsageError(f"{typed} is not on this machine", why=why, fix=fix)


def no_model(name: str) -> UsageError:
    """What to say of a name that is neither a path that is there nor a repository's."""
    near = nearest(name, known_here())
    fix = f"did you mean {' or '.join(near)}?" if near else "check the path."
    return UsageError(
        f"There is no model at {name}",
        why="it is neither a folder here nor a name such as v2-lite-chat or deepseek-ai/DeepSeek-V2-Lite",
        fix=f"{fix} Without --model the embedded model answers",
    )


def lacking(reference: Reference, typed: str) -> UsageError:
    """NotHere, which says so where a part of the model is here."""
    error = NotHere(reference, typed)
    for copy in shelf.copies():
        if shelf.is_meant(copy, reference):
            error.why = f"only a part of it is, in {copy.folder}: {copy.lacks}"
    if reference.source == "ollama":
        base = reference.name.rpartition(":")[0]
        tags = [name for name in known_here() if name.startswith(f"ollama:{base}:")]
        error.fix = " or ".join(tags) if len(tags) > 1 else f"ollama pull {reference.name}"
    return error


def find_config(name: str | None) -> Path:
    """As find_model, but `name` may be a config file, or a repository of which only config.json is here."""
    if name is not None and (path := path_of(name)).is_file() and not is_gguf(path):
        return path
    try:
        return find_model(name)
    except NotHere as error:
        wanted = error.reference
        roots = {"hf": shelf.hub_folder(wanted.name), "ms": shelf.modelscope_folder(wanted.name)}
        for source, root in roots.items():
            revision = wanted.revision or {"hf": "main", "ms": "master"}[source]
            folder = root / "snapshots" / shelf.commit_of(root, revision)
            if wanted.source in ("", source) and (folder / "config.json").is_file():
                return folder
        raise


def known_here() -> list[str]:
    """Names of what is complete on this machine."""
    return list(dict.fromkeys(copy.name for copy in shelf.copies() if not copy.lacks))


def known_models(beginning: str) -> list[str]:
    """Names that begin so: folders here (with a slash where one leads on), short names, and models that are
    on this machine.
    """
    parent, _, start = beginning.rpartition("/")
    found = []
    with contextlib.suppress(OSError, UsageError):
        for entry in sorted(path_of(f"{parent}/" if parent or beginning.startswith("/") else ".").iterdir()):
            if not entry.name.startswith(start) or (not start and entry.name.startswith(".")):
                continue
            name = beginning[: len(beginning) - len(start)] + entry.name
            if entry.is_dir():
                found.append(name if (entry / "config.json").exists() else name + "/")
            elif entry.suffix == ".gguf":
                found.append(name)
    here = known_here()
    bare = [name.partition(":")[2] for name in here if name.startswith(("hf:", "ms:"))]
    found += [name for name in (*bare, *here, *ALIASES) if name.startswith(beginning)]
    return list(dict.fromkeys(found))
