"""What is asked of a model, and what it came to. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.outside import Number

if TYPE_CHECKING:
    from dsv2cli.engine.grammar import Constraint, Grammar

RULES = {
    "temperature": Number(0, 10_000),
    "top_p": Number(0, 1, above=True),
    "top_k": Number(0, 2**31, whole=True),
    "min_p": Number(0, 1),
    "repetition_penalty": Number(0.01, 10_000),
}


@dataclass(frozen=True)
class SamplingParams:
    """How to choose a token. temperature 0 takes the likeliest; the other defaults change nothing."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Raises UsageError for a value that makes no sense."""
        for name, rule in RULES.items():
            if getattr(self, name) not in rule:
                option = "--" + name.replace("_", "-")
                raise UsageError(f"{option} {getattr(self, name)} makes no sense", why=f"it must be {rule}")

    @classmethod
    def from_generation_config(
        cls, settings: dict[str, Any], source: str = "generation_config.json", **overrides: float | None
    ) -> SamplingParams:
        """The checkpoint's generation_config.json, with what the user asked for on top.

        Raises Dsv2Error naming `source` for a senseless value in it, UsageError for one of the user's.
        """
        given: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
        own = {n: settings[n] for n in RULES if n not in given and settings.get(n) is not None}
        for name, value in own.items():
            if value not in RULES[name]:
                fix = f"mend it, or give --{name.replace('_', '-')}"
                what = f"{source}: {name} = {str(value)[:80]!r} makes no sense"
                raise Dsv2Error(what, why=f"it must be {RULES[name]}", fix=fix)
        if settings.get("do_sample") not in (None, True, False):
            raise Dsv2Error(f"{source}: do_sample = {str(settings['do_sample'])[:80]!r} is not true or false")
        params = cls(**own)
        if settings.get("do_sample") is False:
            params = replace(params, temperature=0.0)
        return replace(params, **given)


@dataclass(frozen=True)
class Request:
    """What to generate. `max_new_tokens` None means up to the context limit."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_new_tokens: int | None = None
    eos_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    seed: int = 0
    logprobs: int | None = None
    speculate: bool = False
    grammar: Grammar | None = None
    prompt_logprobs: int | None = None

    def having(self, **values: Any) -> Self:
        """The same with other settings. Raises UsageError for a value that makes no sense."""
        own = {name: value for name, value in values.items() if name in RULES}
        others = {name: value for name, value in values.items() if name not in RULES}
        return replace(self, sampling=replace(self.sampling, **own), **others)

    def chosen(self) -> dict[str, Any]:
        """The settings that hold, by their names."""
        return vars(self.sampling) | {
            "max_new_tokens": self.max_new_tokens,
            "stop": list(self.stop),
            "seed": self.seed,
        }

    @property
    def plain(self) -> bool:
        """Whether the next token follows from the scores alone, so that a device can choose it before anyone
        has read the last.
        """
        return self.grammar is None and self.logprobs is None and self.sampling.repetition_penalty == 1.0

    def constraint(self) -> Constraint | None:
        """What holds one answer to the grammar, where there is one."""
        return None if self.grammar is None else self.grammar.begin()


@dataclass(frozen=True)
class Token:
    """One generated token; `top` holds the K likeliest as (id, logprob), before temperature, penalties and
    grammar.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Result:
    """What a generation came to; filled in while it runs, so that it is right after an interruption, too."""

    prompt_ids: list[int] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    prompt_tokens: list[Token] = field(
        default_factory=list
    )  # all but the first, where they were to be scored
    stop: str = ""  # the stop text that ended it
    finish_reason: str = ""  # nothing while it runs; then stop, length, deadline, interrupted or error
    reused_tokens: int = 0
    prefill_seconds: float = 0.0
    ttft_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def unit(self) -> str:
        """What `length` counts."""
        return "tokens"

    @property
    def token_ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def prompt_length(self) -> int:
        return len(self.prompt_ids)

    @property
    def cached(self) -> int | None:
        """Tokens of the prompt that had been read before, where that is known."""
        return self.reused_tokens

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def prefill_tokens_per_second(self) -> float | None:
        new = len(self.prompt_ids) - self.reused_tokens
        return new / self.prefill_seconds if self.prefill_seconds else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Tokens after the first over the time they took; None with fewer than two."""
        return (self.length - 1) / self.decode_seconds if self.length > 1 and self.decode_seconds else None


def check_prompt(config: DeepseekV2Config, prompt_ids: list[int]) -> None:
    """Raise UsageError for a prompt that is empty, too long, or names tokens that do not exist."""
    limit, vocab = config.max_position_embeddings, config.vocab_size
    if not prompt_ids:
        raise UsageError("The prompt is empty", why="there is nothing to continue", fix="give a prompt")
    if len(prompt_ids) >= limit:
        raise UsageError(
            f"The prompt has {len(prompt_ids):,} tokens and leaves no room for an answer",
            why=f"this model's context holds {limit:,} tokens",
            fix="shorten the prompt",
        )
    for token_id in prompt_ids:
        if not 0 <= token_id < vocab:
            raise UsageError(
                f"There is no token {token_id}", why=f"this model's ids go from 0 to {vocab - 1}"
            )
