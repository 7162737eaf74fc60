"""What is attached to a message: paths, parts, patterns, folders, commands, and @ in a sentence."""

from __future__ import annotations

import inspect
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from dsv2cli.cli import attach
from dsv2cli.cli.attach import Attachment, gather, mentioned
from dsv2cli.errors import UsageError

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
NOBODY = 65534
BINARY = b"\x7fELF\x00\x01\xff"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder to be in, which is its own home."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    return folder


@pytest.fixture
def without_rights(here, monkeypatch):
    """Nothing is forbidden to root, who is nobody for a while, in a folder of nobody's."""
    if os.geteuid():
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, NOBODY, -1)
        monkeypatch.chdir(folder)
        os.seteuid(NOBODY)
        try:
            yield
        finally:
            os.seteuid(0)
            monkeypatch.chdir(here)


def write(name: str, text: str | bytes = "text\n") -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def numbered(name: str, lines: int) -> Path:
    return write(name, "".join(f"line {number}\n" for number in range(1, lines + 1)))


def names(words: str) -> list[str]:
    return [each.name for each in gather(words)]


def error_of(words: str, ask=gather) -> UsageError:
    with pytest.raises(UsageError) as caught:
        ask(words)
    error = caught.value
    assert error.what and error.fix and "\n" not in error.what + error.why + error.fix
    return error


def git(*words: str) -> None:
    subprocess.run(["git", *words], check=True, capture_output=True)


# How it is shown


def test_plain_text_stays_plain():
    assert Attachment("note.txt", "tea\n").shown == "note.txt:\n\ntea\n\n\n"
    assert Attachment("README.md", "# a").shown == "README.md:\n\n# a\n\n"


@pytest.mark.parametrize("name", ["a.py", "a.py:10-40", "src/a.PY", "a.py:3", "a.py:3-"])
def test_code_stands_in_a_fence_with_its_language(name):
    assert Attachment(name, "x = 1\n").shown == f"{name}:\n\n```python\nx = 1\n```\n\n"
    assert Attachment(name, "x = 1").shown == f"{name}:\n\n```python\nx = 1\n```\n\n"


def test_a_fence_is_longer_than_any_inside():
    shown = Attachment("a.rs", "/// ````\n/// ``\n").shown
    assert shown == "a.rs:\n\n`````rust\n/// ````\n/// ``\n`````\n\n"


def test_the_output_of_a_command_is_no_code():
    assert Attachment("$ cat a.py", "x").shown == "$ cat a.py:\n\nx\n\n"


# Paths


def test_several_paths_with_quotes_and_escapes():
    for name in ("a.py", "b c.py", "d e.txt", "it's.txt"):
        write(name, name)
    found = gather("""a.py "b c.py" d\\ e.txt "it's.txt" """)
    assert [each.name for each in found] == [each.text for each in found]
    assert [each.name for each in found] == ["a.py", "b c.py", "d e.txt", "it's.txt"]


@pytest.mark.parametrize("words", ["b c.py", "'b c.py'", '"b c.py"', "b\\ c.py", "  b c.py  "])
def test_one_path_with_blanks_needs_no_quotes(words):
    write("b c.py", "found")
    assert gather(words) == [Attachment("b c.py", "found")]


def test_a_path_with_a_quote_in_it_works_as_typed():
    write("it's here.txt", "found")
    assert names("it's here.txt") == ["it's here.txt"]


def test_file_urls_are_paths(here):
    write("b c.py", "found")
    write("d.py", "found")
    url = f"file://{here}"
    assert names(f"{url}/b%20c.py") == ["b c.py"]
    assert names(f"{url}/b%20c.py {url}/d.py") == ["b c.py", "d.py"]


def test_home_is_known():
    write("a.py")
    assert names("~/a.py") == names("~/*.py") == ["a.py"]


def test_names_are_short(tmp_path):
    write("src/deep/a.py")
    write("../elsewhere/src/b.py")
    elsewhere = tmp_path / "elsewhere"
    assert names(f"{Path.cwd()}/src/deep/a.py") == ["src/deep/a.py"]
    assert names(f"{elsewhere}/src/b.py") == ["b.py"]
    assert names(f"{elsewhere}") == names(f"{elsewhere}/**/*.py") == ["elsewhere/src/b.py"]
    assert names("../elsewhere/src/b.py") == ["../elsewhere/src/b.py"]


