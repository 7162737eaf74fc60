"""The manual page dsv2(1), written from the commands' own help."""

from __future__ import annotations

import re
from typing import Any

import typer

EXIT_CODES = (
    ("0", "done: end of text, or the token limit; also when whoever reads the pipe has had enough"),
    ("1", "failed: a damaged file, no tokenizer, a download that did not work"),
    (
        "2",
        "wrong usage: an unknown option or value, no model there, an empty prompt, one longer than the context",
    ),
    ("3", "with --fail-on-length only: the answer ended at the token limit"),
    ("130", "interrupted by Ctrl-C; what had been generated is printed"),
)
ENVIRONMENT = (
    (
        "DSV2_COMMAND_OPTION",
        "the default of an option, such as DSV2_CHAT_TEMPERATURE=0.3; it comes before the configuration file",
    ),
    ("DSV2_CONFIG", "the configuration file; dsv2 config says where it is otherwise, and shows an example"),
    ("NO_COLOR", "no colours, and Markdown as it is written"),
    (
        "HF_HOME, HF_TOKEN, HF_HUB_OFFLINE",
        "where models are kept, the key to private ones, and no downloads at all",
    ),
    ("CXX", "the C++ compiler for the CPU kernels"),
)


def roff(text: str) -> str:
    """Text that means itself: no line may begin a request, and dashes are those of the command line."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^([.'])", r"\\&\1", escaped, flags=re.MULTILINE)


def options(command: Any, name: str) -> str:
    """Every argument and option with what the command's own help says of it."""
    context = typer.Context(command, info_name=name)
    records = [
        parameter.get_help_record(context)
        for parameter in command.get_params(context)
        if parameter.name != "help"
    ]
    return "".join(
        f".TP\n\\fB{roff(' '.join(head.split()))}\\fR\n{roff(' '.join(text.split()))}\n"
        for head, text in filter(None, records)
    )


def page(group: Any, version: str) -> str:
    """The whole page in roff, in the `man` macros."""
    out = [
        f'.TH DSV2 1 "" "dsv2 {version}" "User Commands"\n.SH NAME\ndsv2 \\- {roff(group.help)}\n.SH SYNOPSIS\n'
    ]
    for name in group.commands:
        out.append(f".B dsv2 {name}\n[\\fIoptions\\fR]\n.br\n")
    out.append(".SH DESCRIPTION\n")
    out.append(
        roff(
            "stdout carries the model's text or JSON and nothing else; progress and remarks go to stderr, and only where it is a terminal."
        )
        + "\n"
    )
    for name, command in group.commands.items():
        paragraphs = [" ".join(part.split()) for part in (command.help or "").split("\n\n")]
        out.append(
            f".SH {name.upper()}\n"
            + "\n.PP\n".join(roff(part) for part in paragraphs)
            + "\n"
            + options(command, name)
        )
    for title, entries in (("EXIT STATUS", EXIT_CODES), ("ENVIRONMENT", ENVIRONMENT)):
        out.append(
            f".SH {title}\n" + "".join(f".TP\n\\fB{roff(key)}\\fR\n{roff(text)}\n" for key, text in entries)
        )
    return "".join(out)
