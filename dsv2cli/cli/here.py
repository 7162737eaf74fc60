"""A model of this machine, as `dsv2 complete` asks it: jobs, answers, and the objects that tell of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from dsv2cli.checkpoint.tokenizer import Tokenizer
from dsv2cli.cli.asking import Asked
from dsv2cli.engine.request import Request, Token, check_prompt
from dsv2cli.engine.scheduler import Job, Scheduler
from dsv2cli.run.open import Opened


class Here:
    """An opened model, with a tokenizer where there is one."""

    def __init__(self, opened: Opened, tokenizer: Tokenizer | None) -> None:
        self.opened, self.tokenizer = opened, tokenizer
        self.scheduler: Scheduler | None = None  # which remembers what it has read

    @property
    def has_text(self) -> bool:
        return self.tokenizer is not None

    def job_of(self, asked: Asked, request: Request) -> Job:
        return Job(asked.ids, request)

    def job(self, key: str, prompt: Any, request: Request) -> Job:
        ids = self.prompt_ids(key, prompt)
        check_prompt(self.opened.config, ids)
        return Job(ids, request)

    def prompt_ids(self, key: str, prompt: Any) -> list[int]:
        """Raises Dsv2Error."""
        if key == "prompt_ids":
            return list(prompt)
        tokenizer = self.tokenizer or self.opened.tokenizer()  # says what is missing
        if key == "messages":
            tokenizer.refuse_too_long(*(message["content"] for message in prompt))
            return tokenizer.encode_chat(prompt)
        tokenizer.refuse_too_long(prompt)
        return tokenizer.encode(prompt)

    def bad(self, request: Request, error: str) -> Job:
        return Job([], request, error=error)

    def of_width(self, width: int) -> Scheduler:
        """What runs so many at once."""
        if self.scheduler is None or self.scheduler.width != width:
            self.scheduler = Scheduler(self.opened.runner, self.tokenizer, width, store=self.opened.store)
        return self.scheduler

    def stream(self, job: Job) -> Iterator[str]:
        return self.of_width(1).stream(job)

    def samples(self, jobs: list[Job]) -> Iterator[Job]:
        return self.of_width(len(jobs)).samples(jobs)

    def in_order(self, jobs: Iterable[Job | None], width: int) -> Iterator[Job]:
        return self.of_width(width).in_order(jobs)

    def mark(self) -> str:
        plan = self.opened.plan
        return repr(([plan.format, plan.dtype, plan.packing], self.opened.mark()))

    def report(
        self, job: Job, asked: Asked | None = None, echo: bool = False, error: str = ""
    ) -> dict[str, Any]:
        """What is known of the words around the answer comes with `asked`; `error` is why it could not be
        brought to its end.
        """
        result, request = job.result, job.request
        return {
            "text": result.text if asked is None else asked.around(result.text, echo),
            "prompt_ids": job.prompt_ids,
            "token_ids": result.token_ids,
            "finish_reason": result.finish_reason,
            "logprobs": None if request.logprobs is None else scores_of(result.tokens),
            "prompt_logprobs": None if request.prompt_logprobs is None else scores_of(result.prompt_tokens),
            "usage": {
                "prompt_tokens": len(job.prompt_ids),
                "generated_tokens": len(result.tokens),
                "reused_tokens": result.reused_tokens,
            },
            "timing": {
                "load_seconds": self.opened.load_seconds,
                "ttft_seconds": result.ttft_seconds,
                "prefill_tokens_per_second": result.prefill_tokens_per_second,
                "decode_tokens_per_second": result.decode_tokens_per_second,
            },
            "seed": request.seed,
            "model": self.opened.name,
        } | ({"error": error} if error else {})


def scores_of(tokens: list[Token]) -> list[dict[str, Any]]:
    """Tokens that were scored, as they stand in the object."""
    return [
        {"token_id": token.id, "logprob": token.logprob, "top": [list(pair) for pair in token.top]}
        for token in tokens
    ]
