"""A talk from within: the record that only grows, what is sent of it, and what commands do to both."""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
import threading

import pytest
from conftest import load
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from dsv2cli import places
from dsv2cli.checkpoint.found import find
from dsv2cli.cli import commands
from dsv2cli.cli.prompt import History, Suggestions
from dsv2cli.cli.talk import LoadedModel, Stopped, Talk
from dsv2cli.engine import journal as journals
from dsv2cli.engine import latents, store
from dsv2cli.engine.journal import SUMMARISE
from dsv2cli.engine.request import Request, Result, SamplingParams
from dsv2cli.engine.session import Session
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.hubs.find import EMBEDDED
from dsv2cli.run import page_store
from dsv2cli.run.machine import look_around
from dsv2cli.run.open import Opened
from dsv2cli.run.plan import make_plan
from dsv2cli.run.wish import Wish

CONTEXT = 1024  # tokens of the short model
GREEDY = Request(SamplingParams(temperature=0), max_new_tokens=30, eos_ids=frozenset([4095]))


class Paper:
    """A screen that remembers what was shown; `choice` is what the person says of a full context."""

    def __init__(self):
        self.notes, self.errors, self.text, self.choice = [], [], "", "stop"
        self.at_piece = lambda: None

    def loading(self, name):
        raise AssertionError

    def note(self, text):
        self.notes.append(text)

    def show_error(self, error):
        self.errors.append(error)

    def last_words(self, error):
        raise AssertionError

    def piece(self, text):
        self.text += text
        self.at_piece()

    def end(self):
        self.text += "\n"

    def exchange(self, *texts):
        self.notes += texts

    def status(self, text):
        pass

    def ask_overflow(self, limit):
        return self.choice


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return tmp_path / "dsv2"


def make_talk(runner, tokenizer, keep=True, folder=EMBEDDED):
    checkpoint = find(str(folder))
    plan = make_plan(checkpoint.config, Wish(), look_around())
    opened = Opened(**vars(checkpoint), runner=runner, plan=plan, load_seconds=0.0)
    model = LoadedModel(checkpoint, lambda: opened)
    model.made["tokenizer"] = tokenizer
    model.run()
    screen = Paper()
    talk = Talk(model, GREEDY, screen, journals.new(None, screen.show_error), "stop", at_first=GREEDY)
    talk.begin(keep)
    talk.set_system("Be brief.")
    return talk


@pytest.fixture
def talk(home, embedded, embedded_tokenizer):
    return make_talk(embedded, embedded_tokenizer)


