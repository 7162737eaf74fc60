"""Questions through the scheduler: what is read, what is generated, and the row that says what came of each.

Examples that questions have in common are read once, and batches fill up with what comes next.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from dsv2cli.checkpoint.tokenizer import Tokenizer
from dsv2cli.engine.likelihood import Distribution, Reading, likely, readings
from dsv2cli.engine.needle import SPARE, Haystack, hidden
from dsv2cli.engine.request import Request, SamplingParams
from dsv2cli.engine.scheduler import Job, Scheduler
from dsv2cli.errors import Dsv2Error
from dsv2cli.evaluation.question import Question, Rule, Task
from dsv2cli.evaluation.record import Row, packed
from dsv2cli.model.config import DeepseekV2Config

KEPT_PLACES = 4096  # of a text, after which the distributions are kept: that many tell enough
KEPT_ANSWERS = 2048  # the same of a task with choices


@dataclass(frozen=True)
class How:
    """What is alike for all questions of a run."""

    config: DeepseekV2Config
    tokenizer: Tokenizer
    eos_ids: frozenset[int]
    chat: bool = False  # whether a question is a message to a chat model
    window: int = 2048  # tokens of a text that are read at once
    keep: bool = False  # whether distributions are kept, to be compared
    kept: frozenset[str] = frozenset()  # the questions whose answers' first token is kept so
    seed: int = 0


@dataclass
class Work:
    """A question, the jobs that answer it, and what makes a row of them."""

    question: Question
    jobs: list[Job]
    row: Callable[[], Row]

    def result(self) -> Row:
        """Of jobs that have ended. Raises Dsv2Error where the model failed."""
        question = self.question
        known: Row = {"key": question.key, "task": question.task, "subset": question.subset}
        if question.remark:
            known["remark"] = question.remark
        for job in self.jobs:
            if job.failure is not None:  # of the model, and not of the question
                raise job.failure
            if job.error:
                return known | {"error": job.error, "right": False}
        counts = {
            "prompt_tokens": sum(len(job.prompt_ids) for job in self.jobs),
            "reused_tokens": sum(job.result.reused_tokens for job in self.jobs),
            "generated_tokens": sum(len(job.result.tokens) for job in self.jobs if job.listener is None),
        }
        return known | self.row() | counts


def kept_answers(asked: list[Question]) -> frozenset[str]:
    """The keys of questions whose distributions are kept: of each task with choices at most KEPT_ANSWERS."""
    by_task = dict[str, list[str]]()
    for question in asked:
        if question.choices:
            by_task.setdefault(question.task, []).append(question.key)
    return frozenset(key for keys in by_task.values() for key in keys[:: -(-len(keys) // KEPT_ANSWERS)])


def context_ids(how: How, prompt: str) -> list[int]:
    """The tokens of what stands before an answer."""
    if how.chat:
        return how.tokenizer.encode_chat([{"role": "user", "content": prompt}])
    return how.tokenizer.begun(how.tokenizer.encode_plain(prompt))


def continued(how: How, prompt: str, text: str, context: list[int]) -> list[int]:
    """The tokens that `text` adds to a prompt whose own are `context`: those of both together but for as many
    as the prompt has, since the two may share a token.
    """
    if how.chat:
        return how.tokenizer.encode_plain(text)
    whole = how.tokenizer.begun(how.tokenizer.encode_plain(prompt + text))
    return whole[len(context) :] or how.tokenizer.encode_plain(text)


def fitting(how: How, question: Question, room: int) -> tuple[str, list[int], int]:
    """The prompt with as many of its examples as leave `room` in the context, its tokens, and how many they
    are. Raises Dsv2Error where even none is too many.
    """
    for shots in range(len(question.shots), -1, -1):
        prompt = question.prompt(shots, how.chat)
        ids = context_ids(how, prompt)
        if len(ids) + room <= how.config.max_position_embeddings:
            return prompt, ids, shots
    raise Dsv2Error(
        f"the question has {len(ids):,} tokens",
        why=f"with {room:,} for the answer they do not fit into the context of "
        f"{how.config.max_position_embeddings:,}",
    )


def failed(question: Question, error: Dsv2Error) -> Work:
    """A question that can not be asked."""
    return Work(question, [Job([], Request(), error=error.sentence)], dict)


def work_of(how: How, task: Task | None, question: Question) -> Work:
    """What has to be run to answer a question; the needle's has no task."""
    try:
        if task is None:
            return seeking(how, question)
        if task.kind == "choices":
            return choosing(how, task.rule, question)
        if task.kind == "text":
            return foreseeing(how, question)
        return answering(how, task, question)
    except Dsv2Error as error:
        return failed(question, error)