def test_each_is_attached_once():
    write("src/a.py")
    assert names("src/a.py src src/*.py ./src/a.py") == ["src/a.py"]


@pytest.mark.parametrize("words", ["", "   ", '""', "''", "'", '" "'])
def test_nothing_is_an_error(words):
    assert "nothing to attach" in error_of(words).what


def test_a_missing_file_is_named_with_the_nearest():
    write("main.py")
    error = error_of("mian.py")
    assert "mian.py" in error.what and "main.py" in error.fix
    assert "nowhere.txt" in error_of("main.py nowhere.txt").what
    assert "empty" in error_of('main.py ""').what.lower()


def test_an_open_quote_is_told():
    error = error_of("a.py 'b.py")
    assert "quot" in error.why and '"it\'s here.txt"' in error.fix


def test_an_empty_file_is_a_text():
    write("empty.txt", "")
    assert gather("empty.txt") == [Attachment("empty.txt", "")]


# Parts of files


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (":2-4", "line 2\nline 3\nline 4"),
        (":3", "line 3"),
        (":4-", "line 4\nline 5"),
        (":1-5", "line 1\nline 2\nline 3\nline 4\nline 5"),
        (":5-5", "line 5"),
    ],
)
def test_parts_are_lines_as_editors_count(part, text):
    numbered("a.py", 5)
    assert gather(f"a.py{part}") == [Attachment(f"a.py{part}", text)]


def test_form_feeds_end_no_line_and_the_last_needs_no_newline():
    write("a.py", "one\x0cstill one\u2028still\r\ntwo")
    assert gather("a.py:2")[0].text == "two"
    assert "2 lines" in error_of("a.py:3").why


@pytest.mark.parametrize(
    ("part", "why"),
    [
        (":6", "5 lines"),
        (":2-6", "5 lines"),
        (":6-", "5 lines"),
        (":0", "from 1"),
        (":0-3", "from 1"),
        (":4-2", "before the first"),
    ],
)
def test_lines_that_are_not_there_are_an_error(part, why):
    numbered("a.py", 5)
    error = error_of(f"a.py{part}")
    assert why in error.why and part[1:] in error.what and "a.py" in error.what


def test_a_file_with_a_colon_in_its_name_comes_first():
    numbered("a.py", 20)
    write("a.py:10", "the file")
    assert gather("a.py:10") == [Attachment("a.py:10", "the file")]
    assert gather("a.py:10:1") == [Attachment("a.py:10:1", "the file")]
    assert gather("a.py:11")[0].text == "line 11"


def test_a_part_of_a_file_with_blanks_in_its_name():
    numbered("b c.py", 5)
    for words in ("b c.py:2", '"b c.py:2"', '"b c.py":2', "b\\ c.py:2"):
        assert gather(words) == [Attachment("b c.py:2", "line 2")]


def test_a_folder_has_no_lines_and_a_long_number_is_none():
    write("src/a.py")
    assert "src:10" in error_of("src:10").what
    assert "9999" in error_of("src/a.py:" + "9" * 5000).what
    assert "no file" in error_of("src/a.py:9999999999").what


# Patterns


def test_patterns_are_sorted_and_look_into_folders():
    for name in ("b.py", "a.py", "src/c.py", "src/deep/d.py", "src/e.txt"):
        write(name)
    assert names("*.py") == ["a.py", "b.py"]
    assert names("src/**/*.py") == ["src/c.py", "src/deep/d.py"]
    assert names("**/*.py") == ["a.py", "b.py", "src/c.py", "src/deep/d.py"]
    assert names("src/**") == ["src/c.py", "src/deep/d.py", "src/e.txt"]
    assert names("s*/[ce].*") == ["src/c.py", "src/e.txt"]
    assert names("?.py src/*.txt") == ["a.py", "b.py", "src/e.txt"]
    assert names("src/../*.py") == ["src/../a.py", "src/../b.py"]
    assert names("*/deep/d.py") == ["src/deep/d.py"]


