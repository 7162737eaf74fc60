"""`dsv2 complete`: a prompt in, its continuation out, or a file of them. Only the text or the JSON reaches stdout."""

from __future__ import annotations

import sys
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv2cli.cli import options as opt
from dsv2cli.cli import ui
from dsv2cli.errors import INTERRUPTED, UsageError

if TYPE_CHECKING:
    from dsv2cli.checkpoint.tokenizer import Tokenizer
    from dsv2cli.engine.generate import Request, Result

CUT_OFF = 3  # the exit code of --fail-on-length


class BadLine(str, Enum):
    fail, skip = "fail", "skip"


def complete(
    prompt: Annotated[str | None, typer.Argument(help="Text to continue. All of stdin, if piped, comes before it.")] = None,
    model: opt.ModelOption = None,
    prompt_ids: Annotated[str | None, typer.Option(help='Token ids instead of text, "1,2,3": no tokenizer needed.')] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The text is a message: put it into the checkpoint's chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="System prompt; implies --chat.")] = None,
    messages: Annotated[Path | None, typer.Option(help="JSON list of messages to answer, instead of a text.")] = None,
    max_new_tokens: opt.MaxTokensOption = 512,
    temperature: opt.TemperatureOption = None,
    top_p: opt.TopPOption = None,
    top_k: opt.TopKOption = None,
    min_p: opt.MinPOption = None,
    repetition_penalty: opt.RepetitionOption = None,
    seed: opt.SeedOption = None,
    stop: opt.StopOption = None,
    samples: Annotated[int, typer.Option(min=1, help="Continuations of one prompt, read once; seeds count up. Needs --json.")] = 1,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt before its continuation.")] = False,
    fail_on_length: Annotated[
        bool, typer.Option("--fail-on-length", help=f"Exit code {CUT_OFF} where an answer ended at the token limit.")
    ] = False,
    speculate: Annotated[
        bool, typer.Option("--speculate", help="Draft tokens from the text so far and check several at once; same text, sooner where it repeats.")
    ] = False,
    batch: Annotated[
        Path | None, typer.Option(metavar="IN.jsonl", help="A prompt a line: {\"prompt\": ...}, prompt_ids or messages, with id, seed, sampling. Goes on where it was stopped.")
    ] = None,
    output: Annotated[Path | None, typer.Option(metavar="OUT.jsonl", help="Answers to --batch, a line each, in order.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts of --batch decoded at once.")] = 16,
    on_bad_line: Annotated[BadLine, typer.Option(help="A line of --batch that can not be run: fail before any is, or skip it with its error.")] = BadLine.fail,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end-of-text token.")] = False,
    logprobs: Annotated[int | None, typer.Option(min=0, help="Report the K likeliest of each token; implies --json.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
    device: opt.DeviceOption = "auto",
    dtype: opt.DtypeOption = opt.Dtype.auto,
    attention: opt.AttentionOption = opt.AttentionPath.auto,
    kernels: opt.KernelsOption = opt.KernelsChoice.auto,
    quantize: opt.QuantizeOption = opt.Quantize.none,
    threads: opt.ThreadsOption = None,
) -> None:
    """Continue a text: the argument, or all of stdin as one prompt, or both.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 with --fail-on-length, 130 interrupted.
    """
    chat = chat or system is not None
    refuse_mixtures(prompt, prompt_ids, messages, chat, batch, output)
    if samples > 1 and not json and logprobs is None:
        raise UsageError("--samples needs --json", why="texts that follow one another could not be told apart", fix="--json")
    if speculate and (samples > 1 or batch is not None):
        raise UsageError("--speculate is for one answer at a time", fix="leave --samples and --batch out")
    text = "" if prompt_ids is not None or messages is not None or batch is not None else ui.read_stdin() + (prompt or "")
    if prompt_ids is None and messages is None and batch is None and not text:
        raise UsageError("The prompt is empty", why="there is nothing to continue", fix='dsv2 complete "Once upon a time"')
    ids = None if prompt_ids is None else opt.parse_ids(prompt_ids)
    opened = opt.open_model(model, device, dtype, threads, attention, kernels, quantize)
    request = opened.request(
        max_new_tokens, seed, stop, logprobs, ignore_eos, temperature=temperature, top_p=top_p, top_k=top_k,
        min_p=min_p, repetition_penalty=repetition_penalty,
    )  # fmt: skip

    if batch is not None and output is not None:
        from dsv2cli.cli.batch import run

        written, errors = run(batch, output, opened, request, batch_size, on_bad_line is BadLine.skip, report)
        ui.note(f"{written} answers in {output}" + (f", {errors} of them errors" if errors else ""))
        return

    from dsv2cli.engine.generate import Result, check_prompt, stream_text

    request = replace(request, speculate=speculate)
    # With ids the tokenizer may be missing; it is used for the text where there is one.
    has_tokenizer = ids is None or (opened.folder / "tokenizer.json").exists()
    tokenizer = opened.tokenizer() if has_tokenizer else None
    if ids is None and tokenizer is not None:
        ids = prompt_of(text, tokenizer, chat, system, messages)
    assert ids is not None
    check_prompt(opened.model, ids)
    as_json = json or logprobs is not None
    if samples > 1:
        several(samples, ids, tokenizer, opened, request, echo, fail_on_length)
        return
    result = Result(prompt_ids=ids)
    if echo and not as_json:
        ui.write(tokenizer.decode(ids) if tokenizer is not None else ",".join(map(str, ids)) + ",")
    try:
        for piece in stream_text(opened.model, tokenizer, ids, request, opened.model.new_cache(), result):
            if piece and not as_json:
                ui.write(piece)
    except KeyboardInterrupt:
        result.finish_reason = "interrupted"
    if as_json:
        ui.write_json(echoed(report(result, opened, request), tokenizer, echo))
    elif tokenizer is None:
        ui.write(",".join(str(token_id) for token_id in result.token_ids) + "\n")
    elif sys.stdout.isatty():
        ui.write("\n")
    ui.note(opt.stats_line(result))
    if result.finish_reason == "interrupted":
        raise typer.Exit(INTERRUPTED)
    if fail_on_length and result.finish_reason == "length":
        raise typer.Exit(CUT_OFF)


def refuse_mixtures(
    prompt: str | None, prompt_ids: str | None, messages: Path | None, chat: bool, batch: Path | None, output: Path | None
) -> None:
    """One source of prompts at a time. Raises UsageError."""
    sources = {"a text": prompt, "--prompt-ids": prompt_ids, "--messages": messages, "--batch": batch}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"Both {given[0]} and {given[1]} are given", fix="leave one of them out")
    if chat and given and given[0] != "a text":
        raise UsageError(f"--chat and {given[0]} do not go together", why="--chat is about a text", fix="leave one of them out")
    if (batch is None) != (output is None):
        raise UsageError("--batch and --output go together", fix="dsv2 complete --batch IN.jsonl --output OUT.jsonl")


def prompt_of(text: str, tokenizer: Tokenizer, chat: bool, system: str | None, messages: Path | None) -> list[int]:
    """The ids of a plain text, of a message in the chat template, or of a file of messages."""
    if messages is not None:
        from dsv2cli.engine.store import parse_messages

        try:
            return tokenizer.encode_chat(parse_messages(messages.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{messages} can not be read", why=str(error)) from None
    if not chat:
        return tokenizer.encode(text)
    start = [{"role": "system", "content": system}] if system else []
    return tokenizer.encode_chat([*start, {"role": "user", "content": text}])


def several(
    count: int, ids: list[int], tokenizer: Tokenizer | None, opened: opt.Opened, request: Request, echo: bool, fail_on_length: bool
) -> None:
    """`count` answers to one prompt, which is read once; each is printed as soon as it and those before it are done."""
    from dsv2cli.engine.batch import Job, run_samples

    jobs = [Job(ids, replace(request, seed=request.seed + i)) for i in range(count)]
    cut_off = False
    for job in run_samples(opened.model, tokenizer, jobs):
        cut_off = cut_off or job.result.finish_reason == "length"
        ui.write_json(echoed(report(job.result, opened, job.request), tokenizer, echo))
    if fail_on_length and cut_off:
        raise typer.Exit(CUT_OFF)


def echoed(report: dict[str, Any], tokenizer: Tokenizer | None, echo: bool) -> dict[str, Any]:
    if echo and tokenizer is not None:
        report["text"] = tokenizer.decode(report["prompt_ids"]) + report["text"]
    return report


def report(result: Result, opened: opt.Opened, request: Request) -> dict[str, Any]:
    """The --json object."""
    logprobs = [
        {"token_id": token.id, "logprob": token.logprob, "top": [list(pair) for pair in token.top]} for token in result.tokens
    ]
    return {
        "text": result.text,
        "prompt_ids": result.prompt_ids,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "logprobs": None if request.logprobs is None else logprobs,
        "usage": {
            "prompt_tokens": len(result.prompt_ids),
            "generated_tokens": len(result.tokens),
            "reused_tokens": result.reused_tokens,
        },
        "timing": {
            "load_seconds": opened.load_seconds,
            "ttft_seconds": result.ttft_seconds,
            "prefill_tokens_per_second": result.prefill_tokens_per_second,
            "decode_tokens_per_second": result.decode_tokens_per_second,
        },
        "seed": request.seed,
        "model": opened.name,
    }
