"""What a line that begins with / does inside `dsv2 chat`."""

from __future__ import annotations

import base64
import difflib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv2cli import places
from dsv2cli.cli import options as opt
from dsv2cli.cli.talk import Talk, clear_lost_caches, shortened
from dsv2cli.engine import journal as journals
from dsv2cli.engine import store
from dsv2cli.engine.journal import Node
from dsv2cli.engine.request import RULES, SamplingParams
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.outside import pasted_path, path_of, reason

if TYPE_CHECKING:
    from dsv2cli.checkpoint.tokenizer import Message

NUMBERS: dict[str, Callable[[str], float]] = {
    each.name: int if each.type == "int" else float for each in fields(SamplingParams)
}
SETTINGS = {name: f"{rule}" for name, rule in RULES.items()} | {
    "seed": "a whole number from 0 on",
    "max_new_tokens": "a whole number from 1 on",
    "stop": "a text that ends an answer; off for none",
    "default": "all settings as they were at the start",
}
MOST_ANSWERS = 32  # of one /retry


class Leave(Exception):
    """The person wants to go."""


def find(name: str) -> Path:
    """A saved session by name, the latest for `last`, or a file. Raises UsageError for anything else."""
    known = places.session_names()
    if name == "last" and (path := latest(silent)) is not None:
        return path
    if name in known:
        return places.session_file(name)
    if (path := pasted_path(name)).is_file():
        return path
    if name == "last":
        raise UsageError("There is no saved session yet", fix="dsv2 chat begins one")
    near = difflib.get_close_matches(name, known, 1)
    fix = f"did you mean {near[0]!r}?" if near else "dsv2 sessions lists what there is"
    raise UsageError(f"There is no saved session {name!r}", why="it is no file either", fix=fix)


def latest(note: Callable[[str], object]) -> Path | None:
    """The newest talk that can be read; those before it are passed over with a word."""
    for name in places.session_names():
        path = places.session_file(name)
        try:
            journal_of(path)
        except Dsv2Error as error:
            note(f"passed over {name}: {error.sentence}")
        else:
            return path
    return None


def is_command(line: str, pasted: bool = False) -> bool:
    """Whether a line is a command, or one that was mistyped; a path that begins with a slash is a message."""
    name = line[1:].split(maxsplit=1)[0] if line[1:].split() else ""
    if line.startswith("//") or not line.startswith("/"):
        return line.strip().lower() in ("exit", "quit")
    return name in COMMANDS or not (pasted or "/" in name or "\n" in line.strip())


def message_of(line: str) -> str:
    """The message that a line is which is no command: two slashes stand for one."""
    return line[1:] if line.startswith("//") else line


def carry_out(talk: Talk, line: str) -> None:
    """Carry out a command. Raises Dsv2Error, Leave."""
    name, _, rest = line.strip().removeprefix("/").partition(" ")
    if name.lower() in ("exit", "quit"):
        raise Leave
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        fix = f"/{near[0]}?" if near else "/help lists them; // begins a message with a slash"
        raise UsageError(f"There is no command /{name}", fix=fix)
    COMMANDS[name].run(talk, rest.strip())


def help_(talk: Talk, rest: str) -> None:
    shown = [command for name, command in COMMANDS.items() if command.usage[1:].split()[0] == name]
    width = max(len(command.usage) for command in shown)
    talk.screen.note("\n".join(f"{command.usage:{width}}  {command.help}" for command in shown))
    talk.screen.note(
        'Alt-Enter, Shift-Enter, Ctrl-J or a backslash at the end begins a new line, as does """ until the '
        "next. @path puts a file before the message. Ctrl-R searches what you typed, Ctrl-G opens your "
        "editor, Ctrl-Z suspends."
    )


def system(talk: Talk, rest: str) -> None:
    if rest:
        talk.set_system("" if rest == "off" else rest)
    talk.screen.note(f"system prompt: {talk.journal.system or 'none'}")


