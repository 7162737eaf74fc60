"""What a command line asks to be continued: a text, ids, messages in a template, or the hole in a file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv2cli.cli import options as opt
from dsv2cli.cli import ui
from dsv2cli.errors import UsageError
from dsv2cli.outside import path_of, read_text, reason

if TYPE_CHECKING:
    from dsv2cli.checkpoint.found import Checkpoint
    from dsv2cli.checkpoint.tokenizer import Message, Tokenizer


@dataclass(frozen=True)
class Prompt:
    """What is to be continued, and by which model."""

    heading = opt.TO_RUN

    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue. All of stdin, if piped, comes before it.")
    ] = None
    model: opt.ModelOption = None
    yes: opt.YesOption = False
    api: opt.ApiOption = None
    prompt_ids: Annotated[
        str | None, typer.Option(help='Token ids instead of text, "1,2,3": no tokenizer needed.')
    ] = None
    chat: Annotated[
        bool,
        typer.Option("--chat", help="The text is a message: put it into the checkpoint's chat template."),
    ] = False
    system: Annotated[str | None, typer.Option(help="System prompt; implies --chat.")] = None
    messages: Annotated[
        Path | None, typer.Option(help="JSON list of messages to answer, instead of a text; - is stdin.")
    ] = None
    prefix: Annotated[str, typer.Option(help="Beginning of the answer, which is printed as part of it.")] = ""
    fim_prefix: Annotated[
        str | None, typer.Option(help="Fill in the middle: what stands before the hole.")
    ] = None
    fim_suffix: Annotated[str | None, typer.Option(help="Fill in the middle: what stands after it.")] = None
    fim_file: Annotated[
        Path | None,
        typer.Option(help=f"Fill in the middle of a file, where it says {opt.CURSOR}; - is stdin."),
    ] = None
    batch: Annotated[
        Path | None,
        typer.Option(
            metavar="IN.jsonl",
            help='A prompt a line: {"prompt": ...}, prompt_ids or messages, with id, seed, sampling. '
            "Goes on where it was stopped.",
        ),
    ] = None
    keep_newline: Annotated[
        bool, typer.Option("--keep-newline", help="The last line's end, if piped, is part of the prompt.")
    ] = False
    jsonl: Annotated[
        bool,
        typer.Option(
            "--jsonl",
            help="As --batch, but from stdin to stdout: each line is answered before the next is read.",
        ),
    ] = False

    @property
    def many(self) -> bool:
        """Whether prompts come line by line."""
        return self.batch is not None or self.jsonl

    @property
    def fim(self) -> tuple[str, str] | None:
        """What stands around a hole, where there is one."""
        if self.fim_prefix is None and self.fim_suffix is None:
            return None
        return self.fim_prefix or "", self.fim_suffix or ""

    def source(self) -> str:
        """Which of the ways to give a prompt is used.

        Raises UsageError for several, or options that belong to others.
        """
        ways = {
            "a text": self.prompt,
            "--prompt-ids": self.prompt_ids,
            "--messages": self.messages,
            "--fim-prefix or --fim-suffix": self.fim,
            "--fim-file": self.fim_file,
            "--batch": self.batch,
            "--jsonl": self.jsonl or None,
        }
        given = [name for name, value in ways.items() if value is not None] or ["a text"]
        source = given[0]
        if len(given) > 1:
            raise UsageError(f"Both {source} and {given[1]} are given", fix="leave one of them out")
        if (self.chat or self.system is not None) and source != "a text":
            why, fix = "--chat is about a text", "leave one of them out"
            raise UsageError(f"--chat and {source} do not go together", why=why, fix=fix)
        if self.prefix and source not in ("a text", "--messages"):
            raise UsageError(f"--prefix and {source} do not go together", fix="leave one of them out")
        return source


@dataclass(frozen=True)
class Asked:
    """Ids to continue, and the words around the answer: those before it, its own beginning, and those after
    it.
    """

    ids: list[int]
    before: str = ""
    start: str = ""
    after: str = ""
    chat: bool = False  # it is answered as a message, not continued as a text
    given: dict[str, Any] = field(default_factory=dict)  # the same for a server, instead of ids

    @property
    def blank(self) -> bool:
        """Whether the answer's first blank is there already, or none is wanted."""
        return self.chat and (not self.start or self.start.endswith(" "))

    def around(self, text: str, echo: bool) -> str:
        """The answer with its own beginning; with `echo` the words before and after it, too."""
        text = self.start + (text.removeprefix(" ") if self.blank else text)
        return self.before + text + self.after if echo else text


