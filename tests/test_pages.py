"""Who has which pages: against a model of dictionaries, in ten thousand operations."""

from __future__ import annotations

import random

import pytest

from dsv2cli.engine.pages import BEGINNING, Full, Pages, Part, Sequence, names_of
from dsv2cli.formats import PAGE
from dsv2cli.model.pool import pages_for


class Written:
    """What a pool would hold: for each page and place the token that was written there last."""

    def __init__(self):
        self.tokens = {}

    def write(self, sequence, at, token):
        self.tokens[sequence.pages[at // PAGE], at % PAGE] = token

    def copy(self, source, target):
        for place in range(PAGE):
            self.tokens[target, place] = self.tokens.get((source, place))

    def read(self, sequence):
        return [self.tokens[sequence.pages[at // PAGE], at % PAGE] for at in range(sequence.length)]


@pytest.mark.parametrize("keep", [None, 0, 3])
def test_every_sequence_reads_its_own_tokens_whatever_others_do(keep):
    numbers, book, memory = random.Random(5), Pages(16, keep), Written()
    held: list[tuple[Sequence, list[int]]] = []  # and what it should hold
    full = parts = 0
    for _ in range(10_000):
        what = numbers.choice(["new", "grow", "grow", "grow", "fork", "truncate", "end", "find"])
        if what == "new" or not held:
            held.append((Sequence(book), []))
            continue
        sequence, tokens = held[numbers.randrange(len(held))]
        if what == "grow":
            new = [numbers.randrange(3) for _ in range(numbers.choice([1, 1, 5, PAGE, 200]))]
            try:
                sequence.make_room(len(tokens) + len(new), memory.copy)
            except Full:
                full += 1
                sequence.truncate(numbers.randrange(len(tokens) + 1))
                del tokens[sequence.length :]
                continue
            for i, token in enumerate(new):
                memory.write(sequence, len(tokens) + i, token)
            tokens += new
            sequence.length = len(tokens)
            names = names_of(tokens)
            for i, page in enumerate(sequence.pages):
                before = names[i - 1] if i else BEGINNING
                book.show(page, Part(before, tokens[PAGE * i : PAGE * (i + 1)], True))
                if i < len(names):
                    book.call(page, names[i])
        elif what == "fork":
            length = numbers.randrange(len(tokens) + 1)
            held.append((sequence.fork(length), tokens[:length]))
        elif what == "truncate":
            sequence.truncate(numbers.randrange(len(tokens) + 1))
            del tokens[sequence.length :]
        elif what == "find":
            names = names_of(tokens)[: numbers.randrange(3)]
            pages = book.find(names)
            for page in pages:
                book.hold(page)
            found = Sequence(book, 0, list(pages), PAGE * len(pages))
            before = names_of(tokens)[len(pages) - 1] if pages else BEGINNING
            page, count = book.find_part(Part(before, tokens[found.length :][:PAGE], True))
            if count:
                book.hold(page)
                found.pages.append(page)
                found.length += count
                parts += 1
            held.append((found, tokens[: found.length]))
        else:
            sequence.end()
            held.remove((sequence, tokens))
        if len(held) > 12:
            held.pop(0)[0].end()
        for each, wanted in held:
            assert memory.read(each) == wanted
            assert len(each.pages) >= pages_for(each.length)
        owners = [page for each, _ in held for page in each.pages]
        assert all(book.holders[page] == owners.count(page) for page in owners)
        assert book.held == len(set(owners)) and book.available == 16 - book.held
        assert not set(book.free) & set(owners) and not set(book.kept) & set(owners)
        assert keep is None or len(book.kept) <= keep
    assert full > 50 < parts, "a pool that is never full, and nothing that is found, prove nothing"
    for each, _ in held:
        each.end()
    assert book.held == 0 and len(book.free) + len(book.kept) == book.touched


def test_the_latest_used_is_kept_for_longest():
    book = Pages(3)
    for number in range(3):
        book.call(page := book.take(), bytes([number]))
        book.drop(page)
    book.hold(book.find([b"\0"])[0])
    book.drop(book.find([b"\0"])[0])
    book.take()
    assert not book.find([b"\1"]) and book.find([b"\0"]) and book.find([b"\2"])
    with pytest.raises(Full):
        for _ in range(3):
            book.take()


def test_a_name_stands_for_all_that_comes_before():
    ids = [*range(3 * PAGE)]
    assert len(set(names_of(ids))) == 3 and names_of(ids + [1]) == names_of(ids)
    assert names_of([9, *ids[1:]])[2] != names_of(ids)[2] and names_of(ids[:-1]) == names_of(ids)[:2]
