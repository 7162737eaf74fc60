"""dsv2 chat: commands, saved conversations, and nobody's words lost."""

from __future__ import annotations

import functools
import json
import re
import resource
import shutil
import signal
import stat
import subprocess

import pexpect
import pytest
from conftest import PROMPT, load
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from running import run_dsv2

from dsv2cli import places
from dsv2cli.checkpoint.hub import EMBEDDED
from dsv2cli.cli import commands
from dsv2cli.cli.chat import answer
from dsv2cli.cli.flow import Flow
from dsv2cli.cli.prompt import History, Suggestions
from dsv2cli.engine import store
from dsv2cli.engine.request import Request, Result, SamplingParams
from dsv2cli.engine.session import SUMMARISE, Session
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.run.machine import look_around
from dsv2cli.run.open import Opened
from dsv2cli.run.plan import make_plan
from dsv2cli.run.wish import Wish

CONTEXT = 1024  # tokens of the short model
GREEDY = Request(SamplingParams(temperature=0), max_new_tokens=30, eos_ids=frozenset([4095]))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return tmp_path / "dsv2"


def make_talk(model, tokenizer):
    plan = make_plan(model.config, Wish(), look_around())
    opened = Opened(EMBEDDED, "embedded", model.config, {}, model, plan, 0.0)
    return commands.Talk(Session(model, tokenizer, "Be brief."), opened, GREEDY)


@pytest.fixture
def talk(home, embedded, embedded_tokenizer):
    return make_talk(embedded, embedded_tokenizer)


