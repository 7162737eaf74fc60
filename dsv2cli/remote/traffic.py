"""How a server does when many ask at once, as its clients see it."""

from __future__ import annotations

import asyncio
import random
import secrets
import time

from dsv2cli.engine.traffic import Run, Served, Traffic
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.remote.calls import Answer, Call, ServerRequest
from dsv2cli.remote.server import Server

# Common words: most tokenizers of this family's kind make one token of each, with the blank before it.
WORDS = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work number night "
    "point home water room mother area money story fact month lot right study book eye job word "
    "business issue side kind head house service friend father power hour game line end member law "
    "car city name team minute idea body back parent face others level office door health person art "
    "war history party result change morning reason research "
).split()


class Client:
    """What asks a server for answers of a given length, as `drive` of engine.traffic asks a model."""

    def __init__(self, server: Server) -> None:
        """Try out how long a prompt becomes, and whether answers can be made to go on. Raises Dsv2Error."""
        self.server, self.ignore_eos, self.tokens_a_word, self.begins_with = server, True, 1.0, 0.0
        self.salt = secrets.randbits(48)  # a server remembers what it was asked before
        try:
            self.try_out()
        except UsageError:
            self.ignore_eos = False
            self.try_out()

    def try_out(self) -> None:
        """Raises Dsv2Error."""
        counts = []
        for words in (16, 144):
            call = self.call(" ".join(random.Random(words).choices(WORDS, k=words)), 2)
            self.server.wait(self.server.answer(call))
            counts.append(call.result.prompt_length)
        if 0 < counts[0] < counts[1]:
            self.tokens_a_word = (counts[1] - counts[0]) / 128
            self.begins_with = counts[0] - 16 * self.tokens_a_word

    def call(self, text: str, tokens: int) -> Call:
        request = ServerRequest(max_new_tokens=tokens, ignore_eos=self.ignore_eos)
        return Call({"prompt": text}, request.having(temperature=0.0))

    def prompts(self, traffic: Traffic, seed: int) -> list[str]:
        """One a request, of random words; about as many tokens as asked for."""
        words = max(1, round((traffic.prompt - self.begins_with) / self.tokens_a_word))
        common = round(traffic.shared * words)
        beginning = random.Random(self.salt + seed).choices(WORDS, k=common)
        numbers = random.Random(self.salt + seed + 1_000_003)
        return [
            " ".join(beginning + numbers.choices(WORDS, k=words - common)) for _ in range(traffic.requests)
        ]

    def drive(self, traffic: Traffic, seed: int) -> Run:
        """Ask for all answers. Raises Dsv2Error where one could not be had."""
        return self.server.wait(self.driven(traffic, seed))  # type: ignore[no-any-return]

    async def driven(self, traffic: Traffic, seed: int) -> Run:
        places, began = asyncio.Semaphore(traffic.concurrency), time.perf_counter()

        async def one(text: str, at: float) -> tuple[Served, Answer]:
            await asyncio.sleep(at)
            async with places:
                arrived = time.perf_counter() if traffic.rate is None else began + at
                call = self.call(text, traffic.generate)
                await self.server.answer(call)
            # Tokens that are no text come without a piece.
            return Served(arrived, call.result.times or [call.result.ended]), call.result

        coming = zip(self.prompts(traffic, seed), traffic.arrivals(seed), strict=True)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(*each)) for each in coming]
        except ExceptionGroup as errors:  # of which one is enough
            raise errors.exceptions[0] from None
        seconds = time.perf_counter() - began
        answers = [task.result() for task in tasks]
        results = [result for _, result in answers]
        if not all(result.length for result in results):
            raise Dsv2Error("The server gave an empty answer", why="there is nothing to measure")
        return Run(
            served=[served for served, _ in answers],
            seconds=seconds,
            generated_tokens=sum(result.length for result in results),
            prompt_tokens=sum(result.prompt_length for result in results),
            reused_tokens=sum(result.cached or 0 for result in results)
            if all(result.cached is not None for result in results)
            else None,
        )