def test_patterns_pass_over_what_is_hidden_binary_or_a_folder():
    for name in ("a.py", ".b.py", ".venv/c.py", "node_modules/d.py", "folder.py/e.txt"):
        write(name)
    write("z.py", BINARY)
    assert names("**/*.py") == ["a.py"]
    assert names(".*.py") == [".b.py"]
    assert names("node_modules/*.py") == ["node_modules/d.py"]


def test_a_pattern_without_a_match_is_an_error():
    write("a.py")
    assert "*.rs" in error_of("a.py *.rs").what
    assert "Nothing matches" in error_of("nowhere/**/*.py").what


def test_a_pattern_of_binaries_alone_is_an_error():
    write("a.bin", BINARY)
    write("b.bin", "text".encode("utf-16"))
    error = error_of("*.bin")
    assert "no text" in error.what and "of 2 found" in error.why


def test_a_file_with_brackets_in_its_name_is_no_pattern():
    write("a[1].py", "brackets")
    write("a1.py", "one")
    assert gather("a[1].py")[0].text == "brackets"


# Folders


def test_a_folder_is_all_its_text():
    for name in ("src/b.py", "src/a.py", "src/deep/c.txt"):
        write(name)
    for name in (".hidden", ".git2/x", "node_modules/x.js", "__pycache__/x.pyc"):
        write(f"src/{name}")
    write("src/picture.png", BINARY)
    write("src/large.bin", BINARY * 2**18)
    assert names("src") == names("src/") == ["src/a.py", "src/b.py", "src/deep/c.txt"]
    assert names(".") == names("src")


def test_a_folder_without_text_is_an_error():
    Path("empty").mkdir()
    assert "empty holds no text" in error_of("empty").what
    write("binary/a.bin", BINARY)
    assert "of 1 found" in error_of("binary").why


def test_outside_git_gitignore_is_honoured_too():
    write("src/.gitignore", "# build\n*.log\n/out/\n!keep.log\ndeep/*/x.txt\na/**/z.txt\n\\#odd\n\n")
    for name in ("a.py", "b.log", "keep.log", "out/c.py", "deep/out/d.py", "deep/1/x.txt", "deep/x.txt"):
        write(f"src/{name}")
    for name in ("a/z.txt", "a/b/c/z.txt", "a/b/y.txt", "#odd", "deep/.gitignore", "deep/out/secret.txt"):
        write(f"src/{name}", "secret.*\n")
    assert names("src") == [
        f"src/{name}" for name in ("a/b/y.txt", "a.py", "deep/out/d.py", "deep/x.txt", "keep.log")
    ]


def test_a_gitignore_that_is_no_text_ignores_nothing():
    write("src/.gitignore", BINARY)
    write("src/a.py")
    assert names("src") == ["src/a.py"]


@needs_git
def test_in_a_work_tree_git_says_what_is_ignored():
    git("init", "-q", ".")
    write(".gitignore", "*.log\nbuild/\n")
    for name in ("src/tracked.py", "src/new.py", "src/a.log", "src/build/b.py", "src/.dotted", "src/gone.py"):
        write(name)
    git("add", "src/tracked.py", "src/gone.py")
    Path("src/gone.py").unlink()
    write("src/binary.png", BINARY)
    assert names("src") == ["src/.dotted", "src/new.py", "src/tracked.py"]
    assert names("src/build/*") == ["src/build/b.py"]
    error = error_of("src/build")
    assert "git" in error.why and "build/*" in error.fix


@needs_git
def test_variables_of_another_repository_and_its_programs_do_nothing(tmp_path, monkeypatch):
    git("init", "-q", ".")
    write("src/a.py")
    write("src/.only-git-lists-this")
    monitor = write("../monitor", f"#!/bin/sh\ntouch {shlex.quote(str(tmp_path / 'ran'))}\n")
    monitor.chmod(0o755)
    git("config", "core.fsmonitor", str(monitor.resolve()))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other"))
    assert names("src") == ["src/.only-git-lists-this", "src/a.py"] and not (tmp_path / "ran").exists()


def test_without_git_a_folder_is_walked(monkeypatch):
    write("src/a.py")
    monkeypatch.setenv("PATH", "/nowhere")
    assert names("src") == ["src/a.py"]


