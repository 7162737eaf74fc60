"""`dsv2 eval`: how good a model is as it runs here, in the settings of its paper, and against another run."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from dsv2cli.cli import offer, ui
from dsv2cli.cli import options as opt
from dsv2cli.cli.asking import read_file
from dsv2cli.cli.figures import numbers
from dsv2cli.cli.niah import Hiding, refuse_lengths
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.outside import reason
from dsv2cli.run.wish import BatchWish

if TYPE_CHECKING:
    from dsv2cli.checkpoint.found import Checkpoint
    from dsv2cli.checkpoint.tokenizer import Tokenizer
    from dsv2cli.evaluation.question import Question, Task
    from dsv2cli.evaluation.record import Record
    from dsv2cli.evaluation.run import How
    from dsv2cli.run.plan import Plan

NEEDLE = "niah"


def task_names(incomplete: str) -> list[str]:
    """For the shell's completion."""
    from dsv2cli.evaluation.tasks.listed import TASKS

    return [name for name in (*TASKS, NEEDLE) if name.startswith(incomplete)]


TasksArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="TASK...",
        autocompletion=task_names,
        help="mmlu, bbh, ceval, cmmlu, humaneval, mbpp, gsm8k, math, hellaswag, arc, perplexity, niah.",
    ),
]


@dataclass(frozen=True)
class Asking:
    """What is asked, of which model."""

    heading = opt.TO_RUN

    model: opt.ModelOption = None
    yes: opt.YesOption = False
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR|FILE",
            help="Where the questions are, in a folder or file named like the task. Default: the hub's data "
            "sets, downloaded once.",
        ),
    ] = None
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="A text for perplexity.")] = None
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many questions a task, from all of its subjects.")
    ] = None
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question. Default: the paper's.")
    ] = None
    chat: Annotated[bool, typer.Option("--chat", help="Put each question to a chat model as a message.")] = (
        False
    )
    window: Annotated[int, typer.Option(min=2, help="Tokens of a text that perplexity reads at once.")] = 2048
    at_once: Annotated[int, typer.Option(min=1, help="Questions that run at the same time.")] = 64
    run_code: Annotated[
        bool,
        typer.Option(
            "--run-code",
            help="Run programs that the model writes, in a box without network; else they are only saved.",
        ),
    ] = False
    against: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|OPTIONS",
            help='Compare with a saved run, or with one under other options: "--quantize none".',
        ),
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="Of the keys that niah hides.")] = 0
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be asked, and ask nothing.")
    ] = False


@dataclass(frozen=True)
class Output:
    """How the result is shown and kept."""

    heading = opt.OUTPUT

    output: Annotated[
        Literal["table", "json", "markdown"], typer.Option("--format", help="How the result is printed.")
    ] = "table"
    json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Write what comes of each question, as it comes; a run that was ended goes on from there.",
        ),
    ] = None
    svg: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Save the scores as a picture.")] = None

    @property
    def format(self) -> str:
        return "json" if self.json else self.output