@pytest.fixture(scope="module")
def short_folder(tmp_path_factory):
    """The embedded model with a context that is soon full."""
    folder = tmp_path_factory.mktemp("short") / "model"
    shutil.copytree(EMBEDDED, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    return folder


@pytest.fixture(scope="module")
def short_model(short_folder):
    return load(short_folder)


@pytest.fixture
def short_talk(home, short_model, embedded_tokenizer, short_folder):
    return make_talk(short_model, embedded_tokenizer, folder=short_folder)


def say(talk, text):
    """An answer, and what became of it."""
    talk.say(text)
    return talk.journal.way()[-1].text, talk.result


def texts(talk):
    return [(node.role, node.text) for node in talk.journal.way()]


def fresh(talk, text):
    """The answer to the same conversation with nothing cached."""
    session, result = Session(talk.model.made["opened"].runner, talk.model.tokenizer), Result()
    messages = [*talk.journal.messages(), {"role": "user", "content": text}]
    "".join(session.reply(messages, GREEDY, result))
    return result.token_ids


def again(talk):
    """The same talk as another start of the program has it."""
    name = talk.name
    talk.journal.close()
    other = make_talk(
        talk.model.made["opened"].runner, talk.model.tokenizer, folder=talk.model.checkpoint.folder
    )
    other.resume(store.path_of(name))
    return other


def lines(talk):
    return [json.loads(line) for line in talk.journal.path.read_bytes().split(b"\n") if line]


# The record.


def test_after_undo_edit_and_branch_answers_are_those_of_a_fresh_prefill(talk):
    for text in ("My name is Nora.", "Tell me a story about a fox.", "Thank you"):
        say(talk, text)
    commands.carry_out(talk, "/undo")
    wanted = fresh(talk, "What is my name?")
    result = say(talk, "What is my name?")[1]
    assert result.token_ids == wanted and result.reused_tokens > 20
    commands.carry_out(talk, "/branch other")
    commands.carry_out(talk, "/edit 2")
    assert talk.draft == "Tell me a story about a fox." and len(talk.journal.turns()) == 3
    say(talk, "What is two plus two?")
    assert [node.text for node in talk.journal.turns()] == ["My name is Nora.", "What is two plus two?"]
    commands.carry_out(talk, "/branch main")
    assert len(talk.journal.turns()) == 3
    wanted = fresh(talk, "Bye")
    assert say(talk, "Bye")[1].token_ids == wanted


def test_every_line_of_the_record_stays_whatever_is_done(talk):
    """The file only grows, and each message that was ever said is in it."""
    before, said = b"", []
    for line in (
        "Hello",
        "Who are you?",
        "/undo",
        "Thank you",
        "/retry 2",
        "/edit 1",
        "Bye",
        "/redo",
        "/branch b",
    ):
        if line.startswith("/"):
            try:
                commands.carry_out(talk, line)
            except UsageError:
                assert line == "/redo"
        else:
            say(talk, line)
            said.append(line)
        now = talk.journal.path.read_bytes()
        assert now.startswith(before)
        before = now
    kept = [line["text"] for line in lines(talk) if line.get("role") == "user"]
    assert kept == said
    assert again(talk).journal.nodes.keys() == talk.journal.nodes.keys()


def test_an_edit_that_is_given_up_leaves_the_talk_as_it_was(talk):
    say(talk, "Hello")
    say(talk, "Who are you?")
    before = texts(talk)
    commands.carry_out(talk, "/edit 1")
    assert texts(talk) == before and texts(again(talk)) == before


def test_what_was_taken_back_is_brought_again(talk):
    for text in ("Hello", "Who are you?"):
        say(talk, text)
    whole = texts(talk)
    commands.carry_out(talk, "/undo")
    commands.carry_out(talk, "/undo")
    assert talk.journal.turns() == []
    talk = again(talk)
    commands.carry_out(talk, "/redo")
    commands.carry_out(talk, "/redo")
    assert texts(talk) == whole
    with pytest.raises(UsageError, match="nothing to bring again"):
        commands.carry_out(talk, "/redo")


def test_retries_are_answers_to_choose_from_each_with_random_numbers_of_its_own(talk):
    talk.request = Request(SamplingParams(temperature=3.0), max_new_tokens=12, seed=5)
    first = say(talk, "Hello")[0]
    commands.carry_out(talk, "/retry 3")
    asked = talk.journal.turns()[-1]
    given = talk.journal.answers(asked)
    assert len({node.text for node in given}) == 4 and len({node.about["seed"] for node in given}) == 4
    assert talk.journal.head == given[-1].id
    commands.carry_out(talk, "/answers 1")
    assert texts(talk)[-1] == ("assistant", first)
    again_ = make_talk(talk.model.made["opened"].runner, talk.model.tokenizer)
    again_.request = talk.request
    say(again_, "Hello")
    commands.carry_out(again_, "/retry 3")
    told = [node.text for node in again_.journal.answers(again_.journal.turns()[-1])]
    assert told == [node.text for node in given], "the same seed gives the same talk"


def test_a_message_says_who_answered_it_how_and_why_it_ended(talk):
    say(talk, "Hello")
    node = talk.journal.way()[-1]
    assert node.about["model"] == str(EMBEDDED) and node.about["settings"]["temperature"] == 0
    assert node.about["ended"] == "stop" and node.about["seed"] == talk.request.seed and node.about["time"]


def test_sessions_are_private_and_whole(talk, home):
    say(talk, "你好 🙂 \x1b[2J")
    path = talk.journal.path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert texts(again(talk)) == texts(talk)
    History(str(home / "history")).store_string("one\ntwo")
    assert list(History(str(home / "history")).load_history_strings()) == ["one\ntwo"]
    assert stat.S_IMODE((home / "history").stat().st_mode) == 0o600


def test_lines_that_are_damaged_are_passed_over_with_a_word(talk):
    say(talk, "Hello")
    say(talk, "Who are you?")
    path, name = talk.journal.path, talk.name
    talk.journal.close()
    data = path.read_bytes()
    path.write_bytes(data[:-30])  # killed while it wrote
    other = make_talk(talk.model.made["opened"].runner, talk.model.tokenizer)
    other.resume(path)
    assert any("1 lines were passed over" in note for note in other.screen.notes)
    assert [node.text for node in other.journal.turns()] == ["Hello", "Who are you?"]
    say(other, "Thank you")
    other.journal.close()
    assert b"Thank you" in path.read_bytes() and name == path.stem
    third = make_talk(talk.model.made["opened"].runner, talk.model.tokenizer)
    third.resume(path)
    assert [node.text for node in third.journal.turns()] == ["Hello", "Who are you?", "Thank you"]


@pytest.mark.parametrize("cut", range(20))
def test_wherever_the_file_ends_the_talk_goes_on_with_what_is_before(talk, cut):
    for text in ("Hello", "Who are you?"):
        say(talk, text)
    path, whole = talk.journal.path, texts(talk)
    talk.journal.close()
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * (cut + 1) // 21])
    try:
        journal = journals.read(path, pytest.fail)
    except Dsv2Error:
        assert cut == 0
        return
    kept = [(node.role, node.text) for node in journal.way()]
    for (role, text), (role_, text_) in zip(kept, whole, strict=False):
        assert role == role_ and text_.startswith(text)
    roles = [role for role, _ in kept if role != "system"]
    assert roles == ["user", "assistant"] * (len(roles) // 2), "no two turns of one in a row"


def test_a_message_without_an_answer_is_a_draft(talk):
    say(talk, "Hello")
    talk.journal.add("user", "And then?", files="a.txt:\n\nx\n\n")
    other = again(talk)
    assert other.draft == "a.txt:\n\nx\n\nAnd then?" and len(other.journal.turns()) == 1


def test_what_was_typed_and_not_sent_is_a_draft(talk):
    say(talk, "Hello")
    talk.journal.keep_draft("one\ntwo")
    assert again(talk).draft == "one\ntwo"


def test_an_old_session_and_a_list_become_a_record_and_stay(talk, home, tmp_path):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    old = {
        "format": store.FORMAT,
        "branches": {"main": messages, "other": [messages[0], {"role": "assistant", "content": "Ho"}]},
        "branch": "other",
        "pending": "And?",
        "model": "x",
    }
    path = places.private_folder(places.sessions()) / "tea.json"
    path.write_text(json.dumps(old))
    talk.resume(commands.find("tea"))
    assert texts(talk) == [("user", "Hi"), ("assistant", "Ho")] and talk.draft == "And?"
    assert sorted(talk.journal.branches) == ["main", "other"] and talk.name == "tea"
    assert sum(node.role == "user" for node in talk.journal.nodes.values()) == 1, "they begin alike"
    assert json.loads(path.read_text()) == old and places.session_names() == ["tea"]
    assert again(talk).draft == "And?"
    (tmp_path / "in.json").write_text(
        json.dumps({"messages": [*messages, {"role": "user", "content": "Go"}]})
    )
    commands.carry_out(talk, f"/load {tmp_path / 'in.json'}")
    assert texts(talk) == [("user", "Hi"), ("assistant", "Hello!")] and talk.draft == "Go"
    assert len(places.session_names()) == 2


@pytest.mark.parametrize(
    "content",
    ["", "[1]", '{"format": "x"}', '[{"role": "robot", "content": "x"}]', '{"messages": 3}', "\xff"],
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_what_is_no_conversation_is_refused(talk, tmp_path, content, suffix):
    (tmp_path / f"x{suffix}").write_bytes(content.encode("latin-1"))
    with pytest.raises(Dsv2Error, match=r"not a "):
        talk.resume(tmp_path / f"x{suffix}")


def test_a_disk_that_is_full_is_said_once_and_what_waits_is_written_when_there_is_room(talk):
    say(talk, "Hello")
    before = talk.journal.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), limits[1]))
    try:
        say(talk, "Who are you?")
        say(talk, "Thank you")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(talk.screen.errors) == 1 and "could not be written" in talk.screen.errors[0].what
    assert talk.journal.path.read_bytes() == before
    say(talk, "Bye")
    assert [node.text for node in again(talk).journal.turns()] == [
        "Hello",
        "Who are you?",
        "Thank you",
        "Bye",
    ]


