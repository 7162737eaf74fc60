"""`dsv2 models`: what is here, wherever it lies, whether it is whole, and taking it away."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dsv2cli.cli import options as opt
from dsv2cli.cli import ui
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.outside import in_units, path_of, reason

if TYPE_CHECKING:
    from dsv2cli.hubs.shelf import Copy

PAGES = "pages"  # the name of what --cache-store auto keeps


@dataclass(frozen=True)
class Where:
    """What to do, and where to look."""

    heading = opt.TO_RUN

    action: Annotated[
        Literal["list", "verify", "path", "rm"],
        typer.Argument(
            metavar="ACTION",
            help="The action. list: what is here. verify: whether files are whole and what was published. "
            "path: where a model lies. rm: delete it.",
        ),
    ] = "list"
    name: Annotated[
        str | None,
        typer.Argument(autocompletion=opt.models, help="Of a model, as dsv2 models lists it, or a folder."),
    ] = None
    api: opt.ApiOption = None
    online: Annotated[
        bool, typer.Option("--online", help="verify: also against what the hub says today.")
    ] = False
    yes: Annotated[bool, typer.Option("--yes", "-y", help="rm: do not ask.")] = False

    def __post_init__(self) -> None:
        """Raises UsageError."""
        if self.action == "list" and self.name is not None:
            raise UsageError("dsv2 models list takes no name", fix=f"dsv2 models path {self.name}")
        if self.action != "list" and self.name is None:
            raise UsageError(f"dsv2 models {self.action} of what?", fix=f"dsv2 models {self.action} NAME")
        if self.api is not None and self.action != "list":
            raise UsageError(f"--api goes without {self.action}", why="what a server has is not ours")
        if self.online and self.action != "verify":
            raise UsageError(f"--online goes without {self.action}", fix="dsv2 models verify NAME --online")


@dataclass(frozen=True)
class Output:
    """How they are shown."""

    heading = opt.OUTPUT

    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False


@opt.unfolded
def models(where: Where, output: Output) -> None:
    """List, verify, find or remove the models that are here.

    With --api, list those of a server.
    """
    if where.action == "list":
        sweep_leftovers()
        listed = here() if where.api is None else there(where.api)
        show_list(listed, output.json)
        return
    assert where.name is not None
    try:
        {"verify": verify, "path": path, "rm": remove}[where.action](where, where.name, output.json)
    except BlockingIOError:
        raise Dsv2Error(f"{where.name} is being fetched", fix="end that first") from None
    except (OSError, RuntimeError) as error:
        raise Dsv2Error(f"{where.name} can not be looked at", why=reason(error)) from None


def sweep_leftovers() -> None:
    """What was not deleted whole, because somebody killed it, is now."""
    from dsv2cli import places
    from dsv2cli.hubs import removal, shelf

    hub, modelscope = shelf.hub_cache(), shelf.modelscope_cache() / "models"
    with contextlib.suppress(OSError):
        roots = [*hub.glob("models--*"), *modelscope.glob("*")]
        inner = [root / name for root in roots for name in ("snapshots", shelf.OURS)]
        removal.sweep([hub, modelscope, places.models(), *inner])


def show_list(listed: list[dict[str, Any]], as_json: bool) -> None:
    """A table, or one object."""
    if as_json:
        ui.write_json({"models": listed})
        return
    rows = [["name", "format", "context", "size", "used", "where"]]
    for model in listed:
        context = "" if model["context"] is None else f"{model['context']:,}"
        size = "" if model["bytes"] is None else in_units(model["bytes"])
        format = model["format"] if not model["lacks"] else "incomplete"
        where = model["where"].replace(f"{Path.home()}/", "~/", 1)
        rows.append([model["name"], format, context, size, (model["used"] or "")[:10], where])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if at in (2, 3) else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        line = "  ".join(cells).rstrip()
        if sys.stdout.isatty() and len(line) > (width := shutil.get_terminal_size().columns):
            line = f"{line[: width - 1]}…"
        ui.write(f"{line}\n")


def here() -> list[dict[str, Any]]:
    """The model in the package, all copies on this machine's disks, and pages of prompts that are kept."""
    from dsv2cli import places
    from dsv2cli.hubs import shelf
    from dsv2cli.hubs.find import EMBEDDED
    from dsv2cli.hubs.reference import Reference

    files = tuple(sorted(EMBEDDED.iterdir()))
    package = shelf.Copy(Reference(""), EMBEDDED, files, EMBEDDED)
    out = [facts(package) | {"name": "(in the package: no --model)", "source": "package"}]
    out += [facts(copy) for copy in shelf.copies()]
    if size := shelf.page_bytes():
        lines = {"name": PAGES, "source": "dsv2", "format": "pages of prompts", "bytes": size}
        out.append(dict.fromkeys(out[0]) | lines | {"lacks": "", "where": str(places.pages())})
    return out


def facts(copy: Copy) -> dict[str, Any]:
    """What is told of one."""
    used = copy.used
    return {
        "name": copy.name,
        "source": copy.reference.source or "dsv2",
        "format": copy.format,
        "context": copy.context,
        "bytes": copy.bytes,
        "used": None if used is None else time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(used)),
        "lacks": copy.lacks,
        "where": str(copy.where),
    }


