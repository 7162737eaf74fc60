"""Damaged conversations and latent caches: gone on with as `dsv2 chat --continue` does, for two tokens."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv2cli import places
from dsv2cli.checkpoint.tokenizer import Message
from dsv2cli.cli import commands
from dsv2cli.cli.chat import begun
from dsv2cli.cli.options import Sampling
from dsv2cli.cli.talk import LoadedModel, cache_path
from dsv2cli.cli.typewriter import Typewriter
from dsv2cli.engine import latents, store
from dsv2cli.engine.request import Result
from dsv2cli.engine.session import Session
from dsv2cli.run import page_store
from tests.fuzz import tiny
from tests.fuzz.case import compared, same
from tests.fuzz.checkpoint import mutate_entry, mutate_json, never
from tests.fuzz.strange import Mutation, alike, mutate_bytes, mutate_place, mutate_tree

NAME = "talk"


class SessionDriver:
    """A saved talk of two turns on two branches, with its cache."""

    name = "session"

    def __init__(self, work: Path) -> None:
        tiny.make(work / "model", 1)
        self.opened = tiny.opened(work / "model")
        self.request = Sampling(max_new_tokens=2, temperature=0.0, seed=1).request(self.opened, logprobs=3)
        self.saved = work / "saved"
        self.save()
        shutil.copytree(places.sessions(), self.saved)
        self.reference = self.act(work / "whole", work / "data")

    def save(self) -> None:
        """What `dsv2 chat` left behind up to version 0.1, and its cache as it still does."""
        session, messages = self.session(), [{"role": "system", "content": "Be brief."}]
        for text in ("Hi é", "More"):
            messages.append({"role": "user", "content": text})
            answer = "".join(session.reply(messages, self.request, Result()))
            messages.append({"role": "assistant", "content": answer})
        talk = {
            "format": store.FORMAT,
            "branches": {"main": messages, "other": messages},
            "branch": "other",
            "pending": "What was I",
            "model": "tiny",
        }
        store.write(store.path_of(NAME).with_suffix(".json"), store.as_json(talk))
        model = page_store.identity(self.opened.folder, session.runner)
        latents.save_cache(cache_path(NAME), session, model)

    def session(self) -> Session:
        return Session(self.opened.runner, self.opened.tokenizer())

    def prepare(self, folder: Path) -> None:
        shutil.copytree(self.saved, folder / "dsv2" / "sessions")

    def mutate(self, folder: Path, numbers: random.Random) -> Mutation:
        sessions = folder / "dsv2" / "sessions"
        text, cache = sessions / f"{NAME}.json", sessions / f"{NAME}.safetensors"
        ways: list[Callable[[], Mutation]] = [
            lambda: mutate_json(text, numbers, talk_may_differ),
            lambda: mutate_json(text, numbers, talk_may_differ),
            lambda: mutate_file(text, numbers, True),
            lambda: mutate_talk(text, numbers),
            lambda: mutate_list(text, numbers),
            lambda: mutate_latents(cache, numbers),
            lambda: mutate_latents(cache, numbers),
            lambda: mutate_latents(cache, numbers),
            lambda: mutate_file(cache, numbers, False),
            lambda: mutate_place(cache, numbers),
            lambda: mutate_place(text, numbers),
            lambda: mutate_folder(sessions, numbers),
        ]
        return numbers.choice(ways)()

    def act(self, folder: Path, data: Path | None = None) -> dict[str, Any]:
        """The reply with what was saved, and the one that a new session with the same messages gives."""
        os.environ["XDG_DATA_HOME"] = str(data or folder)
        screen = Typewriter()
        talk = begun(LoadedModel(self.opened, lambda: self.opened), self.request, screen, "stop", keep=False)
        talk.resume(commands.find("last"), keep=False)
        resumed = talk.model.made["session"] = self.session()
        talk.remember()
        messages = [*talk.journal.messages(), {"role": "user", "content": "And?"}]
        return {
            "reply": self.reply(resumed, messages),
            "draft": talk.draft,
            "fresh": self.reply(self.session(), messages),
            "branches": sorted(talk.journal.branches),
        }

    def reply(self, session: Session, messages: list[Message]) -> list[Any]:
        """Ids of the prompt and the answer, the scores of the likeliest, and the messages."""
        result = Result()
        list(session.reply(messages, self.request, result))
        scores = [pair[1] for token in result.tokens for pair in token.top]
        return [result.prompt_ids, result.token_ids, scores, messages]

    def judge(self, answer: Any, mutation: Mutation) -> tuple[str, str]:
        if not same(answer["reply"], answer["fresh"]):
            differing = "ids" if answer["reply"][:2] != answer["fresh"][:2] else "scores"
            return "wrong", f"a damaged cache is used: other {differing} than without it"
        return compared(answer, self.reference, mutation)


class JournalDriver(SessionDriver):
    """The record of a talk of two turns on two branches, with its cache."""

    name = "journal"

    def save(self) -> None:
        """What `dsv2 chat` leaves behind."""
        screen = Typewriter()
        talk = begun(LoadedModel(self.opened, lambda: self.opened), self.request, screen, "stop", keep=True)
        talk.journal.path = places.sessions() / f"{NAME}.jsonl"
        talk.set_system("Be brief.")
        session = self.session()
        for text in ("Hi é", "More"):
            talk.journal.add("user", text)
            messages = talk.journal.messages()
            node = talk.journal.add("assistant", "", seed=1, settings={"temperature": 0})
            for piece in session.reply(messages, self.request, Result()):
                talk.journal.more(node, piece)
            talk.journal.end(node, "length")
        talk.journal.move(talk.journal.head, "other")
        talk.journal.keep_draft("What was I")
        talk.journal.close()
        model = page_store.identity(self.opened.folder, session.runner)
        latents.save_cache(cache_path(NAME), session, model)

    def mutate(self, folder: Path, numbers: random.Random) -> Mutation:
        sessions = folder / "dsv2" / "sessions"
        text, cache = sessions / f"{NAME}.jsonl", sessions / f"{NAME}.safetensors"
        ways: list[Callable[[], Mutation]] = [
            lambda: mutate_line(text, numbers),
            lambda: mutate_line(text, numbers),
            lambda: mutate_lines(text, numbers),
            lambda: mutate_lines(text, numbers),
            lambda: Mutation(mutate_file(text, numbers, True).what, True),
            lambda: mutate_place(text, numbers),
            lambda: mutate_latents(cache, numbers),
            lambda: mutate_folder(sessions, numbers),
        ]
        return numbers.choice(ways)()


def mutate_line(path: Path, numbers: random.Random) -> Mutation:
    """One value in one line: the talk may then be another, but it is one."""
    lines = path.read_bytes().split(b"\n")
    place = numbers.choice([i for i, line in enumerate(lines) if line])
    lines[place], mutation = mutate_tree(json.loads(lines[place]), numbers, lambda *_: True)
    path.write_bytes(b"\n".join(lines))
    return Mutation(f"line {place}: {mutation.what}", True)


def mutate_lines(path: Path, numbers: random.Random) -> Mutation:
    """Lines that are gone, there twice, in another order, of another talk, or none."""
    lines = [line for line in path.read_bytes().split(b"\n") if line]
    place, other = numbers.randrange(len(lines)), numbers.randrange(len(lines))
    node = json.loads(next(line for line in lines if b'"role"' in line))
    itself = json_line(node | {"id": "me", "parent": "me"})
    child = json_line(node | {"id": "me", "parent": node["id"]})
    ways: dict[str, Callable[[], Any]] = {
        "gone": lambda: lines.pop(place),
        "twice": lambda: lines.insert(other, lines[place]),
        "moved": lambda: lines.insert(other, lines.pop(place)),
        "cut off": lambda: lines.__setitem__(place, lines[place][: numbers.randrange(len(lines[place]))]),
        "one line": lambda: lines.__setitem__(
            place, lines[place] + lines.pop(other) if len(lines) > 1 else b""
        ),
        "its own parent": lambda: lines.append(itself),
        "a head that is nowhere": lambda: lines.append(b'{"head": "nowhere", "branch": "main"}'),
        "a branch of a strange name": lambda: lines.append(b'{"head": "", "branch": "\\ud800\\u001b[2J"}'),
        "a child of the system prompt": lambda: lines.append(child),
        "no line at all": lines.clear,
        "numbers": lambda: lines.append(b"1e400"),
        "a long line": lambda: lines.append(b'{"draft": "' + b"x" * 10**6 + b'"}'),
        "another format": lambda: lines.__setitem__(0, b'{"format": "dsv2 talk 2"}'),
        "a million blank lines": lambda: lines.extend([b""] * 10**6),
        "deep": lambda: lines.append(b"[" * 100_000),
    }
    what = numbers.choice(sorted(ways))
    ways[what]()
    path.write_bytes(b"\n".join(lines) + b"\n")
    return Mutation(f"line {place}: {what}", True)


def json_line(line: dict[str, Any]) -> bytes:
    return json.dumps(line).encode()


def talk_may_differ(path: tuple[Any, ...], old: Any, text: str) -> bool:
    """Other texts and names are another talk; a branch, a message and what may be left out are nothing."""
    whole = path[0] == "branches" and len(path) in (2, 3)
    return alike(old, text) or (text == "" and (whole or path[-1] in ("pending", "model")))


def mutate_file(path: Path, numbers: random.Random, changes: bool) -> Mutation:
    """The bytes of a file."""
    data, mutation = mutate_bytes(path.read_bytes(), numbers, changes)
    path.write_bytes(data)
    return Mutation(f"{path.name}: {mutation.what}", mutation.changes)


def mutate_talk(path: Path, numbers: random.Random) -> Mutation:
    """Roles, texts and names that a conversation can not have, or could."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    messages: list[dict[str, Any]] = tree["branches"][tree["branch"]]
    turn = numbers.randrange(len(messages))
    strange = ["tool", "System", "", "\ud800", "user ", None, ["user"], {"user": 1}, 5, True]
    texts = [
        "",
        " ",
        "\ud800",
        "x\udfff",
        "\0",
        "a" * 10**6,
        "\u202e",
        "<｜end▁of▁sentence｜>",
        "{{ x }}",
        "\r\n",
    ]
    names = ["", "a/b", "../x", "\ud800", "\n", "x" * 10**5, "\x1b[2J"]
    ways: dict[str, tuple[Callable[[], Any], bool]] = {
        "another role": (lambda: messages[turn].update(role=numbers.choice(strange)), False),
        "a role of another": (lambda: messages[turn].update(role=numbers.choice(store.ROLES)), True),
        "another text": (lambda: messages[turn].update(content=numbers.choice(texts)), True),
        "a text of parts": (lambda: messages[turn].update(content=[{"type": "text", "text": "x"}]), False),
        "a message twice": (lambda: messages.insert(turn, dict(messages[turn])), True),
        "a message gone": (lambda: messages.pop(turn), True),
        "no messages": (messages.clear, True),
        "many messages": (lambda: messages.extend([dict(m) for m in messages[1:]] * 2000), True),
        "keys besides": (lambda: messages[turn].update(name="x", tool_calls=[1]), False),
        "another branch": (lambda: tree.update(branch=numbers.choice(["main", *names])), True),
        "a branch of a strange name": (lambda: tree["branches"].update({numbers.choice(names): []}), True),
        "a branch that is none": (
            lambda: tree["branches"].update(x=numbers.choice([None, 1, "x", {}])),
            False,
        ),
        "no branches": (lambda: tree["branches"].clear(), False),
        "pending that is no text": (lambda: tree.update(pending=numbers.choice([None, 5, ["x"], {}])), False),
        "pending": (lambda: tree.update(pending=numbers.choice(texts)), True),
        "another format": (
            lambda: tree.update(format=numbers.choice(["dsv2 conversation 2", None, 1])),
            False,
        ),
        "messages besides": (lambda: tree.update(messages=numbers.choice([[], None, [{}], 5])), True),
    }
    what = numbers.choice(sorted(ways))
    make, changes = ways[what]
    make()
    path.write_bytes(json.dumps(tree, ensure_ascii=numbers.random() < 0.5).encode("utf-8", "surrogatepass"))
    return Mutation(f"{path.name}: message {turn}, {what}", changes)