@pytest.fixture(scope="module")
def short_model(tmp_path_factory):
    """The embedded one with a context that is soon full."""
    folder = tmp_path_factory.mktemp("short") / "model"
    shutil.copytree(EMBEDDED, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    return load(folder)


@pytest.fixture
def short_talk(home, short_model, embedded_tokenizer):
    return make_talk(short_model, embedded_tokenizer)


def say(talk, text):
    answer(talk, text, "stop", keep_going=False)
    return talk.session.messages[-1]["content"], talk.result


def fresh(talk, text):
    """The answer to the same conversation with nothing cached."""
    other = Session(talk.session.runner, talk.session.tokenizer)
    other.messages = [dict(message) for message in talk.session.messages]
    result = Result()
    "".join(other.reply(text, GREEDY, result))
    return result.token_ids


def leave(child):
    child.expect(PROMPT)
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_after_undo_edit_and_branch_answers_are_those_of_a_fresh_prefill(talk):
    for text in ("My name is Nora.", "Tell me a story about a fox.", "Thank you"):
        say(talk, text)
    commands.carry_out(talk, "/undo")
    wanted = fresh(talk, "What is my name?")
    result = say(talk, "What is my name?")[1]
    assert result.token_ids == wanted and result.reused_tokens > 20
    commands.carry_out(talk, "/branch other")
    commands.carry_out(talk, "/edit 2")
    assert talk.draft == "Tell me a story about a fox." and len(talk.session.asked()) == 1
    wanted = fresh(talk, "What is two plus two?")
    assert say(talk, "What is two plus two?")[1].token_ids == wanted
    commands.carry_out(talk, "/branch main")
    assert len(talk.session.asked()) == 3
    wanted = fresh(talk, "Bye")
    assert say(talk, "Bye")[1].token_ids == wanted


def test_retry_asks_the_same_again_with_another_seed(talk):
    say(talk, "Hello")
    seed = talk.request.seed
    assert commands.carry_out(talk, "/retry") == "Hello" and talk.request.seed == seed + 1
    assert talk.session.asked() == []


def test_a_resumed_conversation_costs_no_prefill_and_goes_on_as_if_never_left(talk):
    say(talk, "My name is Nora.")
    say(talk, "Tell me a story about a fox.")
    talk.save_cache()
    wanted = fresh(talk, "What is my name?")
    again = commands.Talk(Session(talk.session.runner, talk.session.tokenizer), talk.opened, GREEDY)
    again.resume(commands.find("last"))
    assert again.session.messages == talk.session.messages
    result = say(again, "What is my name?")[1]
    assert result.token_ids == wanted
    assert result.reused_tokens >= len(talk.session.cached_ids) > 30


def test_a_foreign_or_damaged_cache_falls_back_to_the_text(talk, v2):
    say(talk, "My name is Nora.")
    talk.save_cache()
    path = commands.cache_path(talk.name)

    def reason(model):
        return store.load_cache(path, Session(talk.session.runner, talk.session.tokenizer), model)

    assert reason(store.identity(EMBEDDED, talk.session)) == ""
    assert reason("another model") == "it belongs to another model"
    path.write_bytes(path.read_bytes()[:100])
    assert "damaged" in reason(store.identity(EMBEDDED, talk.session))
    path.unlink()
    assert reason("any") == "none was saved"


def test_sessions_are_private_and_whole(talk, home):
    say(talk, "你好 🙂 \x1b[2J")
    path = store.path_of(talk.name)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert store.load(path).branches["main"] == talk.session.messages
    History(str(home / "history")).store_string("one\ntwo")
    assert list(History(str(home / "history")).load_history_strings()) == ["one\ntwo"]
    assert stat.S_IMODE((home / "history").stat().st_mode) == 0o600


def test_a_file_that_can_not_be_written_leaves_the_old_one_whole(talk):
    say(talk, "Hello")
    path = store.path_of(talk.name)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(Dsv2Error, match="could not be written"):
            store.save(path, store.Conversation(pending="x" * 1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "content",
    ["", "[1]", '{"format": "x"}', '[{"role": "robot", "content": "x"}]', '{"messages": 3}', "\xff"],
)
def test_what_is_no_conversation_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(Dsv2Error, match=r"not a .*conversation"):
        store.load(tmp_path / "x.json")


def test_a_list_of_messages_is_taken_in_and_a_conversation_written_out(talk, tmp_path):
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "And?"},
    ]
    (tmp_path / "in.json").write_text(json.dumps({"messages": messages}))
    commands.carry_out(talk, f"/load {tmp_path / 'in.json'}")
    assert talk.session.messages == messages[:2] and talk.draft == "And?"
    commands.carry_out(talk, f"/save {tmp_path / 'out.json'}")
    commands.carry_out(talk, f"/save {tmp_path / 'out.md'}")
    assert json.loads((tmp_path / "out.json").read_text()) == messages[:2]
    assert "**Assistant:** Hello!" in (tmp_path / "out.md").read_text()


def test_a_session_is_named_and_never_written_over_another(talk):
    say(talk, "Hello")
    commands.carry_out(talk, "/save first talk")
    assert places.session_names() == ["first talk"]
    commands.carry_out(talk, "/clear")
    assert talk.session.asked() == [] and talk.name == ""
    say(talk, "Bye")
    with pytest.raises(UsageError, match="already"):
        commands.carry_out(talk, "/save first talk")
    assert store.load(store.path_of("first talk")).branches["main"][1]["content"] == "Hello"
    commands.carry_out(talk, "/load first talk")
    assert talk.session.messages[1]["content"] == "Hello" and len(places.session_names()) == 2


def test_a_program_may_wait_for_each_answer(start):
    process = start("chat", "--temperature", "0", stdin=subprocess.PIPE)
    for ask in ("My name is Nora.", "What is my name?"):
        process.stdin.write(ask + "\n")
        process.stdin.flush()
        assert "Nora" in process.stdout.readline()
    process.stdin.close()
    assert process.wait(30) == 0


def test_settings_and_the_system_prompt_change_on_the_way(talk):
    commands.carry_out(talk, "/set temperature 0.25")
    commands.carry_out(talk, "/set max-new-tokens 7")
    assert talk.request.sampling.temperature == 0.25 and talk.request.max_new_tokens == 7
    commands.carry_out(talk, "/system You are a bear.")
    assert talk.session.messages[0] == {"role": "system", "content": "You are a bear."}
    commands.carry_out(talk, "/system off")
    assert talk.session.messages == []