def there(api: str) -> list[dict[str, Any]]:
    """What a server lists. Raises Dsv2Error."""
    from dsv2cli.cli import far
    from dsv2cli.remote.server import context_of

    server = far.connect(api, None)
    return [
        {
            "name": each["id"],
            "source": "server",
            "format": "",
            "context": context_of(each),
            "bytes": None,
            "used": None,
            "lacks": "",
            "where": server.address.url,
        }
        for each in server.models()
    ]


def chosen(name: str) -> Copy:
    """The copy of a name, complete or not, or of a folder. Raises UsageError where there is none."""
    from dsv2cli.hubs import shelf
    from dsv2cli.hubs.find import NotHere, no_model
    from dsv2cli.hubs.reference import Reference, parse

    folder = path_of(name)
    if folder.is_dir():
        files = tuple(sorted(path for path in folder.iterdir() if not path.is_dir()))
        return shelf.Copy(Reference(str(folder)), folder, files, folder, lacks=shelf.what_lacks(folder))
    reference = parse(name)
    copies = shelf.copies()
    named = [copy for copy in copies if copy.name == name]
    if named:
        return min(named, key=lambda copy: bool(copy.lacks))
    if reference is None:
        raise no_model(name)
    if (copy := shelf.find_copy(reference)) is not None:
        return copy
    meant = [copy for copy in copies if shelf.is_meant(copy, reference)]
    if len(meant) > 1:
        why = f"it may be {' or '.join(copy.name for copy in meant)}"
        raise UsageError(f"{name} is not one model", why=why, fix="one of these names")
    if meant:
        return meant[0]
    raise NotHere(reference, name)


def path(where: Where, name: str, as_json: bool) -> None:
    """Print where a model lies."""
    copy = chosen(name)
    if copy.lacks:
        fix = f"dsv2 pull {copy.reference}" if copy.reference.source in ("hf", "ms") else "fetch it again"
        raise Dsv2Error(f"{name} is not whole", why=copy.lacks, fix=fix)
    if as_json:
        ui.write_json(facts(copy))
    else:
        ui.emit(f"{copy.where}\n")


def verify(where: Where, name: str, as_json: bool) -> None:
    """Look at a model's files, and read them. Raises Dsv2Error where one is not what it should be."""
    from dsv2cli.checkpoint.verify import looked_at

    copy = chosen(name)
    today = published_today(copy) if where.online else {}
    with ui.loading(name, "reading") as progress:
        verdicts = list(looked_at(copy, today, progress))
    bad = [verdict for verdict in verdicts if verdict.state == "bad"]
    if as_json:
        ui.write_json(
            {
                "name": copy.name,
                "where": str(copy.where),
                "ok": not bad,
                "files": [vars(each) for each in verdicts],
            }
        )
        if bad:
            raise typer.Exit(1)
        return
    for verdict in verdicts:
        ui.write(f"{verdict.state:8}{verdict.file}{verdict.why and ': ' + verdict.why}\n")
    if bad:
        fix = "fetch it again"
        if copy.reference.source in ("hf", "ms"):
            fix = f"dsv2 pull {copy.reference} --check"
        elif copy.reference.format:
            plain = replace(copy.reference, format="")
            fix = f"dsv2 models rm {copy.name}; dsv2 pull {plain} --quantize {copy.reference.format}"
        raise Dsv2Error(f"{len(bad)} files of {name} are wrong", why=f"{bad[0].file}: {bad[0].why}", fix=fix)


def published_today(copy: Copy) -> dict[str, str]:
    """The hash of each file as the hub says. Raises Dsv2Error."""
    from dsv2cli.cli.offer import tell
    from dsv2cli.hubs.remote import WANTED, list_files

    if copy.reference.source not in ("hf", "ms"):
        raise UsageError(f"{copy.name} comes from no hub that can be asked", fix="leave --online out")
    revision = copy.folder.name if copy.reference.source == "hf" else copy.reference.revision
    names = tuple(file.name for file in copy.files)
    wanted = names if copy.gguf is not None else (*WANTED, *names)
    listing = list_files(replace(copy.reference, revision=revision), wanted, tell)
    return {file.name: file.hash for file in listing.files}


def remove(where: Where, name: str, as_json: bool) -> None:
    """Delete a copy. Raises Dsv2Error where it can not be, or the person does not want it."""
    from dsv2cli import places
    from dsv2cli.cli.offer import agreed
    from dsv2cli.hubs import removal, shelf

    if name == PAGES and not Path(name).exists():
        freed, told = shelf.page_bytes(), str(places.pages())

        def doing() -> None:
            places.remove(places.pages())
    else:
        copy = chosen(name)
        if copy.folder == Path(copy.reference.name):
            raise UsageError(f"{name} is a folder of yours", fix=f"rm -r {name}")
        if copy.reference.source == "ollama":
            raise UsageError(f"{name} belongs to Ollama", fix=f"ollama rm {copy.reference.name}")
        freed, told = removal.planned(copy).bytes, str(copy.where)

        def doing() -> None:
            removal.remove(copy)

    if not where.yes:
        if sys.stdin is None or not sys.stdin.isatty():
            raise UsageError(f"{name} was not deleted", why="nobody can be asked", fix="--yes")
        if not agreed(f"Delete {told}, {in_units(freed)}?"):
            raise Dsv2Error(f"{name} was not deleted")
    doing()
    if as_json:
        ui.write_json({"where": told, "bytes": freed})
    else:
        ui.note(f"{in_units(freed)} are free again")
