"""`dsv2 chat`: a conversation, at a prompt or line by line from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from dsv2cli.cli import options as opt
from dsv2cli.cli import ui
from dsv2cli.errors import Dsv2Error

if TYPE_CHECKING:
    from dsv2cli.engine.generate import Request
    from dsv2cli.engine.session import Session

HINT = "Enter sends, Alt-Enter starts a new line, Ctrl-C stops an answer, Ctrl-D or /quit leaves."

def chat(
    model: opt.ModelOption = None,
    system: Annotated[str | None, typer.Option(help="System prompt for the whole conversation.")] = None,
    max_new_tokens: opt.MaxTokensOption = 2048,
    temperature: opt.TemperatureOption = None,
    top_p: opt.TopPOption = None,
    top_k: opt.TopKOption = None,
    min_p: opt.MinPOption = None,
    repetition_penalty: opt.RepetitionOption = None,
    seed: opt.SeedOption = None,
    stop: opt.StopOption = None,
    device: opt.DeviceOption = "auto",
    dtype: opt.DtypeOption = opt.Dtype.auto,
    attention: opt.AttentionOption = opt.AttentionPath.auto,
    threads: opt.ThreadsOption = None,
) -> None:
    """Talk with the model. From a pipe, each line is a turn and only the answers are printed."""
    opened = opt.open_model(model, device, dtype, threads, attention)
    request = opened.request(
        max_new_tokens, seed, stop, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
        repetition_penalty=repetition_penalty,
    )  # fmt: skip

    from dsv2cli.engine.session import Session

    session = Session(opened.model, opened.tokenizer(), system)
    session.tokenizer.encode_chat([{"role": "user", "content": ""}])  # no template: say so before the first word
    interactive = sys.stdin.isatty()
    if interactive:
        ui.note(f"{opened.name} · {HINT}")
    for text in typed_lines() if interactive else piped_lines():
        answer(session, text, request, keep_going=interactive)


def answer(session: Session, text: str, request: Request, keep_going: bool) -> None:
    """Stream one answer. With `keep_going` an error or Ctrl-C ends the answer, not the conversation."""
    from dsv2cli.engine.generate import Result

    result = Result()
    pieces = session.reply(text, request, result)
    try:
        for piece in pieces:
            ui.write(piece)
    except KeyboardInterrupt:
        if not keep_going:
            raise
    except Dsv2Error as error:
        if not keep_going:
            raise
        ui.show_error(error)
        return
    finally:
        pieces.close()  # type: ignore[attr-defined]
    ui.write("\n")
    if not result.text.strip():
        ui.note("no answer; your message was taken back")
    if keep_going:
        ui.note(opt.stats_line(result))


def piped_lines() -> Iterator[str]:
    for line in ui.read_stdin().splitlines():
        if line.strip():
            yield line


def typed_lines() -> Iterator[str]:
    """Messages typed at a prompt, until Ctrl-D or /quit."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    # The prompt is drawn on stderr, so that `dsv2 chat > answers.txt` holds answers only.
    prompt: PromptSession[str] = PromptSession(
        "> ", multiline=True, key_bindings=keys, prompt_continuation="  ", output=create_output(stdout=sys.stderr)
    )
    while True:
        try:
            text = prompt.prompt()
        except KeyboardInterrupt:
            ui.note("Ctrl-D or /quit leaves.")
            continue
        except EOFError:
            return
        if text.strip() == "/quit":
            return
        if text.strip():
            yield text
