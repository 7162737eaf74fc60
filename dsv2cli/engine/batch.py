"""Many prompts at once: rows of one cache, each with its own request, and a finished row given to the next
prompt.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsv2cli.checkpoint.tokenizer import Tokenizer
from dsv2cli.engine.generate import Answer, pick, prefill
from dsv2cli.engine.grammar import Constraint
from dsv2cli.engine.request import Request, Result, Token
from dsv2cli.engine.sampling import NO_TOKEN, no_numbers, sample_rows, seeded
from dsv2cli.errors import Dsv2Error
from dsv2cli.model.cache import LatentCache
from dsv2cli.run.runner import Runner

END = object()
AHEAD = 8  # prompts a row that may finish before the oldest one


@dataclass
class Job:
    """A prompt and how to continue it; `result` is filled in. The ids must have passed check_prompt."""

    prompt_ids: list[int]
    request: Request
    result: Result = field(default_factory=Result)
    error: str = ""  # why it could not be run, or not to its end: it passes through and keeps its place

    @property
    def ended(self) -> bool:
        return bool(self.error) or bool(self.result.finish_reason)


@dataclass
class Row:
    job: Job
    answer: Answer
    generator: torch.Generator
    constraint: Constraint | None
    history: list[int]
    left: int
    began: float
    first: float = 0.0

    def take(self, scores: Tensor, chosen: int | None = None) -> None:
        """The next token of this row, noted; ends the answer where it is the last.

        `chosen` if it was sampled already. An answer that can not go on ends with its error.

        scores [vocab]
        """
        result, request = self.job.result, self.job.request
        try:
            if chosen == NO_TOKEN:
                raise no_numbers()
            token = (
                pick(scores, request, self.history, self.generator, self.constraint)
                if chosen is None
                else Token(chosen)
            )
        except Dsv2Error as error:
            self.job.error, result.finish_reason, self.answer.ended = error.sentence, "error", True
            return
        now = time.perf_counter()
        self.first = self.first or now
        result.ttft_seconds, result.decode_seconds = self.first - self.began, now - self.first
        self.history.append(token.id)
        self.answer.add(token)
        self.left -= 1
        if self.left == 0 and not self.answer.ended:
            result.finish_reason, self.answer.ended = "length", True
        if self.answer.ended:
            self.answer.finish()


@torch.inference_mode()
def run_samples(runner: Runner, tokenizer: Tokenizer | None, jobs: list[Job]) -> Iterator[Job]:
    """Jobs with one and the same prompt, which is read once; in order, as run_batch."""
    cache = runner.new_cache()
    scores = Rows(runner, tokenizer, cache).read(0, jobs[0])
    rows = Rows(runner, tokenizer, cache.repeated(len(jobs)))
    for i, job in enumerate(jobs):
        rows.begin(i, job, scores, jobs[0].result.prefill_seconds)
    begun = list(jobs)
    while begun:
        if begun[0].ended:
            yield begun.pop(0)
        else:
            rows.step()


@torch.inference_mode()
def run_batch(
    runner: Runner, tokenizer: Tokenizer | None, jobs: Iterable[Job | None], width: int
) -> Iterator[Job]:
    """Finished jobs in the order of `jobs`, `width` of them decoded at once. Each job keeps its own seed.

    None among the jobs says that the next is not there yet, and those that run may go on.
    """
    rows = Rows(runner, tokenizer, runner.new_cache(width))
    waiting, begun = iter(jobs), list[Job]()  # begun: those not yet given back, oldest first
    more = True
    while more or begun:
        while more and len(begun) < AHEAD * width and (i := rows.idle()) is not None:
            job = next(waiting, END)
            more = job is not END
            if not isinstance(job, Job):
                break
            begun.append(job)
            if not job.error:
                rows.cache.reserve(len(job.prompt_ids) + 1)
                rows.begin(i, job, rows.read(i, job), job.result.prefill_seconds)
        while begun and begun[0].ended:
            yield begun.pop(0)
        rows.step()


class Rows:
    """The rows of a cache and who has them; an idle row is carried along in every step
    and remembers nothing.
    """

    def __init__(self, runner: Runner, tokenizer: Tokenizer | None, cache: LatentCache) -> None:
        self.runner, self.tokenizer, self.cache = runner, tokenizer, cache
        self.running: dict[int, Row] = {}

    def idle(self) -> int | None:
        return next((i for i in range(len(self.cache.lengths)) if i not in self.running), None)

    def read(self, i: int, job: Job) -> Tensor:
        """Prefill row `i`; gives the scores for the first token. [vocab]"""
        began = time.perf_counter()
        own = self.cache.row(i) if self.cache.capacity else self.cache
        scores = prefill(self.runner, [job.prompt_ids], own)[0]
        self.cache.lengths[i] = own.lengths[0]
        job.result.prefill_seconds = time.perf_counter() - began
        return scores

    def begin(self, i: int, job: Job, scores: Tensor, prefill_seconds: float) -> None:
        """Take the first token of a job whose prompt is in row `i`. scores [vocab]"""
        job.result.prompt_ids, job.result.prefill_seconds = job.prompt_ids, prefill_seconds
        room = self.runner.config.max_position_embeddings - len(job.prompt_ids)
        left = min(room, job.request.max_new_tokens or room)
        generator = seeded(self.runner.device, job.request.seed)
        answer = Answer(self.tokenizer, job.request, job.result)
        row = Row(
            job,
            answer,
            generator,
            job.request.constraint(),
            list(job.prompt_ids),
            left,
            time.perf_counter() - prefill_seconds,
        )
        row.take(scores)
        if not answer.ended:
            self.running[i] = row

    def step(self) -> None:
        """One token more for every row that has a job."""
        rows = sorted(self.running)
        if not rows:
            return
        ids = torch.tensor([[self.running[i].history[-1]] for i in rows], device=self.runner.device)
        scores = self.runner.decode(ids, self.cache, rows)[:, -1]
        chosen: list[int | None] = [None] * len(rows)
        requests = [self.running[i].job.request for i in rows]
        if self.runner.decodes_ahead and all(
            request.plain and request.sampling == requests[0].sampling for request in requests
        ):
            chosen = sample_rows(
                scores, requests[0].sampling, [self.running[i].generator for i in rows]
            ).tolist()
        for i, row_scores, token_id in zip(rows, scores, chosen, strict=True):
            self.running[i].take(row_scores, token_id)
            if self.running[i].answer.ended:
                del self.running[i]
                self.cache.lengths[i] = 0
