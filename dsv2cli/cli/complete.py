"""`dsv2 complete`: a prompt in, its continuation out, or a file of them.

Only the text or the JSON reaches stdout.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dsv2cli.cli import asking, offer, ui
from dsv2cli.cli import options as opt
from dsv2cli.errors import INTERRUPTED, Dsv2Error, UsageError
from dsv2cli.run.wish import CompleteWish, Wish

if TYPE_CHECKING:
    from dsv2cli.checkpoint.found import Checkpoint
    from dsv2cli.checkpoint.tokenizer import Tokenizer
    from dsv2cli.cli.lines import Answering, Asking
    from dsv2cli.engine.request import Request

CUT_OFF = 3  # the exit code of --fail-on-length


@dataclass(frozen=True)
class Sampling(opt.Sampling):
    """The same with what only a continuation has."""

    samples: Annotated[
        int, typer.Option(min=1, help="Continuations of one prompt, read once; seeds count up. Needs --json.")
    ] = 1
    regex: Annotated[
        str | None, typer.Option(help="Hold the answer to a regular expression, whole. Needs llguidance.")
    ] = None
    json_schema: Annotated[
        Path | None, typer.Option(help="Hold the answer to the JSON schema in a file. Needs llguidance.")
    ] = None
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end-of-text token.")] = (
        False
    )
    speculate: Annotated[
        bool,
        typer.Option(
            "--speculate",
            help="Draft tokens from the text so far and check several at once; same text, sooner where it "
            "repeats.",
        ),
    ] = False
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts of --batch decoded at once.")] = 16


@dataclass(frozen=True)
class Output:
    """What is printed or written."""

    heading = opt.OUTPUT

    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False
    logprobs: Annotated[
        int | None, typer.Option(min=0, help="Report the K likeliest of each token; implies --json.")
    ] = None
    prompt_logprobs: Annotated[
        int | None,
        typer.Option(min=0, help="Report each prompt token's score and the K likeliest; implies --json."),
    ] = None
    echo: Annotated[
        bool,
        typer.Option("--echo", help="Print the prompt before its continuation, and what follows a hole."),
    ] = False
    fail_on_length: Annotated[
        bool,
        typer.Option(
            "--fail-on-length", help=f"Exit code {CUT_OFF} where an answer ended at the token limit."
        ),
    ] = False
    output: Annotated[
        Path | None, typer.Option(metavar="OUT.jsonl", help="Answers to --batch, a line each, in order.")
    ] = None
    restart: Annotated[
        bool,
        typer.Option(
            "--restart", help="Answer all of --batch anew; the file that is there gets another name."
        ),
    ] = False
    on_bad_line: Annotated[
        Literal["fail", "skip"],
        typer.Option(
            help="A line that can not be run: end there (--batch: before any is run), or answer it with its "
            "error."
        ),
    ] = "fail"
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Show the exact prompt, its ids and how the model would run; load nothing."
        ),
    ] = False

    @property
    def as_json(self) -> bool:
        return self.json or self.logprobs is not None or self.prompt_logprobs is not None


@opt.unfolded
def complete(prompt: asking.Prompt, sampling: Sampling, output: Output, wish: CompleteWish) -> None:
    """Continue a text: the argument, or all of stdin, or both.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 with --fail-on-length, 130 interrupted.
    """
    source = prompt.source()
    refuse_mixtures(source, prompt, sampling, output, wish)
    if output.restart and prompt.batch is None:
        raise UsageError("--restart is for --batch", fix="leave it out")
    text = None
    if source == "a text":
        text = "" if str(sampling.json_schema) == "-" else ui.read_stdin()
        if not prompt.prompt and not prompt.keep_newline:
            text = text.removesuffix("\n").removesuffix("\r")
        text += prompt.prompt or ""

    schema = None if sampling.json_schema is None else asking.read_file(sampling.json_schema)
    if prompt.api is not None:
        answer_there(prompt, text, schema, sampling, output, wish)
        return

    # What is wrong with the prompt is said before the weights are read.
    checkpoint = offer.find(prompt.model, prompt.yes)
    request = sampling.request(
        checkpoint, output.logprobs, sampling.ignore_eos, sampling.speculate, output.prompt_logprobs
    )
    asked, tokenizer = None, None
    if not prompt.many:
        from dsv2cli.engine.request import check_prompt

        asked, tokenizer = asking.ask(prompt, text, checkpoint)
        check_prompt(checkpoint.config, asked.ids)
        if request.stop and tokenizer is None:
            raise UsageError(
                "--stop needs a tokenizer", why=f"{checkpoint.folder} has none", fix="leave it out"
            )
    if sampling.regex is not None or schema is not None:
        from dsv2cli.engine.grammar import Grammar

        tokenizer, vocab_size = tokenizer or checkpoint.tokenizer(), checkpoint.config.vocab_size
        held = Grammar(tokenizer, vocab_size, request.eos_ids, sampling.regex, schema, prompt.prefix)
        request = replace(request, grammar=held)
    if output.dry_run:
        assert asked is not None
        show_plan(asked, tokenizer, checkpoint, wish, request, output.as_json)
        return
    opened = opt.open_model(prompt.model, wish, found=checkpoint)

    from dsv2cli.cli.here import Here

    here = Here(opened, opened.tokenizer_if_any() if asked is None else tokenizer)
    answer(here, prompt, asked, request, sampling, output)
    opt.close_store(opened)


def answer_there(
    prompt: asking.Prompt,
    text: str | None,
    schema: str | None,
    sampling: Sampling,
    output: Output,
    wish: CompleteWish,
) -> None:
    """The same by a server. Raises Dsv2Error."""
    from dsv2cli.cli import far

    assert prompt.api is not None
    here_only = {
        "--regex": sampling.regex is not None,
        "--speculate": sampling.speculate,
        "--prompt-logprobs": output.prompt_logprobs is not None,
    }
    far.refuse_what_is_here(wish, given=here_only)
    asked = None if prompt.many else asking.ask_server(prompt, text)
    schema = far.schema_of(schema, asked is not None and "messages" in asked.given)
    request = far.request_of(
        sampling, logprobs=output.logprobs, ignore_eos=sampling.ignore_eos, schema=schema
    )
    server = far.connect(prompt.api, prompt.model)
    there = far.There(server)
    if output.dry_run:
        assert asked is not None
        job = there.job_of(asked, request)
        url = server.address.url + job.path
        ui.write_json({"url": url, "body": job.body(server.name or "(the only one there)")})
        return
    server.choose()
    answer(there, prompt, asked, request, sampling, output)


def answer(
    model: Answering,
    prompt: asking.Prompt,
    asked: asking.Asked | None,
    request: Request,
    sampling: Sampling,
    output: Output,
) -> None:
    """What was asked for, once or several times; or line by line."""
    if asked is None:
        many(prompt.batch, model, request, sampling, output)
    elif sampling.samples > 1:
        several(sampling.samples, asked, model, request, output)
    else:
        one(asked, model, request, output)


def refuse_mixtures(
    source: str, prompt: asking.Prompt, sampling: Sampling, output: Output, wish: Wish
) -> None:
    """Raises UsageError for options that do not go together."""
    if (prompt.batch is None) != (output.output is None):
        fix = "dsv2 complete --batch IN.jsonl --output OUT.jsonl"
        raise UsageError("--batch and --output go together", fix=fix)
    if sampling.samples > 1 and not output.as_json:
        why = "texts that follow one another could not be told apart"
        raise UsageError("--samples needs --json", why=why, fix="--json")
    if sampling.regex is not None and sampling.json_schema is not None:
        raise UsageError("Both --regex and --json-schema are given", fix="leave one of them out")
    for option, count in (("--samples", sampling.samples), ("--batch-size", sampling.batch_size)):
        opt.refuse_too_many(option, count, count)
    alone = sampling.samples > 1 or output.dry_run or output.echo or output.fail_on_length
    if prompt.many and alone:
        without = "--samples, --dry-run, --echo and --fail-on-length"
        raise UsageError(f"{source} goes without {without}")
    if wish.sequences and not prompt.many and not output.dry_run:
        why = "one sequence can be attended to by one rank alone"
        raise UsageError("--split-attention sequences is for --batch", why=why, fix="leave it out")


def one(asked: asking.Asked, model: Answering, request: Request, output: Output) -> None:
    """One answer, printed as it comes, or as one object. Raises typer.Exit where its code is not 0, and
    Dsv2Error for an answer that could not be brought to its end.
    """
    from dsv2cli.engine.text import without_first_blank

    job = model.job_of(asked, request)
    failure: Dsv2Error | None = None  # scores that are no numbers, or a form that leads nowhere
    ended: Any = None  # the exit code, where it was interrupted
    if not output.as_json:
        ui.write((asked.before if output.echo else "") + asked.start)
    try:
        shown = without_first_blank if asked.blank else iter
        # No name holds the stream: where this is interrupted it ends at once, and says so in the result.
        for piece in shown(model.stream(job)):
            if piece and not output.as_json:
                ui.write(piece)
    except (KeyboardInterrupt, SystemExit) as error:
        ended = exit_code(error)
    except Dsv2Error as error:
        failure = error
    if output.as_json:
        told = "" if failure is None else failure.sentence
        ui.write_json(model.report(job, asked, output.echo, told))
    elif not model.has_text:
        ui.write(",".join(str(token_id) for token_id in job.result.token_ids) + "\n")
    else:
        ui.write((asked.after if output.echo else "") + ("\n" if sys.stdout.isatty() else ""))
    ui.note(opt.stats_line(job.result))
    if failure is not None:
        raise failure
    if ended is not None:
        raise SystemExit(ended)
    if output.fail_on_length and job.result.finish_reason == "length":
        raise typer.Exit(CUT_OFF)


def exit_code(ended: KeyboardInterrupt | SystemExit) -> Any:
    """What a command ends with that was interrupted so."""
    return ended.code if isinstance(ended, SystemExit) else INTERRUPTED


def several(count: int, asked: asking.Asked, model: Answering, request: Request, output: Output) -> None:
    """`count` answers to one prompt, which is read once; each is printed as soon as it and those before it
    are done.

    Raises typer.Exit where one ended at the token limit and that is a failure, Dsv2Error where one could not
    be brought to its end.
    """
    jobs = [model.job_of(asked, request.having(seed=request.seed + i)) for i in range(count)]
    cut_off, failed = False, None
    left, ended = list(jobs), None

    def tell(job: Asking) -> None:
        ui.write_json(model.report(job, asked, output.echo, job.error))

    try:
        for job in model.samples(jobs):
            cut_off, failed = cut_off or job.result.finish_reason == "length", failed or job.failure
            tell(left.pop(0))
    except (KeyboardInterrupt, SystemExit) as error:
        ended = exit_code(error)
    for job in left:  # what there is of them
        job.result.finish_reason = job.result.finish_reason or "interrupted"
        tell(job)
    if ended is not None:
        raise SystemExit(ended)
    if failed is not None:
        raise failed
    if output.fail_on_length and cut_off:
        raise typer.Exit(CUT_OFF)


def many(batch: Path | None, model: Answering, request: Request, sampling: Sampling, output: Output) -> None:
    """A file of prompts to a file of answers, some at once, or stdin to stdout."""
    from dsv2cli.cli.lines import Lines

    lines = Lines(model, request, output.on_bad_line == "skip", sampling.seed is not None)
    if batch is None:
        lines.answer_stdin()
        return
    assert output.output is not None
    written, errors = lines.answer_file(batch, output.output, sampling.batch_size, output.restart)
    ui.note(f"{written} answers in {output.output}" + (f", {errors} of them errors" if errors else ""))


def show_plan(
    asked: asking.Asked,
    tokenizer: Tokenizer | None,
    checkpoint: Checkpoint,
    wish: Wish,
    request: Request,
    as_json: bool,
) -> None:
    """What --dry-run prints: the prompt to the letter, its ids, and how the model would run."""
    facts = plan_facts(asked, tokenizer, checkpoint, wish, request)
    ui.write_json(facts) if as_json else ui.write(plan_text(facts, checkpoint.config.max_position_embeddings))


def plan_facts(
    asked: asking.Asked, tokenizer: Tokenizer | None, checkpoint: Checkpoint, wish: Wish, request: Request
) -> dict[str, Any]:
    """The --dry-run object."""
    from dsv2cli.model import size
    from dsv2cli.run.machine import from_disk, look_around
    from dsv2cli.run.plan import apart_line, make_plan

    config = checkpoint.config
    plan = make_plan(config, wish, look_around())
    length = min(len(asked.ids) + (request.max_new_tokens or 0), config.max_position_embeddings)
    cache_bytes = length * size.kv_bytes_per_token(config, plan.dtype, plan.cache)
    expected = from_disk(config, plan, checkpoint.folder, cache_bytes)
    return {
        "model": checkpoint.name,
        "prompt": None if tokenizer is None else tokenizer.fast.decode(asked.ids, skip_special_tokens=False),
        "prompt_ids": asked.ids,
        "prompt_tokens": len(asked.ids),
        "max_new_tokens": length - len(asked.ids),
        "sampling": asdict(request.sampling),
        "seed": request.seed,
        "stop": list(request.stop),
        "eos_ids": sorted(request.eos_ids),
        "device": plan.device,
        "weights": plan.format,
        "ranks": plan.ranks,
        "split_attention": "sequences" if plan.sequences else "heads",
        "places": plan.places,
        "experts": apart_line(config, plan) if plan.apart else None,
        "weights_bytes_by_rank": size.bytes_by_rank(
            config, plan.format, plan.dtype, plan.ranks, plan.sequences
        ),
        "cache": plan.cache,
        "cache_bytes": cache_bytes,
        "from_disk": None if expected is None else asdict(expected),
        "attention": plan.attention,
        "kernels": plan.kernels_name,
        "kernels_why": plan.why_slower,
    }


def plan_text(facts: dict[str, Any], context: int) -> str:
    """The --dry-run object for a person; `context` is the most tokens that the model holds."""
    from dsv2cli.model.size import FromDisk
    from dsv2cli.run.plan import from_disk_line, places_line

    sampling = ", ".join(f"{name} {value:g}" for name, value in facts["sampling"].items())
    weights = " + ".join(f"{size / 1e9:.2f}" for size in facts["weights_bytes_by_rank"])
    cache = f"cache {facts['cache_bytes'] / 1e6:.1f} MB"
    why = f" (because {facts['kernels_why']})" if facts["kernels_why"] else ""
    ranks = f"{facts['ranks']} x " if facts["ranks"] > 1 else ""
    texts = f", texts {', '.join(map(repr, facts['stop']))}" if facts["stop"] else ""
    counts = f"{facts['prompt_tokens']} in the prompt, up to {facts['max_new_tokens']} new, of {context}"
    lines = [
        "(no tokenizer)" if facts["prompt"] is None else facts["prompt"],
        "--",
        f"ids: {','.join(map(str, facts['prompt_ids']))}",
        f"tokens: {counts}",
        f"sampling: {sampling}, seed {facts['seed']}",
        f"end: ids {', '.join(map(str, facts['eos_ids'])) or 'none'}{texts}",
        f"model: {facts['model']}, {facts['weights']}, weights {weights} GB, {cache}",
        f"runs on: {ranks}{facts['device']}, {facts['kernels']}{why}, attention {facts['attention']}",
    ]
    if facts["from_disk"] is not None:
        lines.append(f"from disk: {from_disk_line(FromDisk(**facts['from_disk']), facts['weights'])}")
    if facts["experts"] is not None:
        lines.append(f"experts: {facts['experts']}")
    if facts["places"] is not None:
        lines.append(f"places: {places_line(facts['places'])}")
    return "".join(f"{line}\n" for line in lines)
