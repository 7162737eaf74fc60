"""Where the program meets the machine: outputs, environment, other users, the screen, kept caches, kills."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from conftest import DATA, PROMPT, ROOT
from running import forked, run_dsv2
from safetensors.torch import load_file, save_file

from dsv2cli import places
from dsv2cli.cli import ui
from dsv2cli.cli.flow import Flow
from dsv2cli.engine import journal as journals
from dsv2cli.engine import latents, store
from dsv2cli.engine.grammar import Grammar
from dsv2cli.engine.session import Session
from dsv2cli.errors import Dsv2Error
from dsv2cli.hubs.find import EMBEDDED
from dsv2cli.kernels import build, native
from dsv2cli.run import launch, page_store

V2 = str(DATA / "golden" / "v2")
COMMANDS = {
    "info": ("info",),
    "doctor": ("doctor",),
    "help": ("--help",),
    "version": ("--version",),
    "manual": ("manual",),
    "completion": ("completion", "bash"),
    "config": ("config",),
    "complete": ("complete", "Once", "-n", "300", "--ignore-eos"),
    "json": ("complete", "Once", "-n", "20", "--json"),
    "bench": ("bench", "--prompt", "8", "--generate", "2", "-r", "1"),
}


def program(arguments, stdout, stderr=subprocess.PIPE, before=bool):
    """dsv2 in a process with descriptors of its own, in which `before` is called first."""
    child = forked(arguments, {})
    line = [sys.executable, "-m", "dsv2cli", *arguments]
    streams = {"stdin": subprocess.DEVNULL, "stdout": stdout, "stderr": stderr}
    return subprocess.Popen(line, **streams, preexec_fn=lambda: (before(), child()))


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_that_is_full_or_closed_is_a_failure_and_a_reader_that_left_is_none(name):
    with open("/dev/full", "w") as full:
        filled = program(COMMANDS[name], full)
    closed = program(COMMANDS[name], None, before=lambda: os.close(1))
    reading, writing = os.pipe()
    left = program(COMMANDS[name], writing)
    os.close(writing)
    os.close(reading)
    for process, code, words in ((filled, 1, b"No space"), (closed, 1, b"closed"), (left, 0, b"")):
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == code and b"Traceback" not in errors, errors
        assert words in errors and errors.count(b"error:") == code, errors


def test_no_text_is_lost_because_nobody_reads_the_errors(tmp_path):
    wanted = run_dsv2("complete", "Once", "-n", "20", "--seed", "1").stdout
    with open("/dev/full", "w") as full:
        processes = [
            program(("complete", "Once", "-n", "20", "--seed", "1"), subprocess.PIPE, full),
            program(
                ("complete", "Once", "-n", "20", "--seed", "1"),
                subprocess.PIPE,
                None,
                before=lambda: os.close(2),
            ),
        ]
    for process in processes:
        assert process.communicate(timeout=120)[0].decode() == wanted and process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_what_there_is_is_printed_whole_when_it_is_ended(start, number):
    process = start("complete", "Once", "--prompt-ids", "1,2", "--model", V2, "-n", "5")
    process.communicate()
    process = start("complete", "Once upon a time", "-n", "4000", "--ignore-eos", "--json")
    time.sleep(1.5)
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in errors
    if out:  # it may have been loading still
        assert json.loads(out)["finish_reason"] == "interrupted"


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "3", "WORLD_SIZE": "8"},
        {"RANK": "", "WORLD_SIZE": ""},
        {"RANK": "x", "WORLD_SIZE": "y", "LOCAL_RANK": "z"},
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"},
        {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
        {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "3"},
        {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
        {"WORLD_SIZE": "-1"},
        {"TORCHELASTIC_RUN_ID": "none"},
        {"_DSV2_COMPLETE": "complete_bash"},
    ],
    ids=str,
)
def test_leftovers_of_a_cluster_make_no_team(environment):
    done = run_dsv2("complete", "Once", "-n", "3", "--seed", "1", **environment)
    assert done.returncode == 0 and done.stderr == "" and done.stdout


@pytest.mark.parametrize(("name", "value"), [("RANK", "x"), ("WORLD_SIZE", "1e9"), ("LOCAL_RANK", "-1")])
def test_a_wrong_value_of_torchruns_is_named(name, value):
    whole = dict.fromkeys(launch.TORCHRUN, "1") | {"WORLD_SIZE": "2", name: value}
    done = run_dsv2("complete", "Once", "-n", "3", **whole)
    assert done.returncode == 2 and f"{name}={value!r}" in done.stderr


@pytest.mark.parametrize(
    ("command", "variable", "value"),
    [
        (("complete", "x"), "DSV2_COMPLETE_TEMPERATURE", "abc"),
        (("complete", "x"), "DSV2_COMPLETE_TEMPERATURE", "-1"),
        (("complete", "x"), "DSV2_COMPLETE_TEMPERATURE", "1e400"),
        (("complete", "x"), "DSV2_COMPLETE_TOP_P", "7"),
        (("complete", "x"), "DSV2_COMPLETE_TOP_K", "-3"),
        (("complete", "x"), "DSV2_COMPLETE_MAX_NEW_TOKENS", "0"),
        (("complete", "x"), "DSV2_COMPLETE_DTYPE", "int3"),
        (("complete", "x"), "DSV2_COMPLETE_THREADS", "99999999999999999999"),
        (("complete", "x"), "DSV2_COMPLETE_STOP", "[1, 2]"),
        (("complete", "x"), "DSV2_COMPLETE_JSON", "perhaps"),
    ],
)
def test_a_wrong_value_of_a_variable_names_the_variable(command, variable, value):
    done = (
        run_dsv2(*command, "-n", "3", **{variable: value})
        if "MAX" not in variable
        else run_dsv2(*command, **{variable: value})
    )
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert variable in done.stderr or (variable.endswith("STOP") and "[1, 2]" in done.stderr), done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('temperature = "hot"', "temperature"),
        ("temperature = true", "temperature"),
        ("temperature = nan", "temperature"),
        ("temperature = -1", "temperature"),
        ("temperature = 1979-05-27", "temperature"),
        ("temperature = [0.5]", "temperature"),
        ("json = 1", "json"),
        ("top-k = 1.0", "top-k"),
        ("stop = 5", "stop"),
        ('stop = ["a", 5]', "stop"),
        ("model = {a = 1}", "model"),
        ("max-new-tokens = 99999999999999999999", "max-new-tokens"),
        ("surprise = 1", "surprise"),
        ("a = " + "[" * 5000, "c.toml"),
        ("temperature = 0.5\ntemperature = 0.6", "c.toml"),
    ],
)
def test_a_wrong_value_of_the_configuration_names_the_file(tmp_path, text, words):
    file = tmp_path / "c.toml"
    file.write_text(f"[complete]\n{text}\n")
    done = run_dsv2("complete", "x", DSV2_CONFIG=str(file))
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert str(file) in done.stderr and words in done.stderr


@pytest.mark.parametrize(
    "make",
    [
        os.mkfifo,
        os.mkdir,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to(path),
        lambda path: path.write_bytes(b"\xff\xfe"),
    ],
)
def test_a_configuration_that_is_no_file_is_said_at_once(tmp_path, make):
    make(tmp_path / "c.toml")
    done = run_dsv2("complete", "x", DSV2_CONFIG=str(tmp_path / "c.toml"))
    assert done.returncode == 2 and "c.toml" in done.stderr


def test_a_list_is_one_text_or_a_list_and_never_split(tmp_path):
    file = tmp_path / "c.toml"

    def stops(**environment):
        return json.loads(run_dsv2("complete", "x", "--dry-run", "--json", **environment).stdout)["stop"]

    assert stops(DSV2_COMPLETE_STOP="the end") == ["the end"]
    assert stops(DSV2_COMPLETE_STOP='["the end", "x"]') == ["the end", "x"]
    file.write_text('[complete]\nstop = "the end"\n')
    assert stops(DSV2_CONFIG=str(file)) == ["the end"]
    file.write_text('[complete]\nstop = ["the end", "x"]\n')
    assert stops(DSV2_CONFIG=str(file)) == ["the end", "x"]


def test_a_home_that_is_not_there_or_read_only_ends_nothing(tmp_path):
    nowhere = {"XDG_DATA_HOME": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere", "HOME": "/proc/nowhere"}
    for arguments in (("complete", "Once", "-n", "2"), ("info",), ("config",)):
        done = run_dsv2(*arguments, **nowhere)
        assert "Traceback" not in done.stderr and done.stdout and done.returncode in (0, 1)


@pytest.mark.parametrize(("columns", "term"), [(0, "xterm"), (9, "xterm"), (100, "dumb"), (100, ""), (0, "")])
def test_no_width_and_no_terminal_type_lets_an_escape_through(in_terminal, columns, term, home):
    child = in_terminal("complete", "\x1b[31mOnce", "--echo", "-n", "3", columns=columns, TERM=term)
    child.expect("\u241b\\[31mOnce", timeout=60)
    child.wait()
    child = in_terminal("chat", "--temperature", "0", columns=columns, TERM=term)
    child.expect(">", timeout=60)
    child.sendeof()
    child.wait()


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path


STEERING = [
    "\x1b[2J",
    "\x9b2J",
    "\x07",
    "\x08",
    "\r",
    "\u2028",
    "\u2029",
    "\u202e",
    "\u2066",
    "\u061c",
    "\x85",
    "\ud800",
]


@pytest.mark.parametrize("text", STEERING, ids=ascii)
def test_nothing_in_a_text_steers_the_terminal(text):
    assert text not in ui.harmless(f"a{text}b") and len(ui.harmless(f"a{text}b")) > 2
    for columns in (0, 1, 40):
        flow = Flow(columns or 80, True)
        assert text not in flow.feed(f"a{text}b `{text}`\n```\n{text}\n```\n") + flow.end()


@pytest.mark.parametrize(
    "name", ["[blink]x", "[red]bold[/red]", "[link=x]y[/link]", "a\x1b[5mb", ":smile:", "[/]"]
)
def test_names_and_messages_are_text_and_no_markup(tmp_path, name, in_terminal):
    folder = tmp_path / name
    shutil.copytree(EMBEDDED, folder)
    shown = ui.harmless(name)
    child = in_terminal("info", str(folder), columns=200)
    output = child.read()
    assert shown in output and "\x1b[5m" not in output and "]8;" not in output
    child = in_terminal("complete", "x", "-n", "1", "--model", str(tmp_path / "nothing" / name), columns=300)
    output = child.read()
    assert shown in output and "\x1b[5m" not in output and "\x1b[31m" not in output.replace("\x1b[1;31m", "")


def test_a_module_of_the_current_folder_is_not_imported_by_a_rank(tmp_path):
    for module in ("json", "typer", "torch", "dsv2cli"):
        (tmp_path / f"{module}.py").write_text(
            f"open({str(tmp_path / 'executed')!r}, 'a').write('{module} ')"
        )
    line = [
        sys.executable,
        "-P",
        "-c",
        "import sys; sys.path.append(sys.argv.pop(1)); from dsv2cli.cli.app import main; main()",
    ]
    arguments = (
        "complete",
        "--prompt-ids",
        "1,2",
        "--model",
        V2,
        "-n",
        "2",
        "--device",
        "cpu",
        "--gpus",
        "2",
    )
    done = subprocess.run(
        [*line, str(ROOT), *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "executed").exists()


def test_ranks_meet_in_a_folder_of_their_own_and_listen_to_nobody_else(start):
    process = start("complete", "Once", "-n", "3500", "--ignore-eos", "--device", "cpu", "--gpus", "2")
    assert process.stdout.read(20)
    (rank,) = psutil.Process(process.pid).children()
    meeting = Path(rank.environ()[launch.MEETING])
    assert (
        stat.S_IMODE(meeting.parent.stat().st_mode) == 0o700 and meeting.parent.stat().st_uid == os.geteuid()
    )
    for each in (psutil.Process(process.pid), rank):
        listening = [found.laddr.ip for found in each.net_connections() if found.status == psutil.CONN_LISTEN]
        assert all(
            address.startswith("127.") or address in ("::1", "::ffff:127.0.0.1") for address in listening
        )
    process.terminate()
    process.communicate(timeout=30)
    assert not meeting.parent.exists()


def test_a_rank_that_is_stopped_is_named_within_thirty_seconds(start):
    process = start("complete", "Once", "-n", "3500", "--ignore-eos", "--device", "cpu", "--gpus", "2")
    assert process.stdout.read(20)
    (rank,) = psutil.Process(process.pid).children()
    rank.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    errors = process.communicate(timeout=60)[1]
    assert time.monotonic() - began < 30
    assert (
        process.returncode == 1 and "Rank 1" in errors and "stopped" in errors and "Traceback" not in errors
    )
    assert not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE


def test_a_rank_that_does_nothing_in_a_step_is_given_up(monkeypatch):
    process = subprocess.Popen(["sleep", "60"])
    try:
        pulse = launch.Pulse(process.pid)
        monkeypatch.setattr(launch, "HUNG", 0.3)
        assert pulse.look() == ""
        time.sleep(0.5)
        assert pulse.look() == "", "between steps it may rest"
        with launch.BUSY.now():
            assert pulse.look() == ""
            with ThreadPoolExecutor(1) as other:  # as it is: what looking takes is not our main thread's time
                looks = (time.sleep(0.5) or other.submit(pulse.look).result() for _ in range(20))
                assert any("done nothing" in look for look in looks)
        assert pulse.look() == ""
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def kernels_folder(tmp_path, monkeypatch):
    native.load("native")  # compiled once for all tests
    folder, kept = places.private_folder(tmp_path / "dsv2" / "kernels"), places.compiled_kernels()
    for file in kept.glob("native-*"):
        shutil.copy2(file, folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    yield folder
    build.library.cache_clear()


@pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")
def test_a_compiled_kernel_that_is_not_ours_or_not_whole_is_compiled_anew(kernels_folder, monkeypatch):
    """What the compiler makes takes seconds; here it makes a copy of what it made before."""
    made, _ = native.load("native")
    assert made is not None
    library = Path(made.library._name)
    whole, calls = library.read_bytes(), []
    assert stat.S_IMODE(kernels_folder.stat().st_mode) == 0o700 and build.is_whole(library)

    def compile_again(program, flags, built):
        calls.append(built)
        if built.is_dir():
            built.rmdir()
        built.unlink(missing_ok=True)
        built.write_bytes(whole)
        built.chmod(0o700)
        shutil.copy(kept, build.hash_file(built))

    def another(data):
        """Not into the file that is loaded here."""
        library.unlink()
        library.write_bytes(data)
        library.chmod(0o700)

    kept = shutil.copy(build.hash_file(library), kernels_folder.parent / "kept")
    monkeypatch.setattr(build, "build", compile_again)
    ways = [
        lambda: another(b""),
        lambda: another(whole[: len(whole) // 2]),
        lambda: another(whole[:-1] + bytes([whole[-1] ^ 1])),
        lambda: build.hash_file(library).unlink(),
        lambda: build.hash_file(library).write_text("0" * 64),
        lambda: library.chmod(0o777),
        lambda: (library.unlink(), library.mkdir()),
        lambda: (library.unlink(), library.symlink_to("/bin/true")),
        lambda: (library.unlink(), os.mkfifo(library)),
        lambda: library.unlink(),
    ]
    for number, damage in enumerate(ways, 1):
        damage()
        assert not build.is_whole(library)
        build.library.cache_clear()
        assert native.load("native")[0] is not None and len(calls) == number and build.is_whole(library)
    kernels_folder.chmod(0o777)
    assert build.safe_folder() == kernels_folder and stat.S_IMODE(kernels_folder.stat().st_mode) == 0o700
    monkeypatch.setattr(build.os, "geteuid", lambda: 12345)  # then nothing there is this user's
    assert not build.is_whole(library) and build.safe_folder() != kernels_folder


def test_what_we_keep_is_private_whatever_the_umask(home):
    before = os.umask(0)
    try:
        journal = journals.new(store.path_of("talk"), pytest.fail)
        journal.keep_draft("secret")
        with (
            places.unfinished(home / "data" / "x") as file,
            places.unfinished(home / "y", folder=True) as folder,
        ):
            modes = [stat.S_IMODE(path.stat().st_mode) for path in (file, folder)]
    finally:
        os.umask(before)
    assert modes == [0o600, 0o700]
    assert stat.S_IMODE(store.path_of("talk").stat().st_mode) == 0o600
    for folder in (places.sessions(), places.data_folder(), home / "data"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_what_killed_runs_left_is_cleared_away_and_what_live_ones_write_is_not(home):
    path = home / "talk.json"
    with places.unfinished(path) as alive:
        left, folder = home / ".talk.json-x.unfinished", home / ".talk.json-y.unfinished"
        left.write_text("half")
        folder.mkdir()
        (folder / "shard").write_text("9 GB")
        with places.unfinished(path) as new:
            assert new.exists() and alive.exists() and not left.exists() and not folder.exists()
    assert not list(home.glob(".talk*"))


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.symlink_to("me@host.1234:5678"),
        lambda path: path.symlink_to(path.name),
        os.mkfifo,
        os.mkdir,
        lambda path: path.write_text("[]"),
        lambda path: path.write_text("{"),
        lambda path: path.write_bytes(b"\xff"),
        lambda path: path.write_text('{"branches": 5, "format": "dsv2 conversation 1"}'),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.write_text("[" * 100_000),
    ],
)
@pytest.mark.parametrize("name", ["x.json", "x.jsonl", ".#talk.jsonl"])
def test_a_strange_file_among_the_sessions_is_passed_over(home, make, name):
    from dsv2cli.cli import commands

    talk = journals.new(store.path_of("talk"), pytest.fail)
    talk.add("user", "Hi")
    talk.close()
    make(places.sessions() / name)
    if not (places.sessions() / name).is_symlink():
        os.utime(places.sessions() / name, (2e9, 2e9))
    assert commands.find("last") == store.path_of("talk")
    assert places.session_names()


@pytest.mark.parametrize("text", ["\ud800", "a\udc80b", "\ud83d"])
def test_a_talk_with_half_a_character_goes_on(home, text):
    journal = journals.new(store.path_of("talk"), pytest.fail)
    journal.add("user", f"Hi {text}")
    node = journal.add("assistant", "")
    journal.more(node, text)
    journal.end(node, "stop")
    journal.keep_draft(text)
    journal.close()
    kept = journals.read(store.path_of("talk"), pytest.fail)
    assert [node.text for node in kept.way()] == [mended(f"Hi {text}"), mended(text)]
    assert kept.draft == mended(text)
    messages = [{"role": "user", "content": f"Hi {text}"}, {"role": "assistant", "content": text}]
    old = json.dumps(
        {"format": store.FORMAT, "branch": "main", "pending": "", "branches": {"main": messages}},
        ensure_ascii=False,
    )
    path = store.path_of("old").with_suffix(".json")
    path.write_bytes(old.encode("utf-8", "surrogatepass"))  # as earlier versions wrote it
    assert store.load(path).branches["main"][1]["content"] == mended(text)
    path.write_text(old.encode("ascii", "backslashreplace").decode())
    assert store.load(path).branches["main"][1]["content"] == mended(text)


def mended(text):
    return "".join("\ufffd" if "\ud800" <= letter <= "\udfff" else letter for letter in text)


@pytest.mark.parametrize("damage", range(10))
def test_a_cache_is_used_only_if_it_is_what_was_written(home, embedded, embedded_tokenizer, damage):
    from dsv2cli.engine.request import Request, Result, SamplingParams

    def talk():
        return Session(embedded, embedded_tokenizer)

    session = talk()
    hello = [{"role": "user", "content": "Hello"}]
    "".join(session.reply(hello, Request(SamplingParams(temperature=0), max_new_tokens=8), Result()))
    path = home / "talk.safetensors"
    latents.save_cache(path, session, "this model")
    fresh = talk()
    assert latents.load_cache(path, fresh, "this model") == "" and fresh.cached_ids == session.cached_ids
    tensors, data = load_file(path), bytearray(path.read_bytes())
    metadata = {"model": "this model", "sha256": page_store.digest_of(tensors)}
    names = sorted(tensors)
    if damage == 0:
        data[-100] ^= 1
        path.write_bytes(data)
    elif damage == 1:
        path.write_bytes(data[:-100])
    elif damage == 2:
        tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
        save_file(tensors, path, metadata)
    elif damage == 3:
        tensors["token_ids"][3] = 7
        save_file(tensors, path, metadata)
    elif damage == 4:
        tensors["layers.0"][0, 0] = float("nan")
        save_file(tensors, path, metadata | {"sha256": page_store.digest_of(tensors)})
    elif damage == 5:
        save_file({name: each for name, each in tensors.items() if name != "layers.2"}, path, metadata)
    elif damage == 6:
        save_file(tensors, path, metadata | {"model": "another model"})
    elif damage == 7:
        save_file(tensors, path, {"model": "this model"})
    elif damage == 8:
        path.unlink()
        os.mkfifo(path)
    else:
        tensors = {name: each[..., :-1] if name != "token_ids" else each for name, each in tensors.items()}
        save_file({name: each.contiguous() for name, each in tensors.items()}, path, metadata)
    fresh = talk()
    assert latents.load_cache(path, fresh, "this model") and not fresh.cached_ids


def test_a_model_with_another_byte_anywhere_is_another_model(home, embedded, embedded_tokenizer, tmp_path):
    folder = Path(shutil.copytree(EMBEDDED, tmp_path / "model"))
    session = Session(embedded, embedded_tokenizer)
    before = page_store.identity(folder, session.runner)
    assert page_store.identity(folder, session.runner) == before
    file = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    times = file.stat()
    with file.open("r+b") as opened:
        opened.seek(times.st_size // 2)
        byte = opened.read(1)
        opened.seek(times.st_size // 2)
        opened.write(bytes([byte[0] ^ 1]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert page_store.identity(folder, session.runner) != before


def test_no_message_that_was_sent_is_missing_after_kill_9(in_terminal, home):
    """At moments from the key to the end of the answer."""
    for number in range(6):
        child = in_terminal("chat", *(("--continue",) if number else ()), "--temperature", "0")
        child.expect(PROMPT, timeout=60)
        child.send("\x15" + f"message {number}\r")
        child.expect(rf"\x1b\[1m> message {number}")  # it was taken
        time.sleep(0.02 + 0.05 * number)
        child.kill(signal.SIGKILL)
        child.expect([".*", "$"])
        child.close()
        (name, *more) = places.session_names()
        assert not more
        kept = journals.read(store.path_of(name), pytest.fail)
        said = [node.text for node in kept.nodes.values() if node.role == "user"]
        assert f"message {number}" in said or f"message {number}" == kept.draft


@pytest.mark.parametrize(
    "line",
    [
        b'{"prompt": 5}',
        b'{"prompt": "\\ud800"}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"prompt": "x", "seed": 18446744073709551616}',
        b'{"prompt": "x", "seed": -1}',
        b'{"prompt": "x", "temperature": 1e-320}',
        b'{"prompt": "x", "temperature": 1e300}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "top_p": 5e-324}',
        b'{"prompt": "x", "top_k": 1.5}',
        b'{"prompt": "x", "repetition_penalty": 18446744073709551615}',
        b'{"prompt": "x", "max_new_tokens": "2"}',
        b'{"prompt": "x", "stop": {"a": 1}}',
        b'{"prompt_ids": [1, 99999999999999999999]}',
        b'{"prompt_ids": [-1]}',
        b'{"prompt_ids": [true]}',
        b'{"messages": [{"role": "user", "content": null}]}',
        b'{"messages": {"role": "user"}}',
        b'{"prompt": "x", "prompt": "y"}',
        b"null",
    ],
    ids=lambda line: ascii(line[:40]),
)
def test_one_bad_line_is_one_bad_answer(tmp_path, line):
    good = b'{"prompt": "Once", "max_new_tokens": 2, "seed": 1}\n'
    out = tmp_path / "out.jsonl"
    (tmp_path / "in.jsonl").write_bytes(good + line + b"\n" + good)
    options = ("--on-bad-line", "skip", "-n", "2")
    done = run_dsv2("complete", "--batch", str(tmp_path / "in.jsonl"), "--output", str(out), *options)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(each, parse_constant=pytest.fail) for each in out.read_text().splitlines()]
    assert [answer["line"] for answer in answers] == [1, 2, 3]
    assert answers[0]["text"] == answers[2]["text"] != ""
    assert answers[1].get("error") or answers[1]["text"]
    piped = run_dsv2("complete", "--jsonl", *options, stdin=good + line + b"\n" + good)
    assert [json.loads(each).get("text") for each in piped.stdout.splitlines()] == [
        each.get("text") for each in answers
    ]


def test_prompts_and_answers_may_be_pipes(tmp_path):
    lines = b'{"prompt": "Once", "max_new_tokens": 2, "seed": 1}\n' * 2
    (tmp_path / "in.jsonl").write_bytes(lines)
    wanted = run_dsv2("complete", "--jsonl", stdin=lines).stdout
    texts = [json.loads(line)["text"] for line in wanted.splitlines()]
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    shell = f"cat {tmp_path / 'in.jsonl'} | {sys.executable} -m dsv2cli complete --batch {{}} --output {{}}"
    for source, out in (("-", "/dev/stdout"), ("<(cat in.jsonl)", "-")):
        done = subprocess.run(
            ["bash", "-c", "cd " + str(tmp_path) + " && " + shell.format(source, out)],
            capture_output=True,
            timeout=120,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr
        assert [json.loads(line)["text"] for line in done.stdout.splitlines()] == texts


@pytest.mark.parametrize("out", ["", ".", "/dev/full", "nothing/out.jsonl", "n" * 300, "~nosuchuser/x"])
def test_an_output_that_can_not_be_written_is_said_before_or_at_once(tmp_path, out):
    (tmp_path / "in.jsonl").write_text('{"prompt": "Once", "max_new_tokens": 2}\n')
    where = out if out.startswith(("/", "~")) else str(tmp_path / out)
    done = run_dsv2("complete", "--batch", str(tmp_path / "in.jsonl"), "--output", where)
    assert done.returncode in (1, 2) and "error:" in done.stderr and "Traceback" not in done.stderr
    assert (
        run_dsv2("complete", "--batch", str(tmp_path / "in.jsonl"), "--output", "/dev/null").returncode == 0
    )


def test_a_form_that_leads_nowhere_ends_with_an_error(embedded_tokenizer):
    """The matcher is told that the end may come where it may not: as where a form has a dead end."""
    grammar = Grammar(embedded_tokenizer, 4096, frozenset([4095]), "abc", None)
    way = grammar.begin()
    for token in embedded_tokenizer.encode("ab", add_bos=False):
        way.allow(torch.zeros(4096))
        way.take(token)
    with pytest.raises(Dsv2Error, match="No token"):
        way.take(4095)
    way = grammar.begin()
    with pytest.raises(Dsv2Error, match="No token"):
        way.take(embedded_tokenizer.encode("x", add_bos=False)[0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("info", "--memory", "1e308"), "--memory"),
        (("info", "--bandwidth", "inf"), "--bandwidth"),
        (("info", "--bandwidth", "0", "--gpus", "80GB"), "--bandwidth"),
        (("info", "--gpus", "99999999999x1GB"), "--gpus"),
        (("info", "--gpus", "2x99999999999999TB"), "--gpus"),
        (("info", "/dev/zero"), "is no folder"),
        (("bench", "--batch", "999999999999", "--prompt", "4", "--generate", "2"), "--batch"),
        (("bench", "--prompt", "9-5+1"), "empty range"),
        (("bench", "--prompt", "1-99999999999+1"), "--prompt"),
        (("complete", "x", "--threads", "99999999999999999999"), "--threads"),
        (("complete", "x", "--samples", "99999", "--json"), "--samples"),
        (("complete", "x", "--max-memory", "cpu=1GB,cpu=2GB"), "twice"),
        (("complete", "x", "--json-schema", "/dev/zero"), "/dev/zero"),
    ],
)
def test_absurd_values_are_refused_at_once(arguments, words):
    began = time.monotonic()
    done = run_dsv2(*arguments)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert time.monotonic() - began < 10 and len(done.stderr) < 1000


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ({"": "cpu", "model.layers.99": "disk"}, "model.layers.99"),
        ({"model": "cpu", "lm_head": "disk", "x": "cpu"}, "'x'"),
    ],
)
def test_a_placement_names_modules_that_are_there(tmp_path, places, words):
    (tmp_path / "places.json").write_text(json.dumps(places))
    done = run_dsv2("complete", "x", "-n", "1", "--placement", str(tmp_path / "places.json"))
    assert done.returncode == 2 and words in done.stderr


@pytest.mark.parametrize(
    "arguments", [("complete", "-n", "1"), ("complete", "--jsonl", "--on-bad-line", "skip")]
)
def test_a_stdin_that_never_ends_a_line_takes_no_memory(arguments, monkeypatch):
    from dsv2cli import outside

    monkeypatch.setattr(outside.lines_within, "__defaults__", (1000,))
    monkeypatch.setattr(outside.read_within, "__defaults__", (100_000,))
    done = run_dsv2(*arguments, stdin=b"a" * 2_000_000 + b'\n{"prompt": "Once", "max_new_tokens": 1}')
    if "--jsonl" in arguments:
        bad, good = map(json.loads, done.stdout.splitlines())
        assert "bytes" in bad["error"] and good["text"]
    else:
        assert done.returncode == 2 and "more than 100,000 bytes" in done.stderr


def test_a_text_that_can_not_fit_is_refused_before_it_is_looked_at(tmp_path):
    text = "ab " * 2_000_000
    began = time.monotonic()
    for arguments in (("complete",), ("complete", "--chat")):
        done = run_dsv2(*arguments, "-n", "1", stdin=text)
        assert done.returncode == 2 and "6,000,000 characters" in done.stderr.replace(
            "5,999,999", "6,000,000"
        )
    lines = "\n".join(json.dumps({"prompt": each}) for each in ("Once", text, "The"))
    done = run_dsv2("complete", "--jsonl", "--on-bad-line", "skip", "-n", "1", stdin=lines)
    assert ["error" in json.loads(line) for line in done.stdout.splitlines()] == [False, True, False]
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("name", ["n" * 300, "é" * 150, "a/b", ".x", "a\nb"])
def test_a_name_that_no_file_can_have_ends_no_talk(home, embedded, embedded_tokenizer, name):
    with pytest.raises(Dsv2Error, match="can not name a session"):
        store.path_of(name)


@pytest.mark.parametrize("token", [4096, 200_000_000])
def test_a_tokenizer_of_another_model_and_a_form_are_a_sentence(tmp_path, token):
    folder = Path(shutil.copytree(EMBEDDED, tmp_path / "model"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["zzzz"] = token
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    done = run_dsv2("complete", "Once", "--model", str(folder), "--regex", "[a-z]+", "-n", "2")
    assert done.returncode == 1 and "tokenizer.json" in done.stderr
    assert "another model" in done.stderr or "one id to two tokens" in done.stderr


@pytest.mark.parametrize(
    "schema", ['{"$ref": "#"}', '{"enum": ["' + "a" * 100_000 + '"]}', '{"type": "nonsense"}', "[", "5"]
)
def test_what_is_wrong_with_a_form_is_said_in_a_line(tmp_path, schema):
    (tmp_path / "s.json").write_text(schema)
    done = run_dsv2("complete", "Once", "--json-schema", str(tmp_path / "s.json"), "-n", "4", "--seed", "1")
    assert "Traceback" not in done.stderr and len(done.stderr) < 700 and "<state>" not in done.stderr
    assert done.returncode in (0, 1, 2)
