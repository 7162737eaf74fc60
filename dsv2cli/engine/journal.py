"""A talk's record: a tree of messages in a file that only grows, one JSON object a line. Imports no torch.

A line is one of
    {"format": "dsv2 talk 1", "time"}                                  the first
    {"id", "parent", "branch", "role", "text", "time", ...}            a message, "" the parent of the first
    {"of", "more"}                                                     words that an answer goes on with
    {"of", "ended", "time", ...}                                       why it ended
    {"head", "branch", "time"}                                         going to another place, or branch
    {"draft", "time"}                                                  typed, and not sent yet
A message is on disk before a model is asked, an answer as it comes. Nothing is ever changed: going back moves
the head. Roles besides system, user and assistant are `summary` and `left out`: what is sent instead of all
messages up to `upto`, and that they are not sent.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv2cli import places
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.outside import is_text, json_text, mended, parse_json, read_bytes, reason, require_file

if TYPE_CHECKING:
    from dsv2cli.checkpoint.tokenizer import Message

Tell = Callable[[Dsv2Error], object]

FORMAT = "dsv2 talk 1"
MAIN = "main"
FIELDS = ("id", "parent", "branch", "role", "text")  # that every message has
ROLES = ("system", "user", "assistant", "summary", "left out")
SUMMARISE = "Summarize our conversation so far in a few sentences."


@dataclass
class Node:
    """A message, or what stands in the place of older ones."""

    id: str
    parent: str
    branch: str  # on which it was said
    role: str
    text: str
    about: dict[str, Any] = field(default_factory=dict)  # files, model, settings, seed, time, ended, ...

    @property
    def whole(self) -> str:
        """A message with the files before it."""
        return f"{self.about.get('files', '')}{self.text}"

    @property
    def message(self) -> Message:
        """As a model is sent it."""
        return {"role": self.role, "content": self.whole}

    @property
    def line(self) -> dict[str, Any]:
        """As it stands in the file."""
        return {name: getattr(self, name) for name in FIELDS} | self.about


class Locked(UsageError):
    """A talk that is open in another terminal."""

    def __init__(self, name: str) -> None:
        why, fix = "another dsv2 chat writes it", f"dsv2 chat --resume {name}, which offers a branch of it"
        super().__init__(f"The talk {name} is open elsewhere", why=why, fix=fix)


class Journal:
    """The tree of one talk. `file` is None until its first line is to be written, and where nothing is kept.

    A line that could not be written waits for the next one, which is written after it; `tell` is told why,
    once for each reason.
    """

    def __init__(self, tell: Tell) -> None:
        self.tell, self.told = tell, set[str]()
        self.nodes: dict[str, Node] = {}
        self.branch, self.branches = MAIN, {MAIN: ""}
        self.at = ""  # where we were last, on whichever branch
        self.latest: dict[str, str] = {}  # of each message, the one after it that was gone to last
        self.systems: dict[str, str] = {}  # the system prompt of each branch that was given one
        self.draft = ""
        self.shared = False  # another process holds the file
        self.path: Path | None = None
        self.file: int | None = None
        self.waiting: list[bytes] = []
        self.damaged = 0  # lines that could not be read
        self.lock = threading.Lock()  # of what is to be written

    @property
    def head(self) -> str:
        """The last message of the branch we are on; "" before the first."""
        return self.branches[self.branch]

    # The tree.

    def way(self, end: str | None = None) -> list[Node]:
        """The messages from the first to `end`, or to the head."""
        nodes, at = [], self.head if end is None else end
        while at:
            nodes.append(self.nodes[at])
            at = nodes[-1].parent
        return nodes[::-1]

    def turns(self) -> list[Node]:
        """The person's messages up to the head."""
        return [node for node in self.way() if node.role == "user"]

    def answers(self, node: Node) -> list[Node]:
        """All answers to a message that have a word, in the order they were given."""
        given = [each for each in self.nodes.values() if each.parent == node.id and each.role == "assistant"]
        return [each for each in given if each.text.strip()]

    def messages(self, end: str | None = None) -> list[Message]:
        """What a model is sent: the system prompt, then what no summary stands for or was left out."""
        sent = self.told_first()
        for summary in [node for node in self.way(end) if node.role == "summary"][-1:]:
            sent += [{"role": "user", "content": SUMMARISE}, {"role": "assistant", "content": summary.text}]
        return sent + [node.message for node in self.said(end)]

    def told_first(self) -> list[Message]:
        """The system prompt as a message, where there is one."""
        return [{"role": "system", "content": self.system}] if self.system else []

    @property
    def system(self) -> str:
        """The system prompt: the branch's latest, wherever it is gone back to; "" where there is none."""
        if self.branch in self.systems:
            return self.systems[self.branch]
        return next((node.text for node in reversed(self.way()) if node.role == "system"), "")

    def said(self, end: str | None = None) -> list[Node]:
        """The messages of both that are sent as they are: those behind what was summarised or left out."""
        way = self.way(end)
        cuts = {node.about.get("upto") for node in way if node.role in ("summary", "left out")}
        start = 1 + max((i for i, node in enumerate(way) if node.id in cuts), default=-1)
        return [node for node in way[start:] if node.role in ("user", "assistant")]

    def place(self, node: Node) -> None:
        """Put a message into the tree and go there."""
        self.nodes[node.id] = node
        if node.role == "system":
            self.systems[self.branch] = node.text
        self.arrive(node.id, self.branch)

    def arrive(self, head: str, branch: str) -> None:
        """Be at a message, on a branch; the way there is what /redo takes."""
        if branch not in self.branches and self.branch in self.systems:
            self.systems[branch] = self.systems[self.branch]
        self.branch = branch
        self.branches[branch], before, self.at = head, self.at, head
        while head:
            parent = self.nodes[head].parent
            self.latest[parent] = head
            # A step on from where we were: the way up to there is known already.
            head = "" if parent == before else parent

    def settle(self) -> None:
        """After reading: a message without an answer goes back to where it was typed."""
        end = self.way()
        if end and end[-1].role == "assistant" and not end[-1].text:
            end.pop()
        if end and end[-1].role == "user" and (answers := self.answers(end[-1])):
            end.append(answers[-1])  # there is one from before
        elif end and end[-1].role == "user":
            unsent = end.pop()
            self.draft = "\n".join(filter(None, (unsent.whole, self.draft)))
        self.branches[self.branch] = end[-1].id if end else ""

    # What is said and done.

    def add(self, role: str, text: str, parent: str | None = None, **about: Any) -> Node:
        """A new message behind the head, or `parent`, and go there. What was a draft is sent with it."""
        parent, text = self.head if parent is None else parent, mended(text)
        if role == "user":
            self.draft = without_start(self.draft, text)
        node = Node(secrets.token_hex(8), parent, self.branch, role, text, {"time": now()} | about)
        self.place(node)
        self.write(node.line, sure=True)
        return node

    def more(self, node: Node, text: str) -> None:
        """An answer goes on."""
        node.text += text
        self.write({"of": node.id, "more": text})

    def end(self, node: Node, ended: str, **about: Any) -> None:
        """An answer is done, for the reason given."""
        node.about |= {"ended": ended} | about
        self.write({"of": node.id, "ended": ended, "time": now()} | about, sure=True)

    def move(self, head: str, branch: str | None = None) -> None:
        """Go to another place of the tree."""
        self.arrive(head, branch or self.branch)
        self.write({"head": head, "branch": self.branch, "time": now()}, sure=True)

    def keep_draft(self, text: str) -> None:
        """Remember what is typed and not sent, or that there is nothing."""
        if text != self.draft:
            self.draft = text
            self.write({"draft": text, "time": now()}, sure=True)

    # The file.

    def write(self, line: dict[str, Any], sure: bool = False) -> None:
        """Append a line, with those before it that could not be written; `sure`: it is on the disk then.

        Before anything was said or typed nothing is: a system prompt alone makes no file.
        """
        with self.lock:
            self.waiting.append(as_bytes(line))
            words = line.get("role", "system") != "system" or "draft" in line
            if self.path is not None and (self.file is not None or words):
                self.flush(sure)

    def flush(self, sure: bool = True) -> None:
        """Write what waits, as write does; where the file is gone, all there is into a new one."""
        try:
            if self.file is not None and not os.fstat(self.file).st_nlink:
                os.close(self.file)
                self.file, self.shared = None, False
                self.write_anew()
            if self.file is None:
                self.create()
            assert self.file is not None
            while self.waiting:
                if os.write(self.file, self.waiting[0]) < len(self.waiting[0]):
                    raise OSError(errno.ENOSPC, "the disk took half of a line")
                self.waiting.pop(0)
            if sure:
                os.fsync(self.file)
        except OSError as error:
            if (why := reason(error)) not in self.told:
                self.told.add(why)
                fix = "make room, or use --no-save"
                self.tell(Dsv2Error(f"{self.path} could not be written", why=why, fix=fix))

    def create(self) -> None:
        """The file, where none is yet; a name that is taken gets a letter. Raises OSError."""
        assert self.path is not None
        places.private_folder(self.path.parent)
        while True:
            try:
                flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                self.file = os.open(self.path, flags, 0o600)
                break
            except FileExistsError:
                self.path = self.path.with_name(f"{self.path.stem}b{self.path.suffix}")
        places.lock(self.file)
        copies = bool(self.waiting) and not self.waiting[0].startswith(b"\n")
        if not copies:  # what it copies begins so itself
            self.waiting.insert(0, json_text({"format": FORMAT, "time": now()}).encode() + b"\n")
        places.keep_names(self.path.parent)

    def write_anew(self) -> None:
        """Let the whole record wait to be written."""
        lines = [node.line for node in self.nodes.values()]
        names = [*(name for name in self.branches if name != self.branch), self.branch]
        lines += [{"head": self.branches[name], "branch": name, "time": now()} for name in names]
        lines += [{"draft": self.draft, "time": now()}] if self.draft else []
        self.waiting = [as_bytes(line) for line in lines]

    def close(self) -> None:
        """Let others write it."""
        if self.file is not None:
            os.close(self.file)
        self.file = self.path = None