def mutate_list(path: Path, numbers: random.Random) -> Mutation:
    """A plain list of messages in the place of the session, whole or with one value changed."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    messages = tree["branches"]["main"]
    messages = messages if numbers.random() < 0.5 else {"messages": messages}
    data, mutation = mutate_tree(messages, numbers, lambda *_: True)
    path.write_bytes(data)
    return Mutation(f"{path.name}: a list, {mutation.what}", True)


def mutate_latents(path: Path, numbers: random.Random) -> Mutation:
    """The cache: none of its damage may be seen in an answer."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    text, ids = data[8 : 8 + size], header["token_ids"]["data_offsets"]
    way = numbers.choice(["header", "entry", "entry", "ids", "ids", "latents", "latents", "model", "length"])
    mutation = Mutation(way)
    if way == "header":
        text, mutation = mutate_tree(header, numbers, never)
    elif way == "entry":
        text, body, mutation = mutate_entry(header, body, numbers)
    elif way == "ids":
        number = numbers.choice([-1, 0, 5, 2**31, 2**63 - 1, 301, 302])
        at = ids[0] + 8 * numbers.randrange((ids[1] - ids[0]) // 8)
        body = body[:at] + struct.pack("<q", number) + body[at + 8 :]
        mutation = Mutation(f"an id of {number} at {at}")
    elif way == "latents":
        at = numbers.choice([at for at in range(0, len(body) - 3, 4) if not ids[0] <= at < ids[1]])
        what = numbers.choice(["nan", "inf", "1e30", "0.5", "all zeros", "a bit"])
        changed = struct.pack("<f", 0.5 if what[0] == "a" else float(what))
        if what == "a bit":
            changed = body[at : at + 3] + bytes([body[at + 3] ^ 0x40])
        body = body[:at] + changed + body[at + 4 :]
        if what == "all zeros":
            body = bytes(ids[0]) + body[ids[0] : ids[1]] + bytes(len(body) - ids[1])
        mutation = Mutation(f"{what} in the latents at {at}")
    elif way == "model":
        header["__metadata__"] = numbers.choice([None, {}, {"model": "x"}, {"model": 1}, {"model": ""}])
        text = json.dumps(header).encode()
    else:
        size = numbers.choice([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1])
        mutation = Mutation(f"a header of length {size}")
    path.write_bytes(struct.pack("<Q", size if way == "length" else len(text)) + text + body)
    return Mutation(f"{path.name}: {mutation.what}", False)


def mutate_folder(sessions: Path, numbers: random.Random) -> Mutation:
    """Strange files beside the talk, older than it or newer."""
    name = numbers.choice(
        ["x.json", ".new-x.json", "a b.json", "\udcff.json", "talk.json.json", "-x.json", "é.json"]
    )
    path = sessions / name
    newer = numbers.random() < 0.4
    path.write_text("[]")
    mutation = mutate_place(path, numbers)
    if path.exists() or path.is_symlink():
        moment = 2_000_000_000 if newer else 1_000_000_000
        if "/dev" not in mutation.what and "link" not in mutation.what:
            os.utime(path, (moment, moment))
        else:
            newer = True
    return Mutation(f"beside it {name!a}, {'newer' if newer else 'older'}: {mutation.what}", newer)