@pytest.mark.parametrize(
    "line",
    [
        "/sett x",
        "/set",
        "/set temperature",
        "/set temperature -1",
        "/set seed -1",
        "/undo",
        "/edit 9",
        "/load nowhere",
        "/save a/b",
        "/file /",
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


def fill(talk, turns=6):
    for i in range(turns):
        talk.session.messages += [
            {"role": "user", "content": f"{i} " + "word " * (CONTEXT // 5)},
            {"role": "assistant", "content": "Yes."},
        ]


def test_the_oldest_turns_make_room_and_the_system_prompt_stays(short_talk):
    fill(short_talk)
    assert short_talk.session.prompt_tokens() > CONTEXT
    dropped = short_talk.session.make_room("Hello", 256)
    assert 1 <= dropped < 6 and short_talk.session.prompt_tokens("Hello") < CONTEXT - 256
    assert short_talk.session.messages[0] == {"role": "system", "content": "Be brief."}
    assert short_talk.session.messages[1]["content"].startswith(f"{dropped} ")


@pytest.mark.parametrize("choice", ["drop", "summarise"])
def test_a_full_context_is_made_room_in_as_chosen_and_the_answer_is_that_of_a_fresh_prefill(
    short_talk, choice
):
    fill(short_talk, 5)
    answer(short_talk, "Hello", choice, keep_going=False)
    assert short_talk.session.prompt_tokens() < CONTEXT and short_talk.session.messages[0]["role"] == "system"
    assert (short_talk.session.messages[1]["content"] == SUMMARISE) == (choice == "summarise")
    wanted = fresh(short_talk, "Who are you?")
    assert say(short_talk, "Who are you?")[1].token_ids == wanted


def test_a_full_context_with_stop_is_refused_and_nothing_is_lost(short_talk):
    fill(short_talk)
    before = list(short_talk.session.messages)
    with pytest.raises(UsageError, match="no room"):
        answer(short_talk, "Hello", "stop", keep_going=False)
    assert short_talk.session.messages == before


def test_a_summary_that_is_interrupted_leaves_the_conversation_as_it_was(talk):
    fill(talk, 9)
    before = list(talk.session.messages)
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.03)  # reading 1,800 tokens takes longer
    try:
        with pytest.raises(KeyboardInterrupt):
            talk.session.summarise(GREEDY)
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert talk.session.messages == before


def test_the_person_is_asked_what_to_do_about_a_full_context(in_terminal, home):
    store.save(
        store.path_of("long"),
        store.Conversation(
            {
                "main": [
                    {"role": "user", "content": "word " * 3000},
                    {"role": "assistant", "content": "Yes."},
                    {"role": "user", "content": "word " * 1000},
                    {"role": "assistant", "content": "Yes."},
                ]
            }
        ),
    )
    child = in_terminal("chat", "--resume", "long", "--temperature", "0")
    child.expect(PROMPT)
    child.send("Hello\r")
    child.expect(r"summarise them, or stop")
    child.send("d\r")
    child.expect("dropped the 1 oldest turns")
    child.expect("first after")
    leave(child)


def test_kill_during_an_answer_loses_neither_the_talk_nor_the_message(in_terminal, home):
    child = in_terminal("chat", "--seed", "1")
    child.expect(PROMPT)
    child.send("My name is Nora.\r")
    child.expect("first after")
    child.expect(PROMPT)
    child.send("Tell me a story about a fox.\r")
    child.expect(r"\w+ \w+ \w+ \w+")
    child.kill(9)
    child.close()
    child = in_terminal("chat", "--continue", "--temperature", "0")
    child.expect(r"\d+ turns")
    child.expect(PROMPT)
    child.send(
        "\x15What is my name?\r"
    )  # Ctrl-U takes the unanswered message away, if it had not been answered yet
    child.expect("Nora")
    child.expect("first after")
    leave(child)
    (path,) = (home / "sessions").glob("*.json")
    asked = [message["content"] for message in store.load(path).branches["main"] if message["role"] == "user"]
    assert asked[0] == "My name is Nora." and asked[-1] == "What is my name?"


def test_an_unanswered_message_comes_back_at_the_prompt(in_terminal, home):
    store.save(store.path_of("talk"), store.Conversation(pending="Who are you?"))
    child = in_terminal("chat", "--resume", "talk", "--temperature", "0")
    child.expect(PROMPT)
    child.send("\r")
    child.expect("first after")
    leave(child)
    assert store.load(store.path_of("talk")).branches["main"][0]["content"] == "Who are you?"


def test_a_full_disk_is_said_once_and_ends_nothing(in_terminal, home):
    full = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (0, 0))
    child = in_terminal("chat", "--temperature", "0", before=full)
    child.expect(PROMPT)
    child.send("Hello\r")
    child.expect("could not be written")
    child.expect("first after")
    child.expect(PROMPT)
    child.send("What is two plus two?\r")
    child.expect("first after")
    assert "could not" not in child.before
    leave(child)


def test_a_home_that_is_no_folder_ends_nothing(in_terminal, tmp_path):
    (tmp_path / "file").touch()
    child = in_terminal("chat", "--temperature", "0", XDG_DATA_HOME=str(tmp_path / "file"))
    child.expect(PROMPT)
    child.send("Hello\r")
    child.expect("could not be written")
    child.expect("first after")
    leave(child)


def test_no_save_leaves_nothing_behind(in_terminal, home):
    child = in_terminal("chat", "--no-save", "--temperature", "0")
    child.expect(PROMPT)
    child.send("Hello\r")
    child.expect("first after")
    leave(child)
    assert not home.exists()


def test_every_command_can_be_typed_and_tab_completes_it(in_terminal, home):
    child = in_terminal("chat", "--temperature", "0")
    child.expect(PROMPT)
    child.send("Hello\r")
    child.expect("first after")
    for line, words in (
        ("/he\tlp", "this list"),
        ("/show", "max_new_tokens"),
        ("/stats", "tok/s"),
        ("/tokens", "of 4,096 tokens"),
        ("/tokens a b", "2 tokens"),
        ("/history", "1> Hello"),
        ("/copy", "in the clipboard"),
        ("/save my talk", "saved as my talk"),
        ("/sessions", "my talk"),
        ("/load my\t talk", "1 turns"),
        ("/branch b", "new branch b"),
        ("/system Be kind.", "system prompt: Be kind."),
        ("/undo", "taken back: Hello"),
        ("/branch main", "back on branch main"),
        ("/retry", "first after"),
        ("/clear", "a new conversation"),
        ("/nothing", "There is no command"),
    ):
        child.expect(PROMPT)
        typed, tab, rest = line.partition("\t")
        child.send(typed + tab)
        # Completing takes a moment; a blank may be drawn as a step of the cursor.
        child.expect(re.escape(rest.strip()) if tab else "")
        child.send("\r")
        child.expect(re.escape(words))
    child.expect(PROMPT)
    child.send("/quit\r")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_tab_offers_what_belongs_behind_a_command(talk, tmp_path):
    def offered(text):
        return {
            completion.text
            for completion in Suggestions(talk).get_completions(Document(text), CompleteEvent())
        }

    say(talk, "Hello")
    commands.carry_out(talk, "/save my talk")
    (tmp_path / "notes.txt").touch()
    assert (
        offered("/re") == {"retry"}
        and offered("/set temp") == {"temperature"}
        and offered("/load my") >= {"my talk"}
    )
    assert (
        offered(f"/file {tmp_path}/no") == {"tes.txt"}
        and offered("/branch ") == {"main"}
        and offered("hello /re") == set()
    )


def test_ctrl_g_opens_the_editor(in_terminal, home, tmp_path):
    editor = tmp_path / "editor"
    editor.write_text("#!/bin/sh\nprintf 'My name is Nora.' > \"$1\"\n")
    editor.chmod(0o755)
    child = in_terminal("chat", "--temperature", "0", EDITOR=str(editor), VISUAL=str(editor))
    child.expect(PROMPT)
    child.send("\x07")
    child.expect("My name is Nora")
    child.send("\r")
    child.expect("first after")
    leave(child)


def test_what_was_typed_can_be_searched_in_the_next_chat(in_terminal, home):
    for keys in ("My name is Nora.\r", "\x12name is\r\r"):  # Ctrl-R
        child = in_terminal("chat", "--temperature", "0")
        child.expect(PROMPT)
        child.send(keys)
        child.expect("first after")
        leave(child)
    for path in (home / "sessions").glob("*.json"):
        assert store.load(path).branches["main"][0]["content"] == "My name is Nora."


def test_after_ctrl_c_the_next_answer_is_that_of_a_fresh_prefill(
    in_terminal, home, embedded, embedded_tokenizer
):
    child = in_terminal("chat", "--temperature", "0")
    child.expect(PROMPT)
    child.delaybeforesend = 0
    child.send("Tell me a story about a fox.\r")
    child.expect(r"\x1b\[\?2004l")  # the prompt is gone, the answer begins
    child.expect(r"\w+ \w+ \w+ \w+")
    child.sendintr()
    child.expect("interrupted")
    child.expect(PROMPT)
    child.send("What was the fox called?\r")
    child.expect(r"(\d+) reused")
    assert int(child.match[1]) > 5
    leave(child)
    (path,) = (home / "sessions").glob("*.json")
    messages = store.load(path).branches["main"]
    other = Session(embedded, embedded_tokenizer)
    other.messages = messages[:2]
    assert (
        len(messages) == 4
        and "".join(other.reply(messages[2]["content"], GREEDY, Result())) == messages[3]["content"]
    )


def test_a_paste_of_two_thousand_lines_is_one_message_and_refused_whole(in_terminal, home):
    child = in_terminal("chat", "--temperature", "0")
    child.expect(PROMPT)
    child.send("\x1b[200~" + "a line\n" * 2000 + "\x1b[201~\r")
    child.expect("leaves no room for an answer")
    child.expect(PROMPT)
    child.send("Hello\r")
    child.expect("first after")
    leave(child)


def test_chinese_and_emoji_are_kept_as_they_are(in_terminal, home):
    child = in_terminal("chat", "--temperature", "0")
    child.expect(PROMPT)
    child.send("你好，我叫小明 🙂\r")
    child.expect("first after")
    leave(child)
    (path,) = (home / "sessions").glob("*.json")
    assert store.load(path).branches["main"][0]["content"] == "你好，我叫小明 🙂"


def test_a_paste_and_quotes_are_one_message_each(in_terminal, home):
    child = in_terminal("chat", "--temperature", "0")
    child.expect(PROMPT)
    child.send("\x1b[200~one\ntwo\nthree\x1b[201~\r")
    child.expect("first after")
    child.expect(PROMPT)
    child.send('"""four\rfive"""\r')
    child.expect("first after")
    leave(child)
    (path,) = (home / "sessions").glob("*.json")
    asked = [message["content"] for message in store.load(path).branches["main"] if message["role"] == "user"]
    assert asked == ["one\ntwo\nthree", "four\nfive"]


def test_on_a_narrow_terminal_lines_break_between_words(in_terminal, home):
    child = in_terminal("chat", "--seed", "1", columns=40)
    child.expect(PROMPT)
    child.send("Tell me a story about a fox.\r")
    child.expect(r"first after")
    shown = bare(child.before).split("fox.", 1)[1]
    leave(child)
    (path,) = (home / "sessions").glob("*.json")
    story = store.load(path).branches["main"][1]["content"]
    lines = [line for line in shown.split("\r\n") if line.strip()]
    assert max(map(len, lines)) <= 40 and len(lines) > 5
    assert set(story.split()) <= set(shown.split())


def flowed(text, columns=40, drawn=True, step=3):
    flow = Flow(columns, drawn)
    return "".join(flow.feed(text[i : i + step]) for i in range(0, len(text), step)) + flow.end()


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_markdown_is_drawn_the_same_however_the_text_arrives(step):
    bold, code, plain = "\x1b[1m", "\x1b[36m", "\x1b[0m"
    shown = flowed("# Big\n- a **very** `x y`\n2 * 3 ** 4\n", step=step)
    assert (
        shown == f"{bold}Big{plain}\n\u2022 a {bold}very{plain} {code}x{plain} {code}y{plain}\n2 * 3 ** 4\n"
    )


def test_code_is_highlighted_by_line_and_never_broken():
    line = "for i in range(10): print('a line that is far too long for the terminal')"
    text = f"```python\n{line}\n```\nDone **now**"
    shown = flowed(text)
    assert "\x1b[" in shown.split("\n")[1] and bare(shown) == text.replace("**", "")
    assert flowed(text, drawn=False) == text


def test_lines_break_between_words_and_wide_letters_count_twice():
    assert flowed("aaaa bbbb cccc\n  dd", 9, False) == "aaaa bbbb\ncccc\n  dd"
    assert flowed("你好你好你好", 8, False) == "你好你好\n你好"
    assert flowed("a" * 30, 8, False) == "a" * 30


def test_escapes_in_the_models_words_stay_harmless_and_a_pipe_gets_them_raw():
    assert "\x1b" not in flowed("a \x1b[2J b", drawn=False)
    assert flowed("a \x1b[2J  **b**", 0) == "a \x1b[2J  **b**"


def bare(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_file_goes_before_the_next_message_and_its_escapes_stay_harmless(in_terminal, talk, tmp_path):
    (tmp_path / "note.txt").write_text("My name is \x1b[31mNora.")
    commands.carry_out(talk, f"/file {tmp_path / 'note.txt'}")
    assert talk.attached == "note.txt:\n\nMy name is \x1b[31mNora.\n\n"
    child = in_terminal("chat", "--no-save", "--temperature", "0")
    child.expect(PROMPT)
    child.send(f"/file {tmp_path / 'note.txt'}\r")
    child.expect("it goes before your next message")
    child.expect(PROMPT)
    child.send("Hello\r")
    child.expect("first after")
    child.expect(PROMPT)
    child.send("/history\r")
    child.expect(re.escape("My name is ␛[31mNora."))
    leave(child)


def test_messages_as_json_give_messages_as_json():
    lines = [
        [{"role": "user", "content": "My name is Nora."}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
    ]
    done = run_dsv2("chat", "--json", "--temperature", "0", stdin="\n".join(map(json.dumps, lines)))
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["role"] for answer in answers] == ["assistant"] * 2 and "Nora" in answers[0]["content"]
    for bad in ("x", "[]", '[{"role": "assistant", "content": "x"}]', "{}"):
        done = run_dsv2("chat", "--json", stdin=bad)
        assert done.returncode in (1, 2) and done.stdout == "" and "Traceback" not in done.stderr


def test_a_system_file_is_read_and_a_missing_one_said(tmp_path):
    (tmp_path / "s.txt").write_text("Be brief.\n")
    options = ("chat", "--temperature", "0", "-n", "20")
    first = run_dsv2(*options, "--system", "Be brief.", stdin="Hello")
    assert run_dsv2(*options, "--system-file", str(tmp_path / "s.txt"), stdin="Hello").stdout == first.stdout
    done = run_dsv2(*options, "--system-file", str(tmp_path / "none"), stdin="Hello")
    assert done.returncode == 2 and "can not be read" in done.stderr
