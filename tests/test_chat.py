"""dsv2 chat from outside: at a terminal, and line by line. What the record does is test_talk.py's."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time

import pexpect
import pytest
from conftest import ROOT
from person import Person
from running import run_dsv2

from dsv2cli import places
from dsv2cli.engine import journal as journals
from dsv2cli.engine import store
from dsv2cli.engine.request import Request, Result, SamplingParams
from dsv2cli.engine.session import Session

GREEDY = Request(SamplingParams(temperature=0), max_new_tokens=30, eos_ids=frozenset([4095]))
COLD = ("--temperature", "0")
FOX = "Tell me a story about a fox."
TELLS = r"\n(\d\d|[5-9]) tokens · .*Ctrl-C stops"  # an answer has begun: some words are there


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return tmp_path / "dsv2"


def kept(name=None):
    """The record of the only talk, or of one by name."""
    (name,) = [name] if name else places.session_names()
    return journals.read(store.path_of(name), pytest.fail)


def asked(journal):
    return [node.text for node in journal.turns()]


def at_prompt(person, *arguments, **options):
    """Somebody for whom the prompt stands."""
    someone = person("chat", *arguments, **options)
    someone.wait("embedded")  # the bar
    return someone


def stop_while_one_waits(nora):
    """A message is answered, another waits behind it and is seen to; then Ctrl-C brings that one back."""
    nora.type(FOX + "\r")
    nora.wait(TELLS)
    nora.type("Who was it?\r")
    nora.wait(r"next: Who was it\?")
    nora.interrupt()
    nora.wait("interrupted")
    nora.wait(r"> Who was it\?")


def test_a_talk_is_answered_stopped_and_left(person, home):
    nora = at_prompt(person, *COLD)
    assert "I am glad" in nora.ask("Hello")
    nora.type(FOX + "\r")
    nora.wait(TELLS)
    nora.interrupt()
    nora.wait("interrupted")
    nora.ask("two\x1b\rlines")
    nora.interrupt()
    nora.wait("Ctrl-D or /quit leaves")
    text = nora.leave()
    assert "comes back here" in text and asked(kept()) == ["Hello", FOX, "two\nlines"]


def test_the_prompt_stands_before_the_model_and_what_is_typed_waits_its_turn(home):
    """Nothing heavy is imported for it; a message that is typed while the model loads is answered then."""
    code = "import sys, dsv2cli.cli.chat, dsv2cli.cli.prompt; print({'torch', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
    child = pexpect.spawn(
        sys.executable, ["-m", "dsv2cli", "chat", *COLD], encoding="utf-8", dimensions=(30, 100), cwd=ROOT
    )
    try:
        nora = Person(child, 100, 30)
        nora.wait("> ")
        nora.type("Hello\r")
        nora.wait(r"> Hello\n(loading|working)")
        nora.wait("I am glad")
        nora.wait("first after")
        nora.leave()
    finally:
        child.close(force=True)


def test_an_error_of_model_session_and_options_comes_before_the_prompt(person, home):
    for words, told in (
        (("--model", "./nowhere"), "There is no model at"),
        (("--resume", "nothing"), "There is no saved session"),
        (("--temperature", "-1"), "makes no sense"),
        (("--device", "cuda"), "not there"),
        (("--system", "a", "--system-file", "b"), "Both"),
    ):
        nora = person("chat", *words)
        text = nora.end(2)
        assert told in text and "> " not in text.splitlines()[0]


def test_to_go_on_where_nothing_was_saved_begins_a_talk_and_says_so(person, home):
    nora = at_prompt(person, "--continue", *COLD)
    nora.wait("no saved session yet")
    nora.ask("Hello")
    nora.leave()
    assert asked(kept()) == ["Hello"]


def test_a_first_message_may_stand_on_the_command_line(person, home):
    nora = person("chat", "Hello", *COLD)
    nora.wait("I am glad")
    nora.wait("first after")
    nora.leave()
    assert asked(kept()) == ["Hello"]


def test_what_is_sent_before_the_prompt_stands_is_sent(person, home):
    """The terminal gives Ctrl-J for Enter as long as it is the terminal's."""
    nora = person("chat", *COLD)
    nora.type("Hello\rWho are you?\r")
    nora.wait(lambda text: text.count("first after") == 2)
    nora.leave()
    assert asked(kept()) == ["Hello", "Who are you?"]


