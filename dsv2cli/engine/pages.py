"""Who has which pages of a pool: counted, shared, copied when written, found again, and given up.

Knows numbers only; the latents lie in model/pool.py. A full page of a prompt gets a name that stands for all
its tokens and those before it, so that another prompt which begins alike finds it; and where two prompts part
within a page, the later one begins with a copy of what they share.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from dsv2cli.formats import PAGE
from dsv2cli.model.pool import pages_for

Name = bytes
BEGINNING: Name = b""  # what comes before the first page


MOST_PARTS = 16  # pages with parts behind one name


class Full(Exception):
    """There is no page left, also none that nobody holds."""


def name_of(before: Name, ids: list[int]) -> Name:
    """The name of a full page with these tokens, after the page that is called `before`."""
    return hashlib.sha256(before + array("q", ids).tobytes()).digest()


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many leading items two lists share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def names_of(ids: list[int]) -> list[Name]:
    """Those of all full pages of a prompt, in order."""
    names = list[Name]()
    for at in range(0, len(ids) // PAGE * PAGE, PAGE):
        names.append(name_of(names[-1] if names else BEGINNING, ids[at : at + PAGE]))
    return names


@dataclass(frozen=True)
class Part:
    """What of a page is known to others: its first tokens, and the name of what comes before them. `whole`
    says how they were read (model/step.py's Span).
    """

    before: Name
    ids: list[int]
    whole: bool


class Pages:
    """The pages of one pool. A page is held by sequences, or kept because others may find it, or free.

    Those that nobody holds any more are kept as long as there is room, the latest used for longest.
    """

    def __init__(self, count: int, keep: int | None = None) -> None:
        """`keep` is how many may be kept that nobody holds; by default all."""
        self.count, self.keep = count, count if keep is None else keep
        self.holders: dict[int, int] = {}  # of each page that somebody holds
        self.kept: OrderedDict[int, None] = OrderedDict()  # those that nobody holds, the oldest first
        self.free: list[int] = []
        self.touched = 0  # pages from here on were never used
        self.name_of: dict[int, Name] = {}
        self.page_of: dict[Name, int] = {}
        self.part_of: dict[int, Part] = {}
        self.after: dict[
            Name, OrderedDict[int, None]
        ] = {}  # pages with parts behind a name, the oldest first

    @property
    def available(self) -> int:
        """How many can be taken now."""
        return self.count - len(self.holders)

    @property
    def held(self) -> int:
        """How many somebody holds."""
        return len(self.holders)

    def take(self) -> int:
        """A page for one holder, of whose content nothing is known. Raises Full."""
        if self.free:
            page = self.free.pop()
        elif self.touched < self.count:
            page, self.touched = self.touched, self.touched + 1
        elif self.kept:
            page = next(iter(self.kept))
            self.forget(page)
            self.free.pop()
        else:
            raise Full
        self.holders[page] = 1
        return page

    def forget(self, page: int) -> None:
        """Give up a page that nobody holds: it is free."""
        del self.kept[page]
        if page in self.name_of:
            del self.page_of[self.name_of.pop(page)]
        self.hide(page)
        self.free.append(page)

    def hide(self, page: int) -> None:
        """Let the part of a page be found no more."""
        part = self.part_of.pop(page, None)
        if part is not None:
            others = self.after[part.before]
            del others[page]
            if not others:
                del self.after[part.before]

    def hold(self, page: int) -> None:
        """One more holder for a page that is held or kept."""
        self.kept.pop(page, None)
        self.holders[page] = self.holders.get(page, 0) + 1

    def drop(self, page: int) -> None:
        """One holder fewer."""
        self.holders[page] -= 1
        if self.holders[page]:
            return
        del self.holders[page]
        if page in self.name_of or page in self.part_of:
            self.kept[page] = None
            while len(self.kept) > self.keep:
                self.forget(next(iter(self.kept)))
        else:
            self.free.append(page)

    def shared(self, page: int, place: int) -> bool:
        """Whether it may not be written from this place on: others hold it too, or know what is there."""
        known = page in self.part_of and place < len(self.part_of[page].ids)
        return self.holders[page] > 1 or page in self.name_of or known

    def call(self, page: int, name: Name) -> None:
        """Let a full page be found by its name; where another page has it already, that one is."""
        if name not in self.page_of and page not in self.name_of:
            self.name_of[page], self.page_of[name] = name, page

    def show(self, page: int, part: Part) -> None:
        """Let the first tokens of a page be found by a prompt that goes on with some of them."""
        if page in self.part_of or not part.ids:
            return
        others = self.after.setdefault(part.before, OrderedDict())
        others[page], self.part_of[page] = None, part
        if len(others) > MOST_PARTS:
            oldest = next(iter(others))
            self.hide(oldest)
            if oldest in self.kept and oldest not in self.name_of:
                self.forget(oldest)

    def find_part(self, wanted: Part) -> tuple[int, int]:
        """The page that begins with most of these tokens, read in the same way, and how many; 0 for none."""
        best = (0, 0)
        for page in self.after.get(wanted.before, ()):
            part = self.part_of[page]
            if part.whole == wanted.whole:
                same = common_prefix(part.ids, wanted.ids)
                best = (page, same) if same > best[1] else best
        return best

    def find(self, names: Iterable[Name]) -> list[int]:
        """The pages with the first of these names, as far as all are there."""
        found = []
        for name in names:
            page = self.page_of.get(name)
            if page is None:
                break
            found.append(page)
        return found


@dataclass
class Sequence:
    """Tokens whose latents are in a pool: its pages in order, and how many tokens are there."""

    book: Pages
    rank: int = 0  # of the pool, in a team that shares out sequences
    pages: list[int] = field(default_factory=list)
    length: int = 0

    def begin_with(self, pages: list[int]) -> None:
        """Let an empty sequence hold these full pages, which are in the pool."""
        for page in pages:
            self.book.hold(page)
        self.pages, self.length = list(pages), PAGE * len(pages)

    def fork(self, length: int | None = None) -> Sequence:
        """Another with the same tokens (the first `length` of them) in the same pages."""
        length = self.length if length is None else min(length, self.length)
        pages = self.pages[: pages_for(length)]
        for page in pages:
            self.book.hold(page)
        return Sequence(self.book, self.rank, pages, length)

    def make_room(self, length: int, copy: Callable[[int, int], None]) -> None:
        """Have pages of its own for the tokens from here up to `length`; `copy(source, target)` is done where
        the one that is to be gone on with is shared. Raises Full; what was taken until then stays.
        """
        last = self.length // PAGE
        place = self.length % PAGE
        if place and last < len(self.pages) and self.book.shared(self.pages[last], place):
            page = self.book.take()
            copy(self.pages[last], page)
            self.book.drop(self.pages[last])
            self.pages[last] = page
        while len(self.pages) < pages_for(length):
            self.pages.append(self.book.take())

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on."""
        self.length = min(length, self.length)
        while len(self.pages) > pages_for(self.length):
            self.book.drop(self.pages.pop())

    def end(self) -> None:
        """Let all pages go."""
        self.truncate(0)