@opt.unfolded
def eval(tasks: TasksArgument, asking: Asking, hiding: Hiding, output: Output, wish: BatchWish) -> None:
    """Say how good a model is, task by task.

    The tasks are in the settings of DeepSeek's paper, and what it published stands beside the result. With
    --against two runs, or two set-ups of one model, are compared question by question and token by token.
    """
    chosen = tasks_of(tasks)
    refuse_what_goes_unused(tasks, chosen, asking, hiding)
    refuse_places(asking, output)
    opt.refuse_too_many("--at-once", asking.at_once, asking.at_once)
    asked = list(questions_of(chosen, asking))
    if asking.dry_run and NEEDLE not in tasks:
        show_questions(asked, asking.chat, output.format)
        return
    from dsv2cli.evaluation.sandbox import open_box

    box = open_box() if asking.run_code else None  # or says why not, before an hour's work
    found = offer.find(asking.model, asking.yes)
    tokenizer = found.tokenizer()
    if asking.chat:
        tokenizer.encode_chat([{"role": "user", "content": "?"}])  # says what is missing
    with contextlib.ExitStack() as stack:
        then = None
        if asking.against is not None:
            then = other_run(asking.against, tasks, asking, hiding, output, wish, stack)
        began = time.monotonic()
        plan = plan_of(found, wish)
        how = how_of(found, tokenizer, asking, keep=output.save is not None or then is not None)
        asked = [part for each in asked for part in in_windows(how, chosen, each, asking.limit)]
        asked += needles(how, tasks, asking, hiding)
        if asking.dry_run:
            show_questions(asked, asking.chat, output.format)
            return
        if not asked:
            raise UsageError("There is nothing to ask", why="the data hold no question", fix="other --data")
        refuse_twins(asked)
        if then is not None:
            refuse_strangers(asked, then)
        from dsv2cli.evaluation.record import recording

        facts = facts_of(found, plan, asking)
        record = stack.enter_context(recording(facts, output.save))
        answer(record, chosen, how, asked, found, wish, asking)
        if box is not None:
            judge(record, asked, box)
        finish(record, then, chosen, asked, found, plan, output, time.monotonic() - began)


def tasks_of(names: list[str]) -> dict[str, Task]:
    """The tasks that are named, but for the needle's. Raises UsageError for an unknown one."""
    from dsv2cli.evaluation.tasks.listed import TASKS

    for name in names:
        if name not in (*TASKS, NEEDLE):
            near = difflib.get_close_matches(name.lower(), (*TASKS, NEEDLE), 1)
            why, fix = f"tasks are {', '.join((*TASKS, NEEDLE))}", f"dsv2 eval {near[0]}" if near else ""
            raise UsageError(f"There is no task {name[:80]!r}", why=why, fix=fix)
    return {name: TASKS[name] for name in dict.fromkeys(names) if name != NEEDLE}


def refuse_what_goes_unused(
    tasks: list[str], chosen: dict[str, Task], asking: Asking, hiding: Hiding
) -> None:
    """Raises UsageError for an option that no task here has a use for."""
    programs = any(task.kind == "program" for task in chosen.values())
    texts = any(task.kind == "text" for task in chosen.values())
    kinds = {task.kind for task in chosen.values()}
    unused = {
        "--shots": (asking.shots is not None and not kinds - {"text"}, "there are no examples"),
        "--window": (asking.window != Asking.window and not texts, "it is for perplexity"),
        "--limit": (asking.limit is not None and not chosen, "niah has --tries"),
        "--seed": (asking.seed != Asking.seed and NEEDLE not in tasks, "it is for niah"),
        "--text": (asking.text is not None and not texts, "it is for perplexity"),
        "--run-code": (asking.run_code and not programs, "it is for humaneval and mbpp"),
        "--data": (
            asking.data is not None and not any(task.home for task in chosen.values()),
            "niah has none",
        ),
        "--chat": (
            asking.chat and all(task.kind == "text" for task in chosen.values()),
            "there is no question",
        ),
    }
    for field in fields(hiding):
        used = NEEDLE in tasks or getattr(hiding, field.name) == field.default
        unused[f"--{field.name}"] = (not used, "it is for niah")
    for option, (is_unused, why) in unused.items():
        if is_unused:
            raise UsageError(f"{option} has nothing to do here", why=why, fix=f"leave {option} out")


def questions_of(chosen: dict[str, Task], asking: Asking) -> Iterator[Question]:
    """Of all tasks, texts as one question each. Raises Dsv2Error."""
    from dsv2cli.evaluation.data import find_data
    from dsv2cli.evaluation.question import Question, taken_in_turn

    for name, task in chosen.items():
        if task.kind == "text" and asking.text is not None:
            text = read_file(asking.text)
            if not text.strip():
                raise UsageError(f"{asking.text} holds no text")
            yield Question(name, asking.text.name, "0", text, "")
            continue
        data = find_data(name, task.names, task.home, asking.data, len(chosen) == 1)
        shots = task.shots if asking.shots is None else asking.shots
        found = taken_in_turn(task.questions(data, shots), None if task.kind == "text" else asking.limit)
        if not found:
            why = f"none of its {len(data.tables)} files has a question"
            raise UsageError(f"{data.folder} has no questions of {name}", why=why, fix="another --data")
        yield from found