def test_a_draft_and_what_is_sent_before_the_prompt_stands_are_two(person, home):
    journal = journals.new(places.sessions() / "talk.jsonl", pytest.fail)
    journal.keep_draft("half a thought")
    journal.close()
    nora = person("chat", "--continue", *COLD)
    nora.type("Hello\r")
    nora.wait("first after")
    nora.wait("> half a thought")
    nora.interrupt()
    nora.leave()
    assert asked(kept()) == ["Hello"]


def test_a_talk_of_many_lines_is_gone_on_with(person, home):
    lines = "\n".join(f"line {n}" for n in range(30))
    journal = journals.new(places.sessions() / "talk.jsonl", pytest.fail)
    journal.add("user", lines)
    journal.end(journal.add("assistant", "Yes."), "stop")
    journal.close()
    nora = at_prompt(person, "--continue", *COLD)
    nora.wait(r"> \[30 lines, 229 characters\]\nYes\.")
    nora.leave()


def test_to_leave_before_the_first_word_keeps_the_message(person, home):
    nora = at_prompt(person, *COLD)
    nora.type("word " * 1500 + "\r")
    nora.wait("reading")
    nora.type("\x04")
    nora.end(0)
    assert kept().draft.startswith("word word") or asked(kept())


def test_what_came_back_is_kept_until_it_is_sent_or_taken_away(person, home):
    nora = at_prompt(person, *COLD)
    stop_while_one_waits(nora)
    nora.child.kill(9)
    nora.end(-9)
    nora = at_prompt(person, "--continue", *COLD)
    nora.wait(r"> Who was it\?")
    nora.interrupt()
    nora.wait(lambda text: "> Who was it" not in text.split("on branch")[-1].split("embedded")[-1])
    nora.leave()
    assert kept().draft == ""


def test_no_key_that_comes_early_makes_the_prompt_deaf(person, home):
    journal = journals.new(places.sessions() / "talk.jsonl", pytest.fail)
    journal.keep_draft("half a thought")
    journal.close()
    nora = person("chat", "--continue", *COLD)
    until = time.monotonic() + 60
    while not nora.ended and time.monotonic() < until:
        nora.type("\x15\x04")
        nora.look(0.05)
    assert nora.ended
    nora = at_prompt(person, *COLD)
    nora.type("\0")
    nora.ask("Hello")
    nora.leave()


def test_a_pasted_nul_is_text(person, home):
    nora = at_prompt(person, *COLD)
    nora.ask("\x1b[200~\0/delete x !\x1b[201~")
    nora.leave()
    assert asked(kept()) == ["\0/delete x !"]


def test_an_answer_has_a_face_and_what_is_typed_meanwhile_goes_to_the_next_message(person, home):
    nora = at_prompt(person, *COLD)
    nora.type(FOX + "\r")
    nora.wait(r"\d+ tokens · [\d.]+ tok/s · Ctrl-C stops")
    nora.type("Who was it?")
    nora.wait(r"> Who was it\?")
    nora.wait("first after")
    nora.type("\r")
    nora.wait(lambda text: text.count("first after") == 2)
    nora.leave()
    answers = [node.text for node in kept().way() if node.role == "assistant"]
    assert asked(kept()) == [FOX, "Who was it?"] and not any("Who was it" in text for text in answers)


def test_a_message_that_waits_is_seen_and_comes_back_when_the_answer_is_stopped(person, home):
    nora = at_prompt(person, *COLD)
    stop_while_one_waits(nora)
    nora.type("\r")
    nora.wait(lambda text: text.count("first after") == 2)
    nora.leave()
    assert asked(kept()) == [FOX, "Who was it?"]


def test_no_key_is_echoed_as_a_control_while_the_model_works(person, home):
    nora = at_prompt(person, *COLD)
    nora.type(FOX + "\r")
    nora.wait(TELLS)
    nora.type("\x1b[A\x1b[B\x1b[D")
    nora.interrupt()
    nora.wait("interrupted")
    text = nora.leave()
    assert "^C" not in text and "^[" not in text and "[A" not in text


def test_two_presses_within_a_second_leave_with_everything_saved(person, home):
    nora = at_prompt(person, *COLD)
    nora.type(FOX + "\r")
    nora.wait(TELLS)
    nora.interrupt()
    nora.interrupt()
    nora.end(0)
    (turn, answer) = kept().way()
    assert turn.text == FOX and answer.text and answer.about["ended"] == "interrupted"


