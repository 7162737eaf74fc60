"""Conversations on disk: one private JSON file each, replaced in one move, and the latent cache beside it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dsv2cli import places
from dsv2cli.checkpoint.tokenizer import Message
from dsv2cli.engine.session import Session
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.kernels.quantized import Quantized

FORMAT = "dsv2 conversation 1"
ROLES = ("system", "user", "assistant")
EDGE = 2**16  # bytes of each end of a weights file that tell it from another


@dataclass
class Conversation:
    """All branches of a talk; `pending` is a message that had no answer yet when the file was written."""

    branches: dict[str, list[Message]] = field(default_factory=lambda: {"main": []})
    branch: str = "main"
    pending: str = ""
    model: str = ""


def path_of(name: str) -> Path:
    """Raises UsageError for a name that is no plain file name."""
    if not re.fullmatch(r"\w[\w .-]*", name):
        raise UsageError(
            f"{name!r} can not name a session",
            why="letters, digits, spaces, dots and dashes can",
            fix="/save my-talk",
        )
    return places.sessions() / f"{name}.json"


def save(path: Path, conversation: Conversation) -> None:
    """Raises Dsv2Error when the disk or the permissions do not allow it; what was there before then stays
    whole.
    """
    write(path, as_json({"format": FORMAT, **vars(conversation)}))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new private file to fill, which takes the place of `path` in one move, or vanishes where that fails.

    Raises Dsv2Error when the disk or the permissions do not allow it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
        os.close(handle)
        try:
            yield Path(name)
            os.chmod(name, 0o600)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise Dsv2Error(f"{path} could not be written", why=why, fix="make room, or use --no-save") from error


def write(path: Path, text: str) -> None:
    """Readable by its owner only, and either the old file or the new one, whatever happens meanwhile."""
    with replacing(path) as new, new.open("wb") as file:
        file.write(text.encode("utf-8", "surrogatepass"))
        file.flush()
        os.fsync(file.fileno())


def load(path: Path) -> Conversation:
    """A saved session, or any JSON list of {"role", "content"} messages. Raises Dsv2Error
    for anything else.
    """
    try:
        content = json.loads(path.read_bytes().decode("utf-8", "surrogatepass"))
    except OSError as error:
        raise Dsv2Error(
            f"{path} could not be read", why=error.strerror or str(error), fix="/sessions lists what there is"
        ) from error
    except ValueError as error:
        raise Dsv2Error(f"{path} is not a saved conversation", why=str(error)) from None
    if isinstance(content, dict) and "messages" in content:
        content = content["messages"]
    if isinstance(content, list):
        messages = checked(content, str(path))
        pending = messages.pop()["content"] if messages and messages[-1]["role"] == "user" else ""
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
    branch, pending, model = (str(content.get(key, "")) for key in ("branch", "pending", "model"))
    if branch not in branches:
        raise Dsv2Error(f"{path} is damaged", why=f"its branch {branch!r} is not in it")
    return Conversation(branches, branch, pending, model)


def parse_messages(line: str) -> list[Message]:
    """A JSON list of messages with at least one in it. Raises Dsv2Error for anything else."""
    try:
        messages = checked(json.loads(line), "The line")
    except ValueError as error:
        raise UsageError("The line is not JSON", why=str(error)) from None
    if not messages:
        raise UsageError("The list of messages is empty", why="there is nothing to answer")
    return messages


def checked(messages: Any, source: str) -> list[Message]:
    """An optional system message, then turns of user and assistant. Raises Dsv2Error for anything else."""
    good = isinstance(messages, list) and all(
        isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)
        for message in messages
    )
    if not good:
        raise Dsv2Error(
            f"{source} is not a conversation",
            why='messages are {"role": system|user|assistant, "content": text}',
        )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def as_json(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def as_markdown(messages: list[Message]) -> str:
    return "".join(f"**{message['role'].capitalize()}:** {message['content']}\n\n" for message in messages)


def identity(checkpoint: Path, session: Session) -> str:
    """Tells one model in one number format from another without reading it whole."""
    codes = sorted(
        {f"{w.bits}:{w.group}" for w in session.runner.model.modules() if isinstance(w, Quantized)}
    )
    digest = hashlib.sha256(f"{session.runner.dtype} {codes}".encode())
    for file in sorted([*checkpoint.glob("*.safetensors"), checkpoint / "config.json"]):
        size = file.stat().st_size
        with file.open("rb") as opened:
            digest.update(f"{file.name} {size} ".encode() + opened.read(EDGE))
            opened.seek(max(0, size - EDGE))
            digest.update(opened.read(EDGE))
    return digest.hexdigest()


def save_cache(path: Path, session: Session, model: str) -> None:
    """The latents of all cached tokens, so that resuming costs no prefill. Raises
    Dsv2Error as `save` does.
    """
    latents = session.cache.latents(len(session.cached_ids))
    tensors = {f"layers.{i}": layer.cpu().contiguous() for i, layer in enumerate(latents)}
    tensors["token_ids"] = torch.tensor(session.cached_ids, dtype=torch.int64)
    with replacing(path) as new:
        save_file(tensors, new, metadata={"model": model})


@torch.inference_mode()  # as the cache itself was made
def load_cache(path: Path, session: Session, model: str) -> str:
    """Put saved latents into the session's cache. Says in a few words why not, or nothing where it did."""
    if not path.exists():
        return "none was saved"
    config = session.runner.config
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("model") != model:
                return "it belongs to another model"
            ids: list[int] = file.get_tensor("token_ids").tolist()
            layers = [file.get_tensor(f"layers.{i}") for i in range(config.num_hidden_layers)]
    except (OSError, SafetensorError) as error:
        return f"it is damaged: {error}"
    if any(
        layer.shape != (1, len(ids), config.cached_dim) or layer.dtype != session.runner.dtype
        for layer in layers
    ):
        return "its shape is another"
    session.take_cache(ids, layers)
    return ""
