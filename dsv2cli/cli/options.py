"""Options that several commands share, each said once, and how a command's options are shown.

Imports no torch.

A command takes dataclasses: `unfolded` makes an option of each of their fields, under the dataclass's
heading. What is asked about where and how a model runs is run/wish.py's.
"""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import secrets
import shlex
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer
from typer import BadParameter
from typer._click.exceptions import NoSuchOption  # not among what typer exports
from typer.core import TyperCommand

from dsv2cli.cli import ui
from dsv2cli.cli.values import lightly
from dsv2cli.errors import UsageError
from dsv2cli.outside import parse_json
from dsv2cli.run.wish import Wish

if TYPE_CHECKING:
    from dsv2cli.checkpoint.found import Checkpoint
    from dsv2cli.engine.request import Request, Result
    from dsv2cli.run.open import Opened, Screen

MOST_AT_ONCE = 4096  # sequences in one cache
CURSOR = "<CURSOR>"  # where a file is to be filled in
TO_RUN, SAMPLING, OUTPUT = "What to run", "Sampling", "Output"  # headings; Wish has the last one
Overflow = Literal[
    "ask", "stop", "drop", "summarise"
]  # what becomes of a conversation that fills the context


def unfolded(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the fields of its dataclasses as parameters, each an option as its annotation says."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY))
            continue
        inner = get_type_hints(groups[name], include_extras=True)
        for field in fields(groups[name]):
            # A copy: an option that several groups share has a heading of its own in each.
            kind_of, (option, *more) = inner[field.name].__origin__, inner[field.name].__metadata__
            option = copy.copy(option)
            option.rich_help_panel = getattr(groups[name], "heading", None)
            inner[field.name] = Annotated[kind_of, option, *more]
            kind = inspect.Parameter.KEYWORD_ONLY
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            parameters.append(
                inspect.Parameter(field.name, kind, default=default, annotation=inner[field.name])
            )

    @functools.wraps(command)
    def run(**values: Any) -> None:
        made = {
            name: kind(**{f.name: values.pop(f.name) for f in fields(kind)}) for name, kind in groups.items()
        }
        command(**values, **made)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del run.__wrapped__
    return run


class Command(TyperCommand):
    """A command whose help shows its options under their headings, and whose errors name the variable or the
    file that a value came from.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        for parameter in self.params:
            parameter.split_envvar_value = one_or_list  # type: ignore[method-assign,assignment]
            lightly(parameter)

    def get_help_option(self, ctx: Any) -> Any:
        return lightly(super().get_help_option(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As the library does. Raises UsageError for a wrong value that was not on the command line."""
        given = args[-1:]
        try:
            return super().parse_args(ctx, args)
        except BadParameter as error:
            where = None if error.param is None else origin(ctx, error.param)
            if where is None:
                raise
            raise UsageError(f"{where}: {error.message}") from None
        except NoSuchOption as error:
            if any(each.param_type_name == "argument" for each in self.params):
                text = shlex.join(given)
                error.message += f" (a text that begins with a dash stands behind --: -- {text})"
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run it. Where a UsageError begins with an option that nobody typed, it is named by its origin."""
        try:
            return super().invoke(ctx)
        except UsageError as error:
            option, _, rest = error.what.partition(" ")
            named = [each for each in self.params if option in each.opts]
            where = origin(ctx, named[0]) if named else None
            if where is None:
                raise
            raise UsageError(f"{where}: {rest}", why=error.why, fix=error.fix) from None

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write each heading and what is below it, in the order of the parameters."""
        headings: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            heading = "Arguments" if parameter.param_type_name == "argument" else "Options"
            if (record := parameter.get_help_record(ctx)) is not None:
                headings.setdefault(getattr(parameter, "rich_help_panel", None) or heading, []).append(record)
        for heading, records in headings.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def origin(ctx: Any, parameter: Any) -> str | None:
    """The variable or the table of the configuration file that a parameter's value came from; None for the
    command line and for what is built in.
    """
    source = ctx.get_parameter_source(parameter.name)
    if source is not None and source.name == "ENVIRONMENT":
        variable: str = parameter.envvar or f"{ctx.auto_envvar_prefix}_{parameter.name.upper()}"
        return variable
    if source is not None and source.name == "DEFAULT_MAP":
        from dsv2cli.cli.config import config_path

        return f"{config_path()}: {parameter.opts[0].lstrip('-')}"
    return None


def one_or_list(text: str) -> list[str]:
    """The value of a variable for an option that may be given several times: one text, never split at spaces,
    or a JSON list of texts. Raises UsageError for another list.
    """
    if not text.startswith("["):
        return [text]
    try:
        listed = parse_json(text)
    except ValueError:
        return [text]
    if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
        raise UsageError(f"{text[:80]} is no list of texts", fix='["one", "two"]')
    return listed


def models(incomplete: str) -> list[str]:
    """For the shell's completion: folders that hold a checkpoint or lead on, and DeepSeek-V2 models already
    downloaded.
    """
    from dsv2cli.hubs.find import known_models

    return known_models(incomplete)


def sessions(incomplete: str) -> list[str]:
    """For the shell's completion: saved conversations, the latest first."""
    from dsv2cli.places import session_names

    return [name for name in session_names() if name.startswith(incomplete)]


ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="DIR|NAME",
        autocompletion=models,
        help="Folder with a checkpoint, a short name (v2-lite-chat), a repository (OWNER/NAME, "
        "ms:OWNER/NAME) or a packed copy (v2-lite-chat:int4). Default: the small model inside the package.",
    ),
]
YesOption = Annotated[
    bool, typer.Option("--yes", "-y", help="Download a model that is not on this machine, without asking.")
]
ApiOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL|NAME",
        help="Let a server answer: its address, or its name in the configuration file. Its key comes from "
        "the environment.",
    ),
]
MaxTokensOption = Annotated[
    int, typer.Option("--max-new-tokens", "-n", min=1, help="Most tokens to generate.")
]
SeedOption = Annotated[
    int | None, typer.Option(min=0, help="Same seed, same text. Default: a new one each time.")
]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and where an answer ends. What is None is the checkpoint's own."""

    heading = SAMPLING

    max_new_tokens: MaxTokensOption = 512
    temperature: Annotated[float | None, typer.Option(help="0 always takes the likeliest token.")] = None
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the likeliest tokens that hold this probability.")
    ] = None
    top_k: Annotated[int | None, typer.Option(help="Sample from this many tokens; 0 is off.")] = None
    min_p: Annotated[
        float | None, typer.Option(help="Drop tokens less likely than this share of the likeliest.")
    ] = None
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1 discourages tokens that have occurred.")
    ] = None
    seed: SeedOption = None
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be given several times.")
    ] = None

    def stops(self) -> tuple[str, ...]:
        """Raises UsageError for an empty one."""
        if self.stop and not all(self.stop):
            raise UsageError("--stop is empty", why="every text begins with nothing", fix="leave it out")
        return tuple(self.stop or ())

    def request(
        self,
        checkpoint: Checkpoint,
        logprobs: int | None = None,
        ignore_eos: bool = False,
        speculate: bool = False,
        prompt_logprobs: int | None = None,
    ) -> Request:
        """The checkpoint's sampling defaults with these on top. Raises UsageError for senseless values."""
        from dsv2cli.engine.request import Request, SamplingParams

        stops = self.stops()
        chosen = {each.name: getattr(self, each.name) for each in fields(SamplingParams)}
        return Request(
            SamplingParams.from_generation_config(
                checkpoint.settings, str(checkpoint.folder / "generation_config.json"), **chosen
            ),
            self.max_new_tokens,
            eos_ids=frozenset() if ignore_eos else checkpoint.eos_ids,
            stop=stops,
            seed=secrets.randbits(32) if self.seed is None else self.seed,
            logprobs=logprobs,
            speculate=speculate,
            prompt_logprobs=prompt_logprobs,
        )


