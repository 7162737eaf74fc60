"""`dsv2 complete`: one prompt in, its continuation out. Only the text or the JSON reaches stdout."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv2cli.cli import options as opt
from dsv2cli.cli import ui
from dsv2cli.errors import INTERRUPTED, UsageError

if TYPE_CHECKING:
    from dsv2cli.engine.generate import Request, Result


def complete(
    prompt: Annotated[str | None, typer.Argument(help="Text to continue. All of stdin, if piped, comes before it.")] = None,
    model: opt.ModelOption = None,
    prompt_ids: Annotated[str | None, typer.Option(help='Token ids instead of text, "1,2,3": no tokenizer needed.')] = None,
    max_new_tokens: opt.MaxTokensOption = 512,
    temperature: opt.TemperatureOption = None,
    top_p: opt.TopPOption = None,
    top_k: opt.TopKOption = None,
    min_p: opt.MinPOption = None,
    repetition_penalty: opt.RepetitionOption = None,
    seed: opt.SeedOption = None,
    stop: opt.StopOption = None,
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

    Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
    """
    text = "" if prompt_ids is not None else ui.read_stdin() + (prompt or "")
    if prompt_ids is not None and prompt is not None:
        raise UsageError("Both a text and --prompt-ids are given", fix="leave one of them out")
    if prompt_ids is None and not text:
        raise UsageError("The prompt is empty", why="there is nothing to continue", fix='dsv2 complete "Once upon a time"')
    ids = None if prompt_ids is None else opt.parse_ids(prompt_ids)
    opened = opt.open_model(model, device, dtype, threads, attention, kernels, quantize)
    request = opened.request(
        max_new_tokens, seed, stop, logprobs, ignore_eos, temperature=temperature, top_p=top_p, top_k=top_k,
        min_p=min_p, repetition_penalty=repetition_penalty,
    )  # fmt: skip

    from dsv2cli.engine.generate import Result, check_prompt, stream_text

    # With ids the tokenizer may be missing; it is used for the text where there is one.
    has_tokenizer = ids is None or (opened.folder / "tokenizer.json").exists()
    tokenizer = opened.tokenizer() if has_tokenizer else None
    if ids is None and tokenizer is not None:
        ids = tokenizer.encode(text)
    assert ids is not None
    check_prompt(opened.model, ids)
    as_json = json or logprobs is not None
    result = Result(prompt_ids=ids)
    try:
        for piece in stream_text(opened.model, tokenizer, ids, request, opened.model.new_cache(), result):
            if piece and not as_json:
                ui.write(piece)
    except KeyboardInterrupt:
        result.finish_reason = "interrupted"
    if as_json:
        ui.write_json(report(result, opened, request))
    elif tokenizer is None:
        ui.write(",".join(str(token_id) for token_id in result.token_ids) + "\n")
    elif sys.stdout.isatty():
        ui.write("\n")
    ui.note(opt.stats_line(result))
    if result.finish_reason == "interrupted":
        raise typer.Exit(INTERRUPTED)


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
