"""dsv2 bench and dsv2 niah: sweeps that measure what they say, comparisons that know the spread, needles
where they should be.
"""

from __future__ import annotations

import csv
import io
import json

import pytest
import torch
from conftest import CPU, DATA
from rows import scores_of
from running import run_dsv2, run_process

from dsv2cli.checkpoint.load import load_model
from dsv2cli.cli.figures import numbers
from dsv2cli.engine.benchmark import Ours, Timing, Work, compare, profile, random_prompts
from dsv2cli.engine.needle import Haystack, make_prompt, sentences
from dsv2cli.engine.traffic import Traffic, drive
from dsv2cli.errors import UsageError
from dsv2cli.kernels import native
from dsv2cli.run.cpu import CppRunner
from dsv2cli.run.runner import PlainRunner

SHORT = ("--prompt", "8", "--generate", "3", "-r", "2")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("64", [64]),
        ("64,512", [64, 512]),
        ("512-2048+512", [512, 1024, 1536, 2048]),
        ("64-4096*4", [64, 256, 1024, 4096]),
        ("1-3", [1, 2, 3]),
        ("0,100-300*2", [0, 100, 200]),
        ("5,5", [5]),
    ],
)
def test_numbers_are_lists_and_ranges(text, expected):
    assert numbers("--depth", text, 0) == expected


@pytest.mark.parametrize("text", ["", "x", "-1", "1-9*1", "1-9+0", "0-9*2", "1,,2", "1.5"])
def test_what_is_no_range_is_refused(text):
    with pytest.raises(UsageError, match="--depth"):
        numbers("--depth", text, 0)


def test_every_combination_is_measured():
    out = json.loads(
        run_dsv2(
            "bench",
            "--prompt",
            "4-8*2",
            "--generate",
            "3",
            "--depth",
            "0,20",
            "--batch",
            "1,2",
            "-r",
            "2",
            "--json",
        ).stdout
    )
    keys = [(run["batch"], run["depth"], run["prompt_tokens"]) for run in out["runs"]]
    assert keys == [(batch, depth, prompt) for batch in (1, 2) for depth in (0, 20) for prompt in (4, 8)]
    for run in out["runs"]:
        assert 0 < run["itl_seconds"]["p50"] <= run["itl_seconds"]["p90"] <= run["itl_seconds"]["p99"]
        assert ("decode_share_of_bandwidth" in run) == (run["batch"] == 1)


def test_depth_is_in_the_cache_and_not_in_the_prompt(v2):
    """After each measurement the cache holds what came before, so that repetitions are alike."""
    engine = Ours(v2)
    engine.fill(random_prompts(v2, 2, 12, seed=0), 40)
    pool = engine.scheduler.pool

    def latents():
        return [v2.read(pool, sequence.pages, 12) for sequence in engine.sequences]

    before = latents()
    for _ in range(2):
        first, gaps = engine.measure(random_prompts(v2, 2, 3, seed=1), 5)
        assert first > 0 and len(gaps) == 4 and [each.length for each in engine.sequences] == [12, 12]
        assert all(
            torch.equal(old, new)
            for row, again in zip(before, latents(), strict=True)
            for old, new in zip(row, again, strict=True)
        )


