"""A conversation at a prompt: its record, the model on its way, and how a message becomes an answer.

Knows nothing of keys and windows: what is to be seen goes to a Screen.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dsv2cli import places
from dsv2cli.cli import options as opt
from dsv2cli.engine import journal as journals
from dsv2cli.engine import store
from dsv2cli.engine.journal import SUMMARISE, Journal, Node
from dsv2cli.engine.request import Request, Result
from dsv2cli.errors import Dsv2Error, UsageError

if TYPE_CHECKING:
    from dsv2cli.checkpoint.found import Checkpoint
    from dsv2cli.checkpoint.tokenizer import Message, Tokenizer
    from dsv2cli.cli.attach import Attachment
    from dsv2cli.engine.session import Session
    from dsv2cli.run.open import Opened

SPARE = 256  # tokens kept free for an answer when old turns are left out
SUMMARY_TOKENS = 256
STRIDE = 0x9E3779B97F4A7C15  # between the seeds of two answers: odd, so that none comes twice


class Stopped(Exception):
    """The person stopped what was going on."""


class Screen(Protocol):
    """What a person sees of a talk."""

    def loading(self, name: str, /) -> AbstractContextManager[Callable[[int, int], None] | None]:
        """Progress of loading, as run.open's Screen has it."""

    def note(self, text: str, /) -> None:
        """A remark."""

    def show_error(self, error: Dsv2Error, /) -> None:
        """What went wrong."""

    def last_words(self, error: Dsv2Error, /) -> None:
        """What went wrong, after which the program ends at once. Called by any thread."""

    def piece(self, text: str, /) -> None:
        """More of an answer, as the model writes it."""

    def end(self) -> None:
        """The answer is over."""

    def exchange(self, *texts: str) -> None:
        """The last message of a talk that is gone on with, and its answer."""

    def status(self, text: str, /) -> None:
        """What is going on at this moment; nothing where it is over."""

    def ask_overflow(self, limit: int, /) -> opt.Overflow:
        """What to do about a full context."""


class Model(Protocol):
    """What answers: a model that is being loaded, beside what a person types meanwhile, or one behind a
    server.

    What its methods can not tell is None.
    """

    ready: threading.Event
    failure: BaseException | None  # why it can not be asked

    @property
    def name(self) -> str: ...

    @property
    def place(self) -> str:
        """Where and how it runs, in a few words."""
        ...

    @property
    def limit(self) -> int | None:
        """The most tokens that it holds."""
        ...

    @property
    def held_bytes(self) -> int | None:
        """What it remembers of the talk."""
        ...

    def run(self) -> None:
        """Get ready; whatever happens is kept for those who wait."""
        ...

    def session(self, stop: threading.Event) -> Answering:
        """Once it is ready. Raises Stopped where nobody wants to wait, and why it can not be asked."""
        ...

    def result(self) -> Result:
        """For the next answer."""
        ...

    def count(self, messages: list[Message]) -> int | None:
        """How many tokens a conversation takes."""
        ...

    def length(self, text: str) -> int | None:
        """How many tokens a text takes."""
        ...

    def ids(self, text: str) -> list[int]:
        """Its tokens. Raises Dsv2Error."""
        ...

    @property
    def counts_at_once(self) -> bool:
        """Whether nobody has to wait for `length`."""
        ...

    def check(self, *texts: str) -> None:
        """Raises UsageError for texts that are too long to be looked at."""
        ...

    def remember(self, path: Path) -> str:
        """Take over what was kept of a talk; gives why not."""
        ...

    def keep(self, path: Path) -> None:
        """Keep what it remembers. Raises Dsv2Error."""
        ...

    def complaint(self) -> Dsv2Error | None:
        """What else went wrong, once."""
        ...


class Answering(Protocol):
    """What a message is said to: engine.session's Session."""

    def reply(
        self,
        messages: list[Message],
        request: Any,
        result: Any,
        start: str = "",
        reading: Callable[[int, int], None] = ...,
    ) -> Iterator[str]: ...


class Preparing:
    """What is got ready beside what a person types, and what whoever needs it waits for."""

    def __init__(self) -> None:
        self.ready = threading.Event()
        self.failure: BaseException | None = None

    def prepare(self) -> None:
        """Get it ready."""
        raise NotImplementedError

    def run(self) -> None:
        """The same; whatever happens is kept for those who wait."""
        try:
            self.prepare()
        except BaseException as error:
            self.failure = error
        finally:
            self.ready.set()

    def wait(self, stop: threading.Event) -> None:
        """Until it is ready. Raises Stopped where nobody wants to wait, and why it could not be."""
        while not self.ready.wait(0.05):
            if stop.is_set():
                raise Stopped
        if self.failure is not None:
            raise self.failure


