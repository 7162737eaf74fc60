"""The `dsv2` program: its commands, and what becomes of errors."""

from __future__ import annotations

import sys
from enum import Enum
from typing import Annotated, Any

import typer
from typer._completion_classes import (
    completion_init,
)  # done by typer itself only where it adds its own options

from dsv2cli.cli import launch, ui
from dsv2cli.cli.bench import bench
from dsv2cli.cli.chat import chat
from dsv2cli.cli.complete import complete
from dsv2cli.cli.config import apply, config
from dsv2cli.cli.doctor import doctor
from dsv2cli.cli.info import info
from dsv2cli.cli.niah import niah
from dsv2cli.cli.quantize import quantize
from dsv2cli.errors import INTERRUPTED, Dsv2Error

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
app.command()(chat)
app.command()(complete)
app.command()(bench)
app.command()(niah)
app.command()(info)
app.command()(doctor)
app.command()(quantize)
app.command()(config)


class Shell(str, Enum):
    bash, zsh, fish, powershell = "bash", "zsh", "fish", "powershell"


@app.command()
def completion(shell: Annotated[Shell, typer.Argument(help="Which shell.")]) -> None:
    """Print a completion script for a shell."""
    sys.stdout.write(completion_script(shell.value))


def completion_script(shell: str) -> str:
    from typer._completion_shared import get_completion_script

    script: str = get_completion_script(prog_name="dsv2", complete_var="_DSV2_COMPLETE", shell=shell)
    return script.strip() + "\n"


@app.command()
def manual() -> None:
    """Print the manual page: dsv2 manual | man -l -"""
    sys.stdout.write(manual_page())


def manual_page() -> str:
    from importlib.metadata import version

    from dsv2cli.cli.manual import page

    return page(command(), version("dsv2cli"))


def print_version(wanted: bool) -> None:
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
    """The entry point. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted; other tracebacks are bugs."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        if launch.is_follower():
            from dsv2cli.cli.worker import work

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
        if launch.torchrun_size() > 1:
            launch.dismiss()
    sys.exit(code)