def test_a_talk_that_may_only_be_read_goes_on_in_a_copy(talk, home):
    say(talk, "Hello")
    talk.journal.close()
    path = store.path_of(places.session_names()[0])
    path.chmod(0o400)
    if os.geteuid() == 0:
        pytest.skip("root may write anything")
    other = make_talk(talk.model.made["opened"].runner, talk.model.tokenizer)
    other.resume(path)
    say(other, "Bye")
    assert [node.text for node in again(other).journal.turns()] == ["Hello", "Bye"]
    assert b"Bye" not in path.read_bytes()


def test_what_waits_is_kept_whatever_of_it_is_sent(talk):
    """Several messages were sent while the first is answered, and the program is killed."""
    talk.journal.keep_draft("one\ntwo\nthree")
    talk.journal.add("user", "one")
    talk.journal.more(talk.journal.add("assistant", ""), "Yes.")
    assert again(talk).draft == "two\nthree"


def test_a_retry_that_was_killed_before_its_first_word_leaves_the_answer_before(talk):
    answer = say(talk, "Hello")[0]
    talk.journal.add("assistant", "", talk.journal.turns()[-1].id)
    other = again(talk)
    assert texts(other)[-1] == ("assistant", answer) and other.draft == ""


def test_a_talk_that_is_deleted_under_its_writer_is_written_anew(talk):
    say(talk, "Hello")
    say(talk, "Who are you?")
    talk.journal.path.unlink()
    say(talk, "Thank you")
    assert [node.text for node in again(talk).journal.turns()] == ["Hello", "Who are you?", "Thank you"]