class LoadedModel(Preparing):
    """A Model of this machine."""

    def __init__(self, checkpoint: Checkpoint, load: Callable[[], Opened]) -> None:
        """`load` may raise Dsv2Error, which is then raised wherever the model is asked for."""
        super().__init__()
        self.checkpoint, self.load = checkpoint, load
        self.made: dict[str, Any] = {}
        self.lock = threading.Lock()

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises Dsv2Error where there is none."""
        with self.lock:
            if "tokenizer" not in self.made:
                self.made["tokenizer"] = self.checkpoint.tokenizer()
            tokenizer: Tokenizer = self.made["tokenizer"]
            return tokenizer

    def prepare(self) -> None:
        opened = self.load()

        from dsv2cli.engine.session import Session

        self.made |= {"opened": opened, "session": Session(opened.runner, self.tokenizer, opened.store)}

    def session(self, stop: threading.Event) -> Session:
        self.wait(stop)
        session: Session = self.made["session"]
        return session

    @property
    def name(self) -> str:
        return self.checkpoint.name

    @property
    def place(self) -> str:
        opened: Opened | None = self.made.get("opened")
        if opened is None:
            return "loading"
        return f"{opened.runner.device}, {str(opened.runner.dtype).removeprefix('torch.')}"

    @property
    def limit(self) -> int:
        return self.checkpoint.config.max_position_embeddings

    @property
    def held_bytes(self) -> int:
        session: Session | None = self.made.get("session")
        return 0 if session is None else len(session.cached_ids) * session.scheduler.pool.bytes_per_token()

    def result(self) -> Result:
        return Result()

    def count(self, messages: list[Message]) -> int:
        return len(self.tokenizer.encode_chat(messages))

    def length(self, text: str) -> int:
        return len(self.ids(text))

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_bos=False)

    @property
    def counts_at_once(self) -> bool:
        return "tokenizer" in self.made

    def check(self, *texts: str) -> None:
        self.tokenizer.refuse_too_long(*texts)

    def remember(self, path: Path) -> str:
        session: Session = self.made["session"]
        if session.cached_ids:
            return ""
        from dsv2cli.engine import latents
        from dsv2cli.run import page_store

        identity = page_store.identity(self.checkpoint.folder, session.runner)
        why = latents.load_cache(path, session, identity)
        return "" if why == "none was saved" else why

    def keep(self, path: Path) -> None:
        session: Session | None = self.made.get("session")
        if session is None or not session.cached_ids:
            return
        from dsv2cli.engine import latents
        from dsv2cli.run import page_store

        latents.save_cache(path, session, page_store.identity(self.checkpoint.folder, session.runner))

    def complaint(self) -> Dsv2Error | None:
        opened: Opened | None = self.made.get("opened")
        return None if opened is None or opened.store is None else opened.store.complaint()


@dataclass
class Talk:
    """A conversation, how it is sampled, and where it is kept."""

    model: Model
    request: Request
    screen: Screen
    journal: Journal
    on_overflow: opt.Overflow = "stop"
    result: Result | None = None  # of the last answer
    keep: bool = True  # whether it is saved
    files: list[Attachment] = field(default_factory=list)  # to put before the next message
    kept_files: str = ""  # those of a message that is edited
    draft: str = ""  # what the next prompt begins with
    behind: str | None = None  # where the next message goes, if not behind the last one: it is an edited one
    at_first: Request | None = None  # the settings that the program was started with
    stop: threading.Event = field(default_factory=threading.Event)
    began_reading: float = 0.0  # when the prompt was begun to be read
    cache_of: str = ""  # the talk whose saved cache is to be looked for

    @property
    def name(self) -> str:
        """The talk's name, once it has a file."""
        path = self.journal.path
        if path is None or self.journal.file is None:
            return ""
        return path.stem if path.parent == places.sessions() else str(path)

    @property
    def attached(self) -> str:
        """The files that go before the next message, as they will stand there."""
        return self.kept_files + "".join(each.shown for each in self.files)

    def count(self, messages: list[Message]) -> int | None:
        """How many tokens they take, where that is known."""
        return self.model.count(messages) if messages else 0

    def full(self, messages: list[Message], spare: int = 0) -> bool:
        """Whether they leave no room for so many more tokens, as far as that is known."""
        limit = self.model.limit
        tokens = None if limit is None else self.count(messages)
        return limit is not None and tokens is not None and tokens + spare >= limit

    @property
    def spare(self) -> int:
        """Tokens kept free for an answer when old turns are left out."""
        return min(SPARE, (self.model.limit or 4 * SPARE) // 4)

    def cost(self, file: Attachment) -> str:
        """What an attachment takes, in a line."""
        tokens = self.model.length(file.shown)
        more = "" if tokens is None else f", {tokens:,} tokens"
        return f"{file.name}: {len(file.text.encode()):,} bytes{more}"

    # A message and its answer.

    def say(self, text: str) -> None:
        """Send a message and show the answer. One that gets no word is back at the prompt, with its files.

        Raises UsageError for one that is too long or names a file that can not be read.
        """
        from dsv2cli.cli.attach import mentioned

        behind, files, kept, node = self.behind, self.files, self.kept_files, None
        failure: BaseException | None = None
        try:
            named = mentioned(text)
            before = kept + "".join(each.shown for each in [*files, *named])
            self.model.check(before + text)
            for each in named:
                self.screen.note(self.cost(each))
            was = self.journal.head
            parent = self.make_room(was if behind is None else behind, before + text)
            node = self.journal.add("user", text, parent, files=before)
            self.files, self.behind, self.kept_files = [], None, ""
            answered = self.answer(node)
        except (Dsv2Error, Stopped, KeyboardInterrupt) as error:
            # What was typed is not lost by what is wrong with it.
            if node is None:
                self.draft = text
            failure, answered = error, node is None or self.journal.head != node.id
        if node is not None and not answered:
            self.take_back(node, was)
            self.files, self.behind, self.kept_files = files, behind, kept
        if isinstance(failure, Dsv2Error):
            raise failure

    def take_back(self, node: Node, head: str) -> None:
        """A message that had no answer returns to where it was typed, and we to where we were."""
        self.journal.keep_draft("\n".join(filter(None, [node.text, self.journal.draft])))
        self.journal.move(head)
        self.draft = node.text
        self.screen.note("no answer; your message is back at the prompt")

    def answer(self, asked: Node, onto: Node | None = None) -> bool:
        """Let the model answer a message, or go on with an answer; whether it said a word.

        A part is kept where it is interrupted. Raises Dsv2Error where the model can not, with what it said
        till then kept, and Stopped's message taken back by whoever asked.
        """
        seed = self.seed()
        node, failure = onto, None
        before, head = "" if onto is None else onto.text, self.journal.head
        result = self.model.result()
        try:
            session = self.model.session(self.stop)
            self.remember()
            request = replace(self.request, seed=seed)
            messages = self.journal.messages(asked.id)
            if node is None:
                node = self.journal.add("assistant", "", asked.id, **self.settings(seed))
            for piece in session.reply(messages, request, result, before, self.reading):
                if piece:
                    self.journal.more(node, piece)
                    self.screen.piece(piece)
                    self.screen.status(rate(result))
                if self.stop.is_set():
                    break
        except (Stopped, KeyboardInterrupt):
            self.stop.set()
        except Dsv2Error as error:
            failure = error
        finally:
            self.screen.end()
            self.screen.status("")
            if node is not None:
                ended = result.finish_reason or ("error" if failure else "interrupted")
                self.journal.end(node, ended, **counts(result))
        if node is not None and not node.text.strip():
            self.journal.move(head)
        if failure is not None:
            raise failure
        if trouble := self.model.complaint():
            self.screen.show_error(trouble)
        self.result = result
        return node is not None and node.text.strip() != before.strip()

    def seed(self) -> int:
        """Of the next answer: all follow from the one that was given, and no two are alike."""
        return self.seed_of(sum(node.role == "assistant" for node in self.journal.nodes.values()))

    def seed_of(self, given: int) -> int:
        """Of the answer after so many others."""
        return (self.request.seed + given * STRIDE) % 2**64

    def settings(self, seed: int) -> dict[str, Any]:
        """What the record says of how an answer was made."""
        settings = self.request.chosen()
        settings.pop("seed", None)
        return {"model": self.model.name, "settings": settings, "seed": seed}

    def reading(self, done: int, total: int) -> None:
        """Told between two parts of the prompt, or while nothing is known of it. Raises Stopped."""
        if self.stop.is_set():
            raise Stopped
        if not total:
            self.screen.status("waiting for the server")
            return
        now = time.monotonic()
        self.began_reading = self.began_reading if done else now
        spent = now - self.began_reading
        left = f" \u00b7 {spent * (total - done) / done:.0f} s left" if done and spent > 0.5 else ""
        self.screen.status(f"reading {done:,} of {total:,} tokens{left}")

    # A context that is full.

    def make_room(self, parent: str, text: str) -> str:
        """Where a message behind `parent` would leave too little of the context for an answer, do what was
        chosen about the turns before it; gives what it then stands behind.

        Raises UsageError where that can not help, or is to stop.
        """
        message, limit = {"role": "user", "content": text}, self.model.limit
        if limit is None or (tokens := self.count([*self.journal.messages(parent), message])) is None:
            return parent  # a server that tells nothing says so when it is too much
        if tokens + self.spare < limit:
            return parent
        lasting = [each for each in self.journal.messages(parent) if each["role"] == "system"]
        alone = self.count([*lasting, message]) or 0
        said = [node for node in self.journal.said(parent) if node.role == "user"]
        if alone >= limit or (not said and tokens >= limit):
            why = f"this model's context holds {limit:,} tokens"
            what = f"The message has {alone:,} tokens and leaves no room for an answer"
            raise UsageError(what, why=why, fix="shorten it, or attach less")
        if not said or alone + self.spare >= limit:
            return parent
        choice = self.on_overflow
        if choice == "ask":
            choice = self.screen.ask_overflow(limit)
        if choice == "stop":
            if tokens < limit:
                return parent
            raise UsageError(
                f"The conversation has {tokens:,} tokens and leaves no room for an answer",
                why=f"this model's context holds {limit:,} tokens",
                fix="--on-overflow drop or summarise, or /clear",
            )
        if choice == "summarise" and len(said) > 1:
            parent = self.summarise(parent)
        return self.leave_out(parent, message)

    def fitting(self, messages: list[Message]) -> list[Message]:
        """Messages of somebody's own; of a full context without the oldest turns, where that was chosen."""
        first = messages[0]["role"] == "system"
        while self.on_overflow in ("drop", "summarise") and self.full(messages, self.spare):
            turns = [i for i, each in enumerate(messages) if each["role"] == "user"]
            if len(turns) < 2:
                break
            messages = messages[:first] + messages[turns[1] :]
        return messages

    def leave_out(self, parent: str, message: Message) -> str:
        """Send no more of the oldest turns than leaves room for a message; the record keeps them."""
        said, dropped = self.journal.said(parent), list[Node]()
        keep = self.journal.messages(parent)[: -len(said) or None]
        while said and self.full([*keep, *(node.message for node in said), message], self.spare):
            end = next((i for i, node in enumerate(said) if i and node.role == "user"), len(said))
            dropped, said = dropped + said[:end], said[end:]
        if not dropped:
            return parent
        turns = [node for node in dropped if node.role == "user"]
        first = ", ".join(repr(shortened(node.text, 40)) for node in turns[:3])
        more = ", \u2026" if len(turns) > 3 else ""
        self.screen.note(f"the context is full: left out the {len(turns)} oldest turns ({first}{more})")
        return self.journal.add("left out", "", parent, upto=dropped[-1].id).id

    def summarise(self, parent: str) -> str:
        """Let the model write a summary, which is sent in the place of all turns but the last.

        Whatever goes wrong meanwhile, the record is as it was. Raises Stopped.
        """
        said = self.journal.said(parent)
        last = max(i for i, node in enumerate(said) if node.role == "user")
        keep = self.journal.messages(parent)[: -len(said)]
        old, ask = said[:last], {"role": "user", "content": SUMMARISE}
        while old and self.full([*keep, *(node.message for node in old), ask], SUMMARY_TOKENS):
            old = old[next((i for i, node in enumerate(old) if i and node.role == "user"), len(old)) :]
        session, result = self.model.session(self.stop), self.model.result()
        self.remember()
        request = replace(self.request.having(max_new_tokens=SUMMARY_TOKENS), seed=self.seed())
        text = ""
        for piece in session.reply(
            [*keep, *(node.message for node in old), ask], request, result, "", self.reading
        ):
            text += piece
            self.screen.status(f"summarising: {rate(result)}")
            if self.stop.is_set():
                raise Stopped
        self.screen.status("")
        if not text.strip():
            return parent
        self.screen.note(f"summary: {text.strip()}")
        return self.journal.add("summary", text.strip(), parent, upto=said[last - 1].id).id

    # Where it is kept.

    def new_path(self) -> Path:
        """A file for a new talk, named by the time of day."""
        return places.sessions() / f"{time.strftime('%Y-%m-%d-%H%M%S')}.jsonl"

    def begin(self, keep: bool) -> None:
        """A new talk, whose file comes with its first message."""
        system, self.keep = self.journal.system, keep
        if self.journal.draft:  # what waits is sent in the new one
            self.journal.keep_draft("")
        self.journal.close()
        self.journal = journals.new(self.new_path() if keep else None, self.screen.show_error)
        self.result, self.files, self.behind, self.cache_of, self.kept_files = None, [], None, "", ""
        if system:
            self.set_system(system)

    def resume(self, path: Path, keep: bool | None = None, shared: bool = False) -> None:
        """Go on with a saved talk, or with a list of messages, of which a new talk is made.

        Raises Locked where it is open elsewhere, Dsv2Error where it can not be read.
        """
        keep = self.keep if keep is None else keep
        journal = self.opened(path, keep, shared)
        if self.journal.draft:
            self.journal.keep_draft("")
        self.journal.close()
        self.keep = keep
        self.journal, self.draft = journal, journal.draft
        self.result, self.files, self.behind, self.kept_files = None, [], None, ""
        self.cache_of = path.stem if path.parent == places.sessions() and not shared else ""
        if journal.damaged:
            self.screen.note(f"{path.name}: damaged, {journal.damaged} lines were passed over")
        on = f", on branch {journal.branch}" if len(journal.branches) > 1 else ""
        self.screen.note(f"{path.stem}: {len(journal.turns())} turns{on}")
        last = journal.way()[-2:]
        if last and last[-1].role == "assistant":
            self.screen.exchange(*(node.text for node in last))

    def opened(self, path: Path, keep: bool, shared: bool) -> Journal:
        """The record of a saved talk; what an earlier version saved, or a list of messages, becomes one."""
        tell = self.screen.show_error
        if path.suffix == ".jsonl":
            if keep:
                return journals.open_talk(path, tell, shared)
            journal = journals.read(path, tell)
            journal.write_anew()  # in case that it is saved after all
            return journal
        saved = store.load(path)
        journal = journals.new(None, tell)
        journals.replay(saved.branches, saved.branch, journal)
        if saved.pending:
            journal.keep_draft(saved.pending)
        if keep:
            inside = path.parent == places.sessions()
            journal.path = path.with_suffix(".jsonl") if inside else self.new_path()
            journal.flush()
        return journal

    def set_system(self, text: str) -> None:
        """What the model is told first, from here on."""
        if self.journal.system != text:
            self.journal.add("system", text)

    def remember(self) -> None:
        """Take over the cache that was saved beside a talk that is gone on with, once."""
        name, self.cache_of = self.cache_of, ""
        if name and (why := self.model.remember(cache_path(name))):
            self.screen.note(f"the saved cache is not used: {why}")

    def save_cache(self) -> None:
        """Keep the latents too, when leaving; not where the text itself could not be kept."""
        path = self.journal.path
        inside = path is not None and path.parent == places.sessions() and not self.journal.shared
        if not inside or self.journal.waiting:
            return
        try:
            self.model.keep(cache_path(self.name))
        except Dsv2Error as error:
            self.screen.show_error(error)


def clear_lost_caches() -> None:
    """Caches of talks that are gone take room for nothing."""
    known = places.session_names()
    for path in places.sessions().glob("*.safetensors"):
        if path.stem not in known:
            with contextlib.suppress(OSError):
                path.unlink()


def cache_path(name: str) -> Path:
    """Where the cache of a talk lies."""
    return places.sessions() / f"{name}.safetensors"


def counts(result: Result) -> dict[str, Any]:
    """What the record says of how an answer went."""
    return {"prompt_tokens": result.prompt_length, "generated_tokens": result.length}


def rate(result: Result) -> str:
    """How it is going, for the line below the text."""
    speed = result.decode_tokens_per_second
    return f"{result.length:,} {result.unit}" + (f" \u00b7 {speed:.1f} tok/s" if speed else "")


def shortened(text: str, most: int = 60) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "\u2026"
