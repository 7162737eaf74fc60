"""The `dsv2` program: its commands, and what becomes of errors."""

from __future__ import annotations

import gc
import os
import sys
from typing import Annotated, Any, Literal

import typer
from typer._completion_classes import (
    completion_init,  # typer does it itself only where it adds its own options
)

from dsv2cli.cli import ui
from dsv2cli.cli.bench import bench
from dsv2cli.cli.chat import chat
from dsv2cli.cli.complete import complete
from dsv2cli.cli.config import apply, config
from dsv2cli.cli.doctor import doctor
from dsv2cli.cli.info import info
from dsv2cli.cli.niah import niah
from dsv2cli.cli.options import Command
from dsv2cli.cli.quantize import quantize
from dsv2cli.errors import INTERRUPTED, Dsv2Error
from dsv2cli.run import launch

app = typer.Typer(
    name="dsv2",
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
for each in (chat, complete, bench, niah, info, doctor, quantize, config):
    app.command(cls=Command)(each)


@app.command(cls=Command)
def completion(
    shell: Annotated[Literal["bash", "zsh", "fish", "powershell"], typer.Argument(help="Which shell.")],
) -> None:
    """Print a completion script for a shell."""
    sys.stdout.write(completion_script(shell))


def completion_script(shell: str) -> str:
    """What makes a shell complete the commands, options, models and sessions."""
    from typer._completion_shared import get_completion_script

    script: str = get_completion_script(prog_name="dsv2", complete_var="_DSV2_COMPLETE", shell=shell)
    return script.strip() + "\n"


@app.command(cls=Command)
def manual() -> None:
    """Print the manual page: dsv2 manual | man -l -"""
    sys.stdout.write(manual_page())


def manual_page() -> str:
    """dsv2(1) in roff."""
    from importlib.metadata import version

    from dsv2cli.cli.manual import page

    return page(command(), version("dsv2cli"))


def print_version(wanted: bool) -> None:
    """What --version does: raises typer.Exit."""
    if wanted:
        from importlib.metadata import version

        sys.stdout.write(f"dsv2 {version('dsv2cli')}\n")
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
    apply(context)


def command() -> Any:
    """The commands, with a help that does not repeat every option as an environment variable."""
    group: Any = typer.main.get_command(app)
    for sub in group.commands.values():
        for parameter in sub.params:
            parameter.show_envvar = False
    return group


def main() -> None:
    """The entry point.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted; other tracebacks are bugs.
    """
    # Until all that stays is there: a seventh of the time to the first letter went to looking through it.
    gc.disable()
    # torch then takes huge pages: reading weights is 1.08x faster.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        if launch.is_follower():
            from dsv2cli.run.worker import work

            work()
            sys.exit(0)
        completion_init()
        code = command()(prog_name="dsv2")
    except Dsv2Error as error:
        ui.show_error(error)
        code = error.exit_code
    except KeyboardInterrupt:
        code = INTERRUPTED
    except ui.ReaderGone:
        code = 0
    finally:
        gc.unfreeze()
        gc.enable()
        if launch.torchrun_size() > 1:
            launch.dismiss()
    sys.exit(code)
