"""DeepSeek-V2 as a model of EleutherAI's lm-evaluation-harness (lm_eval 0.4.13 and newer), called dsv2.

    lm_eval.simple_evaluate(model=Dsv2(model="v2-lite", quantize="int4"), tasks=["arc_easy"])
    python -m dsv2cli.engine.lm_eval --model_args model=v2-lite,quantize=int4,cache=int6 --tasks arc_easy

The second line is lm_eval's own command line, to which the model has been made known. Versions after 0.4.13
find it by the package's entry point: `lm_eval --model dsv2 --batch_size auto --device auto ...` is the same.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from dsv2cli.checkpoint.template import render
from dsv2cli.engine.likelihood import Reading, likely, readings
from dsv2cli.engine.request import RULES, Request, SamplingParams, check_prompt
from dsv2cli.engine.scheduler import WIDTH, Job, Scheduler
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.outside import Number
from dsv2cli.run.open import open_model
from dsv2cli.run.wish import BatchWish

COUNT = Number(1, 2**31, whole=True)
MOST = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # what tasks call it
OPTIONS = {("--model", "-M"): "dsv2", ("--batch_size", "-b"): "auto", ("--device",): "auto"}
log = logging.getLogger(__name__)

Message = dict[str, str]
Values = dict[str, Any]
Pair = tuple[list[int], list[int]]  # what is read, and what is asked about


class Bars:
    """The Screen of an evaluation: lm_eval's kind of progress, and its log."""

    @contextmanager
    def loading(self, name: str) -> Iterator[Callable[[int, int], None]]:
        with tqdm(desc=f"Loading {name}", unit="B", unit_scale=True) as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield show

    def note(self, text: str) -> None:
        log.warning(text)

    def last_words(self, error: Dsv2Error) -> None:
        log.critical(error.sentence)