def test_a_second_press_at_an_empty_prompt_leaves_and_the_first_takes_away_what_is_typed(person, home):
    nora = at_prompt(person, *COLD)
    nora.type("half a sent")
    nora.wait("> half a sent")
    nora.interrupt()
    nora.wait(lambda text: "> half" not in text)
    nora.type("\x1b[A")  # it is in the history
    nora.wait("> half a sent")
    nora.interrupt()
    nora.wait(lambda text: "> half" not in text)
    nora.interrupt()
    nora.wait("Ctrl-C again")
    nora.interrupt()
    nora.end(0)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_keeps_the_part_of_an_answer_and_what_is_typed(person, home, number, code):
    nora = at_prompt(person, *COLD)
    nora.type(FOX + "\r")
    nora.wait(TELLS)
    nora.type("and th")
    nora.wait("> and th")
    os.kill(nora.child.pid, number)
    nora.end(code)
    journal = kept()
    assert journal.way()[-1].about["ended"] == "interrupted" and len(journal.way()[-1].text) > 10
    assert journal.draft == "and th"


def test_it_is_suspended_and_comes_back(home, tmp_path):
    """By a shell with job control, at the prompt and in an answer."""
    command = f"{sys.executable} -m dsv2cli chat {' '.join(COLD)}"
    child = pexpect.spawn("bash", ["--norc", "-i"], encoding="utf-8", dimensions=(30, 100), cwd=ROOT)
    try:
        nora = Person(child, 100, 30)
        nora.type("PS1='shell: '\r" + command + "\r")
        nora.wait("Enter sends")
        nora.type("Hel")
        nora.wait("> Hel")
        nora.type("\x1a")
        nora.wait("Stopped")
        nora.type("fg\r")
        nora.wait(r"fg\n(.*\n)*> Hel")
        nora.type("lo\r")
        nora.wait("I am glad")
        nora.type(FOX + "\r")
        nora.wait(TELLS)
        nora.type("\x1a")
        nora.wait(lambda text: text.count("Stopped") == 2)
        nora.type("fg\r")
        nora.wait(lambda text: text.count("first after") == 2)
        nora.type("\x04")
        nora.wait("comes back here")
        nora.type("exit 0\r")
    finally:
        child.close(force=True)
    assert asked(kept()) == ["Hello", FOX]


def test_kill_9_leaves_the_message_and_the_beginning_of_its_answer(person, home):
    nora = at_prompt(person, *COLD)
    nora.ask("My name is Nora.")
    nora.type(FOX + "\r")
    text = nora.wait(TELLS)
    nora.child.kill(9)
    nora.end(-9)
    shown = re.search(r"\nOnce.*", text)[0].strip()
    nora = at_prompt(person, "--continue", *COLD)
    nora.wait(f"2 turns\n> {FOX}\n{shown[:20]}")
    assert "your name is Nora" in nora.ask("What is my name?")
    nora.leave()
    assert asked(kept()) == ["My name is Nora.", FOX, "What is my name?"]


def test_a_message_without_an_answer_is_back_at_the_prompt(person, home):
    journal = journals.new(places.sessions() / "talk.jsonl", pytest.fail)
    journal.add("user", "Who are you?")
    journal.close()
    nora = at_prompt(person, "--resume", "talk", *COLD)
    nora.wait(r"> Who are you\?")
    nora.ask("")
    nora.leave()
    assert asked(kept()) == ["Who are you?"] and len(kept().way()) == 2


def test_the_person_is_asked_what_to_do_about_a_full_context(person, home):
    journal = journals.new(places.sessions() / "long.jsonl", pytest.fail)
    for words in (3000, 1000):
        journal.add("user", "word " * words)
        journal.end(journal.add("assistant", "Yes."), "stop")
    journal.close()
    nora = at_prompt(person, "--resume", "long", *COLD)
    nora.type("Hello\r")
    nora.wait(r"summarise them, or stop")
    nora.type("d")
    nora.wait("left out the 1 oldest turns")
    nora.wait("first after")
    nora.leave()
    assert len(asked(kept())) == 3