def requests(*options):
    done = run_dsv2("bench", "--json", *options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["runs"]


def test_traffic_counts_every_token_every_hit_and_every_page():
    """One after the other: the first reads all, each later one what is its own, in two pages and a part."""
    asked = ("--prompt", "170", "--generate", "4", "-r", "2", "--requests", "5", "--shared-prefix", "0.9")
    one, all_at_once = requests("--concurrency", "1,5", *asked)
    assert one["hit_rate"] == pytest.approx(4 * 153 / (5 * 170), abs=2 / 170)
    assert one["pages_used"] == 3 and one["preempted"] == 0
    assert all_at_once["hit_rate"] >= 4 * 128 / (5 * 170) and 3 < all_at_once["pages_used"] <= 11
    for run in (one, all_at_once):
        spent = [5 * 4 / rate for rate in run["output_tokens_per_second"]["all"]]
        assert run["total_tokens_per_second"]["all"] == pytest.approx([5 * 174 / each for each in spent])
        assert run["requests_per_second"]["all"] == pytest.approx([5 / each for each in spent])
        for name in ("ttft_seconds", "itl_seconds"):
            assert 0 < run[name]["p50"] <= run[name]["p90"] <= run[name]["p99"] < max(spent)


def test_a_request_that_waits_for_its_turn_waits_for_its_first_token(embedded):
    """All come at once to one place: the last waits for all the others."""
    crowd = Traffic(1, 8, 4, requests=6, rate=1e9)
    run = drive(embedded, crowd, seed=1)
    firsts = [each.first for each in run.served]
    assert [len(each.times) for each in run.served] == [4] * 6
    assert firsts == sorted(firsts) and firsts[-1] > 0.7 * run.seconds
    each_in_turn = drive(embedded, Traffic(1, 8, 4, requests=6), seed=1)
    assert max(each.first for each in each_in_turn.served) < 0.5 * each_in_turn.seconds


def test_requests_arrive_at_the_rate_that_was_asked_for(embedded):
    many = Traffic(8, 8, 2, requests=2000, rate=40.0)
    arrivals = many.arrivals(seed=3)
    assert arrivals[0] == 0 and arrivals == sorted(arrivals)
    assert len(arrivals) / arrivals[-1] == pytest.approx(40, rel=0.1)
    few = Traffic(8, 8, 2, requests=4, rate=10.0)
    run = drive(embedded, few, seed=3)
    assert run.seconds >= few.arrivals(seed=3)[-1]
    begins = [each.arrived - run.served[0].arrived for each in run.served]
    assert begins == pytest.approx(few.arrivals(seed=3))


def test_formats_of_the_cache_are_compared_each_with_itself(tmp_path):
    path = str(tmp_path / "a.json")
    asked = ("bench", *SHORT, "--cache", "auto,int8,int6")
    done = run_dsv2(*asked, "--save", path)
    assert [line.split()[0] for line in done.stdout.splitlines()[1:5]] == ["cache", "auto", "int8", "int6"]
    runs = json.loads(run_dsv2(*asked, "--compare", path, "--json").stdout)
    sizes = [run["kv_bytes_per_token"] for run in runs["runs"]]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    assert [each["cache"] for each in runs["compared"]] == ["auto", "int8", "int6"]
    (run,) = requests("--concurrency", "2", "--cache", "int4", *SHORT)
    assert run["cache"] == "int4" and run["kv_bytes_per_token"] < sizes[-1]


@pytest.mark.parametrize(
    "wrong",
    [
        ("--cache", "int7"),
        ("--cache", "auto,,int8"),
        ("--cache", "auto,int8", "--device", "cpu", "--gpus", "2"),
        ("--rate", "5"),
        ("--requests", "5"),
        ("--shared-prefix", "0.5"),
        ("--concurrency", "2", "--shared-prefix", "1.5"),
        ("--concurrency", "0"),
        ("--concurrency", "5000"),
        ("--concurrency", "2", "--rate", "0"),
        ("--concurrency", "2", "--rate", "nan"),
        ("--concurrency", "2", "--batch", "2"),
        ("--concurrency", "2", "--depth", "2"),
        ("--plot", "--concurrency", "2"),
        ("--profile", "--concurrency", "2"),
        ("--concurrency", "2", "--against", "transformers"),
    ],
    ids=" ".join,
)
def test_what_can_not_be_measured_is_wrong_usage(wrong):
    done = run_dsv2("bench", *wrong)
    assert (
        done.returncode == 2 and done.stdout == "" and wrong[-2].replace("--gpus", "--cache") in done.stderr
    )


def test_transformers_does_the_same_work_at_every_depth():
    done = run_process(
        "bench",
        "--prompt",
        "6",
        "--depth",
        "0,9",
        "--generate",
        "3",
        "-r",
        "2",
        "--against",
        "transformers",
        "--json",
    )
    assert done.returncode == 0 and done.stderr == ""
    assert [(run["engine"], run["depth"]) for run in json.loads(done.stdout)["runs"]] == [
        ("dsv2", 0),
        ("transformers", 0),
        ("dsv2", 9),
        ("transformers", 9),
    ]


@pytest.mark.parametrize("fused", [False, True])
def test_the_parts_are_all_of_the_time_and_change_nothing(fused):
    model = load_model(DATA / "golden" / "v2", CPU, torch.bfloat16)
    library, why = native.load()
    if fused and library is None:
        pytest.skip(why)
    runner = CppRunner(model, library) if fused else PlainRunner(model)
    before = scores_of(runner, [*range(1, 6)])
    parts = profile(runner, Work(prompt=5, generate=4, depth=3, batch=2))
    assert torch.equal(scores_of(runner, [*range(1, 6)]), before)
    assert set(parts["decode"]) == {"attention", "experts", "dense layers", "head", "sampling", "the rest"}
    assert set(parts["prefill"]) == set(parts["decode"])
    assert all(seconds > 0 for phase in parts.values() for seconds in phase.values())


def test_formats_hold_the_same_runs():
    table, rows = (
        run_dsv2("bench", *SHORT, "--format", "markdown").stdout.splitlines(),
        run_dsv2("bench", *SHORT, "--batch", "1,2", "--format", "csv").stdout,
    )
    assert (
        len(table) == 3
        and all(line.count("|") == 10 for line in table)
        and table[2].startswith("| dsv2 | 1 | 0 | 8 | 3 |")
    )
    first, second = csv.DictReader(io.StringIO(rows))
    assert (first["batch"], second["batch"]) == ("1", "2") and float(
        first["decode_tokens_per_second_min"]
    ) <= float(first["decode_tokens_per_second_median"])


def test_a_plot_in_the_terminal_and_as_a_picture(tmp_path):
    done = run_dsv2("bench", *SHORT, "--plot", "--svg", str(tmp_path / "a.svg"), "--profile")
    assert done.returncode == 0 and "█" * 10 in done.stdout and "a decode step: " in done.stdout
    picture = (tmp_path / "a.svg").read_text()
    assert picture.startswith("<svg") and "█" in picture and "url(http" not in picture


def test_each_bar_is_named_wholly():
    done = run_dsv2("bench", "--prompt", "4", "--generate", "2,3", "--depth", "0,1", "-r", "1", "--plot")
    for name in ("prompt 4, 2 new", "prompt 4, 3 new, depth 1"):
        assert sum(line.startswith(f"dsv2, {name} ") for line in done.stdout.splitlines()) == 2, done.stdout


@pytest.mark.parametrize("form", ["csv", "markdown"])
def test_what_stands_in_no_row_is_refused(form, tmp_path):
    saved = str(tmp_path / "a.json")
    assert run_dsv2("bench", *SHORT, "--save", saved).returncode == 0
    for words in (("--profile",), ("--compare", saved), ("--plot",)):
        done = run_dsv2("bench", *SHORT, "--format", form, *words)
        assert (done.returncode, done.stdout) == (2, "") and words[0] in done.stderr


def timing(rates):
    out = Timing("dsv2", Work(8, 3))
    for rate in rates:
        out.add(8 / rate, [1 / rate, 1 / rate])
        out.read_bytes_per_second.append(1e10)
        out.gemm_flops_per_second.append(1e11)
    return out.as_json()


@pytest.mark.parametrize(
    ("now", "then", "verdict"),
    [
        ([100, 101, 102], [80, 81, 82], "faster"),
        ([80, 81, 82], [100, 101, 102], "slower"),
        ([90, 100, 110], [86, 96, 106], "same"),
        ([100, 101, 102], [97, 98, 99], "same"),
        ([100], [50], "unknown"),
    ],
)
def test_a_verdict_knows_the_spread(now, then, verdict):
    (found,) = compare([timing(now)], [timing(then)])
    assert (
        found["decode_tokens_per_second"]["verdict"]
        == found["prefill_tokens_per_second"]["verdict"]
        == verdict
    )
    assert found["decode_tokens_per_second"]["ratio"] == pytest.approx(
        sorted(now)[len(now) // 2] / sorted(then)[len(then) // 2]
    )
    assert compare([timing(now)], [timing(then) | {"depth": 5}]) == []


def test_a_result_is_saved_and_compared(tmp_path):
    path = tmp_path / "before.json"
    assert run_dsv2("bench", *SHORT, "--save", str(path)).returncode == 0
    saved = json.loads(path.read_text())
    for run in saved["runs"]:
        for name in ("decode_tokens_per_second", "prefill_tokens_per_second"):
            run[name] = {
                key: [v / 100 for v in value] if isinstance(value, list) else value / 100
                for key, value in run[name].items()
            }
    path.write_text(json.dumps(saved))
    done = run_dsv2("bench", *SHORT, "--compare", str(path))
    # However noisy this machine: a hundredth is further away than any spread.
    assert done.returncode == 0 and "(faster)" in done.stdout and "(slower)" not in done.stdout
    path.write_text("{}")
    assert run_dsv2("bench", *SHORT, "--compare", str(path)).returncode == 2


def test_the_needle_lies_at_its_depth(embedded_tokenizer):
    """And the prompt is as long as it was asked to be, less at most one sentence."""
    hay = Haystack()
    longest = max(len(embedded_tokenizer.encode(sentence)) for sentence in sentences(hay.filler))
    for length in (150, 400, 1500):
        for depth in (0.0, 0.25, 0.5, 1.0):
            ids = make_prompt(embedded_tokenizer, hay, "31415", length, depth)
            assert length - longest <= len(ids) <= length
            text = embedded_tokenizer.decode(ids)
            before, _, after = text.partition(" The pass key is 31415.")
            assert after.endswith("What is the pass key?\n\nAssistant:")
            around = (
                len(before) - len("User: "),
                len(after)
                - len(" Remember it. 31415 is the pass key.\n\nWhat is the pass key?\n\nAssistant:"),
            )
            assert around[0] / sum(around) == pytest.approx(depth, abs=35 / sum(around))


def test_a_heat_map_counts_the_right_answers(tmp_path):
    """The embedded model finds no needle, and says so: `not told` is what it answers, and what is counted
    here.
    """
    (tmp_path / "hay.txt").write_text("The owl sat in a tree. The bear ate honey.")
    asked = (
        "--lengths",
        "64,128",
        "--depths",
        "0,100",
        "--needle",
        "My cup is red.",
        "--question",
        "What is my name?",
        "--haystack",
        str(tmp_path / "hay.txt"),
    )
    out = json.loads(run_dsv2("niah", *asked, "--expect", "not told", "--tries", "2", "--json").stdout)
    assert len(out["trials"]) == 8
    for i, row in enumerate(out["found"]):
        for j, share in enumerate(row):
            cell = out["trials"][4 * i + 2 * j :][:2]
            assert share == sum("not told" in trial["answer"] for trial in cell) / 2
    assert sum(map(sum, out["found"])) > 0
    done = run_dsv2("niah", *asked, "--expect", "Nora")
    assert (
        done.returncode == 0
        and done.stdout.splitlines()[-1] == "0% in all"
        and "100%" in done.stdout.splitlines()[1]
    )


@pytest.mark.parametrize(
    "wrong",
    [
        ("--lengths", "5"),
        ("--lengths", "4096"),
        ("--depths", "101"),
        ("--lengths", "x"),
        ("--haystack", "/nowhere"),
    ],
    ids=" ".join,
)
def test_a_haystack_that_can_not_be_is_wrong_usage(wrong):
    done = run_dsv2("niah", *wrong)
    assert (
        done.returncode == 2
        and done.stdout == ""
        and "error:" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_a_config_file_alone_is_enough_to_measure():
    out = json.loads(
        run_dsv2(
            "bench", "--random-weights", str(DATA / "golden" / "v2" / "config.json"), *SHORT, "--json"
        ).stdout
    )
    assert out["model"].startswith("random weights of") and len(out["runs"]) == 1