def set_(talk: Talk, rest: str) -> None:
    """Change a setting and show them all. Raises UsageError."""
    name, _, value = rest.partition(" ")
    name = name.replace("-", "_")
    try:
        if name in NUMBERS:
            talk.request = talk.request.having(**{name: NUMBERS[name](value)})
        elif (name == "seed" and int(value) >= 0) or (name == "max_new_tokens" and int(value) > 0):
            talk.request = talk.request.having(**{name: int(value)})
        elif name == "stop" and value:
            text = value.replace("\\n", "\n").replace("\\t", "\t")
            talk.request = talk.request.having(stop=() if value == "off" else (*talk.request.stop, text))
        elif name == "default" and talk.at_first is not None:
            talk.request = talk.at_first
        else:
            raise UsageError(f"/set {rest} makes no sense", why=f"settings are {', '.join(SETTINGS)}")
    except (ValueError, OverflowError):
        number = "0.3" if NUMBERS.get(name) is float else "40"
        why = f"it is {SETTINGS[name]}"
        raise UsageError(
            f"{value[:80]!r} is no value for {name}", why=why, fix=f"/set {name} {number}"
        ) from None
    show(talk, "")


def show(talk: Talk, rest: str) -> None:
    kept = f"session {talk.name or '(new)'}" if talk.journal.path is not None else "not saved"
    talk.screen.note(
        f"{talk.model.name} on {talk.model.place} \u00b7 {kept} \u00b7 branch {talk.journal.branch}"
    )
    talk.screen.note(" \u00b7 ".join(f"{name} {value}" for name, value in values_of(talk).items()))


def values_of(talk: Talk) -> dict[str, str]:
    """Settings as they are."""
    chosen = talk.request.chosen()
    stop = ", ".join(map(repr, talk.request.stop)) or "none"
    names = (*RULES, "max_new_tokens", "seed")
    return {name: str(chosen.get(name, "the server's own")) for name in names} | {"stop": stop}


def last_turn(talk: Talk) -> Node:
    """The person's last message. Raises UsageError where there is none."""
    turns = talk.journal.turns()
    if not turns:
        raise UsageError("There is no such turn", why="this conversation has 0")
    return turns[-1]


def retry(talk: Talk, rest: str) -> None:
    """More answers to the last message, each with random numbers of its own; those before stay.

    Raises UsageError.
    """
    count = number(rest or "1", "/retry 3")
    if not 1 <= count <= MOST_ANSWERS:
        raise UsageError(f"/retry {count} is too many", why=f"{MOST_ANSWERS} are the most")
    asked = last_turn(talk)
    for _ in range(count):
        if not talk.answer(asked) or talk.stop.is_set():
            break
    answers_(talk, "", brief=True)


def answers_(talk: Talk, rest: str, brief: bool = False) -> None:
    """The answers to the last message; a number goes to one of them. Raises UsageError."""
    given = talk.journal.answers(last_turn(talk))
    way = {node.id for node in talk.journal.way()}
    if rest:
        chosen = number(rest, "/answers 1")
        if not 1 <= chosen <= len(given):
            raise UsageError(f"There is no answer {chosen}", why=f"there are {len(given)}", fix="/answers")
        talk.journal.move(given[chosen - 1].id)
        talk.screen.exchange(given[chosen - 1].text)
        return
    if brief:
        if len(given) > 1:
            talk.screen.note(f"{len(given)} answers; /answers lists them, /answers N goes on from one")
        return
    for place, node in enumerate(given, 1):
        talk.screen.note(f"{'*' if node.id in way else ' '} {place}: {shortened(node.text)}")


def undo(talk: Talk, rest: str) -> None:
    turn = last_turn(talk)
    talk.journal.move(turn.parent)
    talk.screen.note(f"taken back: {shortened(turn.text)} (/redo brings it again)")


def redo(talk: Talk, rest: str) -> None:
    """Raises UsageError where nothing was taken back."""
    at, found = talk.journal.head, ""
    while (at := talk.journal.latest.get(at, "")) and at != found:
        found = at
        node = talk.journal.nodes[at]
        if node.role == "assistant" and node.text.strip():
            talk.journal.move(at)
            turn = last_turn(talk)
            talk.screen.note(f"again there: {shortened(turn.text)}")
            return
    raise UsageError("There is nothing to bring again", why="nothing was taken back here")


