"""Defaults from a TOML file: `[chat]` and the other commands, and named presets.

The command line overrides both.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv2cli.cli import ui
from dsv2cli.errors import UsageError
from dsv2cli.outside import path_of, read_text, reason

COMMANDS = ("chat", "complete", "bench", "niah", "info", "doctor", "quantize")
OTHERS = ("presets", "servers")
OF_A_SERVER = ("url", "model", "key-env")
LARGEST = 2**20  # bytes of the file
EXAMPLE = """\
# Any option of a command, without its dashes. Environment variables such as DSV2_CHAT_TEMPERATURE come before
# this
# file, and the command line before both.
[chat]
temperature = 0.3
on-overflow = "drop"

[presets.reader]              # dsv2 chat --preset reader
system = "You are a careful proof-reader."
temperature = 0

[servers.cluster]             # dsv2 chat --api cluster
url = "https://node7:8000/v1"
model = "deepseek-ai/DeepSeek-V2-Chat"
key-env = "CLUSTER_KEY"       # the variable that holds its key
"""


def config_path() -> Path:
    """$DSV2_CONFIG, or the place where this system keeps such files."""
    import platformdirs

    chosen = os.environ.get("DSV2_CONFIG")
    if chosen:
        return path_of(chosen)
    return Path(platformdirs.user_config_path("dsv2", appauthor=False)) / "config.toml"


def read_config() -> dict[str, Any]:
    """The file's tables; nothing where there is none.

    Raises UsageError for what is not TOML or not a known table.
    """
    path = config_path()
    try:
        tables = tomllib.loads(read_text(path, LARGEST))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        fix = "mend it, or move it away"
        raise UsageError(f"{path} can not be read", why=reason(error), fix=fix) from None
    for name, table in tables.items():
        if name not in (*COMMANDS, *OTHERS) or not isinstance(table, dict):
            why = f"tables are {', '.join(COMMANDS)}, presets.NAME and servers.NAME"
            raise UsageError(f"{path}: [{name}] is unknown", why=why)
    for name, server in tables.get("servers", {}).items():
        right = isinstance(server, str) or (
            isinstance(server, dict)
            and "url" in server
            and all(key in OF_A_SERVER and isinstance(value, str) for key, value in server.items())
        )
        if not right:
            why = f"it is an address, or a table with url, and perhaps {' and '.join(OF_A_SERVER[1:])}"
            raise UsageError(f"{path}: servers.{name} makes no sense", why=why)
    return tables


def defaults(table: dict[str, Any], command: Any, where: str) -> dict[str, Any]:
    """Option names to parameter names. Raises UsageError for an option that the command does not have."""
    known = {
        option.lstrip("-"): parameter
        for parameter in command.params
        for option in parameter.opts
        if option.startswith("--") and parameter.name not in ("help", "preset")
    }
    values = {}
    for key, value in table.items():
        option = key.replace("_", "-")
        if option not in known:
            near = difflib.get_close_matches(option, known, 1)
            fix = f"did you mean {near[0]}?" if near else f"dsv2 {command.name} --help lists the options"
            raise UsageError(f"{config_path()}: {where} has no option {key!r}", fix=fix)
        parameter = known[option]
        several = bool(getattr(parameter, "multiple", False))
        kind = getattr(getattr(parameter, "type_descriptor", None), "annotation", None)
        if (wanted := unfit(value, kind, several)) is not None:
            what = f"{config_path()}: {where} {key} = {str(value)[:80]!r} makes no sense"
            raise UsageError(what, why=f"it must be {wanted}")
        values[str(parameter.name)] = [value] if several and isinstance(value, str) else value
    return values


def unfit(value: Any, kind: Any, several: bool) -> str | None:
    """What a value of the file must be for its option of a `kind`, where it is of another."""
    if kind is bool:
        return None if isinstance(value, bool) else "true or false"
    if several:
        texts = value if isinstance(value, list) else [value]
        return None if all(isinstance(text, str) for text in texts) else "a text or a list of texts"
    if isinstance(value, int) and not isinstance(value, bool):
        return None if abs(value) < 2**63 else "a number within 64 bits"
    if kind is int and isinstance(value, float):
        return "a whole number"
    return None if isinstance(value, str | float) else "a text or a number"


def apply(context: typer.Context) -> None:
    """Make the file's values the defaults of the command about to run."""
    name = context.invoked_subcommand
    if name in COMMANDS and (table := read_config().get(name)):
        command = context.command.commands[name]  # type: ignore[attr-defined]
        context.default_map = {name: defaults(table, command, f"[{name}]")}


def use_preset(context: typer.Context, name: str | None) -> str | None:
    """Callback of --preset: its values come before those of the file's other tables.

    Raises UsageError where there is none of that name.
    """
    if name is not None and not context.resilient_parsing:
        presets = read_config().get("presets", {})
        if not isinstance(presets.get(name), dict):
            there = ", ".join(sorted(presets)) or "none"
            raise UsageError(
                f"There is no preset {name!r}",
                why=f"{config_path()} has {there}",
                fix="dsv2 config shows an example",
            )
        values = defaults(presets[name], context.command, f"[presets.{name}]")
        context.default_map = {**(context.default_map or {}), **values}
    return name


PresetOption = Annotated[
    str | None,
    typer.Option(callback=use_preset, is_eager=True, help="Named options from the configuration file."),
]


def config() -> None:
    """Show the configuration file, or an example of one."""
    path = config_path()
    tables = read_config()
    if not tables:
        ui.write(f"# {path} does not exist yet. An example:\n{EXAMPLE}")
        return
    ui.write(f"# {path}\n{read_text(path, LARGEST).strip()}\n")