def in_windows(how: How, chosen: dict[str, Task], question: Question, limit: int | None) -> list[Question]:
    """A text as its windows, at most --limit; any other question as it is."""
    from dsv2cli.evaluation.run import windows

    if chosen[question.task].kind != "text":
        return [question]
    found = list(windows(how, question))
    if not found:
        raise UsageError("The text has less than two tokens", why="nothing can be foreseen in it")
    return found[:limit]


def needles(how: How, tasks: list[str], asking: Asking, hiding: Hiding) -> list[Question]:
    """The questions of niah, where it is asked for. Raises UsageError."""
    if NEEDLE not in tasks:
        return []
    from dsv2cli.evaluation.run import needle_questions

    sizes, percents, texts = numbers("--lengths", hiding.lengths, 1), hiding.percents(), hiding.texts()
    refuse_lengths(sizes, how.config.max_position_embeddings, how.tokenizer, texts)
    depths = [percent / 100 for percent in percents]
    return list(needle_questions(how, texts, sizes, depths, hiding.tries))


def plan_of(found: Checkpoint, wish: BatchWish) -> Plan:
    """Raises Dsv2Error."""
    from dsv2cli.run.machine import look_around
    from dsv2cli.run.plan import make_plan

    return make_plan(found.config, wish, look_around())


def how_of(found: Checkpoint, tokenizer: Tokenizer, asking: Asking, keep: bool) -> How:
    from dsv2cli.evaluation.run import How

    return How(
        found.config,
        tokenizer,
        found.eos_ids,
        chat=asking.chat,
        window=asking.window,
        keep=keep,
        seed=asking.seed,
    )


def facts_of(found: Checkpoint, plan: Plan, asking: Asking) -> dict[str, Any]:
    """What a saved run says of itself; with other settings or another mark it is another run."""
    held = (plan.format, plan.dtype, plan.packing, plan.cache, plan.kernels_name, plan.attention)
    names = ("shots", "chat", "window", "seed")
    return {
        "model": found.name,
        "mark": hashlib.sha256(repr((held, found.mark())).encode()).hexdigest()[:16],
        "settings": {name: getattr(asking, name) for name in names},
        "device": plan.device,
        "weights": plan.format,
        "dtype": plan.dtype,
        "cache": plan.cache,
        "kernels": plan.kernels_name,
    }


def refuse_places(asking: Asking, output: Output) -> None:
    """Raises UsageError for a picture that has no place to go, or another file's."""
    if output.svg is None:
        return
    if output.svg.is_dir() or not output.svg.parent.is_dir():
        raise UsageError(
            f"--svg {output.svg} can be no file", why="there is no such folder", fix="another --svg"
        )
    others = [] if output.save is None else [output.save, other_place(output.save)]
    others += [Path(asking.against)] if asking.against is not None else []
    if any(os.path.realpath(each) == os.path.realpath(output.svg) for each in others):
        raise UsageError(f"--svg {output.svg} is a run's file", fix="another --svg")


def refuse_twins(asked: list[Question]) -> None:
    """Raises UsageError for two questions of one name: what came of one would stand for both."""
    known = set[str]()
    for question in asked:
        if question.key in known:
            why = "the data hold the task twice"
            raise UsageError(
                f"Two questions are called {question.key}", why=why, fix="--data with one of them"
            )
        known.add(question.key)


def refuse_strangers(asked: list[Question], then: Record) -> None:
    """Raises UsageError where a saved run has none of the questions, before an hour's work."""
    if not any(then.rows.get(each.key, {}).get("digest") == digest(each) for each in asked):
        why, fix = f"none of these questions is in {then.path}", "the same tasks, data and --window"
        raise UsageError("The two runs can not be compared", why=why, fix=fix)