def test_a_talk_that_is_not_kept_is_saved_whole_when_it_is_asked_for(talk, embedded, embedded_tokenizer):
    say(talk, "Hello")
    talk.journal.close()
    path = store.path_of(places.session_names()[0])
    before = path.read_bytes()
    for words in ((), ("Bye",)):
        other = make_talk(embedded, embedded_tokenizer, keep=False)
        other.resume(path)
        for text in words:
            say(other, text)
        assert path.read_bytes() == before
        commands.carry_out(other, f"/save copy {len(words)}")
        assert [node.text for node in again(other).journal.turns()] == ["Hello", *words]
    other = make_talk(embedded, embedded_tokenizer, keep=False)
    commands.carry_out(other, f"/load {path.stem}")
    say(other, "secret")
    assert path.read_bytes() == before


def test_a_system_prompt_holds_wherever_it_is_gone_back_to(talk):
    say(talk, "Hello")
    commands.carry_out(talk, "/system You are a bear.")
    for line in ("/retry", "/undo"):
        commands.carry_out(talk, line)
        assert talk.journal.messages()[0] == {"role": "system", "content": "You are a bear."}
    assert again(talk).journal.system == "You are a bear."


def test_an_edited_message_keeps_its_files(talk, tmp_path):
    (tmp_path / "a.txt").write_text("My name is Nora.")
    commands.carry_out(talk, f"/file {tmp_path / 'a.txt'}")
    say(talk, "Hello")
    commands.carry_out(talk, "/edit")
    say(talk, "Hello again")
    assert "Nora" in talk.journal.turns()[0].whole
    commands.carry_out(talk, "/edit")
    commands.carry_out(talk, "/file off")
    say(talk, "Bye")
    assert "Nora" not in talk.journal.turns()[0].whole