def ask(prompt: Prompt, text: str | None, checkpoint: Checkpoint) -> tuple[Asked, Tokenizer | None]:
    """The ids of a prompt that is not line by line; `text` is its text with what stdin gave before it.

    Raises UsageError for what makes no prompt, Dsv2Error where the checkpoint lacks what it needs.
    """
    if prompt.prompt_ids is not None:
        # With ids the tokenizer may be missing; it is used for the text where there is one.
        tokenizer = checkpoint.tokenizer_if_any()
        ids = opt.parse_ids(prompt.prompt_ids)
        shown = tokenizer.decode(ids) if tokenizer is not None else ",".join(map(str, ids)) + ","
        return Asked(ids, before=shown), tokenizer
    tokenizer = checkpoint.tokenizer()
    if prompt.fim is not None or prompt.fim_file is not None:
        prefix, suffix = around_the_hole(prompt)
        from dsv2cli.engine.fill import fill_in

        return Asked(fill_in(prefix, suffix, tokenizer), before=prefix, after=suffix), tokenizer
    start = prompt.prefix
    if prompt.messages is not None:
        from dsv2cli.engine.store import parse_messages

        messages = parse_messages(read_file(prompt.messages), str(prompt.messages))
        tokenizer.refuse_too_long(*(message["content"] for message in messages))
        ids = tokenizer.encode_chat(messages, start)
        return Asked(ids, start=start, chat=True), tokenizer
    text = text or ""
    tokenizer.refuse_too_long(text)
    if prompt.chat or prompt.system is not None:
        ids = tokenizer.encode_chat(conversation(prompt.system, text), start)
        return Asked(ids, before=text, start=start, chat=True), tokenizer
    return Asked(tokenizer.encode(some(text + start)), before=text, start=start), tokenizer


def ask_server(prompt: Prompt, text: str | None) -> Asked:
    """The same for a server, which is told what was typed and makes ids of it itself. Raises UsageError."""
    if prompt.prompt_ids is not None:
        ids = opt.parse_ids(prompt.prompt_ids)
        return Asked([], before=",".join(map(str, ids)) + ",", given={"prompt": ids})
    if prompt.fim is not None or prompt.fim_file is not None:
        prefix, suffix = around_the_hole(prompt)
        return Asked([], before=prefix, after=suffix, given={"prompt": prefix, "suffix": suffix})
    text = text or ""
    chat = prompt.chat or prompt.system is not None or prompt.messages is not None
    if chat and prompt.prefix:
        why = "a server begins the answer to a message itself"
        raise UsageError("--prefix goes without --api here", why=why, fix="leave one of them out")
    if prompt.messages is not None:
        from dsv2cli.engine.store import parse_messages

        messages = parse_messages(read_file(prompt.messages), str(prompt.messages))
        return Asked([], given={"messages": messages})
    if chat:
        return Asked([], before=text, given={"messages": conversation(prompt.system, text)})
    return Asked([], before=text, start=prompt.prefix, given={"prompt": some(text + prompt.prefix)})


def some(text: str) -> str:
    """A text to continue. Raises UsageError for none."""
    if not text:
        fix = 'dsv2 complete "Once upon a time"'
        raise UsageError("The prompt is empty", why="there is nothing to continue", fix=fix)
    return text


def around_the_hole(prompt: Prompt) -> tuple[str, str]:
    """What stands before and after a hole. Raises UsageError for nothing."""
    prefix, suffix = prompt.fim or split_at_cursor(prompt.fim_file)
    if not prefix + suffix:
        fix = 'dsv2 complete --fim-prefix "def f(x):" --fim-suffix "return y"'
        raise UsageError("There is nothing around the hole", fix=fix)
    return prefix, suffix


def conversation(system: str | None, text: str) -> list[Message]:
    """One message, with a system prompt before it where there is one. Raises UsageError
    for an empty message.
    """
    if not text:
        fix = 'dsv2 complete --chat "Who are you?"'
        raise UsageError("The message is empty", why="there is nothing to answer", fix=fix)
    start = [{"role": "system", "content": system}] if system else []
    return [*start, {"role": "user", "content": text}]


def read_file(path: Path) -> str:
    """A file or pipe as text, or stdin for `-`. Raises UsageError."""
    if str(path) == "-":
        return ui.read_stdin()
    try:
        return read_text(path_of(path), pipes=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} can not be read", why=reason(error)) from None


def split_at_cursor(path: Path | None) -> tuple[str, str]:
    """What stands before and after the mark in a file. Raises UsageError where it does
    not stand there once.
    """
    assert path is not None
    before, *rest = read_file(path).split(opt.CURSOR)
    if len(rest) != 1:
        why = f"{opt.CURSOR} says where the text is to be put, once"
        raise UsageError(f"{path} has {len(rest) or 'no'} cursor marks", why=why)
    return before, rest[0]
