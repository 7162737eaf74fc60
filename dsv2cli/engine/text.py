"""Tokens to text: decoding, stop strings, drafts, and why an answer ended."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dsv2cli.checkpoint.tokenizer import IncrementalDecoder, Tokenizer
from dsv2cli.engine.request import Request, Result, Token


class StopStrings:
    """Finds stop strings in streamed text, holding back whatever may still turn into one."""

    def __init__(self, stop: Iterable[str]) -> None:
        self.stop = tuple(text for text in stop if text)
        self.held = ""
        self.found = False
        self.hit = ""  # which it was

    def add(self, piece: str) -> str:
        """Text that is safe to show.

        Once a stop string is complete `found` is set, and it and the rest are dropped.
        """
        self.held += piece
        hits = [(at, text) for text in self.stop if (at := self.held.find(text)) >= 0]
        if hits:
            at, self.hit = min(hits, key=lambda hit: hit[0])
            self.found, shown, self.held = True, self.held[:at], ""
            return shown
        keep = max((self.overlap(text) for text in self.stop), default=0)
        cut = len(self.held) - keep
        shown, self.held = self.held[:cut], self.held[cut:]
        return shown

    def overlap(self, text: str) -> int:
        """How many characters at the end of what is held could begin `text`."""
        return next(
            (n for n in range(min(len(text) - 1, len(self.held)), 0, -1) if self.held.endswith(text[:n])), 0
        )

    def finish(self) -> str:
        shown, self.held = self.held, ""
        return shown


class Answer:
    """One row's text as its tokens come: decoding, stop strings, and why it ended. Keeps
    `result` up to date.
    """

    def __init__(self, tokenizer: Tokenizer | None, request: Request, result: Result) -> None:
        self.decoder = IncrementalDecoder(tokenizer) if tokenizer is not None else None
        self.request, self.result = request, result
        self.stops = StopStrings(request.stop)
        self.ended = False

    def add(self, token: Token) -> str:
        """The text that this token makes safe to show."""
        self.result.tokens.append(token)
        end_of_text = token.id in self.request.eos_ids
        piece = self.stops.add("" if end_of_text or self.decoder is None else self.decoder.add(token.id))
        self.result.text += piece
        self.ended = end_of_text or self.stops.found
        if self.ended:
            self.result.finish_reason, self.result.stop = "stop", self.stops.hit
        return piece

    def finish(self) -> str:
        """The text that was held back, when no more tokens come."""
        if self.stops.found:
            return ""
        rest = self.stops.add(self.decoder.finish() if self.decoder is not None else "") + self.stops.finish()
        self.result.text += rest
        return rest


def without_first_blank(pieces: Iterator[str]) -> Iterator[str]:
    """The same text but for one blank that it may begin with: after "Assistant:" the model's first token
    brings one that is not part of the answer.
    """
    started = False
    for piece in pieces:
        yield piece if started else piece.removeprefix(" ")
        started = started or bool(piece)


def look_up(history: list[int], most: int) -> list[int]:
    """What followed the latest earlier place where the last few tokens stood: prompt-lookup drafting (Saxena
    2023).
    """
    for size in (3, 2):
        tail = history[-size:]
        for start in range(len(history) - size - 1, -1, -1):
            if history[start : start + size] == tail:
                return history[start + size : start + size + most]
    return []