def edit(talk: Talk, rest: str) -> None:
    """Put a message back into the prompt; nothing changes before it is sent. Raises UsageError."""
    turns = talk.journal.turns()
    place = number(rest or str(len(turns)), "/edit 2")
    if not 1 <= place <= len(turns):
        raise UsageError(
            "There is no such turn", why=f"this conversation has {len(turns)}", fix="/history shows them"
        )
    turn = turns[place - 1]
    talk.draft, talk.behind, talk.kept_files = turn.text, turn.parent, str(turn.about.get("files", ""))
    if talk.kept_files:
        talk.screen.note("its files stay before it; /file off takes them away")
    talk.screen.note(f"message {place} is in the prompt: Enter sends it anew, Ctrl-C leaves all as it is")


def continue_(talk: Talk, rest: str) -> None:
    """Go on with an answer that was cut off. Raises UsageError where the last one was not."""
    way = talk.journal.way()
    if not way or way[-1].role != "assistant" or way[-1].about.get("ended") == "stop":
        raise UsageError("There is no answer that was cut off", why="the last one came to its end")
    talk.screen.piece(way[-1].text)
    if not talk.answer(talk.journal.nodes[way[-1].parent], way[-1]):
        talk.screen.note("there was no more to say")


def branch(talk: Talk, rest: str) -> None:
    """List the branches, or go to one, which begins here where it is new."""
    journal = talk.journal
    if rest and rest != journal.branch:
        known = rest in journal.branches
        journal.move(journal.branches.get(rest, journal.head), rest)
        note = f"back on branch {rest}" if known else f"new branch {rest}; the other stays as it is"
        talk.screen.note(note)
    for name in sorted(journal.branches):
        turns = sum(node.role == "user" for node in journal.way(journal.branches[name]))
        talk.screen.note(f"{'*' if name == journal.branch else ' '} {name}: {turns} turns")


def history(talk: Talk, rest: str) -> None:
    turn = 0
    for node in talk.journal.way():
        turn += node.role == "user"
        marks = {"user": f"{turn}>", "assistant": "  ", "left out": "(left out what is above)"}
        talk.screen.note(f"{marks.get(node.role, node.role + ':')} {node.whole}")


def clear(talk: Talk, rest: str) -> None:
    kept = talk.journal.path is not None
    talk.save_cache()
    talk.begin(kept)
    talk.screen.note("a new conversation; the old one is in /sessions" if kept else "a new conversation")


def save(talk: Talk, rest: str) -> None:
    """Under a name, or as Markdown or JSON into a file.

    Raises UsageError for a name or a file that is taken, Dsv2Error as store.write.
    """
    forced = rest.endswith("!")
    target = rest.removesuffix("!").strip()
    if target.endswith((".md", ".json")):
        path, messages = path_of(target), whole(talk)
        if path.exists() and not forced:
            raise UsageError(f"{path} is there already", fix=f"/save {target} ! writes over it")
        text = store.as_markdown(messages) if target.endswith(".md") else store.as_json(messages)
        store.write(path, text)
        talk.screen.note(f"written to {path}")
        return
    if rest and rest != talk.name:
        rename(talk, rest)
    elif talk.journal.path is None and talk.journal.nodes:
        talk.journal.path = talk.new_path()
        talk.journal.flush()
    talk.screen.note(f"saved as {talk.name}" if talk.name else "there is nothing to save yet")


def whole(talk: Talk) -> list[Message]:
    """All that was said up to here, whatever of it is still sent."""
    said = [node.message for node in talk.journal.way() if node.role in ("user", "assistant")]
    return talk.journal.told_first() + said


def rename(talk: Talk, rest: str) -> None:
    """Give the talk another name. Raises UsageError for one that is taken or can not be."""
    if not rest:
        raise UsageError("/rename needs a name", fix="/rename my-talk")
    path = store.path_of(rest).with_suffix(".jsonl")
    if rest in places.session_names() or rest == "last":
        raise UsageError(
            f"There is a session {rest!r} already", why="it would be written over", fix="choose another name"
        )
    old = talk.name
    try:
        if old and talk.journal.path is not None:
            talk.journal.path.rename(path)
            for suffix in (".json", ".safetensors"):
                if (beside := path.with_name(old + suffix)).exists():
                    beside.rename(path.with_suffix(suffix))
    except OSError as error:
        raise Dsv2Error(f"{old} could not be renamed", why=reason(error)) from None
    talk.journal.path = path
    if not old and talk.journal.nodes:
        talk.journal.flush()