def test_circles_of_links_end():
    write("src/a.py")
    for name in ("one", "two"):
        Path("src", name).symlink_to("..", target_is_directory=True)
    Path("src/self").symlink_to("self")
    Path("src/nowhere.py").symlink_to("nothing")
    Path("src/link.py").symlink_to("a.py")
    assert names("src") == names("src/**") == names("**/*.py") == ["src/a.py", "src/link.py"]
    assert "no file src/self" in error_of("src/self").what


def test_folders_may_be_deeper_than_python_calls_functions():
    write("a.py")
    write(".gitignore", "x/**/y\n")
    Path(*"d" * 300).mkdir(parents=True)
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(len(inspect.stack()) + 150)
        assert names(".") == names("**/*.py") == ["a.py"]
    finally:
        sys.setrecursionlimit(limit)


# What is no text


def test_a_binary_by_its_own_name_is_an_error():
    write("a.bin", BINARY)
    write("b.bin", "text\0text")
    write("c.txt", "text".encode("utf-16"))
    assert "a.bin" in error_of("a.bin").what
    assert "not text" in error_of("b.bin").why
    assert "UTF-16" in error_of("c.txt").why


def test_fifos_devices_and_sockets_are_refused_and_never_waited_for():
    os.mkfifo("fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        assert "a FIFO" in error_of("fifo").why
        assert "a socket" in error_of("socket").why
        assert "a device" in error_of("/dev/zero").why
        assert "a device" in error_of("/dev/null").why
        write("a.py")
        assert names(".") == names("*") == ["a.py"]
        assert mentioned("@fifo and @socket and @/dev/zero") == []


def test_what_may_not_be_read_is_an_error(without_rights):
    write("src/a.py").chmod(0)
    write("closed/b.py")
    write("seen/c.py")
    Path("closed").chmod(0)
    Path("seen").chmod(0o444)
    try:
        assert "right to read" in error_of("src/a.py").fix
        for words in ("src/a.py", "src", "src/*.py", "closed", "closed/*.py", "**/*.rs", "seen/*.py", "seen"):
            assert "ermission denied" in error_of(words).why, words
        assert "ermission denied" in error_of("closed/b.py").sentence
        assert mentioned("see @closed/b.py") == []
        assert "src/a.py" in error_of("see @src/a.py", mentioned).what
        assert "closed" in error_of("see @closed", mentioned).what
    finally:
        Path("closed").chmod(0o755)
        Path("seen").chmod(0o755)


def test_the_root_folder_is_refused():
    assert "root" in error_of("/").why
    assert mentioned("either @/ or not") == []


# Limits


def test_a_file_has_a_largest_size():
    write("fits.txt", "x" * attach.LARGEST_FILE)
    write("large.txt", "x" * (attach.LARGEST_FILE + 1))
    assert names("fits.txt") == ["fits.txt"]
    error = error_of("large.txt")
    assert "1,048,577" in error.why and "1,048,576" in error.why and "head" in error.fix
    assert "large.txt" in error_of(".").what


def test_all_together_have_a_largest_size():
    for number in range(5):
        write(f"src/{number}.txt", f"{number}" * (attach.LARGEST_FILE - 10))
    assert len(gather("src/[0-3].txt")) == 4
    assert names("src/0.txt " * 5) == ["src/0.txt"]
    error = error_of("src")
    assert "5,242,830" in error.why and "4,194,304" in error.why


def test_files_have_a_largest_number():
    for number in range(501):
        write(f"src/{number:03}.txt", "x")
        write(f"src/{number:03}.bin", b"\0")
    assert len(gather("src/[0-4]*")) == 500
    error = error_of("src/*.txt")
    assert "501" in error.why and "500" in error.why
    assert "500" in error_of("src").why


# Commands


def test_a_commands_output_and_errors_are_attached_in_order():
    found = gather("!echo one; echo two >&2; echo 'three  four'")
    assert found == [Attachment("$ echo one; echo two >&2; echo 'three four'", "one\ntwo\nthree  four\n")]


def test_the_exit_code_is_told_in_the_name():
    assert names("!echo no; exit 3") == ["$ echo no; exit 3 (exit 3)"]
    assert names("!echo no; kill -9 $$") == ["$ echo no; kill -9 $$ (exit 137)"]
    assert "not found" in gather("!no-such-command-anywhere")[0].text


def test_a_command_has_no_input_and_no_terminal():
    reading, writing = os.pipe()
    os.write(writing, b"typed by a person")
    os.close(writing)
    ours = os.dup(0)
    os.dup2(reading, 0)
    try:
        assert "wrote nothing" in error_of("!cat").what
    finally:
        os.dup2(ours, 0)
        os.close(ours)
        os.close(reading)
    assert gather("!(: </dev/tty) 2>/dev/null || echo none")[0].text == "none\n"


def test_bytes_that_are_no_text_are_replaced():
    assert gather(r"!printf 'a\377b'")[0].text == "a\ufffdb"


def test_empty_output_is_an_error():
    assert "exit code is 0" in error_of("!true").why
    assert "exit code is 1" in error_of("!false").why
    assert "no command" in error_of("!").what
    assert "no command" in error_of("! ").what


def test_a_command_may_stand_behind_files_and_takes_the_rest_as_it_is():
    write("a.py")
    write("!quoted", "a file")
    assert names('a.py !echo "b  c" | cat') == ["a.py", '$ echo "b c" | cat']
    assert names('"!echo one" "!quoted"') == ["$ echo one", "!quoted"]
    assert gather('a.py !echo "b  c" | cat')[1].text == "b  c\n"


def test_where_a_name_is_wrong_no_command_runs():
    error_of("nowhere.txt !touch ran")
    error_of('"!touch ran" nowhere.txt')
    assert not Path("ran").exists()


def test_output_has_a_largest_size_and_endless_output_ends():
    begin = time.monotonic()
    error = error_of("!yes")
    assert (
        "1,048,576" in error.why and error.fix == "/file !yes | head -n 100" and time.monotonic() - begin < 5
    )
    assert len(gather("!yes | head -c 1048576")[0].text) == 2**20


def is_gone(number: int) -> bool:
    """Whether a process has ended, if need be within a moment."""
    for _ in range(100):
        try:
            os.kill(number, 0)
            if Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True  # nobody has asked for its exit code yet
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.02)
    return False