def digest(question: Question) -> str:
    """Tells a question from others of the same name, whatever examples stand before it."""
    asked = repr((question.ask, question.choices, question.expected, question.about))
    return hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def answer(
    record: Record,
    chosen: dict[str, Task],
    how: How,
    asked: list[Question],
    found: Checkpoint,
    wish: BatchWish,
    asking: Asking,
) -> None:
    """Ask what the record does not hold yet; the model is loaded for that. Raises Dsv2Error."""
    from dsv2cli.evaluation.run import kept_answers, run, work_of

    digests = {question.key: digest(question) for question in asked}
    todo = [question for question in asked if question.key not in record.rows]
    for question in asked:
        if question.key in record.rows and record.rows[question.key].get("digest") != digests[question.key]:
            why = f"{question.key} is another question there"
            raise UsageError(f"{record.path} is of another run", why=why, fix="another --save")
    if not todo:
        return
    how = replace(how, kept=kept_answers(asked) if how.keep else frozenset())
    opened = opt.open_model(asking.model, wish, found=found)
    from dsv2cli.engine.scheduler import Scheduler

    scheduler = Scheduler(opened.runner, how.tokenizer, asking.at_once)
    right = count = 0
    with ui.counting("asking", len(asked), len(asked) - len(todo)) as tick:
        for row in run(scheduler, (work_of(how, chosen.get(each.task), each) for each in todo)):
            record.add(row | {"digest": digests[row["key"]]})
            if row.get("right") is not None:
                right, count = right + row["right"], count + 1
            stand = f"{row['task']} {row['subset']}".strip()
            tick(f"{stand}, {right / count:.1%} right" if count else stand)


def judge(record: Record, asked: list[Question], box: Any) -> None:
    """Run the programs that nobody has run yet, as many at once as there are cores. Raises Dsv2Error."""
    from concurrent.futures import ThreadPoolExecutor

    todo = [
        record.rows[question.key]
        for question in asked
        if record.rows[question.key].get("right") is None and "program" in record.rows[question.key]
    ]
    with ui.counting("running programs", len(todo)) as tick, ThreadPoolExecutor(os.cpu_count()) as pool:
        for row, ran in zip(todo, pool.map(lambda row: box.run(row["program"]), todo), strict=True):
            record.add(row | {"right": ran.passed, "why": ran.why})
            tick()


# Another run to compare with.


def other_run(
    against: str,
    tasks: list[str],
    asking: Asking,
    hiding: Hiding,
    output: Output,
    wish: BatchWish,
    stack: contextlib.ExitStack,
) -> Record:
    """A saved run; or this one under other options, in a process of its own, so that both models are never in
    memory together. Raises Dsv2Error.
    """
    from dsv2cli.evaluation.record import load

    if not against.strip():
        raise UsageError("--against is empty", fix='a saved run, or options: --against "--quantize none"')
    if not against.strip().startswith("-"):
        return load(Path(against))
    try:
        options = shlex.split(against)
    except ValueError as error:
        raise UsageError(f"--against {against[:80]} can not be read", why=reason(error)) from None
    if {"--save", "--against", "--svg", "--dry-run", "--help", "-h"} & {
        each.split("=")[0] for each in options
    }:
        why = "these are this run's own"
        raise UsageError(f"--against {against[:80]} goes too far", why=why, fix='--against "--quantize none"')
    if output.save is not None:
        path = other_place(output.save)
    else:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dsv2-eval-"))) / "against.jsonl"
    words = [*as_words(asking, "against", "dry_run"), *as_words(hiding), *as_words(wish)]
    # Its options are all said here: neither variables nor the configuration file say others.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DSV2_EVAL_")}
    environment["DSV2_CONFIG"] = os.devnull
    command = [
        sys.executable,
        "-m",
        "dsv2cli",
        "eval",
        *tasks,
        *words,
        "--save",
        str(path),
        "--json",
        *options,
    ]
    ui.note(f"first with {against}")
    nowhere = subprocess.DEVNULL
    with subprocess.Popen(command, stdin=nowhere, stdout=nowhere, env=environment) as process:
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            raise
    if code == 130:
        raise KeyboardInterrupt
    if code != 0:
        why = f"that run ended with {code}; what it said stands above"
        raise Dsv2Error(f'There is nothing to compare with: "{against}" failed', why=why)
    return load(path)


