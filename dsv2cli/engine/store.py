"""Conversations in files: lists of messages, what earlier versions saved, and writing them. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv2cli import places
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.outside import json_text, mended, parse_json, read_bytes, reason

if TYPE_CHECKING:
    from dsv2cli.checkpoint.tokenizer import Message

FORMAT = "dsv2 conversation 1"
LONGEST_NAME = 200  # bytes: file systems hold 255, and temporary names are longer
ROLES = ("system", "user", "assistant")


@dataclass
class Conversation:
    """All branches of a talk; `pending` is a message that had no answer yet when the file was written."""

    branches: dict[str, list[Message]] = field(default_factory=lambda: {"main": []})
    branch: str = "main"
    pending: str = ""
    model: str = ""


def path_of(name: str) -> Path:
    """Raises UsageError for a name that is no plain file name."""
    if not re.fullmatch(r"\w[\w .-]*", name) or len(name.encode()) > LONGEST_NAME:
        raise UsageError(
            f"{name[:80]!r} can not name a session",
            why=f"letters, digits, spaces, dots and dashes can, up to {LONGEST_NAME} bytes of them",
            fix="/save my-talk",
        )
    return places.session_file(name)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new private file to fill, which takes the place of `path` in one move, or vanishes where that fails.

    Raises Dsv2Error when the disk or the permissions do not allow it.
    """
    try:
        places.private_folder(path.parent)
        with places.unfinished(path) as new:
            yield new
            os.chmod(new, 0o600)
            os.replace(new, path)
        places.keep_names(path.parent)
    except OSError as error:
        why = getattr(error, "strerror", None) or str(error)
        raise Dsv2Error(f"{path} could not be written", why=why, fix="make room, or use --no-save") from error


def write(path: Path, text: str) -> None:
    """Readable by its owner only, and either the old file or the new one, whatever happens meanwhile.

    Raises as replacing does.
    """
    with replacing(path) as new, new.open("wb") as file:
        file.write(mended(text).encode())
        file.flush()
        os.fsync(file.fileno())


def load(path: Path) -> Conversation:
    """A saved session, or any JSON list of {"role", "content"} messages. Raises Dsv2Error
    for anything else.
    """
    try:
        content = parse_json(read_bytes(path), mend=True)
    except OSError as error:
        fix = "/sessions lists what there is"
        raise Dsv2Error(f"{path} could not be read", why=reason(error), fix=fix) from error
    except ValueError as error:
        raise Dsv2Error(f"{path} is not a saved conversation", why=reason(error)) from None
    if isinstance(content, dict) and "messages" in content:
        content = content["messages"]
    if isinstance(content, list):
        messages = checked(content, str(path))
        if not messages:
            raise Dsv2Error(f"{path} is not a saved conversation", why="it is an empty list")
        pending = messages.pop()["content"] if messages[-1]["role"] == "user" else ""
        return Conversation({"main": messages}, pending=pending)
    if (
        not isinstance(content, dict)
        or content.get("format") != FORMAT
        or not isinstance(content.get("branches"), dict)
    ):
        raise Dsv2Error(
            f"{path} is not a saved conversation",
            why="it is neither a session of dsv2 nor a list of messages",
        )
    branches = {str(name): checked(messages, str(path)) for name, messages in content["branches"].items()}
    texts = [content.get(key, "") for key in ("branch", "pending", "model")]
    if not all(isinstance(text, str) for text in texts):
        raise Dsv2Error(f"{path} is damaged", why="branch, pending and model are texts")
    branch, pending, model = texts
    if branch not in branches:
        raise Dsv2Error(f"{path} is damaged", why=f"its branch {branch!r} is not in it")
    return Conversation(branches, branch, pending, model)


def parse_messages(text: str, source: str = "The line") -> list[Message]:
    """A JSON list of messages with at least one in it. Raises Dsv2Error naming `source` for anything else."""
    try:
        content = parse_json(text)
    except ValueError as error:
        raise UsageError(f"{source} is not JSON", why=reason(error)) from None
    messages = checked(content, source)
    if not messages:
        raise UsageError(f"{source} is an empty list of messages", why="there is nothing to answer")
    return messages


def checked(messages: Any, source: str) -> list[Message]:
    """An optional system message, then turns of user and assistant, in the format of OpenAI's: a content may
    be a list of parts of text, and a developer is who writes the system message.

    Raises Dsv2Error for anything else, by the message's place.
    """
    if not isinstance(messages, list):
        raise no_conversation(source, "it is no list")
    out = []
    for place, message in enumerate(messages):
        if not isinstance(message, dict):
            raise no_conversation(source, f"message {place} is no object")
        role = {"developer": "system"}.get(str(message.get("role")), message.get("role"))
        if role not in ROLES:
            raise no_conversation(source, f"message {place} has the role {str(role)[:40]!r}")
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
            raise no_conversation(source, f"message {place} has parts that are no text")
        texts = [part.get("text") for part in parts]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise no_conversation(source, f"message {place} has no text")
        out.append({"role": role, "content": "".join(map(str, texts))})
    return out


def no_conversation(source: str, why: str) -> Dsv2Error:
    """What to say of messages that are none."""
    fix = 'messages are {"role": system|user|assistant, "content": text}'
    return Dsv2Error(f"{source} is not a conversation", why=why, fix=fix)


def as_json(content: Any) -> str:
    return json_text(content, indent=1) + "\n"


def as_markdown(messages: list[Message]) -> str:
    return "".join(f"**{message['role'].capitalize()}:** {message['content']}\n\n" for message in messages)