def test_a_file_with_a_strange_name_among_the_sessions_ends_no_list(talk):
    say(talk, "All about tea")
    shutil.copy(talk.journal.path, places.sessions() / "talk (copy).jsonl")
    commands.carry_out(talk, "/sessions")
    assert any("talk (copy)" in note for note in talk.screen.notes)
    assert len(list(commands.search("about tea"))) == 2
    assert commands.find("talk (copy)").name == "talk (copy).jsonl"


def test_what_is_written_out_is_all_that_was_said(short_talk, tmp_path):
    fill(short_talk)
    short_talk.on_overflow = "summarise"
    short_talk.say("Hello")
    commands.carry_out(short_talk, f"/save {tmp_path / 'all.json'}")
    written = json.loads((tmp_path / "all.json").read_text())
    assert [each["role"] for each in written] == ["system", *["user", "assistant"] * 7]
    assert not any(each["content"] == SUMMARISE for each in written)


# Two writers.


def test_a_talk_that_is_open_is_locked_and_a_branch_of_it_is_in_the_same_record(talk):
    say(talk, "Hello")
    other = make_talk(talk.model.made["opened"].runner, talk.model.tokenizer)
    with pytest.raises(UsageError, match="open elsewhere"):
        other.resume(talk.journal.path)
    with pytest.raises(UsageError, match="open elsewhere"):
        commands.carry_out(other, f"/delete {talk.name} !")
    free = threading.Timer(0.3, talk.journal.close)
    path = talk.journal.path
    free.start()
    other.resume(path)  # what held it is just ending
    other.journal.close()
    talk.resume(path)
    other.resume(talk.journal.path, shared=True)
    for number in range(5):
        say(talk, f"left {number}")
        say(other, f"right {number}")
    other.journal.close()
    kept = again(talk).journal
    asked = [node.text for node in kept.nodes.values() if node.role == "user"]
    assert sorted(asked) == sorted(
        ["Hello", *(f"{side} {n}" for side in ("left", "right") for n in range(5))]
    )
    ways = {
        name: [node.text for node in kept.way(head) if node.role == "user"]
        for name, head in kept.branches.items()
    }
    assert ways["main"] == ["Hello", *(f"left {n}" for n in range(5))]
    assert ways["main-2"] == ["Hello", *(f"right {n}" for n in range(5))]


# Stopping.


def stop_after(talk, pieces):
    count = iter(range(10_000))
    talk.screen.at_piece = lambda: talk.stop.set() if next(count) == pieces - 1 else None


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(talk):
    stop_after(talk, 3)
    talk.say("Tell me a story about a fox.")
    node = talk.journal.way()[-1]
    assert node.role == "assistant" and node.text and node.about["ended"] == "interrupted"
    assert node.text == talk.screen.text.strip("\n") and talk.draft == ""
    talk.stop.clear()
    wanted = fresh(talk, "Who was it?")
    assert say(talk, "Who was it?")[1].token_ids == wanted


def test_before_the_first_word_message_and_files_return_to_the_prompt(talk, tmp_path):
    (tmp_path / "a.txt").write_text("My name is Nora.")
    commands.carry_out(talk, f"/file {tmp_path / 'a.txt'}")
    talk.stop.set()
    talk.say("Hello")
    assert talk.draft == "Hello" and [each.name for each in talk.files] == ["a.txt"]
    assert talk.journal.turns() == []
    talk.stop.clear()
    talk.draft = ""
    say(talk, "Hello")
    assert "Nora" in talk.journal.turns()[0].whole and talk.journal.turns()[0].text == "Hello"
    assert talk.files == []


def test_nobody_waits_for_a_model_that_is_still_loaded_once_it_is_stopped(home, talk):
    slow = LoadedModel(talk.model.checkpoint, lambda: None)
    talk.model, stop = slow, threading.Timer(0.1, talk.stop.set)
    slow.made["tokenizer"] = slow.tokenizer
    stop.start()
    talk.say("Hello")
    assert talk.draft == "Hello" and talk.journal.turns() == []
    with pytest.raises(Stopped):
        slow.session(talk.stop)


