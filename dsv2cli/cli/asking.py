"""What a command line asks to be continued: a text, ids, messages in a template, or the hole in a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dsv2cli.checkpoint.tokenizer import Message, Tokenizer
from dsv2cli.cli import options as opt
from dsv2cli.cli import ui
from dsv2cli.engine.store import parse_messages
from dsv2cli.errors import UsageError

# The tokens of the DeepSeek-Coder family, with full-width bars; their order is prefix, suffix, middle.
FIM_TOKENS = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")


@dataclass(frozen=True)
class Asked:
    """Ids to continue, and the words around the answer: those before it, its own beginning, and those after it."""

    ids: list[int]
    before: str = ""
    start: str = ""
    after: str = ""


@dataclass(frozen=True)
class Source:
    """Where the prompt comes from, as the command line has it; exactly one of the first five is used."""

    text: str | None = None
    prompt_ids: str | None = None
    messages: Path | None = None
    fim: tuple[str, str] | None = None  # prefix and suffix
    fim_file: Path | None = None
    chat: bool = False
    system: str | None = None
    prefix: str = ""

    def ask(self, checkpoint: opt.Checkpoint) -> tuple[Asked, Tokenizer | None]:
        """Raises UsageError for what makes no prompt, Dsv2Error where the checkpoint lacks what it needs."""
        if self.prompt_ids is not None:
            # With ids the tokenizer may be missing; it is used for the text where there is one.
            tokenizer = checkpoint.tokenizer_if_any()
            ids = opt.parse_ids(self.prompt_ids)
            shown = tokenizer.decode(ids) if tokenizer is not None else ",".join(map(str, ids)) + ","
            return Asked(ids, before=shown), tokenizer
        tokenizer = checkpoint.tokenizer()
        if self.fim is not None or self.fim_file is not None:
            prefix, suffix = self.fim or split_at_cursor(self.fim_file)
            return fill_in(prefix, suffix, tokenizer), tokenizer
        if self.messages is not None or self.chat:
            ids = tokenizer.encode_chat(self.conversation(), self.prefix)
            return Asked(
                ids, before="" if self.messages is not None else self.text or "", start=self.prefix
            ), tokenizer
        text = self.text or ""
        if not text + self.prefix:
            raise UsageError(
                "The prompt is empty",
                why="there is nothing to continue",
                fix='dsv2 complete "Once upon a time"',
            )
        return Asked(tokenizer.encode(text + self.prefix), before=text, start=self.prefix), tokenizer

    def conversation(self) -> list[Message]:
        if self.messages is not None:
            return parse_messages(read(self.messages))
        if not self.text:
            raise UsageError(
                "The message is empty",
                why="there is nothing to answer",
                fix='dsv2 complete --chat "Who are you?"',
            )
        start = [{"role": "system", "content": self.system}] if self.system else []
        return [*start, {"role": "user", "content": self.text}]


def read(path: Path) -> str:
    """A file as UTF-8, or stdin for `-`. Raises UsageError."""
    if str(path) == "-":
        return ui.read_stdin()
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} can not be read", why=getattr(error, "strerror", None) or str(error)
        ) from None


def split_at_cursor(path: Path | None) -> tuple[str, str]:
    """What stands before and after the mark in a file."""
    assert path is not None
    before, *rest = read(path).split(opt.CURSOR)
    if len(rest) != 1:
        raise UsageError(
            f"{path} has {len(rest) or 'no'} cursor marks",
            why=f"{opt.CURSOR} says where the text is to be put, once",
        )
    return before, rest[0]


def fill_in(prefix: str, suffix: str, tokenizer: Tokenizer) -> Asked:
    """The hole between two texts, in the order the checkpoint was trained for. Raises UsageError where it has no such tokens."""
    if not prefix + suffix:
        raise UsageError(
            "There is nothing around the hole",
            fix='dsv2 complete --fim-prefix "def f(x):" --fim-suffix "return y"',
        )
    begin, hole, end = (tokenizer.fast.token_to_id(token) for token in FIM_TOKENS)
    if begin is None or hole is None or end is None:
        raise UsageError(
            "This checkpoint can not fill in the middle",
            why=f"its tokenizer has no {FIM_TOKENS[0]}",
            fix="a Coder-V2 base checkpoint",
        )
    start, after = tokenizer.encode(prefix, add_bos=False), tokenizer.encode(suffix, add_bos=False)
    return Asked([*tokenizer.encode(""), begin, *start, hole, *after, end], before=prefix, after=suffix)
