"""Sequences in a runner's pool that a test drives by hand, and answers through the engine's own loop."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv2cli.checkpoint.tokenizer import Tokenizer
from dsv2cli.engine.pages import Pages, Sequence
from dsv2cli.engine.request import Request, Result
from dsv2cli.engine.scheduler import Job, Scheduler
from dsv2cli.formats import PAGE
from dsv2cli.model.pool import pages_for
from dsv2cli.model.step import Span
from dsv2cli.run.runner import Runner

TOKENS = 2048  # of each row, for which a pool has room


class Rows:
    """Some sequences of one pool. What each is to be gone on with comes as a list of ids, in their order."""

    def __init__(self, runner: Runner, count: int = 1, tokens: int = TOKENS) -> None:
        self.runner, self.pool = runner, runner.new_pool(count * PAGE * pages_for(tokens))
        ranks = [row * runner.ranks // count for row in range(count)]
        self.books = [Pages(self.pool.pages) for _ in range(runner.ranks)]
        self.sequences = [Sequence(self.books[rank], rank) for rank in ranks]

    @property
    def lengths(self) -> list[int]:
        return [sequence.length for sequence in self.sequences]

    def spans(self, rows: tuple[list[int], ...], whole: bool) -> list[Span]:
        """Of the rows that have new ids; they are then counted as being in the pool."""
        out = []
        for sequence, ids in zip(self.sequences, rows, strict=True):
            if ids:
                sequence.make_room(sequence.length + len(ids), self.copy_page)
                span = Span(list(sequence.pages), sequence.length, len(ids), whole, sequence.rank)
                out.append(span)
                sequence.length += len(ids)
        return out

    def copy_page(self, source: int, target: int) -> None:
        self.runner.copy_page(self.pool, 0, source, target)

    @torch.inference_mode()
    def scores(self, *rows: list[int], whole: bool = False) -> Tensor:
        """Those after each new token of all rows. [tokens, vocab]"""
        ids = torch.tensor([token for row in rows for token in row], device=self.runner.device)
        return self.runner.logits(self.runner(ids, self.spans(rows, whole), self.pool)).clone()

    @torch.inference_mode()
    def last(self, *rows: list[int], whole: bool = False) -> Tensor:
        """Those after the last new token of each row. [rows, vocab]"""
        ends = torch.tensor([len(row) for row in rows if row]).cumsum(0) - 1
        return self.scores(*rows, whole=whole)[ends]

    @torch.inference_mode()
    def decode(self, *rows: list[int]) -> Tensor:
        """The same by Runner.decode; all rows that have any have equally many. [rows, seq, vocab]"""
        ids = torch.tensor([row for row in rows if row], device=self.runner.device)
        return self.runner.decode(ids, self.spans(rows, False), self.pool).clone()


def scores_of(runner: Runner, ids: list[int]) -> Tensor:
    """After each token of a prompt that is read at once. [tokens, vocab]"""
    return Rows(runner, tokens=len(ids)).scores(ids, whole=True)


def answered(runner: Runner, ids: list[int], request: Request, tokenizer: Tokenizer | None = None) -> Result:
    """What a prompt gets alone."""
    job = Job(ids, request)
    text = "".join(Scheduler(runner, tokenizer).stream(job))
    assert text == job.result.text
    return job.result


def together(runner: Runner, prompts: list[list[int]], request: Request, width: int = 64) -> list[list[int]]:
    """The tokens that prompts get at once."""
    jobs = [Job(ids, request) for ids in prompts]
    return [job.result.token_ids for job in Scheduler(runner, None, width).in_order(jobs)]
