"""Where requests of many threads and tasks meet the one loop that runs the model.

A thread of its own makes the scheduler's steps. Who asks for something gets what comes of it in an asyncio
queue of its own; who goes away is cancelled before the next step.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from dsv2cli.engine.scheduler import Job, News, Scheduler
from dsv2cli.errors import Dsv2Error


class Crowded(Exception):
    """So many wait already that nobody else may."""


@dataclass(frozen=True)
class Ended:
    """A job that has ended, or could not be run."""

    job: Job


@dataclass(eq=False)
class Ticket:
    """Jobs that were asked for together, and what comes of them."""

    jobs: list[Job]
    loop: asyncio.AbstractEventLoop
    coming: asyncio.Queue[News | Ended] = field(default_factory=asyncio.Queue)
    left: int = 0  # jobs that have not ended

    def tell(self, what: News | Ended) -> None:
        """Called by the model's thread. Where the loop is closed nobody listens any more."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.coming.put_nowait, what)


@dataclass
class Counts:
    """What has happened since the start."""

    requests: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0


class Desk:
    """Takes jobs, runs them, and says what came of them."""

    def __init__(self, make: Callable[[], Scheduler], waiting: int) -> None:
        """`make` gives a scheduler; at most `waiting` jobs wait for one of its places."""
        self.make, self.waiting = make, waiting
        self.scheduler = make()
        self.orders = queue.SimpleQueue[tuple[str, Ticket] | None]()
        self.tickets = dict[int, Ticket]()  # of the jobs that run or wait, by the job's id
        self.counts, self.lock, self.held = Counts(), threading.Lock(), 0  # held: jobs that have not ended
        self.thread = threading.Thread(target=self.run, name="model", daemon=True)
        self.thread.start()

    # Called by those who ask.

    def submit(self, jobs: list[Job]) -> Ticket:
        """Let jobs wait for their turn; those with the same prompt stand one behind the other. Raises
        Crowded.
        """
        with self.lock:
            if self.held and self.held + len(jobs) > self.scheduler.width + self.waiting:
                self.counts.refused += 1
                raise Crowded
            self.held += len(jobs)
            self.counts.requests += 1
        ticket = Ticket(jobs, asyncio.get_running_loop(), left=len(jobs))
        self.orders.put(("run", ticket))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Whoever wanted this is gone, or has enough."""
        if ticket.left:
            self.orders.put(("cancel", ticket))

    async def news(self, ticket: Ticket) -> AsyncIterator[News | Ended]:
        """What comes of a ticket's jobs, until all have ended. Whoever ends this early cancels the ticket."""
        while ticket.left:
            what = await ticket.coming.get()
            if isinstance(what, Ended):
                ticket.left -= 1
            yield what

    def close(self) -> None:
        """End all jobs and the thread."""
        self.orders.put(None)
        self.thread.join()

    # The model's thread.

    def run(self) -> None:
        """Until it is closed."""
        going = True
        while going:
            try:
                going = self.obey()
                for each in self.scheduler.step() if going else ():
                    self.tickets[id(each.job)].tell(each)
            except Exception as error:
                self.fail(error)
            self.end_what_has_ended()

    def obey(self) -> bool:
        """Do what was asked for since the last step; where there is nothing else to do, wait for it. False
        where it is all over.
        """
        while True:
            try:
                order = self.orders.get(block=not self.scheduler.busy)
            except queue.Empty:
                return True
            if order is None:
                self.scheduler.cancel(*(job for ticket in self.tickets.values() for job in ticket.jobs))
                self.end_what_has_ended()
                return False
            what, ticket = order
            if what == "cancel":
                self.scheduler.cancel(*ticket.jobs)
            else:
                for job in ticket.jobs:
                    self.tickets[id(job)] = ticket
                for group in alike(ticket.jobs):
                    self.scheduler.submit(*group)
            self.end_what_has_ended()

    def end_what_has_ended(self) -> None:
        """Tell of jobs that have ended."""
        for ticket in list(self.tickets.values()):
            for job in ticket.jobs:
                if job.ended and self.tickets.pop(id(job), None) is not None:
                    self.count(job)
                    ticket.tell(Ended(job))

    def count(self, job: Job) -> None:
        counts, result = self.counts, job.result
        with self.lock:
            self.held -= 1
        counts.prompt_tokens += len(result.prompt_ids)
        counts.reused_tokens += result.reused_tokens
        counts.generated_tokens += len(result.tokens)

    def fail(self, error: Exception) -> None:
        """A step that failed ends all jobs: nobody knows what is in the pool. What is no error of the
        world's is one of ours, and looks like one.
        """
        if not isinstance(error, Dsv2Error):
            traceback.print_exception(error, file=sys.stderr)
            error = Dsv2Error("The server has made a mistake", why=repr(error))
        for ticket in self.tickets.values():
            for job in ticket.jobs:
                if not job.ended:
                    job.fail(error)
        self.scheduler = self.make()


def alike(jobs: list[Job]) -> list[list[Job]]:
    """Jobs in order, those with one prompt together: it is read once for them."""
    groups = list[list[Job]]()
    for job in jobs:
        if groups and groups[-1][0].prompt_ids == job.prompt_ids:
            groups[-1].append(job)
        else:
            groups.append([job])
    return groups