@register_model("dsv2")
class Dsv2(TemplateLM):  # type: ignore[misc]
    """A model that runs through the scheduler: what requests have in common is read once, none is padded."""

    def __init__(
        self,
        model: str | Path | None = None,
        pretrained: str | Path | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int | str | None = None,
        max_length: int | str | None = None,
        max_gen_toks: int | str = 256,
        add_bos_token: bool | None = None,
        **wish: Any,
    ) -> None:
        """`model`, or `pretrained`, is a folder, a short name or a repository; by default it is the model
        inside the package. `wish` are the fields of BatchWish. `batch_size` requests run at once.
        `add_bos_token` None is the checkpoint's own rule. Raises Dsv2Error.
        """
        super().__init__()
        name = one_of({"model": model, "pretrained": pretrained})
        width = width_of(batch_size, max_batch_size)
        self.max_gen_toks = whole("max_gen_toks", max_gen_toks)
        if add_bos_token not in (None, True, False):
            raise senseless("add_bos_token", add_bos_token, "it must be true or false")
        wanted = None if max_length is None else whole("max_length", max_length)
        opened = open_model(None if name is None else str(name), wish_of(wish), Bars())
        context = opened.config.max_position_embeddings
        self.max_length = wanted or context
        if self.max_length > context:
            raise senseless("max_length", max_length, f"this model's context holds {context:,} tokens")
        self.opened, self.tokenizer = opened, opened.tokenizer()
        if add_bos_token is not None:
            self.tokenizer.adds_bos = add_bos_token
        if self.tokenizer.adds_bos and self.tokenizer.bos_id is None:
            raise senseless("add_bos_token", add_bos_token, "this tokenizer has no token that begins a text")
        end = self.tokenizer.fast.token_to_id(self.tokenizer.eos) if self.tokenizer.eos else None
        self.eos_ids = opened.eos_ids if end is None else opened.eos_ids | {end}
        self.eot = min(opened.eos_ids) if end is None else end
        self.scheduler = Scheduler(opened.runner, self.tokenizer, width)
        # Whatever token comes ends it, also where the context is full and has no room for one.
        every = frozenset(range(opened.config.vocab_size))
        self.only_read = Request(SamplingParams(temperature=0.0), max_new_tokens=1, eos_ids=every)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Values | None = None) -> Dsv2:
        """From lm_eval's `model_args`, which have the last word over its options. Raises Dsv2Error."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: Values, additional_config: Values | None = None) -> Dsv2:
        """The same from a dictionary of them. Raises Dsv2Error."""
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**(options | arg_dict))

    # Text and tokens.

    @property
    def eot_token_id(self) -> int:
        return self.eot

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it: BOS, or else the end of the text before."""
        bos = self.tokenizer.bos_id
        return self.eot if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.opened.name).replace("/", "__")

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Token ids; BOS comes first exactly once where the checkpoint adds it, unless `add_special_tokens`
        is False.
        """
        ids = self.tokenizer.encode(string, add_bos=add_special_tokens is not False)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens)

    @property
    def template(self) -> str:
        """Raises UsageError where the checkpoint has no chat template."""
        if self.tokenizer.chat_template is None:
            what = f"{self.opened.name} has no chat template"
            raise UsageError(what, why="it is a base model", fix="leave --apply_chat_template out")
        return self.tokenizer.chat_template

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's text, None for False. Raises UsageError for a template by name."""
        if isinstance(chat_template, str) and chat_template != "default":
            why = "of several templates the default one is taken"
            raise UsageError(f"There is no chat template {chat_template!r}", why=why)
        return self.template if chat_template else None

    def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as text, BOS included, ending where the answer begins; without
        `add_generation_prompt` after the answer's beginning, which is the last message. Raises Dsv2Error.
        """
        bos, eos = self.tokenizer.bos, self.tokenizer.eos
        if add_generation_prompt:
            return render(self.template, chat_history, bos, eos)
        *before, last = chat_history
        if last["role"] != "assistant":
            why = f"the last message is the {last['role']}'s"
            raise UsageError("There is no answer to go on with", why=why)
        text, start = render(self.template, before, bos, eos), last["content"]
        between = "" if start[:1].isspace() or text[-1:].isspace() else " "
        return text + between + start

    # Likelihoods.

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether it is the likeliest, from (what was asked,
        context, continuation). What is too long loses its beginning. Raises Dsv2Error.
        """
        pairs = [self.cut(context, tokens) for _, context, tokens in requests]
        alike = dict[tuple[int, ...], list[int]]()
        for i, (context, _) in enumerate(pairs):
            alike.setdefault(tuple(context), []).append(i)
        answers = dict[int, tuple[float, bool]]()
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for same, read in self.run_alike(pairs, [same for _, same in sorted(alike.items())]):
                for i in same:
                    found = likely(*pairs[i], read)
                    answers[i] = (found.total, found.greedy)
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
                bar.update(len(same))
        return [answers[i] for i in range(len(requests))]

    def cut(self, context: list[int], tokens: list[int]) -> Pair:
        """A pair whose prompt fits into `max_length`: all but the last token is read. Raises UsageError where
        there is nothing to ask about, or more than fits.
        """
        if not 0 < len(tokens) <= self.max_length:
            why = f"it must have 1 to {self.max_length:,}"
            raise UsageError(f"A continuation of {len(tokens):,} tokens can not be rated", why=why)
        ids = (context + tokens)[-(self.max_length + 1) :]
        if max(ids) >= self.opened.config.vocab_size:
            what, most = f"There is no token {max(ids)}", self.opened.config.vocab_size - 1
            raise UsageError(what, why=f"this model's ids go from 0 to {most}")
        return ids[: -len(tokens)], tokens

    def run_alike(
        self, pairs: list[Pair], groups: list[list[int]]
    ) -> Iterator[tuple[list[int], list[Reading]]]:
        """Each group of pairs, which have one context, with what was read for it. Raises Dsv2Error."""
        waiting = deque[tuple[list[int], list[Reading]]]()

        def jobs() -> Iterator[Job]:
            for same in groups:
                read = readings(pairs[same[0]][0], [pairs[i][1] for i in same])
                waiting.append((same, read))
                for each in read:
                    job = each.job()
                    job.request = self.only_read
                    yield job

        done = 0
        for job in self.scheduler.in_order(jobs()):
            if job.failure is not None:
                raise job.failure
            done += 1
            if done == len(waiting[0][1]):
                yield waiting.popleft()
                done = 0

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, of which every token is asked for once, after as many as fit.

        The first stands after `prefix_token_id`, and no other BOS. Raises Dsv2Error.
        """
        windows = list[tuple[None, list[int], list[int]]]()
        counts = list[int]()
        for (text,) in (request.args for request in requests):
            ids = self.tok_encode(text, add_special_tokens=False)
            if ids[:1] == [self.prefix_token_id]:
                ids = ids[1:]
            rolled = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            mine = [(None, *make_disjoint_window(pair)) for pair in rolled]
            windows += mine
            counts.append(len(mine))
        parts = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = [sum(next(parts)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # Answers.

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """An answer to each (context, settings). Raises Dsv2Error."""
        asked = list[tuple[list[int], Request]]()
        for context, settings in (request.args for request in requests):
            request = self.request_of(settings)
            room = self.max_length - (request.max_new_tokens or 0)
            if room < 1:
                why = f"this model's context, or max_length, holds {self.max_length:,} tokens"
                what = f"max_gen_toks={request.max_new_tokens} leaves no room for a prompt"
                raise UsageError(what, why=why)
            ids = self.tok_encode(context, left_truncate_len=room) or [self.prefix_token_id]
            check_prompt(self.opened.config, ids)
            asked.append((ids, request))
        order = sorted(range(len(asked)), key=lambda i: asked[i][0])
        texts = dict[int, str]()
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            jobs = (Job(*asked[i]) for i in order)
            for i, job in zip(order, self.scheduler.in_order(jobs), strict=True):
                if job.failure is not None:
                    raise job.failure
                texts[i] = job.result.text
                self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                bar.update()
        return [texts[i] for i in range(len(requests))]

    def request_of(self, settings: dict[str, Any]) -> Request:
        """What a task's generation settings ask for: the likeliest tokens unless `do_sample` is true, or a
        temperature is given and `do_sample` is not.

        A stop text that is a special token is met as that token. Seeds come from torch's, which lm_eval sets.
        Raises UsageError for a setting that is not known or makes no sense.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        until = given.pop("until", [])
        stops = [until] if isinstance(until, str) else until
        if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) for stop in stops):
            raise senseless("until", until, "it must be a text, or a list of texts")
        most = one_of({name: given.pop(name, None) for name in MOST})
        do_sample = given.pop("do_sample", None)
        if do_sample not in (None, True, False):
            raise senseless("do_sample", do_sample, "it must be true or false")
        sampling = {name: given.pop(name) for name in RULES if name in given}
        if given:
            known = ", ".join(["until", *MOST, "do_sample", *RULES])
            raise UsageError(f"There is no generation setting {', '.join(given)}", why=f"there are {known}")
        for name, value in sampling.items():
            if value not in RULES[name]:
                raise senseless(name, value, f"it must be {RULES[name]}")
        temperature = sampling.get("temperature", 1.0 if do_sample else 0.0)
        sampling["temperature"] = 0.0 if do_sample is False else temperature
        special = [self.tokenizer.fast.token_to_id(stop) for stop in stops]
        ends = {token for token in special if token is not None and self.tokenizer.is_special(token)}
        return Request(
            SamplingParams(**sampling),
            self.max_gen_toks if most is None else whole("max_gen_toks", most),
            eos_ids=self.eos_ids | ends,
            stop=tuple(stops),
            seed=int(torch.randint(2**31, ())) if sampling["temperature"] else 0,
        )