def test_a_full_disk_is_said_once_and_ends_nothing(person, home):
    full = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (0, 0))
    nora = at_prompt(person, *COLD, before=full)
    nora.ask("Hello")
    nora.ask("What is two plus two?")
    text = nora.leave()
    assert text.count("could not be written") == 1 and "2 plus 2" in text.replace("two", "2")


def test_a_home_that_is_no_folder_or_may_not_be_written_ends_nothing(person, tmp_path):
    (tmp_path / "file").touch()
    nora = at_prompt(person, *COLD, XDG_DATA_HOME=str(tmp_path / "file"))
    nora.ask("Hello")
    assert nora.leave().count("could not be written") == 1


def test_no_save_leaves_nothing_behind(person, home):
    nora = at_prompt(person, "--no-save", *COLD)
    nora.ask("Hello")
    nora.leave()
    assert not home.exists()


def test_every_command_can_be_typed_and_tab_completes_it(person, home):
    nora = at_prompt(person, *COLD)
    nora.ask("Hello")
    for keys, words in (
        ("/he\tlp", "Ctrl-Z suspends"),
        ("/show", "max_new_tokens"),
        ("/stats", "tok/s"),
        ("/tokens", "of 4,096 tokens"),
        ("/tokens a b", "2 tokens"),
        ("/history", "1> Hello"),
        ("/copy", "in the clipboard"),
        ("/save my talk", "saved as my talk"),
        ("/sessions", r"\* my talk"),
        ("/branch b", "new branch b"),
        ("/system Be kind.", "system prompt: Be kind."),
        ("/undo", "taken back: Hello"),
        ("/redo", "again there: Hello"),
        ("/branch main", "back on branch main"),
        ("/retry", "2 answers"),
        ("/answers", r"\* 2: "),
        ("/find glad", "my talk  assistant: I am glad"),
        ("/clear", "a new conversation"),
        ("/load my talk", "my talk: 1 turns"),
        ("/nothing", "There is no command"),
        ("/?", "Ctrl-Z suspends"),
    ):
        typed, tab, rest = keys.partition("\t")
        nora.type(typed)
        if tab:
            nora.wait("help +this list")
            nora.type(tab)
            nora.wait(re.escape(f"> {typed}{rest}"))
        before = len(re.findall(words, nora.look()))
        nora.type("\r")
        nora.wait(lambda text, words=words, before=before: len(re.findall(words, text)) > before)
    nora.type("exit\r")
    nora.end(0)


def test_the_menu_opens_by_itself_and_a_talk_is_picked_with_the_arrows(person, home):
    for name in ("tea", "trains"):
        journal = journals.new(places.sessions() / f"{name}.jsonl", pytest.fail)
        journal.add("user", f"All about {name}")
        journal.end(journal.add("assistant", "Yes."), "stop")
        journal.close()
        os.utime(places.sessions() / f"{name}.jsonl", (1e9, 1e9 + len(name)))
    nora = at_prompt(person, *COLD)
    nora.type("/")
    nora.wait("help +this list")
    nora.type("load ")
    nora.wait("trains .*All about trains\n.*tea .*All about tea")
    nora.type("\x1b[B\x1b[B")
    nora.wait("> /load tea")
    nora.type("\r")
    nora.wait("tea: 1 turns")
    nora.leave()


def test_ctrl_g_opens_the_editor(person, home, tmp_path):
    editor = tmp_path / "editor"
    editor.write_text("#!/bin/sh\nprintf 'My name is Nora.' > \"$1\"\n")
    editor.chmod(0o755)
    nora = at_prompt(person, *COLD, EDITOR=str(editor), VISUAL=str(editor))
    nora.type("\x07")
    nora.wait("> My name is Nora")
    nora.ask("")
    nora.leave()
    assert asked(kept()) == ["My name is Nora."]


def test_what_was_typed_can_be_searched_in_the_next_chat(person, home):
    for keys in ("My name is Nora.", "\x12name is\r"):  # Ctrl-R
        nora = at_prompt(person, *COLD)
        nora.ask(keys)
        nora.leave()
    for name in places.session_names():
        assert asked(kept(name)) == ["My name is Nora."]