def load(talk: Talk, rest: str) -> None:
    path = find(rest or "last")
    if path == talk.journal.path:
        raise UsageError(f"You are in {talk.name} already")
    talk.save_cache()
    talk.resume(path)


def delete(talk: Talk, rest: str) -> None:
    """Remove a talk for good, once it was said again. Raises UsageError."""
    name = rest.removesuffix("!").strip() or talk.name
    if name not in places.session_names():
        raise UsageError(f"There is no saved session {name!r}", fix="/sessions lists what there is")
    if not rest.endswith("!"):
        talk.screen.note(f"/delete {name} ! removes it for good: {about(name)}")
        return
    here = name == talk.name
    if here and talk.journal.shared:
        raise journals.Locked(name)
    if here:
        talk.begin(keep=True)
    remove(name)
    talk.screen.note(f"deleted {name}")


def remove(name: str) -> None:
    """A talk with its cache. Raises Locked where it is open elsewhere."""
    path = places.session_file(name)
    with journals.held_for(path):
        for suffix in (".jsonl", ".json", ".safetensors"):
            path.with_suffix(suffix).unlink(missing_ok=True)


def about(name: str) -> str:
    """One line on a talk: when, how long, how it begins."""
    entry = describe(name)
    return f"{entry['when']} \u00b7 {entry['turns']} turns \u00b7 {entry['first'] or 'nothing was said'}"


def describe(name: str) -> dict[str, Any]:
    """What there is to say of a saved talk: name, when, turns, model, bytes, and how it begins."""
    path = places.session_file(name)
    found: dict[str, Any] = {"name": name, "when": "", "turns": 0, "model": "", "bytes": 0, "first": ""}
    try:
        found["bytes"] = path.stat().st_size
        found["when"] = time.strftime("%d %b %Y %H:%M", time.localtime(path.stat().st_mtime))
        journal = journal_of(path)
    except (OSError, Dsv2Error) as error:
        return found | {"first": f"(can not be read: {error})"}
    turns = journal.turns()
    models = [node.about.get("model") for node in journal.nodes.values() if node.about.get("model")]
    first = shortened(turns[0].text) if turns else shortened(journal.draft)
    return found | {"turns": len(turns), "model": str(models[-1]) if models else "", "first": first}


def journal_of(path: Path) -> journals.Journal:
    """A talk to look at only. Raises Dsv2Error."""
    if path.suffix == ".jsonl":
        return journals.read(path, silent)
    saved = store.load(path)
    journal = journals.new(None, silent)
    journals.replay(saved.branches, saved.branch, journal)
    return journal


def silent(told: object) -> None:
    """Nothing is written where somebody only looks."""


def sessions(talk: Talk, rest: str) -> None:
    """The newest, with the way to pick one."""
    clear_lost_caches()
    names = places.session_names()
    for name in names[:20]:
        talk.screen.note(f"{'*' if name == talk.name else ' '} {name}  {about(name)}")
    more = f", and {len(names) - 20} more" if len(names) > 20 else ""
    talk.screen.note(
        f"in {places.sessions()}{more}; /load picks one with the arrows, /find WORD searches them"
    )


def find_(talk: Talk, rest: str) -> None:
    """Every message of every talk that has a word in it. Raises UsageError for none."""
    if not rest:
        raise UsageError("/find needs a word", fix="/find fox")
    hits = list(search(rest))
    for name, role, line in hits[:40]:
        talk.screen.note(f"{name}  {role}: {line}")
    more = f" (40 of {len(hits)} are shown)" if len(hits) > 40 else ""
    talk.screen.note(f"{len(hits)} messages{more}; /load NAME goes on with a talk" if hits else "not found")


def search(word: str) -> Iterator[tuple[str, str, str]]:
    """Name, role and the words around, of each message with a word in it, whatever its case."""
    for name in places.session_names():
        try:
            nodes = journal_of(places.session_file(name)).nodes.values()
        except Dsv2Error:
            continue
        for node in nodes:
            at = node.text.lower().find(word.lower())
            if at >= 0:
                yield (
                    name,
                    node.role,
                    shortened(("\u2026" if at > 30 else "") + node.text[max(0, at - 30) :], 80),
                )


