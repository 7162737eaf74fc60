"""`dsv2 complete`: a prompt in, its continuation out, or a file of them. Only the text or the JSON reaches stdout."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv2cli.cli import options as opt
from dsv2cli.cli import ui
from dsv2cli.errors import INTERRUPTED, UsageError

if TYPE_CHECKING:
    from dsv2cli.checkpoint.tokenizer import Tokenizer
    from dsv2cli.cli.asking import Asked
    from dsv2cli.engine.generate import Request, Result

CUT_OFF = 3  # the exit code of --fail-on-length


class BadLine(str, Enum):
    fail, skip = "fail", "skip"


def complete(
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue. All of stdin, if piped, comes before it.")
    ] = None,
    model: opt.ModelOption = None,
    prompt_ids: Annotated[
        str | None, typer.Option(help='Token ids instead of text, "1,2,3": no tokenizer needed.')
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="The text is a message: put it into the checkpoint's chat template."),
    ] = False,
    system: Annotated[str | None, typer.Option(help="System prompt; implies --chat.")] = None,
    messages: Annotated[
        Path | None, typer.Option(help="JSON list of messages to answer, instead of a text; - is stdin.")
    ] = None,
    prefix: Annotated[
        str, typer.Option(help="Beginning of the answer, which is printed as part of it.")
    ] = "",
    fim_prefix: Annotated[
        str | None, typer.Option(help="Fill in the middle: what stands before the hole.")
    ] = None,
    fim_suffix: Annotated[str | None, typer.Option(help="Fill in the middle: what stands after it.")] = None,
    fim_file: Annotated[
        Path | None,
        typer.Option(help=f"Fill in the middle of a file, where it says {opt.CURSOR}; - is stdin."),
    ] = None,
    max_new_tokens: opt.MaxTokensOption = 512,
    temperature: opt.TemperatureOption = None,
    top_p: opt.TopPOption = None,
    top_k: opt.TopKOption = None,
    min_p: opt.MinPOption = None,
    repetition_penalty: opt.RepetitionOption = None,
    seed: opt.SeedOption = None,
    stop: opt.StopOption = None,
    regex: Annotated[
        str | None,
        typer.Option(help="Hold the answer to a regular expression, whole. Needs dsv2cli[grammar]."),
    ] = None,
    json_schema: Annotated[
        Path | None,
        typer.Option(help="Hold the answer to the JSON schema in a file. Needs dsv2cli[grammar]."),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Continuations of one prompt, read once; seeds count up. Needs --json.")
    ] = 1,
    echo: Annotated[
        bool,
        typer.Option("--echo", help="Print the prompt before its continuation, and what follows a hole."),
    ] = False,
    fail_on_length: Annotated[
        bool,
        typer.Option(
            "--fail-on-length", help=f"Exit code {CUT_OFF} where an answer ended at the token limit."
        ),
    ] = False,
    speculate: Annotated[
        bool,
        typer.Option(
            "--speculate",
            help="Draft tokens from the text so far and check several at once; same text, sooner where it repeats.",
        ),
    ] = False,
    batch: Annotated[
        Path | None,
        typer.Option(
            metavar="IN.jsonl",
            help='A prompt a line: {"prompt": ...}, prompt_ids or messages, with id, seed, sampling. Goes on where it was stopped.',
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="OUT.jsonl", help="Answers to --batch, a line each, in order.")
    ] = None,
    jsonl: Annotated[
        bool,
        typer.Option(
            "--jsonl",
            help="As --batch, but from stdin to stdout: each line is answered before the next is read.",
        ),
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts of --batch decoded at once.")] = 16,
    on_bad_line: Annotated[
        BadLine,
        typer.Option(
            help="A line that can not be run: end there (--batch: before any is run), or answer it with its error."
        ),
    ] = BadLine.fail,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on past the end-of-text token.")
    ] = False,
    logprobs: Annotated[
        int | None, typer.Option(min=0, help="Report the K likeliest of each token; implies --json.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Show the exact prompt, its ids and how the model would run; load nothing."
        ),
    ] = False,
    device: opt.DeviceOption = "auto",
    dtype: opt.DtypeOption = opt.Dtype.auto,
    attention: opt.AttentionOption = opt.AttentionPath.auto,
    kernels: opt.KernelsOption = opt.KernelsChoice.auto,
    quantize: opt.QuantizeOption = opt.Quantize.none,
    gpus: opt.GpusOption = None,
    split_attention: opt.SplitAttentionOption = opt.SplitAttention.heads,
    placement: opt.PlacementOption = None,
    max_memory: opt.MaxMemoryOption = None,
    offload_folder: opt.OffloadFolderOption = None,
    experts: opt.ExpertsOption = opt.Experts.auto,
    threads: opt.ThreadsOption = None,
) -> None:
    """Continue a text: the argument, or all of stdin as one prompt, or both.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 with --fail-on-length, 130 interrupted.
    """
    chat = chat or system is not None
    fim = None if fim_prefix is None and fim_suffix is None else (fim_prefix or "", fim_suffix or "")
    sources = {
        "a text": prompt,
        "--prompt-ids": prompt_ids,
        "--messages": messages,
        "--fim-prefix or --fim-suffix": fim,
        "--fim-file": fim_file,
        "--batch": batch,
        "--jsonl": jsonl or None,
    }
    source = next((name for name, value in sources.items() if value is not None), "a text")
    as_json = json or logprobs is not None
    refuse_mixtures(source, sources, chat, prefix, output)
    if samples > 1 and not as_json:
        raise UsageError(
            "--samples needs --json",
            why="texts that follow one another could not be told apart",
            fix="--json",
        )
    if regex is not None and json_schema is not None:
        raise UsageError("Both --regex and --json-schema are given", fix="leave one of them out")
    if source in ("--batch", "--jsonl") and (samples > 1 or speculate or dry_run or echo or fail_on_length):
        raise UsageError(
            f"{source} goes without --samples, --speculate, --dry-run, --echo and --fail-on-length"
        )
    if (
        split_attention is opt.SplitAttention.sequences
        and source not in ("--batch", "--jsonl")
        and not dry_run
    ):
        raise UsageError(
            "--split-attention sequences is for --batch",
            why="one sequence can be attended to by one rank alone",
            fix="leave it out",
        )
    if speculate and samples > 1:
        raise UsageError("--speculate is for one answer at a time", fix="leave --samples out")
    compute = opt.Compute(
        device,
        dtype,
        threads,
        attention,
        kernels,
        quantize,
        gpus,
        placement,
        max_memory,
        offload_folder,
        experts,
        split_attention,
    )
    sampling = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    text = ui.read_stdin() + (prompt or "") if source == "a text" else None

    from dsv2cli.cli import asking

    schema = None if json_schema is None else asking.read(json_schema)

    # What is wrong with the prompt is said before the weights are read.
    checkpoint = opt.find(model)
    request = replace(
        checkpoint.request(max_new_tokens, seed, stop, logprobs, ignore_eos, **sampling), speculate=speculate
    )
    asked, tokenizer = None, None
    if source not in ("--batch", "--jsonl"):
        from dsv2cli.engine.generate import check_prompt

        asked, tokenizer = asking.Source(text, prompt_ids, messages, fim, fim_file, chat, system, prefix).ask(
            checkpoint
        )
        check_prompt(checkpoint.config, asked.ids)
    if regex is not None or schema is not None:
        from dsv2cli.engine.grammar import Grammar

        tokenizer = tokenizer or checkpoint.tokenizer()
        request = replace(
            request,
            grammar=Grammar(tokenizer, checkpoint.config.vocab_size, request.eos_ids, regex, schema, prefix),
        )
    if dry_run:
        assert asked is not None
        show_plan(asked, tokenizer, checkpoint, compute, request, as_json)
        return
    opened = opt.open_model(model, compute, found=checkpoint)
    if asked is None:
        many(batch, output, opened, request, batch_size, on_bad_line is BadLine.skip)
    elif samples > 1:
        several(samples, asked, tokenizer, opened, request, echo, fail_on_length)
    else:
        one(asked, tokenizer, opened, request, as_json, echo, fail_on_length)


def refuse_mixtures(
    source: str, sources: dict[str, Any], chat: bool, prefix: str, output: Path | None
) -> None:
    """One source of prompts at a time, with the options that belong to it. Raises UsageError."""
    others = [name for name, value in sources.items() if value is not None and name != source]
    if others:
        raise UsageError(f"Both {source} and {others[0]} are given", fix="leave one of them out")
    if chat and source != "a text":
        raise UsageError(
            f"--chat and {source} do not go together",
            why="--chat is about a text",
            fix="leave one of them out",
        )
    if prefix and source not in ("a text", "--messages"):
        raise UsageError(f"--prefix and {source} do not go together", fix="leave one of them out")
    if (sources["--batch"] is None) != (output is None):
        raise UsageError(
            "--batch and --output go together", fix="dsv2 complete --batch IN.jsonl --output OUT.jsonl"
        )


def one(
    asked: Asked,
    tokenizer: Tokenizer | None,
    opened: opt.Opened,
    request: Request,
    as_json: bool,
    echo: bool,
    fail_on_length: bool,
) -> None:
    """One answer, printed as it comes, or as one object."""
    from dsv2cli.engine.generate import Result, stream_text

    result = Result(prompt_ids=asked.ids)
    if not as_json:
        ui.write((asked.before if echo else "") + asked.start)
    try:
        for piece in stream_text(
            opened.model, tokenizer, asked.ids, request, opened.model.new_cache(), result
        ):
            if piece and not as_json:
                ui.write(piece)
    except KeyboardInterrupt:
        result.finish_reason = "interrupted"
    if as_json:
        ui.write_json(report(result, opened, request, asked, echo))
    elif tokenizer is None:
        ui.write(",".join(str(token_id) for token_id in result.token_ids) + "\n")
    else:
        ui.write((asked.after if echo else "") + ("\n" if sys.stdout.isatty() else ""))
    ui.note(opt.stats_line(result))
    if result.finish_reason == "interrupted":
        raise typer.Exit(INTERRUPTED)
    if fail_on_length and result.finish_reason == "length":
        raise typer.Exit(CUT_OFF)


def several(
    count: int,
    asked: Asked,
    tokenizer: Tokenizer | None,
    opened: opt.Opened,
    request: Request,
    echo: bool,
    fail_on_length: bool,
) -> None:
    """`count` answers to one prompt, which is read once; each is printed as soon as it and those before it are done."""
    from dsv2cli.engine.batch import Job, run_samples

    jobs = [Job(asked.ids, replace(request, seed=request.seed + i)) for i in range(count)]
    cut_off = False
    for job in run_samples(opened.model, tokenizer, jobs):
        cut_off = cut_off or job.result.finish_reason == "length"
        ui.write_json(report(job.result, opened, job.request, asked, echo))
    if fail_on_length and cut_off:
        raise typer.Exit(CUT_OFF)


def many(
    batch: Path | None, output: Path | None, opened: opt.Opened, request: Request, width: int, skip_bad: bool
) -> None:
    """A file of prompts to a file of answers, or stdin to stdout."""
    from dsv2cli.cli.batch import answer_lines, run

    if batch is None:
        answer_lines(opened, request, skip_bad, report)
        return
    assert output is not None
    written, errors = run(batch, output, opened, request, width, skip_bad, report)
    ui.note(f"{written} answers in {output}" + (f", {errors} of them errors" if errors else ""))


def show_plan(
    asked: Asked,
    tokenizer: Tokenizer | None,
    checkpoint: opt.Checkpoint,
    compute: opt.Compute,
    request: Request,
    as_json: bool,
) -> None:
    """What --dry-run prints: the prompt to the letter, its ids, and how the model would run."""
    from dsv2cli.checkpoint.placement import summary
    from dsv2cli.model import size

    plan, config = opt.make_plan(checkpoint.config, compute), checkpoint.config
    dtype = str(plan.dtype).removeprefix("torch.")
    length = min(len(asked.ids) + (request.max_new_tokens or 0), config.max_position_embeddings)
    facts: dict[str, Any] = {
        "model": checkpoint.name,
        "prompt": None if tokenizer is None else tokenizer.fast.decode(asked.ids, skip_special_tokens=False),
        "prompt_ids": asked.ids,
        "prompt_tokens": len(asked.ids),
        "max_new_tokens": length - len(asked.ids),
        "sampling": asdict(request.sampling),
        "seed": request.seed,
        "stop": list(request.stop),
        "eos_ids": sorted(request.eos_ids),
        "device": str(plan.device),
        "weights": plan.format,
        "ranks": plan.ranks,
        "split_attention": compute.split_attention.value,
        "places": plan.places,
        "experts": None if plan.apart is None else opt.apart_line(config, plan),
        "weights_bytes_by_rank": size.bytes_by_rank(config, plan.format, dtype, plan.ranks, plan.sequences),
        "cache_bytes": length * size.kv_bytes_per_token(config, dtype),
        "attention": compute.attention.value,
        "kernels": plan.path,
        "kernels_why": plan.why,
    }
    if as_json:
        ui.write_json(facts)
        return
    sampling = ", ".join(f"{name} {value:g}" for name, value in facts["sampling"].items())
    weights = " + ".join(f"{part / 1e9:.2f}" for part in facts["weights_bytes_by_rank"]) + " GB"
    why = f" (because {plan.why})" if plan.why else ""
    ui.write(
        f"{facts['prompt'] if tokenizer is not None else '(no tokenizer)'}\n--\n"
        f"ids: {','.join(map(str, asked.ids))}\n"
        f"tokens: {len(asked.ids)} in the prompt, up to {facts['max_new_tokens']} new, of {config.max_position_embeddings}\n"
        f"sampling: {sampling}, seed {request.seed}\n"
        f"end: ids {', '.join(map(str, facts['eos_ids'])) or 'none'}"
        + (f", texts {', '.join(map(repr, request.stop))}" if request.stop else "")
        + f"\nmodel: {facts['model']}, {plan.format}, weights {weights}, cache {facts['cache_bytes'] / 1e6:.1f} MB\n"
        f"runs on: {f'{plan.ranks} x ' if plan.ranks > 1 else ''}{plan.device}, {plan.path}{why}, attention {facts['attention']}\n"
        + ("" if facts["experts"] is None else f"experts: {facts['experts']}\n")
        + ("" if plan.places is None else f"places: {summary(plan.places)}\n")
    )


def report(
    result: Result, opened: opt.Opened, request: Request, asked: Asked | None = None, echo: bool = False
) -> dict[str, Any]:
    """The --json object. What is known of the words around the answer comes with `asked`."""
    logprobs = [
        {"token_id": token.id, "logprob": token.logprob, "top": [list(pair) for pair in token.top]}
        for token in result.tokens
    ]
    text = result.text if asked is None else asked.start + result.text
    if asked is not None and echo:
        text = asked.before + text + asked.after
    return {
        "text": text,
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
