"""Conversations on disk: one private JSON file each, replaced in one move, and the latent cache beside it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dsv2cli import places
from dsv2cli.checkpoint.hashes import edges
from dsv2cli.checkpoint.tokenizer import Message
from dsv2cli.engine.session import Session
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.kernels.quantized import Quantized
from dsv2cli.outside import json_text, mended, parse_json, read_bytes, reason, require_file

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
    return places.sessions() / f"{name}.json"


def save(path: Path, conversation: Conversation, fresh: bool = False) -> None:
    """Raises Dsv2Error when the disk or the permissions do not allow it; what was there before then stays
    whole. `fresh`: raises FileExistsError where something is there.
    """
    write(path, as_json({"format": FORMAT, **vars(conversation)}), fresh)


@contextmanager
def replacing(path: Path, fresh: bool = False) -> Iterator[Path]:
    """A new private file to fill, which takes the place of `path` in one move, or vanishes where that fails.

    Raises Dsv2Error when the disk or the permissions do not allow it, and FileExistsError where `fresh` says
    that nothing may be there yet.
    """
    try:
        places.private_folder(path.parent)
        with places.unfinished(path) as new:
            yield new
            os.chmod(new, 0o600)
            if fresh:
                os.link(new, path)
            else:
                os.replace(new, path)
        keep_names(path.parent)
    except (OSError, SafetensorError) as error:
        if fresh and isinstance(error, FileExistsError):
            raise
        why = getattr(error, "strerror", None) or str(error)
        raise Dsv2Error(f"{path} could not be written", why=why, fix="make room, or use --no-save") from error


def keep_names(folder: Path) -> None:
    """Let the disk have the names in a folder, not only what the files hold. Raises OSError."""
    number = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write(path: Path, text: str, fresh: bool = False) -> None:
    """Readable by its owner only, and either the old file or the new one, whatever happens meanwhile.

    Raises as replacing does.
    """
    with replacing(path, fresh) as new, new.open("wb") as file:
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


def identity(checkpoint: Path, session: Session) -> str:
    """Tells one model in one number format from another without reading it whole: whoever changes a file
    changes its times. Raises Dsv2Error where it can not be looked at.
    """
    weights = [each for each in session.runner.model.modules() if isinstance(each, Quantized)]
    codes = sorted({f"{each.bits}:{each.group}" for each in weights})
    files = edges(checkpoint, times=True)
    return hashlib.sha256(f"{session.runner.dtype} {codes} {files}".encode()).hexdigest()


def save_cache(path: Path, session: Session, model: str) -> None:
    """The latents of all cached tokens, so that resuming costs no prefill. Raises
    Dsv2Error as `save` does.
    """
    latents = session.cache.latents(len(session.cached_ids))
    tensors = {f"layers.{i}": layer.cpu().contiguous() for i, layer in enumerate(latents)}
    tensors["token_ids"] = torch.tensor(session.cached_ids, dtype=torch.int64)
    with replacing(path) as new:
        save_file(tensors, new, metadata={"model": model, "sha256": digest_of(tensors)})


def digest_of(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of the names and bytes of tensors on the CPU, of any shapes, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()


@torch.inference_mode()  # as the cache itself was made
def load_cache(path: Path, session: Session, model: str) -> str:
    """Put saved latents into the session's cache. Says in a few words why not, or nothing where it did."""
    if not path.exists():
        return "none was saved"
    config = session.runner.config
    try:
        require_file(path)
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("model") != model:
                return "it belongs to another model"
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        return f"it is damaged: {reason(error)}"
    names = [f"layers.{i}" for i in range(config.num_hidden_layers)]
    if about.get("sha256") != digest_of(tensors) or tensors.keys() != {"token_ids", *names}:
        return "it is damaged: it is not what was written"
    ids, layers = tensors["token_ids"].tolist(), [tensors[name] for name in names]
    shape = (1, len(ids), config.cached_dim)
    if any(layer.shape != shape or layer.dtype != session.runner.dtype for layer in layers):
        return "its shape is another"
    if not all(bool(layer.isfinite().all()) for layer in layers):
        return "it holds NaN or infinity"
    session.take_cache(ids, layers)
    return ""