def as_bytes(line: dict[str, Any]) -> bytes:
    """A line of its own even behind one that a killed process left unfinished."""
    return b"\n" + json_text(line).encode() + b"\n"


def now() -> str:
    """The time, for a record."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def new(path: Path | None, tell: Tell) -> Journal:
    """A talk that nothing has been said in; its file comes with the first message, where it has one."""
    journal = Journal(tell)
    journal.path = path
    return journal


def open_talk(path: Path, tell: Tell, shared: bool = False) -> Journal:
    """A talk to go on with, held until it is closed, or on a branch of its own where `shared`.

    Raises Locked where another process holds it, Dsv2Error where it can not be read.
    """
    try:
        require_file(path)
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EROFS):
            return copied(path, tell)
        raise unreadable(path, reason(error)) from None
    try:
        if not shared:
            places.lock(file, places.ENDING)
        journal = read(path, tell)
    except BlockingIOError:
        os.close(file)
        raise Locked(path.stem) from None
    except BaseException:
        os.close(file)
        raise
    journal.path, journal.file = path, file
    journal.shared = shared
    if shared:
        names = (f"{journal.branch}-{number}" for number in itertools.count(2))
        journal.draft = ""
        journal.move(journal.head, next(name for name in names if name not in journal.branches))
    return journal


def copied(path: Path, tell: Tell) -> Journal:
    """A talk that may only be read: what is said goes into a copy, where there can be one."""
    journal = read(path, tell)
    journal.waiting = [read_bytes(path)]
    journal.path = path
    return journal


def read(path: Path, tell: Tell) -> Journal:
    """A talk as it stands in its file; lines that are damaged are left out and counted.

    Raises Dsv2Error where it can not be read, or is none.
    """
    try:
        lines = read_bytes(path).split(b"\n")
    except (OSError, ValueError) as error:
        raise unreadable(path, reason(error)) from None
    journal, known = Journal(tell), False
    for line in filter(None, lines):
        try:
            content = parse_json(line, mend=True)
            if isinstance(content, dict) and "format" in content:
                if content["format"] != FORMAT:
                    raise unreadable(path, f"its format is {str(content['format'])[:40]!r}")
                known = True
            else:
                take(journal, content)
        except ValueError:
            journal.damaged += 1
    if not known and not journal.nodes:
        raise unreadable(path, "it holds no message")
    journal.settle()
    return journal


def take(journal: Journal, line: Any) -> None:
    """One line of the file. Raises ValueError for what makes no sense there."""
    if not isinstance(line, dict):
        raise ValueError("it is no object")
    if "id" in line:
        texts: dict[str, Any] = {name: text_in(line, name) for name in FIELDS}
        node = Node(**texts)
        if node.role not in ROLES or node.id in journal.nodes or not (known_in(journal, node.parent)):
            raise ValueError("it belongs to nothing")
        node.about = {name: line[name] for name in line if name not in FIELDS}
        if not is_text(str(node.about.get("files", ""))):
            raise ValueError("files are a text")
        if node.branch != journal.branch:
            journal.arrive(journal.branches.get(node.branch, node.parent), node.branch)
        journal.place(node)
        if node.role == "user":
            journal.draft = without_start(journal.draft, node.text)
    elif "of" in line and text_in(line, "of") in journal.nodes:
        node = journal.nodes[line["of"]]
        if "more" in line:
            node.text += text_in(line, "more")
        else:
            node.about |= {name: line[name] for name in line if name != "of"}
    elif "head" in line and known_in(journal, text_in(line, "head")):
        journal.arrive(line["head"], text_in(line, "branch"))
    elif "draft" in line:
        journal.draft = text_in(line, "draft")
    else:
        raise ValueError("it belongs to nothing")


def without_start(draft: str, text: str) -> str:
    """What of a draft is not sent with a message that it may begin with."""
    return draft[len(text) :].removeprefix("\n") if draft.startswith(text) else draft


def known_in(journal: Journal, node: str) -> bool:
    """Whether a message is there; "" is before the first."""
    return not node or node in journal.nodes


def text_in(line: dict[str, Any], name: str) -> str:
    """A field that is a text. Raises ValueError where it is none."""
    value = line.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name} is no text")
    return value


def unreadable(path: Path, why: str) -> Dsv2Error:
    """What to say of a talk that can not be gone on with."""
    return Dsv2Error(f"{path} is not a talk that can be read", why=why, fix="/sessions lists what there is")


def replay(branches: dict[str, list[Message]], branch: str, journal: Journal) -> None:
    """Put whole conversations into a new journal, on one stem as far as they begin alike, and go to one."""
    heads: dict[tuple[str, str, str], str] = {}
    for name in [*(name for name in branches if name != branch), branch]:
        journal.branch, at = name, ""
        journal.branches[name] = ""
        for message in branches[name]:
            key = (at, message["role"], message["content"])
            if key in heads:
                at = heads[key]
            else:
                at = heads[key] = journal.add(message["role"], message["content"], at).id
        journal.move(at, name)
    if MAIN not in branches:
        journal.branches.pop(MAIN, None)


@contextlib.contextmanager
def held_for(path: Path) -> Iterator[None]:
    """Hold a talk while it is renamed or deleted. Raises Locked where another process has it open."""
    try:
        with places.held(path):
            yield
    except BlockingIOError:
        raise Locked(path.stem) from None