def test_after_ctrl_c_the_next_answer_is_that_of_a_fresh_prefill(person, home, embedded, embedded_tokenizer):
    nora = at_prompt(person, "-n", "30", *COLD)
    nora.type(FOX + "\r")
    nora.wait(TELLS)
    nora.interrupt()
    nora.wait("interrupted")
    nora.ask("What was the fox called?")
    assert int(re.findall(r"(\d+) reused", nora.leave())[-1]) > 5
    way = kept().way()
    messages = [{"role": node.role, "content": node.text} for node in way]
    session = Session(embedded, embedded_tokenizer)
    assert len(messages) == 4
    assert "".join(session.reply(messages[:3], GREEDY, Result())) == messages[3]["content"]


# Fingers.


@pytest.mark.parametrize(
    "keys",
    ["one\x1b\rtwo", "one\ntwo", "one\\\rtwo", "one\x1b[13;2utwo", "one\x1b[27;2;13~two", '"""one\rtwo"""'],
    ids=["alt-enter", "ctrl-j", "backslash", "kitty", "xterm", "quotes"],
)
def test_a_new_line_is_begun_in_six_ways(person, home, keys):
    nora = at_prompt(person, *COLD)
    nora.ask(keys)
    nora.leave()
    assert asked(kept()) == ["one\ntwo"]


def test_a_long_paste_stands_as_one_word_and_is_sent_whole(person, home):
    code = "".join(f'\tif x == {n}:  """say {n}"""\r\n' for n in range(40)) + "done"
    nora = at_prompt(person, *COLD)
    nora.ask("Hello")
    nora.type("Look: \x1b[200~" + code + "\x1b[201~")
    nora.wait(r"> Look: \[pasted 41 lines, [\d,]+ tokens\]")
    nora.ask(" and?")
    nora.leave()
    assert asked(kept())[1] == "Look: " + code.replace("\r\n", "\n") + " and?"


def test_a_long_paste_is_taken_away_whole(person, home):
    nora = at_prompt(person, *COLD)
    nora.type("\x1b[200~" + "a line\n" * 30 + "\x1b[201~")
    nora.wait(r"\[pasted 31 lines")
    nora.type("\x7f")
    nora.wait(lambda text: "[pasted" not in text)
    nora.leave()


@pytest.mark.parametrize("paste", ['"""\nmodule\n"""', "/usr/bin/env: no such file", '"""a"""'])
def test_what_is_pasted_is_left_alone(person, home, paste):
    nora = at_prompt(person, *COLD)
    nora.ask(f"\x1b[200~{paste}\x1b[201~")
    nora.leave()
    assert asked(kept()) == [paste]


def test_a_paste_that_is_longer_than_the_context_is_refused_and_stays(person, home):
    nora = at_prompt(person, *COLD)
    nora.type("\x1b[200~" + "a line\n" * 2000 + "\x1b[201~\r")
    nora.wait("leaves no room for an answer")
    nora.wait(r"attach less\n.*\n> \[pasted 2001 lines, [\d,]+ tokens\]")
    nora.interrupt()
    nora.wait("Enter sends")
    nora.ask("Hello")
    nora.leave()
    assert asked(kept()) == ["Hello"]


def test_two_slashes_send_one(person, home):
    nora = at_prompt(person, *COLD)
    nora.ask("//help me")
    nora.leave()
    assert asked(kept()) == ["/help me"]


def test_chinese_and_emoji_are_kept_as_they_are(person, home):
    nora = at_prompt(person, *COLD)
    nora.ask("你好，我叫小明 🙂")
    nora.leave()
    assert asked(kept()) == ["你好，我叫小明 🙂"]


def test_the_meter_counts_the_draft_and_the_files(person, home, tmp_path):
    (tmp_path / "a.txt").write_text("word " * 500)
    nora = at_prompt(person, *COLD)
    nora.ask("Hello")
    used = int(re.search(r"(\d+)/4,096 tokens", nora.wait(r"\d+/4,096"))[1])

    def meter(text):
        shown = re.findall(r"([\d,]+)/4,096 tokens", text)
        return int(shown[-1].replace(",", "")) if shown else -1

    nora.type("word " * 50)
    nora.wait(lambda text: used + 45 < meter(text) < used + 60)
    nora.type(f"\x15/file {tmp_path / 'a.txt'}\r")
    nora.wait(lambda text: used + 490 < meter(text) < used + 600)
    nora.leave()


