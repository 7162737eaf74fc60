"""dsv2 bench --against PATH: the llama-bench of others in turn with this program, and its bad days.

The other program is the script of llama_bench.py.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import os
import signal
import time

import psutil
import pytest
import torch
from conftest import DATA
from llama_bench import asked_of, write
from running import run_dsv2

from dsv2cli.engine import peer
from dsv2cli.engine.benchmark import Ours, Work
from dsv2cli.engine.peer import Peer

GGUF = DATA / "gguf" / "random-Q4_K_M.gguf"
SHORT = ("--prompt", "8", "--generate", "4", "-r", "3")


@pytest.fixture
def fake(tmp_path):
    """Makes a llama-bench that does something `more` before it answers, and gives its path; and what it was
    asked.
    """
    return functools.partial(write, tmp_path), functools.partial(asked_of, tmp_path)


def test_pairs_are_interleaved_and_asked_for_the_same_work(fake, v2, monkeypatch):
    make, asked = fake
    program, order = make(), []
    measure, ask = Ours.measure, Peer.measure
    monkeypatch.setattr(Ours, "measure", lambda *given: order.append(given[2]) or measure(*given))
    monkeypatch.setattr(Peer, "measure", lambda *given: order.append("theirs") or ask(*given))
    ticks = []
    (ours, theirs), told = peer.measure_beside(
        v2, Work(8, 4, depth=5), 2, Peer(program, GGUF, ("-fa", "1")), lambda: ticks.append(None)
    )
    # Ours reads the prompt, then decodes so many tokens after one; once to warm up, and then in turn.
    assert order == [1, 3, "theirs", 1, 5, "theirs", 1, 5, "theirs"] and len(ticks) == 6
    words = ["-m", str(GGUF), "-t", "1", "-p", "8", "-n", "4", "-r", "1", "-o", "json", "-d", "5", "-fa", "1"]
    assert asked()[1:] == [words] * 2 and len(asked()) == 3
    assert theirs.prefill_tokens_per_second == [1000, 2000] and theirs.decode_tokens_per_second == [10, 20]
    assert [len(gaps) for gaps in ours.gaps] == [4, 4] and ours.work.context == 7
    assert told["build_number"] == 4321 and told["backends"] == "BLAS"


def test_the_result_has_both_sides_their_ratios_and_who_they_were(fake):
    program = fake[0]()
    words = ("bench", *SHORT, "-m", str(GGUF), "--against", program, "--threads", "2")
    done = run_dsv2(*words, "--against-flags", "-rtr 1", "--against-flags", "-ot 'a b=CPU'", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    out = json.loads(done.stdout)
    ours, theirs = out["runs"]
    assert (ours["engine"], theirs["engine"]) == ("dsv2", "llama-bench")
    for phase, rates in (("prefill", [1000, 2000, 3000]), ("decode", [10, 20, 30])):
        assert theirs[f"{phase}_tokens_per_second"]["all"] == rates
        pairs = [a / b for a, b in zip(ours[f"{phase}_tokens_per_second"]["all"], rates, strict=True)]
        ratio = ours[f"{phase}_ratio"]
        assert ratio["all"] == pytest.approx(pairs)
        assert (ratio["min"], ratio["median"], ratio["max"]) == pytest.approx(sorted(pairs))
    assert theirs["itl_seconds"] == {"p50": None, "p90": None, "p99": None}
    assert ours["separate"] and theirs["separate"] and "decode_share_of_bandwidth" not in theirs
    assert out["against"] == {
        "program": program,
        "file": str(GGUF),
        "flags": ["-rtr", "1", "-ot", "a b=CPU"],
        "build_commit": "abc\x1b[2Jdef",
        "build_number": 4321,
        "backends": "BLAS",
        "cpu_info": "A Processor",
        "model_type": "deepseek2 16B Q4_0",
        "model_size": 3 * 2**30,
        "n_threads": 2,
    }
    assert out["machine"]["processor"] and isinstance(out["machine"]["instructions"], list)
    assert fake[1]()[-1][-4:] == ["-rtr", "1", "-ot", "a b=CPU"]


def test_the_table_says_it_in_words_and_nothing_steers_the_terminal(fake):
    done = run_dsv2("bench", *SHORT, "--plot", "--against", fake[0](), "--against-file", str(GGUF))
    assert (done.returncode, done.stderr) == (0, "")
    assert "dsv2 / llama-bench: prefill" in done.stdout and "20.0 (10.0-30.0)" in done.stdout
    assert "llama-bench: build 4321, commit abc␛[2Jdef, backends BLAS" in done.stdout
    assert "weights 3.00 GiB" in done.stdout and "\nmachine: " in done.stdout and "\x1b" not in done.stdout
    rows = run_dsv2("bench", *SHORT, "--format", "csv", "--against", fake[0](), "-m", str(GGUF)).stdout
    ours, theirs = csv.DictReader(io.StringIO(rows))
    assert float(ours["decode_ratio_median"]) > 0 and theirs["decode_ratio_median"] == ""


def test_a_saved_result_is_compared_with_its_like_alone(fake, tmp_path):
    saved = str(tmp_path / "a.json")
    words = ("bench", *SHORT, "-m", str(GGUF))
    beside = (*words, "--against", fake[0]())
    assert run_dsv2(*beside, "--save", saved).returncode == 0
    compared = json.loads(run_dsv2(*beside, "--compare", saved, "--json").stdout)["compared"]
    assert [each["engine"] for each in compared] == ["dsv2", "llama-bench"]
    # Alone, decode begins after the prompt.
    assert json.loads(run_dsv2(*words, "--compare", saved, "--json").stdout)["compared"] == []


def test_the_older_fork_is_understood(fake):
    """ik_llama.cpp says of each backend whether it is there, and nothing of depth."""
    more = (
        "for row in rows:\n    del row['backends'], row['n_depth']\n    row |= {'cuda': True, 'metal': False}"
    )
    out = json.loads(run_dsv2("bench", *SHORT, "-m", str(GGUF), "--json", "--against", fake[0](more)).stdout)
    assert out["against"]["backends"] == "cuda"


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (
            "sys.stderr.write('one\\n\\x1b[2Jerror: no model\\nlast'); sys.exit(3)",
            "exit code 3, and said: ␛[2J",
        ),
        ("sys.exit(1)", "it ended with exit code 1"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL (as a system does"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "it was ended by SIGSEGV"),
        ("print('hello'); sys.exit()", "its answer can not be used"),
        ("sys.exit()", "its answer can not be used"),
        ("rows = {'rows': rows}", "no row with n_prompt 8 and n_gen 0"),
        ("rows = rows[:1]", "no row with n_prompt 0 and n_gen 2"),
        ("rows = [1, *rows[1:]]", "no row with n_prompt 8"),
        ("rows = rows * 2", "several rows with n_prompt 8"),
        ("decode['avg_ts'] = 0", "avg_ts is 0, where"),
        ("decode['avg_ts'] = 'fast'", "avg_ts is fast, where"),
        ("del prompt['avg_ts']", "avg_ts is None, where"),
        ("decode['avg_ts'] = float('inf')", "Infinity is no number"),
        ("prompt['n_threads'] = 7", "n_threads is 7, where 1 was asked for"),
        ("prompt['n_depth'] = 9", "n_depth is 9, where 0 was asked for"),
        ("print(' ' * 2**21)", "more than 1,048,576 bytes"),
    ],
)
def test_a_program_that_fails_is_told_of_in_a_sentence(fake, more, why):
    done = run_dsv2("bench", *SHORT, "-m", str(GGUF), "--against", fake[0](more))
    assert (done.returncode, done.stdout) == (1, "") and len(done.stderr.splitlines()) == 3, done.stderr
    assert "llama-bench measured nothing\n  why: " in done.stderr and why in done.stderr
    assert "  fix: see what it says alone: " in done.stderr and "\x1b" not in done.stderr


def test_a_program_that_can_not_be_run_is_told_of_before_anything_is_loaded(tmp_path):
    plain, broken = tmp_path / "plain", tmp_path / "broken"
    plain.write_text("")
    broken.write_bytes(b"\x7fELF of another machine")
    broken.chmod(0o755)
    for path, why in (
        (tmp_path / "nowhere", "there is no such file"),
        (plain, "it is not executable"),
        (tmp_path, "it is a folder"),
        (broken, "it can not be started: Exec format error"),
    ):
        done = run_dsv2("bench", *SHORT, "-m", str(GGUF), "--against", str(path))
        assert (done.returncode, done.stdout) == (1, "") and why in done.stderr, done.stderr
        assert "  fix: " in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_the_other_program(fake, start, number):
    make, asked = fake
    more = "import subprocess\nsubprocess.Popen(['sleep', '600'])\ntime.sleep(600)"
    process = start("bench", *SHORT, "-m", str(GGUF), "--json", "--against", make(more))
    until = time.monotonic() + 60
    mine = psutil.Process(process.pid)
    while len(children := mine.children(recursive=True)) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    assert len(children) >= 2 and len(asked()) == 1
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130 if number == signal.SIGINT else 128 + number, "", "")
    assert psutil.wait_procs(children, timeout=10)[1] == []


def test_our_threads_sleep_while_the_other_runs(fake, monkeypatch, v2):
    """All that this process computes meanwhile is a small part of the time."""
    shares, ask = [], Peer.measure

    def timed(*given):
        before = time.process_time(), time.monotonic()
        found = ask(*given)
        shares.append((time.process_time() - before[0]) / (time.monotonic() - before[1]))
        return found

    monkeypatch.setattr(Peer, "measure", timed)
    torch.set_num_threads(2)
    try:
        peer.measure_beside(v2, Work(8, 4), 1, Peer(fake[0]("time.sleep(0.5)"), GGUF))
    finally:
        torch.set_num_threads(1)
    assert max(shares) < 0.3


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (("--batch", "1,2"), "--batch"),
        (("--gpus", "2", "--device", "cpu"), "--gpus"),
        (("--placement", "auto"), "--placement"),
        (("--max-memory", "cpu=1GB"), "--placement"),
        (("--concurrency", "2"), "--against"),
        (("--api", "127.0.0.1:9"), "--api"),
        (("-m", str(DATA / "golden" / "v2")), "--against-file FILE.gguf"),
        (("--against-file", "/nowhere.gguf"), "--against-file"),
        (("--against-file", str(DATA)), "it is a folder"),
        (("--against-flags", "-fa 1 -t 4"), "--against-flags -t"),
        (("--against-flags", "'"), "--against-flags '"),
    ],
    ids=str,
)
def test_what_goes_without_another_program_is_wrong_usage(fake, wrong, named):
    """And is said before that is asked anything."""
    make, asked = fake
    model = () if "-m" in wrong else ("-m", str(GGUF))
    done = run_dsv2("bench", *SHORT, *model, "--against", make(), *wrong)
    assert (done.returncode, done.stdout) == (2, "") and named in done.stderr, done.stderr
    assert asked() == [] and "Traceback" not in done.stderr


@pytest.mark.parametrize("option", [("--against-file", str(GGUF)), ("--against-flags", "-fa 1")], ids=str)
@pytest.mark.parametrize(
    "against", [(), ("--against", "transformers"), ("--api", "127.0.0.1:9", "--concurrency", "2")], ids=str
)
def test_what_is_for_another_program_needs_one(option, against):
    done = run_dsv2("bench", *SHORT, *against, *option)
    assert (done.returncode, done.stdout) == (2, "") and option[0] in done.stderr


def test_a_program_is_found_by_its_name_alone(fake, tmp_path):
    fake[0]()
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = run_dsv2("bench", *SHORT, "-m", str(GGUF), "--json", "--against", "llama-bench", PATH=path)
    assert done.returncode == 0 and json.loads(done.stdout)["against"]["program"] == str(
        tmp_path / "llama-bench"
    )
