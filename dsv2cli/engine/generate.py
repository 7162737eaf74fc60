"""Tokens to tokens, and tokens to text. Knows no files, no chat and no screen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from dsv2cli.checkpoint.tokenizer import IncrementalDecoder, Tokenizer
from dsv2cli.engine.grammar import Constraint
from dsv2cli.engine.request import Request, Result, Token
from dsv2cli.engine.sampling import NO_TOKEN, no_numbers, sample, sample_rows, seeded
from dsv2cli.errors import Dsv2Error
from dsv2cli.model.cache import LatentCache
from dsv2cli.model.step import Watch, unwatched
from dsv2cli.run.runner import Runner

DRAFT = (
    7  # tokens drafted at most: with the new one they are eight rows, which cost a CPU little more than one
)
# Tokens of each row in a forward pass: enough for full GEMM speed on a CPU, little enough to bound memory.
PREFILL_CHUNK = 512
GPU_PREFILL_TOKENS = 4096  # of all rows together, on a GPU


Reading = Callable[[int, int], object]  # told how many tokens of a prompt have been read, of how many


def unheard(done: int, total: int) -> None:
    """Nobody wants to know."""


@torch.inference_mode()
def prefill(
    runner: Runner,
    prompts: list[list[int]],
    cache: LatentCache,
    watch: Watch = unwatched,
    reading: Reading = unheard,
) -> Tensor:
    """Run the prompts' tokens into the cache, a chunk at a time; logits after each prompt's last one.

    [batch, vocab]

    Prompts of different lengths are padded on the right; padding is never visible to a real token. What
    `reading` raises between two chunks ends it there.
    """
    longest = max(len(prompt) for prompt in prompts)
    base = list(cache.lengths)
    cache.reserve(max(base) + longest)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    ids = ids.to(runner.device)
    last = torch.empty(len(prompts), runner.config.hidden_size, device=runner.device, dtype=runner.dtype)
    size = PREFILL_CHUNK if runner.device.type == "cpu" else max(32, GPU_PREFILL_TOKENS // len(prompts))
    for start in range(0, longest, size):
        # What has been read stays read, whoever ends it here.
        cache.lengths = [old + min(start, len(prompt)) for old, prompt in zip(base, prompts, strict=True)]
        reading(start, longest)
        chunk = ids[:, start : start + size]
        # Rows keep in step while padding runs, so that every chunk starts at one place; lengths are set at
        # the end.
        cache.lengths = [length + start for length in base]
        hidden = runner(chunk, cache, watch)
        for row, prompt in enumerate(prompts):
            if start < len(prompt) <= start + chunk.shape[1]:
                last[row] = hidden[row, len(prompt) - 1 - start]
    cache.lengths = [length + len(prompt) for length, prompt in zip(base, prompts, strict=True)]
    return runner.logits(last)


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
    if request.logprobs is None:
        return Token(token_id)
    logprobs = logits.log_softmax(dim=-1)
    values, ids = logprobs.topk(min(request.logprobs, logprobs.numel()))
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


@torch.inference_mode()
def generate_batch(
    runner: Runner,
    prompts: list[list[int]],
    request: Request,
    cache: LatentCache,
    logits: Tensor | None = None,
) -> Iterator[list[Token | None]]:
    """One list per step with each row's new token, None for rows that have ended (by EOS or length).

    `cache` holds what precedes the prompts; `logits` [rows, vocab] are those of the last prompt token if
    prefill has been done. The last token given for a row is not in the cache yet; a runner that
    `decodes_ahead` may have put it there.
    """
    logits = prefill(runner, prompts, cache) if logits is None else logits
    generators = [seeded(runner.device, request.seed + row) for row in range(len(prompts))]
    room = runner.config.max_position_embeddings - max(cache.lengths)
    limit = room if request.max_new_tokens is None else min(room, request.max_new_tokens)
    if runner.decodes_ahead and request.plain:
        yield from ahead_of_the_reader(runner, request, cache, logits, generators, limit)
        return
    constraints, seen = [request.constraint() for _ in prompts], [list(prompt) for prompt in prompts]
    running = [True] * len(prompts)
    for step in range(limit):
        tokens = [
            pick(logits[row], request, seen[row], generators[row], constraints[row]) if running[row] else None
            for row in range(len(prompts))
        ]
        yield tokens
        for row, token in enumerate(tokens):
            if token is not None:
                seen[row].append(token.id)
                running[row] = token.id not in request.eos_ids
        if not any(running) or step + 1 == limit:
            return
        ids = torch.tensor([[0 if token is None else token.id] for token in tokens], device=runner.device)
        logits = runner.decode(ids, cache)[:, -1]


def ahead_of_the_reader(
    runner: Runner,
    request: Request,
    cache: LatentCache,
    logits: Tensor,
    generators: list[torch.Generator],
    limit: int,
) -> Iterator[list[Token | None]]:
    """generate_batch where the device samples: it goes on while a token is shown; at the end of the text one
    step too far.

    logits [rows, vocab] follow the prompts. Raises Dsv2Error for scores that are no numbers.
    """
    running = [True] * len(logits)
    chosen = sample_rows(logits, request.sampling, generators)
    for step in range(limit):
        ids = read_later(chosen)
        if step + 1 < limit:
            chosen = sample_rows(runner.decode(chosen[:, None], cache)[:, -1], request.sampling, generators)
        tokens = [Token(token_id) if runs else None for token_id, runs in zip(ids(), running, strict=True)]
        if any(token is not None and token.id == NO_TOKEN for token in tokens):
            raise no_numbers()
        yield tokens
        running = [token is not None and token.id not in request.eos_ids for token in tokens]
        if not any(running):
            return


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


@torch.inference_mode()
def speculate(
    runner: Runner, prompts: list[list[int]], request: Request, cache: LatentCache, logits: Tensor
) -> Iterator[list[Token | None]]:
    """generate_batch for one prompt, with tokens drafted from the text so far and checked in one forward
    pass.

    Every token is sampled from the model's own scores in the same order as without drafts, so the text is the
    same up to the rounding of a longer forward pass; where a draft differs from what was sampled it is
    dropped from the cache.

    logits [1, vocab] are those of the last prompt token.
    """
    (prompt,) = prompts
    generator = seeded(runner.device, request.seed)
    history, constraint = list(prompt), request.constraint()
    room = runner.config.max_position_embeddings - cache.lengths[0]
    left = room if request.max_new_tokens is None else min(room, request.max_new_tokens)
    scores, draft = logits, list[int]()  # scores[i] follow draft[:i]
    while left > 0:
        for i in range(len(draft) + 1):
            token = pick(scores[i], request, history, generator, constraint)
            history.append(token.id)
            left -= 1
            yield [token]
            if left == 0 or token.id in request.eos_ids:
                return
            if i < len(draft) and token.id != draft[i]:
                cache.truncate(cache.lengths[0] - (len(draft) - i))
                break
        draft = look_up(history, min(DRAFT, left - 1))
        ids = torch.tensor([[history[-1], *draft]], device=runner.device)
        scores = runner.decode(ids, cache)[0]


class StopStrings:
    """Finds stop strings in streamed text, holding back whatever may still turn into one."""

    def __init__(self, stop: Iterable[str]) -> None:
        self.stop = tuple(text for text in stop if text)
        self.held = ""
        self.found = False

    def add(self, piece: str) -> str:
        """Text that is safe to show.

        Once a stop string is complete `found` is set, and it and the rest are dropped.
        """
        self.held += piece
        hits = [at for text in self.stop if (at := self.held.find(text)) >= 0]
        if hits:
            self.found = True
            shown, self.held = self.held[: min(hits)], ""
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
            self.result.finish_reason = "stop"
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


def stream_text(
    runner: Runner,
    tokenizer: Tokenizer | None,
    prompt_ids: list[int],
    request: Request,
    cache: LatentCache,
    result: Result,
    reading: Reading = unheard,
) -> Iterator[str]:
    """Generate after `prompt_ids` and yield the text as it comes; `result` is kept up to date throughout.
    `reading` is told of each chunk of the prompt before it is read, and may raise.

    The first cache.lengths[0] ids must be in the cache already; at least one id must be new. Without a
    tokenizer every piece is empty. Ending the iteration early leaves finish_reason "interrupted"; a Dsv2Error
    on the way, "error".
    """
    reused = cache.lengths[0]
    assert reused < len(prompt_ids), "the last prompt token must be computed"
    result.prompt_ids, result.reused_tokens, result.finish_reason = prompt_ids, reused, ""
    answer = Answer(tokenizer, request, result)
    began = time.perf_counter()
    try:
        logits = prefill(runner, [prompt_ids[reused:]], cache, reading=reading)
        result.prefill_seconds = time.perf_counter() - began
        first = 0.0
        steps = speculate if request.speculate else generate_batch
        for (token,) in steps(runner, [prompt_ids], request, cache, logits):
            assert token is not None, "a single row ends with the iteration"
            now = time.perf_counter()
            first = first or now
            result.ttft_seconds, result.decode_seconds = first - began, now - first
            yield answer.add(token)
            if answer.ended:
                break
        else:
            result.finish_reason = "length"
        yield answer.finish()
    except Dsv2Error:
        result.finish_reason = "error"
        raise
    finally:
        result.finish_reason = result.finish_reason or "interrupted"