def test_a_command_has_a_time_limit_and_all_it_started_ends_with_it():
    line = "sleep 60 & echo $! > child; sleep 60"
    with pytest.raises(TimeoutError, match=r"more than 0\.2 seconds"):
        attach.run(["/bin/sh", "-c", line], 100, seconds=0.2)
    assert is_gone(int(Path("child").read_text()))
    assert attach.SECONDS == 30


def test_the_time_limit_holds_for_one_that_closes_its_output():
    with pytest.raises(TimeoutError):
        attach.run(["/bin/sh", "-c", "exec >&- 2>&-; sleep 60"], 100, seconds=0.2)


def test_what_a_command_leaves_running_is_not_waited_for():
    begin = time.monotonic()
    assert gather("!sleep 60 & echo $!")[0].text.strip().isdecimal()
    assert time.monotonic() - begin < 5
    assert is_gone(int(gather("!sleep 60 & echo $!")[0].text))


def test_ctrl_c_ends_a_command_and_all_it_started():
    code = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from dsv2cli.cli.attach import gather
gather("!sleep 60 & echo $! > child.new; sleep 0.5; mv child.new child; sleep 60")
"""
    environment = os.environ | {"PYTHONPATH": str(Path(attach.__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, env=environment) as process:
        until = time.monotonic() + 20
        while not Path("child").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert b"KeyboardInterrupt" in process.communicate(timeout=10)[1]
    assert is_gone(int(Path("child").read_text()))


# Mentions


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ("@a.py", ["a.py"]),
        ("what does @a.py do?", ["a.py"]),
        ("see (@a.py), [@b.py] and {@a.py}", ["a.py", "b.py"]),
        ("do you know @a.py?!", ["a.py"]),
        ("it is in '@a.py'", []),
        ("@a.py.", ["a.py"]),
        ("@a.py: why?", ["a.py"]),
        ("line\n@a.py\tand\n\n@b.py", ["a.py", "b.py"]),
        ("@a.py:2-3", ["a.py:2-3"]),
        ("(see @a.py:2).", ["a.py:2"]),
        ("from @a.py:2-", ["a.py:2-"]),
        ('@"b c.py" and @"b c.py:2" or @"b c.py":3-4.', ["b c.py", "b c.py:2", "b c.py:3-4"]),
        ("@src", ["src/d.py"]),
        ("all in @src/.", ["src/d.py"]),
        ("@~/a.py", ["a.py"]),
        ("看看 @a.py，谢谢", ["a.py"]),
        ("@a.py @a.py @a.py", ["a.py"]),
        ("@nora, write to someone@example.com", []),
        ("me@a.py", []),
        ("@ a.py, @, @., @.., @~, @/", []),
        ("@*.py and @!ls and @-a", []),
        ("@src:10 and @a.pyc", []),
        ('@"nora" @"" @"a.py', []),
        ("@empty", []),
    ],
)
def test_mentions_are_what_exists(message, found):
    for name in ("a.py", "b.py", "b c.py", "src/d.py"):
        numbered(name, 5)
    Path("empty").mkdir()
    assert [each.name for each in mentioned(message)] == found


def test_punctuation_belongs_to_a_name_that_has_it():
    write("what?", "a question")
    write("what", "a word")
    assert mentioned("@what?")[0].text == "a question"
    assert mentioned("@what?!")[0].text == "a question"
    assert mentioned("@what.")[0].text == "a word"


def test_a_mention_that_can_not_be_read_is_an_error():
    write("a.bin", BINARY)
    numbered("a.py", 5)
    error = error_of("look at @a.bin.", mentioned)
    assert "a.bin" in error.what and "@" in error.fix
    assert "5 lines" in error_of("@a.py:10-40", mentioned).why
    write("large.txt", "x" * (attach.LARGEST_FILE + 1))
    assert "1,048,577" in error_of("@large.txt", mentioned).why


def test_long_messages_full_of_mentions_take_no_time():
    begin = time.monotonic()
    for message in ("@" * 100_000, "@a" + "!" * 100_000, "@x " * 30_000, '@"' * 50_000, "@" + "a/" * 50_000):
        assert mentioned(message) == []
    assert time.monotonic() - begin < 3


# Anything


@pytest.mark.parametrize(
    "words",
    [
        "a\0b",
        "!echo a\0b",
        "\udcff.py",
        "\ud800",
        "!echo \ud800",
        "x" * 5000,
        "/".join("x" * 5000),
        "*" * 5000,
        "**/" * 3000 + "*.py",
        "[" * 200,
        "[z-a]*[!]",
        "*a" * 100,
        "~nobody-of-this-name/x",
        "file://%00",
        "file://",
        "a\\",
        "a.py/b",
        "!" + "x" * 300_000,
        "a\nb",
    ],
    ids=lambda words: repr(words[:20]),
)
def test_no_input_ends_in_a_traceback(words):
    write("a.py")
    try:
        assert all(each.text for each in gather(words))
    except UsageError as error:
        assert len(error.what) < 200 and (error.what + error.why + error.fix).encode()
    mentioned(f"see @{words} there")


def test_names_of_any_bytes_are_shown_as_text():
    try:
        write(os.fsdecode(b"src/\xff.py"), "found")
    except OSError:
        pytest.skip("this disk wants names to be text")
    write("src/two\nlines\x1b.py", "found")
    assert names("src") == names("src/*") == ["src/two lines\x1b.py", "src/\ufffd.py"]


def test_random_words_end_in_a_sentence():
    write("a.py")
    write("b c.py")
    draw = random.Random(7)
    pieces = [
        "a.py",
        "b c.py",
        "*",
        "**",
        "[",
        "]",
        "?",
        "src/",
        "'",
        '"',
        "\\",
        " ",
        ":",
        "1-",
        "@",
        "~",
        "\0",
    ]
    for _ in range(300):
        words = "".join(
            draw.choices([*pieces, "file://", "%41", "\udc80", "。", "..", "\n"], k=draw.randrange(1, 9))
        )
        try:
            gather(words)
        except UsageError as error:
            assert error.what and error.fix
        try:
            mentioned(words)
        except UsageError as error:
            assert error.what


def test_attaching_needs_no_torch():
    code = "import sys, dsv2cli.cli.attach; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(attach.__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