def senseless(name: str, value: Any, why: str) -> UsageError:
    return UsageError(f"{name}={value!r} makes no sense", why=why)


def whole(name: str, value: Any) -> int:
    """A positive number, given as such or as text. Raises UsageError for anything else."""
    number = int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 20 else value
    if number not in COUNT:
        raise senseless(name, value, f"it must be {COUNT}")
    return int(number)


def one_of(named: dict[str, Any]) -> Any:
    """The value that one setting has under several names, or None. Raises UsageError for two values."""
    given = {name: value for name, value in named.items() if value is not None}
    if any(value != other for value, other in itertools.pairwise(given.values())):
        said = " and ".join(f"{name}={value!r}" for name, value in given.items())
        raise UsageError(f"{said} say one thing in two ways", fix="give one of them")
    return next(iter(given.values()), None)


def width_of(batch_size: Any, max_batch_size: Any) -> int:
    """How many requests run at once. Raises UsageError."""
    auto = isinstance(batch_size, str) and batch_size.partition(":")[0] == "auto"
    width = WIDTH if auto else whole("batch_size", batch_size)
    return width if max_batch_size is None else min(width, whole("max_batch_size", max_batch_size))


def wish_of(given: dict[str, Any]) -> BatchWish:
    """The wish that arguments of lm_eval name, texts or values. Raises UsageError for one that is not there
    or makes no sense.
    """
    hints = get_type_hints(BatchWish, include_extras=True)
    known = [field.name for field in fields(BatchWish)]
    if unknown := [name for name in given if name not in known]:
        own = "model, pretrained, batch_size, max_batch_size, max_length, max_gen_toks, add_bos_token"
        raise UsageError(
            f"dsv2 has no argument {', '.join(unknown)}", why=f"there are {own}, {', '.join(known)}"
        )
    values = {name: value_of(name, get_args(hints[name])[0], value) for name, value in given.items()}
    return BatchWish(**{name: value for name, value in values.items() if value is not None})


def value_of(name: str, kind: Any, value: Any) -> Any:
    """An argument as its field has it, whose type is `kind`; None where it asks for the default.

    lm_eval has made numbers, True, False and None of texts that look like them. Raises UsageError.
    """
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    if value is None:
        return "none" if "none" in choices else None
    if choices:
        if value not in choices:
            raise senseless(name, value, f"it must be one of {', '.join(choices)}")
        return value
    kinds = get_args(kind) or (kind,)
    if int in kinds:
        return whole(name, value)
    if isinstance(value, bool) or not isinstance(value, str | Path | int):
        raise senseless(name, value, "it must be a text")
    return Path(str(value)) if Path in kinds else str(value)


def main() -> None:
    """lm_eval's command line, with `--model dsv2 --batch_size auto --device auto` where it says nothing else:
    by itself it takes one request at a time, and cuda:0.
    """
    from lm_eval.__main__ import cli_evaluate

    words = sys.argv[1:]
    if words and words[0] not in ("ls", "validate") and not {"-h", "--help", "-C", "--config"} & set(words):
        said = {word.partition("=")[0] for word in words}
        for names, value in OPTIONS.items():
            if not said & set(names):
                sys.argv += [names[0], value]
    try:
        cli_evaluate()
    except Dsv2Error as error:
        sys.exit(f"error: {error.sentence}" + (f"\n  fix: {error.fix}" if error.fix else ""))


if __name__ == "__main__":
    main()
