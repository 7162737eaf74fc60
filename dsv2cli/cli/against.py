"""What `dsv2 bench --against` takes and shows: a library or another program that does the same in turn."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from dsv2cli.errors import UsageError
from dsv2cli.outside import reason, require_file

if TYPE_CHECKING:
    from dsv2cli.checkpoint.found import Checkpoint
    from dsv2cli.engine.peer import Peer
    from dsv2cli.run.plan import Plan
    from dsv2cli.run.wish import BatchWish

LIBRARY = "transformers"


def completed(incomplete: str) -> list[str]:
    """For the shell's completion, beside files."""
    return [name for name in (LIBRARY,) if name.startswith(incomplete)]


@dataclass(frozen=True)
class Against:
    """Who is measured beside this program."""

    heading = "Beside another program"

    against: Annotated[
        str | None,
        Option(
            metavar="transformers|PATH",
            autocompletion=completed,
            help="Alternate with this library over the same weights, or with the llama-bench of llama.cpp or "
            "ik_llama.cpp at this path.",
        ),
    ] = None
    against_file: Annotated[
        Path | None,
        Option(metavar="FILE.gguf", help="What llama-bench runs. Default: --model, where that is GGUF."),
    ] = None
    against_flags: Annotated[
        list[str] | None,
        Option(
            metavar="FLAGS",
            help='Flags of llama-bench\'s own, as "-rtr 1 -fa 1"; may be given several times.',
        ),
    ] = None

    @property
    def library(self) -> bool:
        return self.against == LIBRARY

    def program(self) -> str | None:
        """The other program's path, where one is asked for. Raises Dsv2Error."""
        if self.against is None or self.library:
            for option, given in (
                ("--against-file", self.against_file is not None),
                ("--against-flags", self.against_flags),
            ):
                if given:
                    fix = "--against PATH/TO/llama-bench, or leave it out"
                    raise UsageError(f"{option} is for another program", fix=fix)
            return None
        from dsv2cli.engine.peer import program_at

        return program_at(self.against)

    def peer(self, program: str, found: Checkpoint) -> Peer:
        """The other program with its file and flags. Raises UsageError."""
        from dsv2cli.engine.peer import OURS, Peer

        flags = list[str]()
        for text in self.against_flags or ():
            try:
                flags += shlex.split(text)
            except ValueError as error:
                what = f"--against-flags {text[:80]} can not be read"
                raise UsageError(what, why=reason(error), fix='--against-flags "-rtr 1 -fa 1"') from None
        for flag in flags:
            if flag in OURS:
                fix = "--model, --prompt, --generate, --depth, --repetitions and --threads say it to both"
                raise UsageError(f"--against-flags {flag} goes too far", why="it is this run's own", fix=fix)
        return Peer(program, self.file(found), tuple(flags))

    def file(self, found: Checkpoint) -> Path:
        """What the other program runs. Raises UsageError where nothing says so."""
        foreign = found.config.foreign
        if self.against_file is None and foreign is not None and foreign.method == "gguf":
            return Path(foreign.entry["files"][0])
        if self.against_file is None:
            why = f"{found.name} is no GGUF file, and llama-bench reads no other"
            fix = "--against-file FILE.gguf, with the same weights"
            raise UsageError("--against lacks its model", why=why, fix=fix)
        try:
            path = self.against_file.expanduser().absolute()
            require_file(path)
        except (OSError, RuntimeError) as error:
            what = f"--against-file {self.against_file} can not be used"
            raise UsageError(what, why=reason(error), fix="--against-file FILE.gguf") from None
        return path


def refuse_beside_a_program(wish: BatchWish, batch: int, plan: Plan | None = None) -> None:
    """Raises UsageError for what llama-bench does not do, or is not asked to do; with a plan also for what
    that brings by itself.
    """
    for option, given in (
        ("--batch", batch > 1),
        ("--gpus", (wish.gpus or 1) > 1 or (plan is not None and plan.ranks > 1)),
        ("--placement", wish.placed),
    ):
        if given:
            why = "llama-bench decodes one sequence, here beside one process"
            raise UsageError(f"{option} goes without --against PATH", why=why, fix="leave one of them out")


def line(machine: dict[str, Any], other: dict[str, Any]) -> str:
    """The machine and the other program, as they stand below the table."""
    size = other["model_size"]
    told = {
        "build": other["build_number"],
        "commit": other["build_commit"],
        "backends": other["backends"],
        "threads": other["n_threads"],
        "model": other["model_type"],
        "weights": f"{size / 2**30:.2f} GiB" if isinstance(size, int) else None,
        "flags": shlex.join(other["flags"]) or None,
    }
    parts = [f"{name} {value}" for name, value in told.items() if value is not None]
    features = [machine["processor"], " ".join(machine["instructions"])]
    return f"machine: {', '.join(filter(None, features))}\nllama-bench: {', '.join(parts)}"