# Windows.


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}, {"LANG": "C", "LC_ALL": "C"}], ids=str)
def test_in_a_small_window_lines_break_between_words_and_every_word_is_there(person, home, environment):
    nora = at_prompt(person, "--seed", "1", columns=40, rows=12, **environment)
    shown = nora.ask(FOX).split("fox.", 1)[1]
    nora.leave()
    story = kept().way()[1].text
    lines = [line for line in shown.splitlines() if line.strip()]
    assert max(map(len, lines)) <= 40 and len(lines) > 5
    assert set(story.split()) <= set(shown.split())


def test_a_terminal_that_can_not_move_its_cursor_has_a_talk_line_by_line(person, home):
    nora = person("chat", *COLD, TERM="dumb")
    nora.wait(">")
    nora.type("Hello\r")
    nora.wait("I am glad")
    nora.wait("first after")
    nora.type("/undo\r")
    nora.wait("taken back: Hello")
    nora.type(FOX + "\r")
    nora.wait("Once upon")
    nora.interrupt()
    nora.wait("interrupted")
    nora.leave()
    assert "\x1b" not in nora.raw.replace("\x1b[2m", "").replace("\x1b[0m", "")
    assert asked(kept()) == [FOX]


def test_a_window_that_changes_its_size_is_followed_at_once(person, home):
    nora = at_prompt(person, *COLD)
    nora.child.setwinsize(30, 40)
    nora.screen.resize(30, 40)
    shown = nora.ask(FOX).split("fox.", 1)[1]
    nora.leave()
    lines = [line for line in shown.splitlines() if "tok/s" not in line and "embedded" not in line]
    assert max(map(len, lines)) <= 40


def test_answers_go_into_a_file_and_the_rest_to_the_terminal(home, tmp_path):
    line = f"{sys.executable} -m dsv2cli chat {' '.join(COLD)} > {tmp_path / 'answers.txt'}"
    child = pexpect.spawn("bash", ["-c", line], encoding="utf-8", dimensions=(30, 100), cwd=ROOT)
    try:
        nora = Person(child, 100, 30)
        nora.wait("Enter sends")
        nora.ask("Hello")
        text = nora.leave()
    finally:
        child.close(force=True)
    assert (tmp_path / "answers.txt").read_text() == "I am glad. What would you like to talk about now?\n"
    assert "I am glad" not in text


# Two terminals, and nothing lost.


def test_two_terminals_on_one_talk_keep_what_is_said_in_both(person, home):
    left = at_prompt(person, "-n", "4", *COLD)
    left.ask("Hello")
    right = person("chat", "--continue", "-n", "4", *COLD)
    right.wait("open elsewhere")
    right.type("b\r")
    right.wait("1 turns")
    for number in range(10):
        left.ask(f"left {number}")
        right.ask(f"right {number}")
    left.leave()
    right.leave()
    said = [node.text for node in kept().nodes.values() if node.role == "user"]
    assert sorted(said) == sorted(
        ["Hello", *(f"{side} {n}" for side in ("left", "right") for n in range(10))]
    )


def test_a_talk_that_is_open_may_be_read_or_left_alone(person, home):
    left = at_prompt(person, *COLD)
    left.ask("Hello")
    reader = person("chat", "--continue")
    reader.wait("open elsewhere")
    reader.type("r\r")
    assert "1> Hello" in reader.end(0)
    other = person("chat", "--continue")
    other.wait("open elsewhere")
    other.type("\r")
    other.end(2)
    left.leave()


