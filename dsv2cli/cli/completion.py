"""`dsv2 completion`: what makes a shell complete the commands, options, models and sessions."""

from __future__ import annotations

from typing import Annotated, Literal

from typer import Argument

from dsv2cli.cli import ui


def completion(
    shell: Annotated[Literal["bash", "zsh", "fish", "powershell"], Argument(help="Which shell.")],
) -> None:
    """Print a completion script for a shell."""
    ui.emit(completion_script(shell))


def completion_script(shell: str) -> str:
    """The script that makes the shell complete `dsv2`."""
    from typer._completion_shared import get_completion_script

    script: str = get_completion_script(prog_name="dsv2", complete_var="_DSV2_COMPLETE", shell=shell)
    return script.strip() + "\n"