def other_place(save: Path) -> Path:
    """Where the other run of --against is kept."""
    return save.with_name(save.name + ".against")


def as_words(chosen: Any, *without: str) -> list[str]:
    """The options of a group as they are typed."""
    words = list[str]()
    hints = get_type_hints(type(chosen), include_extras=True)
    for field in fields(chosen):
        value = getattr(chosen, field.name)
        if field.name in without or value is None or value is False:
            continue
        declared: Iterable[str] = hints[field.name].__metadata__[0].param_decls or ()
        name = next((each for each in declared if each.startswith("--")), "--" + field.name.replace("_", "-"))
        words += [name] if value is True else [name, str(value)]
    return words


# What came of it.


def finish(
    record: Record,
    then: Record | None,
    chosen: dict[str, Task],
    asked: list[Question],
    found: Checkpoint,
    plan: Plan,
    output: Output,
    seconds: float,
) -> None:
    """Sum up, compare and show. Raises Dsv2Error where nothing could be asked."""
    from dsv2cli.evaluation.record import Record
    from dsv2cli.evaluation.summary import summary
    from dsv2cli.evaluation.verdict import verdict

    wanted = {question.key for question in asked}
    mine = Record(record.facts, {key: row for key, row in record.rows.items() if key in wanted})
    names = dict.fromkeys(question.task for question in asked)
    by_subset = {name: name in chosen and chosen[name].by_subset for name in names}
    said = {key: value for key, value in record.facts.items() if key not in ("format", "mark")}
    facts = said | {"seconds": seconds, "results": summary(mine, found.name, by_subset)}
    if then is not None:
        facts |= {"against": {name: then.facts.get(name) for name in said}, "verdict": verdict(mine, then)}
    failed = [row["error"] for row in mine.rows.values() if "error" in row]
    if len(failed) == len(mine.rows):
        raise Dsv2Error("No question could be asked", why=failed[0])
    show(facts, output.format)
    if output.svg is not None:
        save_picture(output.svg, facts)
    if failed:
        error = Dsv2Error(f"{len(failed)} of {len(mine.rows)} questions could not be asked", why=failed[0])
        ui.show_error(error)


def show_questions(asked: list[Question], chat: bool, form: str) -> None:
    """What would be asked, word by word."""
    for question in asked:
        prompt = question.prompt(chat=chat)
        if form == "json":
            ui.write_json(
                {
                    "task": question.task,
                    "subset": question.subset,
                    "id": question.id,
                    "prompt": prompt,
                    "choices": list(question.choices),
                    "expected": question.expected,
                }
            )
            continue
        follows = " | ".join(question.choices)
        ui.write(f"== {question.key}\n{prompt}\n")
        ui.write(f"-- {follows or question.expected or question.task}\n")


def show(facts: dict[str, Any], form: str) -> None:
    """The result on stdout."""
    if form == "json":
        ui.write_json(facts)
        return
    from dsv2cli.cli import scores

    if form == "markdown":
        ui.emit(scores.markdown(facts))
        return
    scores.show(ui.stdout(), facts)


def save_picture(path: Path, facts: dict[str, Any]) -> None:
    """Raises Dsv2Error where the file can not be written."""
    from dsv2cli.cli import scores

    try:
        path.write_text(scores.picture(facts), encoding="utf-8")
    except OSError as error:
        raise Dsv2Error(f"{path} could not be written", why=reason(error), fix="another --svg") from None
