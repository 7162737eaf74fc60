"""The `dsv2` program: its commands, and what becomes of errors."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer
from typer._completion_classes import (
    completion_init,  # typer does it itself only where it adds its own options
)
from typer.core import TyperGroup

from dsv2cli.cli import ui
from dsv2cli.cli.values import lightly
from dsv2cli.errors import INTERRUPTED, Dsv2Error
from dsv2cli.run import launch

COMPLETION = "_DSV2_COMPLETE"  # what a shell sets that asks for the words that may follow
COMMANDS = {  # the first line of each one's help; the function of this name in the module of this name
    "chat": "Talk with the model, at a prompt or line by line.",
    "sessions": "List saved conversations, the latest first.",
    "complete": "Continue a text: the argument, or all of stdin, or both.",
    "pull": "Download a model, or go on with it.",
    "models": "List, verify, find or remove the models that are here.",
    "serve": "Serve a model to other programs, by OpenAI's API.",
    "bench": "Measure speed, load time, memory and cache size.",
    "eval": "Say how good a model is, task by task.",
    "niah": "Hide a sentence in a long text and ask for it.",
    "info": "Say what a model is and what fits where.",
    "doctor": "Look at this machine and a model, and say what works.",
    "quantize": "Pack a checkpoint into 8 or 4 bits.",
    "config": "Show the configuration file, or an example of one.",
    "completion": "Print a completion script for a shell.",
    "manual": "Print the manual page: dsv2 manual | man -l -",
}


class Commands(Mapping[str, Any]):
    """The commands by name, each imported when it is asked for: a start pays for the one that runs."""

    def __init__(self) -> None:
        self.made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self.made:
            self.made[name] = made(name, COMMANDS[name])
        return self.made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


def made(name: str, summary: str) -> Any:
    """The command of that name, with a help that does not repeat every option as an environment variable."""
    from dsv2cli.cli.options import Command

    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    function = getattr(importlib.import_module(f"dsv2cli.cli.{name}"), name)
    alone.command(name, cls=Command, short_help=summary)(function)
    command = typer.main.get_command(alone)
    for parameter in command.params:
        parameter.show_envvar = False  # type: ignore[attr-defined]
    return command


class Program(TyperGroup):
    """`dsv2`, whose help lists the commands without importing them."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = Commands()  # type: ignore[assignment]
        for parameter in self.params:  # no DSV2_VERSION, which many a build script sets
            parameter.allow_from_autoenv = False  # type: ignore[attr-defined]
            parameter.show_envvar = False  # type: ignore[attr-defined]
            lightly(parameter)

    def get_help_option(self, ctx: Any) -> Any:
        return lightly(super().get_help_option(ctx))

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write each name with its first line."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


app = typer.Typer(
    name="dsv2",
    cls=Program,
    help="Run DeepSeek-V2 models on your own machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={
        "help_option_names": ["--help", "-h"],
        "max_content_width": 100,
        "auto_envvar_prefix": "DSV2",
    },
)


def print_version(wanted: bool) -> None:
    """What --version does: raises typer.Exit."""
    if wanted:
        from importlib.metadata import version

        ui.emit(f"dsv2 {version('dsv2cli')}\n")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and leave."),
    ] = False,
) -> None:
    """Run DeepSeek-V2 models on your own machine."""
    from dsv2cli.cli.config import apply

    apply(context)


@contextlib.contextmanager
def ending_in_order() -> Iterator[None]:
    """SIGTERM and a terminal that is closed end the program as Ctrl-C does, with 128 and their number as the
    exit code; not where they are ignored, as under nohup.
    """

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    ours = [
        number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL
    ]
    for number in ours:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def main() -> None:
    """The entry point.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted; other tracebacks are bugs.
    """
    with ending_in_order():
        run()


def run() -> None:
    """The program itself. Raises SystemExit."""
    # Until all that stays is there: a seventh of the time to the first letter went to looking through it.
    gc.disable()
    # torch then takes huge pages: reading weights is 1.08x faster.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    ui.guard_streams()
    ranks = 1  # that torchrun has started
    try:
        ranks = launch.torchrun_size()
        if launch.is_follower():
            from dsv2cli.run.worker import work

            work()
            sys.exit(0)
        completion_init()
        if COMPLETION in os.environ:  # it may be asked by something that is no shell
            os.environ.setdefault("COMP_WORDS", "")
            os.environ.setdefault("_TYPER_COMPLETE_ARGS", "")
            if not os.environ.get("COMP_CWORD", "").isdecimal():
                os.environ["COMP_CWORD"] = "0"
        code = typer.main.get_command(app)(prog_name="dsv2")
    except Dsv2Error as error:
        ui.show_error(error)
        code = error.exit_code
    except KeyboardInterrupt:
        code = INTERRUPTED
    except MemoryError as error:
        why = str(error) or "this machine, or a limit on this process, has no more"
        ui.show_error(Dsv2Error("There is not enough memory", why=why, fix="a smaller model or input"))
        code = 1
    except ui.ReaderGone:
        code = 0
    finally:
        gc.unfreeze()
        gc.enable()
        if ranks > 1:
            launch.dismiss()
    sys.exit(code)