@pytest.mark.parametrize("seed", range(3))
def test_ctrl_c_at_any_moment_ends_in_order(person, home, seed):
    """Single and double presses at random moments, from the first on: no traceback, no message lost."""
    numbers = random.Random(seed)
    sent = []
    for number in range(4):
        nora = person("chat", *(("--continue",) if number else ()), *COLD)
        if numbers.random() < 0.7:
            nora.wait("embedded")
            message = f"message {number}"
            nora.type(f"\x15{message}\r")
            sent.append(message)
        time.sleep(numbers.random() * 0.6)
        for _ in range(numbers.choice([1, 2])):
            nora.interrupt()
            time.sleep(numbers.random() * 0.2)
        until = time.monotonic() + 60
        while not nora.ended and time.monotonic() < until:
            nora.type("\x15\x04")
            nora.look(0.1)
        text = nora.look()
        assert nora.ended and "Traceback" not in text and "Error" not in text, text
    for name in places.session_names():
        journal = kept(name)
        roles = [node.role for node in journal.way() if node.role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
    everything = "".join(path.read_text() for path in (home / "sessions").glob("*.jsonl"))
    assert [message for message in sent if message not in everything] == []


def test_saved_talks_are_listed_and_searched_from_outside(home):
    done = run_dsv2("sessions")
    assert (done.returncode, done.stdout) == (0, "")
    for name in ("tea", "trains"):
        journal = journals.new(places.sessions() / f"{name}.jsonl", pytest.fail)
        journal.add("user", f"All about {name}\x1b[2J")
        journal.end(journal.add("assistant", "Yes.", model="tiny"), "stop")
        journal.close()
        os.utime(places.sessions() / f"{name}.jsonl", (1e9, 1e9 + len(name)))
    heading, first, second = run_dsv2("sessions").stdout.splitlines()
    assert first.split()[0] == "trains" and second.split()[0] == "tea" and "first words" in heading
    assert "\x1b" not in second and "All about tea" in second and " 1  tiny " in second
    (talk, _) = json.loads(run_dsv2("sessions", "--json").stdout)["sessions"]
    assert talk["name"] == "trains" and talk["turns"] == 1 and talk["model"] == "tiny"
    assert run_dsv2("sessions", "--find", "ABOUT TEA").stdout.startswith("tea  user: All about tea")


# Line by line.


def test_a_program_may_wait_for_each_answer(start):
    process = start("chat", *COLD, stdin=subprocess.PIPE)
    for ask in ("My name is Nora.", "What is my name?"):
        process.stdin.write(ask + "\n")
        process.stdin.flush()
        assert "Nora" in process.stdout.readline()
    process.stdin.close()
    assert process.wait(30) == 0


def test_messages_as_json_give_messages_as_json():
    lines = [
        [{"role": "user", "content": "My name is Nora."}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
    ]
    done = run_dsv2("chat", "--json", *COLD, stdin="\n".join(map(json.dumps, lines)))
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["role"] for answer in answers] == ["assistant"] * 2 and "Nora" in answers[0]["content"]


@pytest.mark.parametrize(
    "bad", ["x", "[]", '[{"role": "assistant", "content": "x"}]', "{}", '[{"role": "user"}]']
)
def test_a_bad_line_has_its_error_and_the_next_is_read(bad):
    good = json.dumps([{"role": "user", "content": "My name is Nora."}])
    done = run_dsv2("chat", "--json", *COLD, stdin=f"{good}\n{bad}\n{good}\n")
    first, error, last = map(json.loads, done.stdout.splitlines())
    assert first["content"] == last["content"] and "Nora" in first["content"]
    assert error["line"] == 2 and error["error"] and "content" not in error
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr


def test_an_answer_is_another_each_turn_and_the_same_from_the_same_seed():
    options = ("chat", "--seed", "3", "--temperature", "2", "-n", "8")
    first = run_dsv2(*options, stdin="Hello\nHello\n").stdout
    assert first == run_dsv2(*options, stdin="Hello\nHello\n").stdout
    one, two = first.splitlines()[0], first.splitlines()[-1]
    assert one != two


def test_a_system_file_is_read_and_a_missing_one_said(tmp_path):
    (tmp_path / "s.txt").write_text("Be brief.\n")
    options = ("chat", *COLD, "-n", "20")
    first = run_dsv2(*options, "--system", "Be brief.", stdin="Hello")
    assert run_dsv2(*options, "--system-file", str(tmp_path / "s.txt"), stdin="Hello").stdout == first.stdout
    done = run_dsv2(*options, "--system-file", str(tmp_path / "none"), stdin="Hello")
    assert done.returncode == 2 and "can not be read" in done.stderr


def test_a_saved_talk_is_gone_on_with_from_a_pipe_and_stays_as_it_is(home):
    journal = journals.new(places.sessions() / "tea.jsonl", pytest.fail)
    journal.add("user", "My name is Nora.")
    journal.end(journal.add("assistant", "Hello Nora."), "stop")
    journal.close()
    before = (places.sessions() / "tea.jsonl").read_bytes()
    done = run_dsv2("chat", "--resume", "tea", *COLD, stdin="What is my name?\n")
    assert "Nora" in done.stdout and (places.sessions() / "tea.jsonl").read_bytes() == before
