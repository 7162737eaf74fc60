"""Files of a hub into a folder, several at once, resumed where they stopped, and checked.

A file grows as NAME.part and gets its name when its length and hash are those that were published; whoever
is killed leaves a beginning that the next run goes on with. Bytes come over plain HTTP, which HF_ENDPOINT and
proxies lead where they should, and which can be resumed at any byte; no code but ours waits for it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import os
import queue
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx2

from dsv2cli.errors import Dsv2Error
from dsv2cli.hubs.remote import (
    AGAIN_LATER,
    LONGEST_WAIT,
    Listing,
    RemoteFile,
    Tell,
    explained,
    patience,
    retry_after,
)
from dsv2cli.outside import STALL, in_units, reason

WIDTH = 4  # files at once
FRUITLESS = 5  # tries of a file that bring nothing, one after the other
BLOCK = 2**18  # bytes that are read at once: they stay in the core's cache
TRICKLE = 1024  # bytes in the time of a stall are none
REDIRECTS = 5
PART = ".part"
SECRETS = ("authorization", "cookie")

Progress = Callable[[int, int], None]


class Broken(Exception):
    """A try that ended too soon: `wait` is how long the server asks to wait, `wrong` says that it answered
    with something else than the file.
    """

    def __init__(
        self, why: str, wait: float | None = None, stalled: bool = False, wrong: bool = False
    ) -> None:
        super().__init__(why)
        self.wait, self.stalled, self.wrong = wait, stalled, wrong


class Download:
    """The files of a listing on their way into the folder `stage`, which is there.

    At most `window` of them lie there at once, where it is given: `drop` makes room for the next.
    """

    def __init__(
        self,
        listing: Listing,
        stage: Path,
        tell: Tell,
        progress: Progress | None = None,
        window: int | None = None,
        stall: float = STALL,
    ) -> None:
        self.listing, self.stage, self.tell = listing, stage, tell
        self.progress, self.stall = progress, stall
        self.todo = list(listing.files)
        self.total, self.done = listing.bytes, 0
        self.lock = threading.Condition()
        self.width = WIDTH  # files that may come at once; fewer after a stall
        self.room = window if window is not None else len(self.todo)
        self.coming = 0
        self.finished: dict[str, str] = {}  # name -> SHA-256
        self.failure: BaseException | None = None
        self.stopped = False
        self.threads: list[threading.Thread] = []
        # For 4 GB httpx2 takes 7 s of a core, this 1 s.
        trust = urllib.request.HTTPSHandler(context=httpx2.create_ssl_context())
        self.opener = urllib.request.build_opener(NoRedirect, trust)

    def start(self) -> None:
        """Begin, in the background."""
        for _ in range(min(self.width, len(self.todo))):
            thread = threading.Thread(target=self.work, daemon=True)
            thread.start()
            self.threads.append(thread)

    def wait(self, names: Iterable[str] | None = None) -> None:
        """Until these files, or all, are there and checked. Raises Dsv2Error, and what stops the program."""
        wanted = {file.name for file in self.listing.files} if names is None else set(names)
        with self.lock:
            while not wanted <= self.finished.keys():
                if self.failure is not None:
                    raise self.failure
                self.lock.wait(0.2)  # short, so that Ctrl-C is heard

    def drop(self, name: str) -> None:
        """Remove a file that is there, so that another may come."""
        (self.stage / name).unlink(missing_ok=True)
        with self.lock:
            self.room += 1
            self.lock.notify_all()

    def stop(self) -> None:
        """End what is under way; what has come is kept."""
        with self.lock:
            self.stopped = True
            self.lock.notify_all()
        for thread in self.threads:
            thread.join(0.5)  # one that waits for a byte ends with the program

    def work(self) -> None:
        """What a thread does: one file after the other."""
        while (file := self.next_file()) is not None:
            try:
                digest = self.fetch(file)
            except BaseException as error:
                with self.lock:
                    self.failure = self.failure or error
                    self.stopped = True
                    self.lock.notify_all()
                return
            with self.lock:
                self.coming -= 1
                self.finished[file.name] = digest
                self.lock.notify_all()

    def next_file(self) -> RemoteFile | None:
        """The next to fetch, when it may; None where there is none."""
        with self.lock:
            while self.todo and not self.stopped:
                if self.room > 0 and self.coming < self.width:
                    self.room -= 1
                    self.coming += 1
                    return self.todo.pop(0)
                self.lock.wait()
        return None

    def count(self, number: int) -> None:
        """So many bytes more, or fewer where they have to come again."""
        with self.lock:
            self.done += number
            if self.progress is not None:
                self.progress(self.done, self.total)

    def fetch(self, file: RemoteFile) -> str:
        """Have one file in the folder, checked; gives its SHA-256. Raises Dsv2Error."""
        final, part = self.stage / file.name, self.stage / f"{file.name}{PART}"
        try:
            if final.exists():  # from an earlier run: checked then, and once more now
                final.rename(part)
            for again in (False, True):
                with Growing(part, file, self.count) as growing:
                    self.fill(file, growing)
                    found, digest = growing.finish()
                if found == file.hash:
                    part.rename(final)
                    return digest
                part.unlink()
                self.count(-file.size)
                if not again:
                    self.tell(f"{file.name} is not what was published: fetching it once more")
        except OSError as error:
            raise self.disk_error(file, error) from None
        host = urlsplit(file.url).netloc
        raise Dsv2Error(
            f"{host} gives another {file.name} than was published",
            why=f"its hash is {found}, not {file.hash}",
            fix="another --source, or HF_ENDPOINT unset",
        )

    def disk_error(self, file: RemoteFile, error: OSError) -> Dsv2Error:
        """What to say where the disk does not take a file."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            left = f"{in_units(self.total - self.done)} are still to come"
            fix = "make room; the same command goes on where it stopped"
            return Dsv2Error(f"The disk of {self.stage.parent} is full", why=left, fix=fix)
        return Dsv2Error(
            f"{self.stage / file.name} could not be written", why=reason(error), fix="check the disk"
        )

    def fill(self, file: RemoteFile, growing: Growing) -> None:
        """Let a file grow to its length, in as many tries as bring something. Raises Dsv2Error, OSError."""
        host = urlsplit(file.url).netloc
        fruitless = wrong = best = 0
        while growing.size < file.size:
            try:
                self.stream(file, growing)
                continue
            except Broken as broken:
                trouble = broken
            if self.stopped:
                raise KeyboardInterrupt
            fruitless = 0 if growing.size > best else fruitless + 1
            best = max(best, growing.size)
            if trouble.wrong and (wrong := wrong + 1) % 2 == 0:
                growing.begin_anew()  # perhaps it is what we have that is not right
            if fruitless >= FRUITLESS or wrong >= FRUITLESS:
                fix = "the same command goes on where it stopped, when the network is back"
                raise Dsv2Error(f"{file.name} stopped coming from {host}", why=str(trouble), fix=fix)
            if trouble.stalled:
                self.narrow(file)
            wait = patience(None, 0 if trouble.wrong else fruitless) if trouble.wait is None else trouble.wait
            if wait >= 1 and trouble.wait is not None:
                self.tell(f"{host} asks to wait {wait:.0f} s ({trouble})")
            self.sleep(wait)

    def sleep(self, seconds: float) -> None:
        """Raises KeyboardInterrupt where the download is stopped meanwhile."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if self.stopped:
                raise KeyboardInterrupt
            time.sleep(min(left, 0.2))

    def narrow(self, file: RemoteFile) -> None:
        """After a stall: fewer at once, and new connections."""
        with self.lock:
            narrower = self.width > 1
            self.width = max(1, self.width // 2)
            width = self.width
        host = urlsplit(file.url).netloc
        fewer = f", with {width} at once" if narrower else ""
        self.tell(f"no byte of {file.name} from {host} for {self.stall:g} s: trying a new connection{fewer}")

    def stream(self, file: RemoteFile, growing: Growing) -> None:
        """One try: what is missing, from where the file ends. Raises Broken, Dsv2Error and OSError."""
        with self.answer(file, growing.size) as response:
            self.take(response, file, growing)

    @contextlib.contextmanager
    def answer(self, file: RemoteFile, begin: int) -> Iterator[Any]:
        """The response that holds a file's bytes from `begin` on, wherever it is redirected to: what is
        secret goes to the first host only. Raises Broken, and Dsv2Error for an address that may not be.
        """
        url, headers = file.url, {**self.listing.headers, "Accept-Encoding": "identity"}
        if begin:
            headers["Range"] = f"bytes={begin}-"
        for _ in range(REDIRECTS):
            response = self.open(url, headers)
            if response.status not in (301, 302, 303, 307, 308):
                with response:
                    yield response
                return
            response.close()
            target = urljoin(url, response.headers.get("Location", ""))
            old, new = urlsplit(url), urlsplit(target)
            if new.scheme not in ("http", "https") or (old.scheme == "https" and new.scheme == "http"):
                what = f"{old.netloc} leads to {target[:80]}"
                raise Dsv2Error(what, why="that is no https address", fix="another --source")
            if origin(url) != origin(target):
                headers = {key: value for key, value in headers.items() if key.lower() not in SECRETS}
            url = target
        raise Broken(f"more than {REDIRECTS} redirects")

    def open(self, url: str, headers: dict[str, str]) -> Any:
        """An answer, whatever its status. Raises Broken where none comes."""
        try:
            return self.opener.open(urllib.request.Request(url, headers=headers), timeout=self.stall)
        except urllib.error.HTTPError as error:
            return error
        except TimeoutError:
            raise Broken("no answer came", stalled=True) from None
        except urllib.error.URLError as error:
            cause = error.reason
            stalled = isinstance(cause, TimeoutError)
            raise Broken(
                reason(cause) if isinstance(cause, OSError) else str(cause), stalled=stalled
            ) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Broken(reason(error)) from None

    def take(self, response: Any, file: RemoteFile, growing: Growing) -> None:
        """Read an answer to its end, or to the file's. Raises Broken, Dsv2Error and OSError."""
        status, headers = response.status, response.headers
        if status in AGAIN_LATER:
            wait = retry_after(headers)
            if wait is not None and wait > LONGEST_WAIT:
                why = f"it answered {status}, and asks to wait {wait:.0f} s"
                raise Dsv2Error(f"{urlsplit(file.url).netloc} gives no more now", why=why, fix="try later")
            raise Broken(f"it answered {status}", wait)
        if status in (401, 403) and origin(response.url) != origin(file.url):
            raise Broken(
                f"{urlsplit(response.url).netloc} answered {status}"
            )  # its address is good for a time
        if status not in (200, 206, 416):
            refused, of = Refused(status, headers), self.listing
            raise explained(refused, of.reference, of.endpoint, of.withheld)
        if status == 416:
            raise Broken("the server has no such part", wrong=True)
        if headers.get("Content-Encoding", "identity") != "identity":
            raise Broken("the server compressed it, which it was asked not to", wrong=True)
        if status == 206 and not begins_at(response, growing.size, file.size):
            raise Broken("the server sent another part than it was asked for", wrong=True)
        if status == 200:
            if headers.get("Content-Length", str(file.size)) != str(file.size):
                why = f"the server gives {headers['Content-Length']} bytes, and {file.size} were published"
                raise Broken(why, wrong=True)
            growing.begin_anew()
        self.read(response, file, growing)
        if growing.size < file.size:
            raise Broken(f"the connection ended after {growing.size:,} of {file.size:,} bytes")

    def read(self, response: Any, file: RemoteFile, growing: Growing) -> None:
        """Let a file grow by all that comes. Raises Broken, OSError."""
        since, before = time.monotonic(), growing.size
        while block := received(response):
            if self.stopped:
                raise Broken("stopped")
            if growing.size + len(block) > file.size:
                growing.begin_anew()
                raise Broken(f"more came than the {file.size:,} bytes that were published", wrong=True)
            growing.add(block)
            if (now := time.monotonic()) - since > self.stall:
                if growing.size - before < TRICKLE and growing.size < file.size:
                    raise Broken("hardly a byte came", stalled=True)
                since, before = now, growing.size