def choosing(how: How, rule: Rule, question: Question) -> Work:
    """Which of the choices is the likeliest. Raises Dsv2Error."""
    longest = max(len(how.tokenizer.encode_plain(text)) for text in question.choices) + 8
    prompt, context, shots = fitting(how, question, longest)
    # An answer in a chat begins with a blank, which its template leaves to the model.
    choices = [f" {text.lstrip()}" for text in question.choices] if how.chat else question.choices
    tokens = [continued(how, prompt, text, context) for text in choices]
    read = readings(context, tokens)
    if question.key in how.kept:
        first = len(context) - 1
        read[0].keeps = lambda place: place == first
    bare, bare_tokens, bare_read = list[int](), list[list[int]](), list[Reading]()
    if rule == "unconditional":
        bare = context_ids(how, question.bare)
        bare_tokens = [continued(how, question.bare, text, bare) for text in choices]
        bare_read = readings(bare, bare_tokens)

    def row() -> Row:
        found = [likely(context, each, read) for each in tokens]
        scores = [each.total for each in found]
        values: Row = {
            "logprobs": scores,
            "tokens": [len(each) for each in tokens],
            "characters": [len(text) for text in question.choices],
        }
        if rule == "mean":
            scores = [each.total / len(each.logprobs) for each in found]
        if rule == "unconditional":
            values["bare_logprobs"] = [likely(bare, each, bare_read).total for each in bare_tokens]
            scores = [a - b for a, b in zip(scores, values["bare_logprobs"], strict=True)]
        chosen = max(range(len(scores)), key=scores.__getitem__)
        expected = int(question.expected)
        values |= {"answer": chosen, "expected": expected, "right": chosen == expected, "shots": shots}
        place = len(context) - 1
        if place in read[0].kept:
            values |= {"top": read[0].best[place], "kept": [kept_text(read[0].kept[place])]}
        return values

    return Work(question, [each.job() for each in read + bare_read], row)


def answering(how: How, task: Task, question: Question) -> Work:
    """What the model writes, and what is found in it. Raises Dsv2Error."""
    room = min(task.max_new_tokens, how.config.max_position_embeddings // 2)
    _, context, shots = fitting(how, question, room)
    stop = () if how.chat else task.stop  # a chat model ends by itself, and may write what a prompt holds
    request = Request(SamplingParams(temperature=0.0), room, how.eos_ids, stop, how.seed)
    job = Job(context, request)

    def row() -> Row:
        text = job.result.text
        values: Row = {"answer": text, "finish_reason": job.result.finish_reason, "shots": shots}
        if task.judge is not None:
            judged = task.judge(question, text)
            values |= {"found": judged.found, "expected": question.expected, "right": judged.right}
        if task.program is not None:
            values |= {"task_id": question.id, "completion": text, "right": None}
            values["program"] = task.program(question, text)
        return values

    return Work(question, [job], row)


def needle_questions(
    how: How, haystack: Haystack, lengths: list[int], depths: list[float], tries: int
) -> Iterator[Question]:
    """One for each length, depth and try."""
    asked = hidden(how.tokenizer, haystack, lengths, depths, tries, how.seed)
    for number, (ids, trial) in enumerate(asked):
        length = lengths[number // (len(depths) * tries)]
        name = f"{trial.depth:.0%}-{number % tries}"
        about = {"ids": ids, "trial": trial}
        yield Question("niah", f"{length}", name, how.tokenizer.decode(ids), trial.expected, about=about)


def seeking(how: How, question: Question) -> Work:
    """Whether what was hidden in a text is found there again."""
    trial = question.about["trial"]
    job = Job(question.about["ids"], Request(SamplingParams(temperature=0.0), SPARE, how.eos_ids))

    def row() -> Row:
        told = replace(trial, answer=job.result.text)
        known = {"depth": trial.depth, "answer": told.answer, "expected": trial.expected}
        return known | {"right": told.found}

    return Work(question, [job], row)


def windows(how: How, question: Question) -> Iterator[Question]:
    """A text as questions of one window each, every token of it in one of them. Raises Dsv2Error."""
    ids = how.tokenizer.encode_plain(question.ask)
    size = min(how.window, how.config.max_position_embeddings)
    begin = how.tokenizer.begun([])
    step = size - len(begin)
    every = max(1, math.ceil(len(ids) / KEPT_PLACES))
    for number, start in enumerate(range(0, len(ids), step)):
        part = ids[start : start + step]
        if len(begin + part) < 2:
            return  # a last token that has nothing before it
        about = {"ids": begin + part, "begin": len(begin), "every": every}
        yield replace(question, id=str(number), ask="", about=about)


def foreseeing(how: How, question: Question) -> Work:
    """How likely the tokens of a window are, each after those before it."""
    ids, begin, every = (question.about[name] for name in ("ids", "begin", "every"))
    first = max(1, begin)  # the first token that is foreseen
    reading = Reading(ids[:-1], {place - 1: [ids[place]] for place in range(first, len(ids))})
    if how.keep:
        reading.keeps = lambda place: place % every == 0

    def row() -> Row:
        places = range(first - 1, len(ids) - 1)
        nats = [-reading.likely[place, ids[place + 1]] for place in places]
        values: Row = {
            "tokens": len(nats),
            "bytes": sum(len(how.tokenizer.bytes_of(token)) for token in ids[first:]),
            "nats": packed("f", nats),
            "top": packed("i", [reading.best[place] for place in places]),
        }
        if reading.kept:
            values |= {
                "kept_places": packed("i", [place - first + 1 for place in sorted(reading.kept)]),
                "kept": [kept_text(reading.kept[place]) for place in sorted(reading.kept)],
            }
        return values

    return Work(question, [reading.job()], row)


def kept_text(distribution: Distribution) -> list[str]:
    return [packed("i", distribution.ids), packed("f", distribution.logprobs)]


def run(scheduler: Scheduler, works: Iterable[Work]) -> Iterator[Row]:
    """The rows of all works, in their order, as they are done."""
    waiting = deque[tuple[Work, int]]()  # with how many of its jobs are still to come

    def jobs() -> Iterator[Job]:
        for work in works:
            waiting.append((work, len(work.jobs)))
            yield from work.jobs

    for _ in scheduler.in_order(jobs()):
        work, left = waiting.popleft()
        if left > 1:
            waiting.appendleft((work, left - 1))
        else:
            yield work.result()
