"""The one loop that runs a model: jobs go in, and step by step their tokens and texts come out.

A step takes every running answer a token further (or a token and its draft), and with what is left of its
budget reads pieces of the prompts that wait. Nothing is padded, and prompts that begin alike are read once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsv2cli.checkpoint.tokenizer import Tokenizer
from dsv2cli.engine.grammar import Constraint
from dsv2cli.engine.pages import BEGINNING, Full, Name, Pages, Part, Sequence, names_of
from dsv2cli.engine.request import Request, Result, Token
from dsv2cli.engine.sampling import NO_TOKEN, no_numbers, sample, sample_rows, seeded
from dsv2cli.engine.text import Answer, look_up
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.formats import PAGE
from dsv2cli.model.step import Span, Watch, unwatched
from dsv2cli.run.page_store import PageStore
from dsv2cli.run.runner import Runner

DRAFT = 7  # tokens drafted at most
WIDTH = 64  # jobs that run at once, where nothing else is said
KEPT_BYTES = 2**30  # of pages in RAM that nobody holds, but a later prompt may begin with
AHEAD = 8  # prompts a row that may finish before the oldest one, where answers come in order

Reading = Callable[[int, int], object]  # told how many tokens of a prompt have been read, of how many
# Told the scores [tokens, vocab] of what follows tokens of a prompt, and the place of the first of these.
Listener = Callable[[Tensor, int], object]


def unheard(done: int, total: int) -> None:
    """Nobody wants to know."""


@dataclass(eq=False)
class Job:
    """A prompt and how to continue it; `result` is filled in. The ids must have passed check_prompt.

    `after` holds the latents of its first tokens already, and is gone on with: when the job has ended its
    owner finds there what is in the pool. `reading` is told before each piece of the prompt, and may raise.
    `listener` is told the scores after each token of the prompt, in order, from the one at `from_place` on:
    what is before it may be reused.
    """

    prompt_ids: list[int]
    request: Request
    result: Result = field(default_factory=Result)
    error: str = ""  # why it could not be run, or not to its end: it passes through and keeps its place
    after: Sequence | None = None
    reading: Reading = unheard
    listener: Listener | None = None
    from_place: int = 0
    deadline: float | None = None  # by time.monotonic
    failure: Dsv2Error | None = None  # what `error` says
    names: list[Name] | None = None  # of the prompt's pages but the last, once they were asked for

    @property
    def ended(self) -> bool:
        return bool(self.error) or bool(self.result.finish_reason)

    @property
    def reusable(self) -> int:
        """How many tokens of the prompt need not be computed where they are in the pool: all but the last,
        and but for those after which scores are asked for.
        """
        if self.request.prompt_logprobs is not None:
            return 0
        return self.from_place if self.listener is not None else len(self.prompt_ids) - 1

    def fail(self, error: Dsv2Error) -> None:
        self.error, self.failure, self.result.finish_reason = error.sentence, error, "error"


@dataclass(frozen=True)
class News:
    """A token that a job has got, and the text that it makes safe to show; no token for text that was held
    back until the end.
    """

    job: Job
    token: Token | None
    text: str


@dataclass(eq=False)
class Active:
    """A job that runs. `history` are its prompt and all tokens since; those that are in the pool are the
    first `sequence.length`.
    """

    job: Job
    answer: Answer
    generator: torch.Generator
    constraint: Constraint | None
    history: list[int]
    left: int  # tokens that may still come
    names: list[Name]  # of the prompt's pages but the last
    sequence: Sequence
    began: float
    siblings: list[Job] = field(default_factory=list)  # that want other answers to the same prompt
    draft: list[int] = field(default_factory=list)
    first: float = 0.0  # when the first token came
    named: int = 0  # pages that others can find
    heard: int = 0  # the place up to which the job's listener has been told
    shows: bool = False  # whether others are still to find the last page of its prompt

    @property
    def todo(self) -> int:
        """How many tokens are to be computed before the next can be chosen."""
        return len(self.history) - self.sequence.length

    @property
    def reads(self) -> bool:
        """Whether it reads its prompt, or reads again what it had to give up."""
        return self.todo > 1 or not self.job.result.tokens

    @property
    def plain(self) -> bool:
        request = self.job.request
        scored = request.prompt_logprobs is not None or self.job.listener is not None
        return request.plain and not request.speculate and not scored and not self.siblings

    def take(self, token: Token) -> str:
        """Note the next token; end the answer where it is the last. Gives the text that is safe to show."""
        result, now = self.job.result, time.perf_counter()
        if not result.tokens:  # by now a device has done what was asked of it
            result.prefill_seconds = now - self.began
        self.first = self.first or now
        result.ttft_seconds, result.decode_seconds = self.first - self.began, now - self.first
        self.history.append(token.id)
        text = self.answer.add(token)
        self.left -= 1
        if self.left <= 0 and not self.answer.ended:
            result.finish_reason, self.answer.ended = "length", True
        return text + self.answer.finish() if self.answer.ended else text


@dataclass
class Piece:
    """What a step computes of an active job: `count` tokens from where it stands, and then its draft."""

    active: Active
    count: int
    completes: bool = field(init=False)  # whether the next token can be chosen after it

    def __post_init__(self) -> None:
        self.completes = self.count >= self.active.todo

    @property
    def ids(self) -> list[int]:
        at = self.active.sequence.length
        return (self.active.history + self.active.draft)[at : at + self.count]


@dataclass
class Flight:
    """Tokens that the device has chosen, and nobody has read yet."""

    rows: list[Active]
    chosen: Tensor  # [rows]
    ids: Callable[[], list[int]]


class Scheduler:
    """Runs jobs on one runner, with one pool."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer | None = None,
        width: int = WIDTH,
        tokens: int | None = None,
        watch: Watch = unwatched,
        store: PageStore | None = None,
    ) -> None:
        """At most `width` jobs run at once; the pool holds `tokens`, or as many as there is room for; pages
        of prompts come from `store` and go there.
        """
        self.runner, self.tokenizer, self.width, self.watch = runner, tokenizer, width, watch
        self.store = store
        self.pool = runner.new_pool(tokens)
        page = max(1, self.pool.bytes_per_token() * PAGE)
        keep = KEPT_BYTES // page if runner.device.type == "cpu" else None
        self.books = [Pages(self.pool.pages, keep) for _ in range(runner.ranks)]
        self.waiting: deque[tuple[Job, list[Job]]] = deque()  # each with its siblings
        self.given_up: deque[Active] = deque()  # those that had to leave their pages to others
        self.active: list[Active] = []  # the oldest first
        self.expected: dict[Name, Active] = {}  # pages that are being read
        self.flight: Flight | None = None
        self.computed = self.reused = self.preempted = 0  # tokens, tokens, jobs

    # What others ask for.

    def submit(self, job: Job, *siblings: Job) -> None:
        """Let a job wait for its turn; `siblings` have the same prompt, which is read once for all."""
        try:
            self.refuse(job)
        except UsageError as error:
            for each in (job, *siblings):
                each.fail(error)
            return
        self.waiting.append((job, list(siblings)))

    def refuse(self, job: Job) -> None:
        """Raises UsageError for a prompt that the pool can never hold."""
        most = self.pool.pages * PAGE - 1
        if len(job.prompt_ids) > most:
            raise UsageError(
                f"The prompt has {len(job.prompt_ids):,} tokens",
                why=f"there is memory for the latents of {most:,}",
                fix="a shorter prompt, or more memory",
            )

    def cancel(self, *jobs: Job) -> None:
        """End jobs where they stand. One that has ended stays as it is."""
        gone = {id(job) for job in jobs}
        for job in jobs:
            if not job.ended:
                job.result.finish_reason = "interrupted"
        waiting = [[job for job in (first, *rest) if id(job) not in gone] for first, rest in self.waiting]
        self.waiting = deque((first, rest) for first, *rest in filter(None, waiting))
        self.given_up = deque(active for active in self.given_up if id(active.job) not in gone)
        for active in list(self.active):
            active.siblings = [job for job in active.siblings if id(job) not in gone]
            if id(active.job) in gone:
                self.leave(active)

    @property
    def busy(self) -> bool:
        """Whether there is something to do."""
        return bool(self.waiting or self.given_up or self.active)

    @property
    def room(self) -> int:
        """How many jobs more could run."""
        return self.width - len(self.active) - len(self.given_up) - len(self.waiting)

    def stream(self, job: Job) -> Iterator[str]:
        """Run a job, and others that were submitted, and yield its text as it comes.

        Ending the iteration early leaves finish_reason "interrupted". Raises Dsv2Error where the job fails.
        """
        self.submit(job)
        try:
            while not job.ended:
                for news in self.step():
                    if news.job is job:
                        yield news.text
            if job.failure is not None:
                raise job.failure
        finally:
            self.cancel(job)

    def samples(self, jobs: list[Job]) -> Iterator[Job]:
        """Finished jobs in order, all with one and the same prompt, which is read once."""
        self.submit(*jobs)
        try:
            for job in jobs:
                while not job.ended:
                    self.step()
                yield job
        finally:
            self.cancel(*jobs)

    def in_order(self, jobs: Iterable[Job | None]) -> Iterator[Job]:
        """Finished jobs in the order of `jobs`, `width` of them at once.

        None among the jobs says that the next is not there yet, and those that run may go on. Jobs that have
        an error pass through.
        """
        coming, begun, more = iter(jobs), deque[Job](), True
        try:
            while more or begun:
                while more and len(begun) < AHEAD * self.width and self.room > 0:
                    try:
                        job = next(coming)
                    except StopIteration:
                        more = False
                        break
                    if job is None:
                        break
                    begun.append(job)
                    if not job.error:
                        self.submit(job)
                while begun and begun[0].ended:
                    yield begun.popleft()
                self.step()
        finally:
            self.cancel(*begun)

    # One step.

    @torch.inference_mode()
    def step(self) -> list[News]:
        """One forward pass. Gives the tokens that jobs have got, which may be those of the pass before."""
        news = list[News]()
        self.end_late()
        if self.flight is not None:
            if self.flies_on(self.flight):
                return self.fly(self.flight)
            news += self.land(self.flight)
        self.admit()
        pieces = self.pieces()
        assert all(piece.count > 0 for piece in pieces) and bool(pieces) == bool(self.active)
        if not pieces:
            return news
        for piece in pieces:
            if piece.active.reads:
                job = piece.active.job
                reused = job.result.reused_tokens
                job.reading(piece.active.sequence.length - reused, len(job.prompt_ids) - reused)
        return news + self.compute(pieces)

    def end_late(self) -> None:
        """End the jobs whose time is over."""
        now = time.monotonic()
        jobs = [active.job for active in (*self.active, *self.given_up)] + [job for job, _ in self.waiting]
        for job in jobs:
            if job.deadline is not None and now > job.deadline:
                job.result.finish_reason = job.result.finish_reason or "deadline"
                self.cancel(job)

    def admit(self) -> None:
        """Let waiting jobs begin, as many as may run and have room for their first tokens."""
        while self.given_up and len(self.active) < self.width:
            active = self.given_up[0]
            book = active.sequence.book
            if self.active and book.available < 1 + active.todo // PAGE:
                return
            self.begin_again(self.given_up.popleft())
        later = deque[tuple[Job, list[Job]]]()
        while self.waiting and len(self.active) < self.width:
            job, siblings = self.waiting.popleft()
            if not self.begin(job, siblings):
                later.append((job, siblings))
        self.waiting = later + self.waiting

    def begin(self, job: Job, siblings: list[Job]) -> bool:
        """Make a job active. False where it should wait: for a page that it shares with one that is being
        read, or for room.
        """
        ids = job.prompt_ids
        # The last page, which may be full, is none of them: its last token must be computed.
        shares = job.reusable > 0 and (job.after is None or job.after.length == 0)
        if job.names is None:
            job.names = names_of(ids[:-1]) if shares else []
        names = job.names
        first = names[: job.reusable // PAGE]  # that may be those of others
        if job.after is not None:
            sequence, pages = job.after, job.after.book.find(first)
        else:
            found = [each.find(first) for each in self.books]
            rank = max(range(len(self.books)), key=lambda i: (len(found[i]), self.books[i].available))
            book, pages = self.books[rank], found[rank]
            if len(pages) < len(first) and first[len(pages)] in self.expected:
                return False
            if self.active and book.available < 1 + (len(ids) - PAGE * len(pages)) // PAGE:
                return False
            sequence = Sequence(book, rank)
        if shares:
            self.begin_with_pages(sequence, pages, first)
            self.begin_with_part(sequence, job)
        limits = (self.runner.config.max_position_embeddings, sequence.book.count * PAGE)
        room = min(limits) - len(ids)
        most = job.request.max_new_tokens
        left = room if most is None else min(room, most)
        active = self.active_job(job, ids, left, names, sequence, time.perf_counter())
        active.siblings, active.shows = siblings, shares
        active.named = sequence.length // PAGE if names else 0
        job.result.prompt_ids, job.result.reused_tokens = ids, sequence.length
        self.reused += sequence.length
        self.enter(active)
        return True

    def active_job(
        self, job: Job, history: list[int], left: int, names: list[Name], sequence: Sequence, began: float
    ) -> Active:
        """A job as it runs, with an answer, random numbers and a constraint of its own."""
        request = job.request
        return Active(
            job,
            Answer(self.tokenizer, request, job.result),
            seeded(self.runner.device, request.seed),
            request.constraint(),
            list(history),
            left,
            names,
            sequence,
            began,
        )

    def enter(self, active: Active) -> None:
        """Let a job run: others wait for the pages that it is about to read."""
        self.active.append(active)
        for name in active.names[active.named :]:
            self.expected.setdefault(name, active)

    def withdraw(self, active: Active) -> None:
        """The other way round."""
        self.active.remove(active)
        self.expected = {name: who for name, who in self.expected.items() if who is not active}

    def begin_with_pages(self, sequence: Sequence, pages: list[int], names: list[Name]) -> None:
        """Let an empty sequence begin with these pages of the pool, which have the first of the names, and
        with those that follow in the store.
        """
        sequence.begin_with(pages)
        size = self.pool.bytes_per_token() * PAGE
        for name in names[len(pages) :] if self.store is not None else ():
            held = self.store.load(name, size)  # type: ignore[union-attr]
            if held is None:
                return
            try:
                sequence.make_room(sequence.length + PAGE, self.copier(sequence))
            except Full:
                return
            page = sequence.pages[-1]
            self.runner.set_page(self.pool, page, held)
            sequence.book.call(page, name)
            sequence.length += PAGE

    def begin_with_part(self, sequence: Sequence, job: Job) -> None:
        """Let a sequence of full pages begin with a copy of what another has of its next page, too."""
        full = len(sequence.pages)
        page, count = sequence.book.find_part(self.part(job.prompt_ids, job.names or [], full))
        count = min(count, job.reusable - PAGE * full)
        if not count:
            return
        sequence.book.hold(page)
        sequence.pages.append(page)
        sequence.length += count
        try:
            sequence.make_room(sequence.length + 1, self.copier(sequence))
        except Full:
            sequence.truncate(PAGE * full)

    def part(self, ids: list[int], names: list[Name], page: int) -> Part:
        """The tokens of a prompt in its `page`, but for the last of all, as others may find them."""
        before = names[page - 1] if page else BEGINNING
        whole = not self.runner.alike or page < len(names)
        return Part(before, ids[:-1][PAGE * page : PAGE * (page + 1)], whole)

    def copier(self, sequence: Sequence) -> Callable[[int, int], None]:
        """Copies a page of a sequence's pool."""
        return lambda source, target: self.runner.copy_page(self.pool, sequence.rank, source, target)

    def begin_again(self, active: Active) -> None:
        """Let a job that was given up read again what it had, but for what is still there."""
        # What a listener has been told is not told again, and what it has not been must be computed.
        reusable = active.job.reusable if active.job.listener is not None else len(active.history)
        names = active.names[: max(reusable, active.heard) // PAGE]
        self.begin_with_pages(active.sequence, active.sequence.book.find(names), names)
        active.named = len(active.sequence.pages)
        self.enter(active)

    def pieces(self) -> list[Piece]:
        """What the next step computes: the next token of all that run, and pieces of prompts. Every one has
        room in the pool; who is too young for that gives up its pages.
        """
        answers = [active for active in self.active if not active.reads]
        readers = [active for active in self.active if active.reads]
        for active in answers:
            request, most = active.job.request, min(DRAFT, active.left - 1)
            active.draft = look_up(active.history, most) if request.speculate else []
        wanted = [Piece(active, 1 + len(active.draft)) for active in answers]
        left = self.runner.chunk
        if answers:
            left = max(PAGE, left // 2 - sum(piece.count for piece in wanted))
        wanted += shared_out(readers, left)
        chosen = list[Piece]()
        for piece in sorted(wanted, key=lambda piece: self.active.index(piece.active)):
            if piece.active in self.active and self.make_room(piece):
                chosen.append(piece)
        return [piece for piece in chosen if piece.active in self.active]

    def make_room(self, piece: Piece) -> bool:
        """Pages for a piece; the youngest job gives up its own where there are too few. False where that is
        the piece's own.
        """
        sequence = piece.active.sequence
        while True:
            try:
                sequence.make_room(sequence.length + piece.count, self.copier(sequence))
                return True
            except Full:
                pass
            others = [each for each in self.active if each.sequence.book is sequence.book]
            youngest = others[-1]
            if len(others) == 1:
                if piece.active.draft:  # only what must be
                    piece.active.draft, piece.count = [], 1
                    continue
                raise Dsv2Error("The pool of latents is full", why="one sequence has all of it")
            self.give_up(youngest)
            if youngest is piece.active:
                return False

    def give_up(self, active: Active) -> None:
        """Let an active job lose its pages; it is read again when there is room."""
        self.withdraw(active)
        active.sequence.end()
        self.given_up.appendleft(active)
        self.preempted += 1

    def leave(self, active: Active) -> None:
        """A job has ended: its pages go, unless they are somebody's. Siblings that still wait for it run by
        themselves.
        """
        self.withdraw(active)
        active.sequence.truncate(len(active.history))
        if active.job.after is None:
            active.sequence.end()
        if active.siblings:
            first, *rest = active.siblings
            self.waiting.appendleft((first, rest))

    def compute(self, pieces: list[Piece]) -> list[News]:
        """One forward pass of these pieces, and what follows from its scores."""
        pieces.sort(key=lambda piece: piece.active.sequence.rank)
        parts = [(piece, *part) for piece in pieces for part in self.parts(piece)]
        parts.sort(key=lambda part: (part[0].active.sequence.rank, not part[1].whole))
        ids = [token for _, _, tokens in parts for token in tokens]
        spans = [span for _, span, _ in parts]
        wanted, at = dict[int, list[int]](), 0  # for each piece the tokens whose scores are asked for
        for piece, span, _ in parts:
            mine = wanted.setdefault(id(piece), [])
            for i in range(span.count):
                if self.asks(piece, span.start + i):
                    mine.append(at + i)
            at += span.count
        self.computed += len(ids)
        device = self.runner.device
        rows = [row for piece in pieces for row in wanted[id(piece)]]
        steady = len(rows) == len(ids) and not any(span.whole for span in spans)
        ahead = self.runner.decodes_ahead and self.watch is unwatched
        if steady and ahead and len({span.count for span in spans}) == 1:
            each = torch.tensor(ids, device=device).view(len(spans), -1)
            scores = self.runner.decode(each, spans, self.pool).flatten(0, 1)
        else:
            hidden = self.runner(torch.tensor(ids, device=device), spans, self.pool, self.watch)
            chosen = hidden[torch.tensor(rows, dtype=torch.long, device=device)]
            scores = self.watch("head", lambda: self.runner.logits(chosen)) if rows else chosen
        for piece in pieces:
            self.advance(piece)
        news, first = list[News](), 0
        ahead = self.may_fly(pieces)
        for piece in pieces:
            count = len(wanted[id(piece)])
            if not ahead:
                news += self.choose(piece, scores[first : first + count])
            first += count
        if ahead:
            self.take_off([piece.active for piece in pieces if piece.completes], scores)
        return news

    def parts(self, piece: Piece) -> list[tuple[Span, list[int]]]:
        """A piece as spans with their tokens: what is of the prompt, and what is after it.

        Where tokens are to be alike the last page of a prompt goes with what comes after: what is left of a
        prompt that is found in the pool is then always read as it would have been.
        """
        active, ids = piece.active, piece.ids
        sequence = active.sequence
        start, end = sequence.length, sequence.length + piece.count
        prompt = len(active.job.prompt_ids)
        cut = min(max(start, (prompt - 1) // PAGE * PAGE if self.runner.alike else prompt), end)
        out = []
        for begin, stop, whole in ((start, cut, True), (cut, end, False)):
            if begin < stop:
                span = Span(sequence.pages, begin, stop - begin, whole, sequence.rank)
                out.append((span, ids[begin - start : stop - start]))
        return out

    def asks(self, piece: Piece, position: int) -> bool:
        """Whether the scores after the token at this position are wanted."""
        active = piece.active
        if position >= len(active.history) - 1:
            return True
        if active.job.listener is not None:
            return max(active.job.from_place, active.heard) <= position < len(active.job.prompt_ids)
        if active.job.request.prompt_logprobs is None:
            return False
        return len(active.job.result.prompt_tokens) <= position < len(active.job.prompt_ids) - 1

    def advance(self, piece: Piece) -> None:
        """The tokens of a piece are in the pool: full pages of its prompt can be found by others."""
        active = piece.active
        active.sequence.length += piece.count
        sequence, ids = active.sequence, active.job.prompt_ids
        full = min(sequence.length // PAGE, len(active.names))
        for i in range(active.named, full):
            name, page = active.names[i], sequence.pages[i]
            sequence.book.call(page, name)
            if self.store is not None and not self.store.has(name):
                self.store.save(name, self.pool.page(page))
            sequence.book.show(sequence.pages[i], self.part(ids, active.names, i))
            if self.expected.get(name) is active:
                del self.expected[name]
        active.named = max(active.named, full)
        if active.shows and sequence.length >= len(ids):
            sequence.book.show(sequence.pages[full], self.part(ids, active.names, full))
            active.shows = False

    def choose(self, piece: Piece, scores: Tensor) -> list[News]:
        """What an active job makes of its scores [wanted, vocab]: a token, or one more for each token of its
        draft that was right.
        """
        active = piece.active
        job, request = active.job, active.job.request
        if job.listener is not None and len(scores) and not job.result.tokens:
            end = active.sequence.length
            job.listener(scores, end - len(scores))
            active.heard, scores = end, scores[len(scores) - piece.completes :]
        if request.prompt_logprobs is not None and len(scores) and not job.result.tokens:
            scores = self.score_prompt(active, scores)
        if not len(scores):
            return []
        news = list[News]()
        try:
            if active.siblings:
                self.fork(active, scores[0], news)
            draft = active.draft
            for i in range(len(draft) + 1):
                token = self.pick(active, scores[i])
                news.append(News(job, token, active.take(token)))
                if active.answer.ended or (i < len(draft) and token.id != draft[i]):
                    break
        except Dsv2Error as error:
            job.fail(error)
        active.draft = []
        active.sequence.truncate(len(active.history) - 1)
        if job.ended:
            self.leave(active)
        return news

    def pick(self, active: Active, scores: Tensor) -> Token:
        """The next token from scores [vocab]. Raises Dsv2Error as `pick`."""
        picked = list[Token]()

        def work() -> Tensor:
            request, history = active.job.request, active.history
            picked.append(pick(scores, request, history, active.generator, active.constraint))
            return scores

        self.watch("sampling", work)
        return picked[0]

    def score_prompt(self, active: Active, scores: Tensor) -> Tensor:
        """Note how likely the prompt's tokens were. scores [wanted, vocab] -> those of what comes after."""
        result, most = active.job.result, active.job.request.prompt_logprobs or 0
        ids = active.job.prompt_ids
        count = min(active.sequence.length, len(ids) - 1) - len(result.prompt_tokens)
        for row in scores[:count]:
            result.prompt_tokens.append(scored(row, ids[len(result.prompt_tokens) + 1], most))
        return scores[count:]

    def fork(self, active: Active, scores: Tensor, news: list[News]) -> None:
        """Let the siblings of a job whose prompt has been read begin where it stands, as many as may run.

        scores [vocab] are those of their first token.
        """
        siblings, active.siblings = active.siblings, []
        for job in siblings:
            if len(self.active) >= self.width:
                self.waiting.append((job, []))
                continue
            most = job.request.max_new_tokens
            left, sequence = active.left if most is None else most, active.sequence.fork()
            other = self.active_job(job, active.history, left, active.names, sequence, active.began)
            other.named = active.named
            job.result.prompt_ids = job.prompt_ids
            job.result.reused_tokens = active.job.result.reused_tokens
            self.active.append(other)
            try:
                token = self.pick(other, scores)
                news.append(News(job, token, other.take(token)))
            except Dsv2Error as error:
                job.fail(error)
            if job.ended:
                self.leave(other)

    # Where the device chooses: it goes on while what it has chosen is read.

    def may_fly(self, pieces: list[Piece]) -> bool:
        """Whether the device can choose the next tokens of all these, and go on with them by itself."""
        if not self.runner.decodes_ahead or self.watch is not unwatched:
            return False
        rows = [piece.active for piece in pieces]
        sampling = rows[0].job.request.sampling
        return all(
            piece.completes and active.plain and active.job.request.sampling == sampling
            for piece, active in zip(pieces, rows, strict=True)
        )

    def take_off(self, rows: list[Active], scores: Tensor) -> None:
        """Let the device choose from scores [rows, vocab]."""
        chosen = sample_rows(scores, rows[0].job.request.sampling, [row.generator for row in rows])
        self.flight = Flight(rows, chosen, read_later(chosen))

    def flies_on(self, flight: Flight) -> bool:
        """Whether the next step is just one token more for all in the flight that may have one."""
        if self.given_up or (self.waiting and len(self.active) < self.width):
            return False
        if {id(active) for active in self.active} != {id(active) for active in flight.rows}:
            return False
        try:
            for active in flight.rows:
                sequence = active.sequence
                if active.left > 1:
                    sequence.make_room(sequence.length + 1, self.copier(sequence))
        except Full:
            return False
        return any(active.left > 1 for active in flight.rows)

    def fly(self, flight: Flight) -> list[News]:
        """The next step, begun before the tokens of the last one are read. At the end of a text it is one
        step too far.
        """
        order = sorted(
            (i for i, active in enumerate(flight.rows) if active.left > 1),
            key=lambda i: flight.rows[i].sequence.rank,
        )
        rows = [flight.rows[i] for i in order]
        ids = flight.chosen if order == list(range(len(flight.rows))) else flight.chosen[order]
        spans = [Span(row.sequence.pages, row.sequence.length, 1, False, row.sequence.rank) for row in rows]
        scores = self.runner.decode(ids.clamp(min=0)[:, None], spans, self.pool)[:, 0]
        self.computed += len(rows)
        for row in rows:
            row.sequence.length += 1
        self.flight = None
        self.take_off(rows, scores)
        return self.read(flight)

    def land(self, flight: Flight) -> list[News]:
        """Read the tokens that the device has chosen, and do not go on yet."""
        self.flight = None
        return self.read(flight)

    def read(self, flight: Flight) -> list[News]:
        """Give the tokens of a flight to its jobs."""
        news = list[News]()
        for active, token_id in zip(flight.rows, flight.ids(), strict=True):
            if active.job.ended or active not in self.active:
                continue
            if token_id == NO_TOKEN:
                active.job.fail(no_numbers())
            else:
                token = Token(token_id)
                news.append(News(active.job, token, active.take(token)))
            if active.job.ended:
                active.sequence.truncate(len(active.history) - 1)
                self.leave(active)
        if self.flight is not None and not any(row in self.active for row in self.flight.rows):
            self.flight = None
        elif self.flight is not None:
            keep = [i for i, row in enumerate(self.flight.rows) if row in self.active]
            if len(keep) < len(self.flight.rows):
                chosen = self.flight.chosen[keep]
                rows = [self.flight.rows[i] for i in keep]
                self.flight = Flight(rows, chosen, read_later(chosen))
        return news


def shared_out(readers: list[Active], budget: int) -> list[Piece]:
    """Pieces of prompts: half of the budget for the one that waits longest, the rest for those that have
    least to do.
    """
    if not readers:
        return []
    oldest, *others = readers
    counts = {id(oldest): min(oldest.todo, budget // 2 if others else budget)}
    left = budget - counts[id(oldest)]
    for active in sorted(others, key=lambda active: active.todo):
        counts[id(active)] = min(active.todo, left)
        left -= counts[id(active)]
    counts[id(oldest)] += min(left, oldest.todo - counts[id(oldest)])
    return [Piece(active, counts[id(active)]) for active in readers if counts[id(active)]]


def pick(
    logits: Tensor,
    request: Request,
    seen: list[int],
    generator: torch.Generator,
    constraint: Constraint | None = None,
) -> Token:
    """Sample from logits [vocab] what `constraint` allows, and note the log-probabilities that were asked
    for.

    Raises Dsv2Error for logits that are no numbers.
    """
    if not logits.isfinite().all():
        raise no_numbers()
    history = torch.tensor(seen if request.sampling.repetition_penalty != 1.0 else [], dtype=torch.long)
    allowed = logits if constraint is None else constraint.allow(logits)
    token_id = sample(allowed, request.sampling, history.to(logits.device), generator)
    if constraint is not None:
        constraint.take(token_id)
    return Token(token_id) if request.logprobs is None else scored(logits, token_id, request.logprobs)


def scored(logits: Tensor, token_id: int, most: int) -> Token:
    """A token with its log-probability and the `most` likeliest ones, from logits [vocab]."""
    logprobs = logits.log_softmax(dim=-1)
    values, ids = logprobs.topk(min(most, logprobs.numel()))
    return Token(token_id, float(logprobs[token_id]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def read_later(ids: Tensor) -> Callable[[], list[int]]:
    """Begin to bring ids [n] here; what is asked of the device after this does not delay them."""
    if ids.device.type != "cuda":
        return ids.tolist
    here, done = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True), torch.cuda.Event()
    here.copy_(ids, non_blocking=True)
    done.record()

    def wait() -> list[int]:
        done.synchronize()
        return here.tolist()

    return wait