def received(response: Any) -> bytes:
    """Some bytes of an answer, as they come; none at its end. Raises Broken."""
    try:
        block: bytes = response.read1(BLOCK)
    except TimeoutError:
        raise Broken("no byte came", stalled=True) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Broken(reason(error)) from None
    return block


class Refused(Exception):
    """An answer with a status that ends the download."""

    def __init__(self, status: int, headers: Any) -> None:
        super().__init__(f"it answered {status}")
        self.status_code, self.headers = status, headers


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Lets an answer that leads elsewhere be seen."""

    def redirect_request(self, *_: Any) -> None:
        return None


def origin(url: str) -> str:
    """Scheme and host of an address."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def begins_at(response: Any, begin: int, size: int) -> bool:
    """Whether a partial answer is the part from `begin` on of a file of this size."""
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", ""))
    return match is not None and int(match[1]) == begin and match[3] in (str(size), "*")


class Growing:
    """A file that is written at its end, and hashed meanwhile by a thread of its own."""

    def __init__(self, path: Path, file: RemoteFile, count: Callable[[int], None]) -> None:
        self.path, self.file, self.count = path, file, count
        self.size = 0

    def __enter__(self) -> Growing:
        """What an earlier run left is read first. Raises OSError."""
        self.number = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        if os.fstat(self.number).st_size > self.file.size:
            os.ftruncate(self.number, 0)
        self.digests = Digests(self.file)
        offset = 0
        while block := os.pread(self.number, BLOCK, offset):
            self.digests.add(block)
            offset += len(block)
        self.size = offset
        self.count(offset)
        return self

    def __exit__(self, *_: object) -> None:
        self.digests.end()
        os.close(self.number)

    def add(self, block: bytes) -> None:
        """Raises OSError."""
        view = memoryview(block)
        while view:
            view = view[os.write(self.number, view) :]
        self.digests.add(block)
        self.size += len(block)
        self.count(len(block))

    def begin_anew(self) -> None:
        """Forget what has come. Raises OSError."""
        if not self.size:
            return  # ext4 writes a file that was cut short to the disk before it is closed: a second for 4 GB
        os.ftruncate(self.number, 0)
        self.digests.end()
        self.digests = Digests(self.file)
        self.count(-self.size)
        self.size = 0

    def finish(self) -> tuple[str, str]:
        """The hash of the kind that was published, and SHA-256."""
        return self.digests.end()


class Digests:
    """SHA-256 of bytes as they come, and git's SHA-1 where that was published."""

    def __init__(self, file: RemoteFile) -> None:
        self.sha256 = hashlib.sha256()
        self.git = None
        if len(file.hash) == 40:
            self.git = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
        self.blocks = queue.Queue[bytes | None](64)
        self.thread: threading.Thread | None = None

    def add(self, block: bytes) -> None:
        if self.thread is None:
            self.thread = threading.Thread(target=self.work, daemon=True)
            self.thread.start()
        self.blocks.put(block)

    def work(self) -> None:
        while (block := self.blocks.get()) is not None:
            self.sha256.update(block)
            if self.git is not None:
                self.git.update(block)

    def end(self) -> tuple[str, str]:
        """The published kind's, and SHA-256, in hexadecimal; may be asked twice."""
        if self.thread is not None:
            self.blocks.put(None)
            self.thread.join()
            self.thread = None
        digest = self.sha256.hexdigest()
        return (digest if self.git is None else self.git.hexdigest()), digest