def file(talk: Talk, rest: str) -> None:
    """Put files, parts of them, folders or a command's output before the next message. Raises UsageError."""
    if rest == "off":
        talk.files, talk.kept_files = [], ""
        talk.screen.note("nothing is attached")
        return
    if not rest:
        raise UsageError("no file can not be read", why="/file needs a name", fix="/file PATH")
    from dsv2cli.cli.attach import gather

    for each in gather(rest):
        talk.files.append(each)
        talk.screen.note(f"{talk.cost(each)}; it goes before your next message")


def copy(talk: Talk, rest: str) -> None:
    """The last answer to the terminal's clipboard (OSC 52), which also works over ssh.

    Raises UsageError where there is none.
    """
    answers = [node.text for node in talk.journal.way() if node.role == "assistant"]
    if not answers:
        raise UsageError("There is no answer to copy yet")
    with open(os.ctermid(), "w") as terminal:
        terminal.write(f"\x1b]52;c;{base64.b64encode(answers[-1].encode()).decode()}\x07")
    talk.screen.note("the last answer is in the clipboard, if this terminal allows it")


def stats(talk: Talk, rest: str) -> None:
    talk.screen.note(opt.stats_line(talk.result) if talk.result else "no answer yet")
    tokens(talk, "")


def tokens(talk: Talk, rest: str) -> None:
    if rest:
        ids = talk.model.ids(rest)
        talk.screen.note(f"{len(ids)} tokens: {ids}")
        return
    used, limit, held = talk.count(talk.journal.messages()), talk.model.limit, talk.model.held_bytes
    share = "context not known" if used is None else f"context {used:,} tokens"
    if used is not None and limit is not None:
        share = f"context {used:,} of {limit:,} tokens ({used / limit:.0%})"
    talk.screen.note(share + ("" if held is None else f" \u00b7 cache {held / 1e6:.1f} MB"))


def quit_(talk: Talk, rest: str) -> None:
    """Raises Leave."""
    raise Leave


def number(text: str, fix: str) -> int:
    """Raises UsageError for what is none."""
    if not text.isdecimal() or len(text) > 9:
        raise UsageError(f"{text[:40]!r} is no number", fix=fix)
    return int(text)


@dataclass(frozen=True)
class Command:
    usage: str
    help: str
    run: Callable[[Talk, str], object]


COMMANDS = {
    command.usage[1:].split()[0]: command
    for command in (
        Command("/help", "this list", help_),
        Command("/system [TEXT|off]", "show or change the system prompt", system),
        Command("/set NAME VALUE", "change a setting, such as temperature 0.3", set_),
        Command("/show", "model, session and settings", show),
        Command("/retry [N]", "another answer to the last message, or N of them", retry),
        Command("/answers [N]", "the answers to the last message; go on from one of them", answers_),
        Command("/continue", "go on with an answer that was cut off", continue_),
        Command("/undo", "take back the last turn", undo),
        Command("/redo", "bring again what was taken back", redo),
        Command("/edit [N]", "change message N (the last) and go on from there", edit),
        Command("/branch [NAME]", "list branches; begin one here, or go back to one", branch),
        Command("/history", "the conversation so far", history),
        Command("/clear", "begin a new conversation", clear),
        Command("/save [NAME|FILE.md|FILE.json]", "name this session, or write it into a file", save),
        Command("/load [NAME|FILE]", "go on with a saved session or a list of messages", load),
        Command("/sessions", "what is saved", sessions),
        Command("/find WORD", "search all sessions", find_),
        Command("/rename NAME", "give this session another name", rename),
        Command("/delete [NAME]", "remove a session for good", delete),
        Command(
            "/file PATH... | !COMMAND | off",
            "put files, or what a command writes, before the next message",
            file,
        ),
        Command("/copy", "the last answer to the clipboard", copy),
        Command("/stats", "how the last answer went", stats),
        Command("/tokens [TEXT]", "context used, or the tokens of a text", tokens),
        Command("/quit", "leave (also Ctrl-D, exit, /exit and /bye)", quit_),
    )
}
COMMANDS |= {"exit": COMMANDS["quit"], "bye": COMMANDS["quit"], "?": COMMANDS["help"]}