def open_model(
    name: str | None,
    wish: Wish,
    random_weights: str | None = None,
    found: Checkpoint | None = None,
    screen: Screen = ui,
) -> Opened:
    """Find, plan and load, with progress on the screen; the arguments are run.open's. Raises Dsv2Error."""
    from dsv2cli.run.open import open_model as find_plan_and_load

    opened = find_plan_and_load(name, wish, screen, random_weights, found)
    collect_garbage_from_here()
    return opened


def close_store(opened: Opened) -> None:
    """Wait until pages of latents that are to be kept have been written; say where that could not be done."""
    if opened.store is not None:
        opened.store.close()
        if (trouble := opened.store.complaint()) is not None:
            ui.show_error(trouble)


def collect_garbage_from_here() -> None:
    """What is there stays, modules and model; garbage is looked for among what comes. See app.main."""
    gc.freeze()
    gc.enable()


def refuse_too_many(option: str, given: object, count: int) -> None:
    """Raises UsageError where an option, `given` so, asks for more sequences at once than there may be."""
    if count > MOST_AT_ONCE:
        raise UsageError(f"{option} {given} is too many", why=f"{MOST_AT_ONCE:,} are the most")


def parse_ids(text: str) -> list[int]:
    """`1,2,3` to token ids. Raises UsageError for anything else."""
    words = text.replace(",", " ").split()
    if not all(word.isdecimal() and len(word) < 20 for word in words):
        fix = '--prompt-ids "1,2,3"'
        raise UsageError(f"--prompt-ids {text!r} is not a list of numbers", fix=fix)
    return [int(word) for word in words]


def stats_line(result: Result) -> str:
    """One line on how it went, for stderr."""
    told = [f"{result.length} {result.unit}"]
    if result.decode_tokens_per_second:
        told.append(f"{result.decode_tokens_per_second:.1f} tok/s")
    told.append(f"first after {result.ttft_seconds:.2f} s")
    reused = f", {result.reused_tokens} reused" if result.reused_tokens else ""
    if result.prompt_length:
        told.append(f"prompt {result.prompt_length}{reused}")
    return " \u00b7 ".join([*told, result.finish_reason])