def test_an_answer_that_was_cut_off_goes_on(talk):
    whole = say(talk, "Hello")[0]
    commands.carry_out(talk, "/undo")
    talk.request = Request(SamplingParams(temperature=0), max_new_tokens=4, eos_ids=frozenset([4095]))
    start = say(talk, "Hello")[0]
    assert whole.startswith(start) and talk.journal.way()[-1].about["ended"] == "length"
    talk.request = GREEDY
    commands.carry_out(talk, "/continue")
    assert texts(talk)[-1] == ("assistant", whole) and texts(again(talk))[-1] == ("assistant", whole)
    with pytest.raises(UsageError, match="cut off"):
        commands.carry_out(talk, "/continue")


# A context that is full.


def fill(talk, turns=6):
    for i in range(turns):
        talk.journal.add("user", f"{i} " + "word " * (CONTEXT // 5))
        talk.journal.end(talk.journal.add("assistant", "Yes."), "stop")


def test_the_oldest_turns_are_left_out_of_what_is_sent_and_stay_in_the_record(short_talk):
    fill(short_talk)
    short_talk.on_overflow = "drop"
    said = len(short_talk.journal.turns())
    short_talk.say("Hello")
    sent = short_talk.journal.messages()
    assert short_talk.count(sent) < CONTEXT and sent[0] == {"role": "system", "content": "Be brief."}
    assert len(short_talk.journal.turns()) == said + 1 and len(sent) < 2 * said
    (note,) = [note for note in short_talk.screen.notes if "left out" in note]
    assert "'0 word word" in note
    wanted = fresh(short_talk, "Who are you?")
    assert say(short_talk, "Who are you?")[1].token_ids == wanted
    assert again(short_talk).journal.messages() == short_talk.journal.messages()


def test_a_summary_stays_in_what_is_sent_whatever_is_left_out_later(short_talk):
    fill(short_talk, 5)
    short_talk.on_overflow = "summarise"
    short_talk.say("Hello")
    (summary,) = [node for node in short_talk.journal.way() if node.role == "summary"]
    assert short_talk.journal.messages()[1:3] == [
        {"role": "user", "content": SUMMARISE},
        {"role": "assistant", "content": summary.text},
    ]
    short_talk.on_overflow = "drop"
    fill(short_talk, 4)
    short_talk.say("Thank you")
    assert short_talk.journal.messages()[2]["content"] == summary.text
    assert short_talk.count(short_talk.journal.messages()) < CONTEXT
    assert len(short_talk.journal.turns()) == 11, "the record has them all"


def test_a_full_context_with_stop_is_refused_and_nothing_is_lost(short_talk):
    fill(short_talk)
    before = texts(short_talk)
    with pytest.raises(UsageError, match="no room"):
        short_talk.say("Hello")
    assert texts(short_talk) == before and short_talk.draft == "Hello"


def test_what_can_not_help_is_refused_before_it_is_done(short_talk, tmp_path):
    """Files that alone are longer than the context: nothing is left out, or summarised, for them."""
    fill(short_talk, 3)
    (tmp_path / "long.txt").write_text("word " * CONTEXT)
    commands.carry_out(short_talk, f"/file {tmp_path / 'long.txt'}")
    short_talk.on_overflow, before = "drop", texts(short_talk)
    with pytest.raises(UsageError, match="no room"):
        short_talk.say("Hello")
    assert texts(short_talk) == before and short_talk.draft == "Hello" and len(short_talk.files) == 1


def test_a_summary_that_is_stopped_leaves_the_record_as_it_was(short_talk):
    fill(short_talk, 5)
    short_talk.on_overflow, before = "summarise", texts(short_talk)
    short_talk.screen.status = lambda text: short_talk.stop.set() if "summarising" in text else None
    short_talk.say("Hello")
    assert texts(short_talk) == before and short_talk.draft == "Hello"


# Commands.


def test_a_resumed_conversation_costs_no_prefill_and_goes_on_as_if_never_left(talk):
    say(talk, "My name is Nora.")
    say(talk, "Tell me a story about a fox.")
    talk.save_cache()
    cached = len(talk.model.made["session"].cached_ids)
    wanted = fresh(talk, "What is my name?")
    other = again(talk)
    assert texts(other) == texts(talk)
    result = say(other, "What is my name?")[1]
    assert result.token_ids == wanted
    assert result.reused_tokens >= cached > 30
    assert talk.screen.notes == [] and other.screen.notes[1] == "Tell me a story about a fox."


def test_a_foreign_or_damaged_cache_falls_back_to_the_text(talk):
    say(talk, "My name is Nora.")
    talk.save_cache()
    path = places.sessions() / f"{talk.name}.safetensors"
    session = talk.model.made["session"]

    def reason(model):
        return latents.load_cache(path, Session(session.runner, session.tokenizer), model)

    assert reason(page_store.identity(EMBEDDED, session.runner)) == ""
    assert reason("another model") == "it belongs to another model"
    path.write_bytes(path.read_bytes()[:100])
    assert "damaged" in reason(page_store.identity(EMBEDDED, session.runner))
    path.unlink()
    assert reason("any") == "none was saved"


def test_a_conversation_is_written_out_and_never_over_a_file_unasked(talk, tmp_path):
    say(talk, "Hello")
    for name in ("out.json", "out.md"):
        commands.carry_out(talk, f"/save {tmp_path / name}")
        with pytest.raises(UsageError, match="already"):
            commands.carry_out(talk, f"/save {tmp_path / name}")
        commands.carry_out(talk, f"/save {tmp_path / name} !")
    assert json.loads((tmp_path / "out.json").read_text()) == talk.journal.messages()
    assert "**User:** Hello" in (tmp_path / "out.md").read_text()


def test_a_session_is_named_and_never_written_over_another(talk):
    say(talk, "Hello")
    commands.carry_out(talk, "/save first talk")
    assert places.session_names() == ["first talk"]
    commands.carry_out(talk, "/clear")
    assert talk.journal.turns() == [] and talk.name == ""
    assert texts(talk) == [("system", "Be brief.")]
    say(talk, "Bye")
    with pytest.raises(UsageError, match="already"):
        commands.carry_out(talk, "/rename first talk")
    commands.carry_out(talk, "/rename second")
    assert sorted(places.session_names()) == ["first talk", "second"]
    commands.carry_out(talk, "/load first talk")
    assert talk.journal.turns()[0].text == "Hello"


def test_talks_are_found_described_and_deleted_with_their_cache(talk):
    say(talk, "My name is Nora.")
    talk.save_cache()
    commands.carry_out(talk, "/save tea")
    assert (places.sessions() / "tea.safetensors").exists()
    commands.carry_out(talk, "/clear")
    say(talk, "Tell me a story about a fox.")
    commands.carry_out(talk, "/find nora")
    assert any(note.startswith("tea  user: My name is Nora.") for note in talk.screen.notes)
    entry = commands.describe("tea")
    assert entry["turns"] == 1 and entry["first"] == "My name is Nora." and entry["model"] == str(EMBEDDED)
    commands.carry_out(talk, "/delete tea")
    assert "tea" in places.session_names() and "removes it for good" in talk.screen.notes[-1]
    commands.carry_out(talk, "/delete tea !")
    assert not list(places.sessions().glob("tea*"))
    commands.carry_out(talk, f"/delete {talk.name} !")
    assert places.session_names() == [] and talk.journal.turns() == []


def test_caches_of_talks_that_are_gone_are_cleared_away(talk):
    say(talk, "Hello")
    talk.save_cache()
    kept = places.sessions() / f"{talk.name}.safetensors"
    left = places.sessions() / "gone.safetensors"
    left.write_bytes(b"x")
    commands.carry_out(talk, "/sessions")
    assert kept.exists() and not left.exists()


def test_settings_and_the_system_prompt_change_on_the_way(talk):
    commands.carry_out(talk, "/set temperature 0.25")
    commands.carry_out(talk, "/set max-new-tokens 7")
    commands.carry_out(talk, "/set stop END")
    assert talk.request.sampling.temperature == 0.25 and talk.request.max_new_tokens == 7
    assert talk.request.stop == ("END",)
    commands.carry_out(talk, "/set default")
    assert talk.request == GREEDY
    commands.carry_out(talk, "/system You are a bear.")
    assert talk.journal.messages()[0] == {"role": "system", "content": "You are a bear."}
    commands.carry_out(talk, "/system off")
    assert talk.journal.messages() == []


@pytest.mark.parametrize(
    "line",
    [
        "/sett x",
        "/set",
        "/set temperature",
        "/set temperature -1",
        "/set seed -1",
        "/undo",
        "/redo",
        "/retry",
        "/retry 99",
        "/continue",
        "/answers",
        "/edit 9",
        "/edit x",
        "/load nowhere",
        "/save a/b",
        "/rename",
        "/delete nowhere",
        "/find",
        "/file",
        "/file /",
        "/file nowhere.txt",
        "/file !false",
        "/copy",
        "/",
    ],
)
def test_senseless_commands_are_answered_with_a_sentence(talk, line):
    with pytest.raises(UsageError):
        commands.carry_out(talk, line)


def test_an_unknown_command_suggests_the_nearest(talk):
    with pytest.raises(UsageError) as caught:
        commands.carry_out(talk, "/hlep")
    assert caught.value.fix == "/help?"


@pytest.mark.parametrize(
    ("line", "pasted", "wanted"),
    [
        ("/help", False, True),
        ("/hlep", False, True),
        ("/hlep", True, False),
        ("/usr/bin/python is broken", False, False),
        ("/etc", True, False),
        ("//help", False, False),
        ("exit", False, True),
        ("Quit", False, True),
        ("exit the room", False, False),
        ("/bye", False, True),
        ("/?", False, True),
        ("Hello", False, False),
    ],
)
def test_what_is_a_command_and_what_a_message(line, pasted, wanted):
    assert commands.is_command(line, pasted) == wanted
    assert commands.message_of("//help") == "/help"


def test_files_go_before_the_message_and_are_taken_back(talk, tmp_path):
    (tmp_path / "note.txt").write_text("My name is \x1b[31mNora.")
    (tmp_path / "a.py").write_text("".join(f"line {n}\n" for n in range(20)))
    commands.carry_out(talk, f"/file {tmp_path / 'note.txt'} {tmp_path / 'a.py'}:3-4 ")
    assert [each.name for each in talk.files] == ["note.txt", "a.py:3-4"]
    assert "line 2\nline 3\n" in talk.attached and "line 4" not in talk.attached
    assert "tokens; it goes before your next message" in talk.screen.notes[-1]
    commands.carry_out(talk, "/file off")
    assert talk.attached == ""
    say(talk, f"What is in @{tmp_path / 'note.txt'}?")
    asked = talk.journal.turns()[0]
    assert "Nora." in asked.about["files"] and asked.text == f"What is in @{tmp_path / 'note.txt'}?"
    commands.carry_out(talk, "/file !echo hi")
    assert talk.files[0].name == "$ echo hi" and "hi\n" in talk.attached


def test_tab_offers_what_belongs_behind_a_command(talk, tmp_path):
    def offered(text):
        completions = Suggestions(talk).get_completions(Document(text), CompleteEvent())
        return {completion.text: completion.display_meta_text for completion in completions}

    say(talk, "Hello")
    commands.carry_out(talk, "/save my talk")
    (tmp_path / "notes.txt").touch()
    assert set(offered("/re")) == {"retry", "redo", "rename"} and "another answer" in offered("/re")["retry"]
    assert offered("/set temp") == {"temperature": "0; a number from 0 to 10,000"}
    assert "1 turns · Hello" in offered("/load my")["my talk"]
    assert set(offered(f"/file {tmp_path}/no")) == {"tes.txt"} and set(offered("/branch ")) == {"main"}
    assert set(offered(f"see @{tmp_path}/no")) == {"tes.txt"} and offered("hello /re") == {}
