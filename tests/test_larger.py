"""Packed checkpoints that are larger than memory: experts are asked for ahead, and what to expect is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CPU, DATA, ROOT
from rows import Rows
from running import run_dsv2
from test_plan import here

from dsv2cli import disk
from dsv2cli.checkpoint.load import load_model, random_model
from dsv2cli.checkpoint.pack import complete, file_of, packed_pieces, sizes_of, write_piece
from dsv2cli.checkpoint.tokenizer import Tokenizer
from dsv2cli.errors import UsageError
from dsv2cli.hubs.find import EMBEDDED
from dsv2cli.kernels.native import load
from dsv2cli.memory import group_limits
from dsv2cli.model import size
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.run import runner as run_runner
from dsv2cli.run.cpu import CppRunner
from dsv2cli.run.plan import make_plan
from dsv2cli.run.runner import PlainRunner
from dsv2cli.run.wish import Wish

GB = 10**9
GROUPS = Path("/sys/fs/cgroup")


@pytest.fixture(scope="module")
def kernels():
    library, why = load()
    if library is None:
        pytest.skip(why)
    return library


def packed(folder: Path, **changes) -> Path:
    """A packed checkpoint of random weights: V2-Lite's config with changes."""
    source = folder / "source"
    source.mkdir(parents=True)
    raw = json.loads((DATA / "configs" / "DeepSeek-V2-Lite" / "config.json").read_text()) | changes
    (source / "config.json").write_text(json.dumps(raw))
    torch.manual_seed(0)
    model = random_model(DeepseekV2Config.load(source), CPU, torch.bfloat16, "int4")
    out, names, sizes = folder / "packed", packed_pieces(model), sizes_of("int4", 64)
    out.mkdir()
    places: dict[str, str] = {}
    for number, piece in enumerate(names, 1):
        file = file_of(number, len(names))
        places |= dict.fromkeys(write_piece(model, piece, out / file, sizes), file)
    complete(source, out, places, sizes, {})
    return out


SMALL = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "n_routed_experts": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 1024,
    "eos_token_id": 1023,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return packed(tmp_path_factory.mktemp("small"), **SMALL)


def test_asking_ahead_and_holding_the_rest_in_memory_change_no_bit(kernels, small):
    """One token, two at once, and a prompt that needs more experts than are asked for in one go."""
    prompt = [i * 37 % 1000 for i in range(70)]

    def scores(ahead, held):
        model = load_model(small, CPU, torch.bfloat16, held=held)
        rows = Rows(CppRunner(model, kernels, ahead=ahead), 2)
        steps = [rows.last([1], [])] + [rows.last([i], [i + 1]) for i in range(4)]
        return [rows.scores(prompt, prompt[:3], whole=True), *steps, rows.last([5], [])]

    before = kernels.guesses()
    plain = scores(None, held=False)
    for held in (False, True):
        assert all(map(torch.equal, scores("chosen", held), plain))
        assert kernels.guesses() == before
    assert all(map(torch.equal, scores("guess", True), plain))
    assert kernels.guesses()[0] > before[0]


def test_the_next_layers_choice_can_be_guessed(kernels):
    """By the embedded model, which has learned something, of text: more often than two of eight at random."""
    model = load_model(EMBEDDED, CPU, torch.bfloat16)
    rows, before = Rows(CppRunner(model, kernels, ahead="guess")), kernels.guesses()
    for token in Tokenizer(EMBEDDED).encode("The bridge of a river is a place where people meet."):
        rows.last([token])
    guesses, right = (now - then for now, then in zip(kernels.guesses(), before, strict=True))
    assert guesses > 0 and right > 0.5 * guesses


def test_what_was_read_last_is_found_and_nothing_where_a_token_reads_more_than_there_is_room_for():
    assert size.hits_of_last_read(1.0, 0.1) == 1
    assert size.hits_of_last_read(0.09, 0.1) == 0
    assert size.hits_of_last_read(0.11, 0.1) == pytest.approx(0.1)
    assert size.hits_of_last_read(0.2, 0.1) == pytest.approx(1 - 0.9**2)
    assert size.hits_of_last_read(0.5, 1.0) == 0


def test_expected_speed_is_that_of_the_disk_for_what_is_missed_and_of_memory_for_all():
    config = DeepseekV2Config.load(DATA / "configs" / "DeepSeek-V2-Lite")
    listed = {part.name: part for part in size.parts(config, "int4")}
    routed = listed.pop("routed experts")
    always = sum(part.read_bytes for part in listed.values())

    def expected(room, **speeds):
        return size.from_disk(config, "int4", "bfloat16", room, **speeds)

    half = expected(int(size.PROCESS_BYTES + always + routed.bytes / 2), disk=2e9)
    assert half.kept_share == pytest.approx(0.5) and not half.fits and half.holds_rest
    assert half.hit_rate == size.hits_of_last_read(half.kept_share, 6 / 64)
    assert half.missed_bytes_per_token == pytest.approx(routed.read_bytes * (1 - half.hit_rate))
    assert half.tokens_per_second == pytest.approx(2e9 / half.missed_bytes_per_token)
    both = expected(half.memory_bytes, disk=2e9, memory=20e9)
    seconds = half.missed_bytes_per_token / 2e9 + (always + routed.read_bytes) / 20e9
    assert both.tokens_per_second == pytest.approx(1 / seconds)
    assert expected(half.memory_bytes).tokens_per_second is None
    little = expected(GB // 2, disk=1e9)
    assert not little.holds_rest and little.missed_bytes_per_token == always + routed.read_bytes
    assert expected(64 * GB).fits and expected(64 * GB).missed_bytes_per_token == 0


def test_experts_are_asked_for_where_a_packed_checkpoint_does_not_fit(small):
    config = DeepseekV2Config.load(small)
    large = replace(config, n_routed_experts=4096, num_hidden_layers=40)

    def plan(ram, config=large, **wish):
        made = make_plan(config, Wish(**wish), here(ram=ram))
        return made.ahead, made.held

    assert plan(64 * GB) == plan(None) == (None, False)
    assert plan(4 * GB) == ("chosen", True)
    assert plan(4 * GB, read_ahead="guess") == ("guess", True)
    assert plan(4 * GB, read_ahead="off") == (None, False)
    assert plan(4 * GB, kernels="off") == (None, True)
    assert plan(64 * GB, read_ahead="chosen") == ("chosen", True)
    assert plan(GB // 4) == ("chosen", False)
    of_ranks = Wish(device="cpu", gpus=2)
    assert make_plan(large, of_ranks, here(ram=64 * GB)).fits
    assert not make_plan(large, of_ranks, here(ram=4 * GB)).fits
    unpacked = replace(large, packed=None)
    assert plan(4 * GB, unpacked) == (None, False)
    with pytest.raises(UsageError, match="packed checkpoints"):
        plan(4 * GB, unpacked, read_ahead="chosen")
    done = run_dsv2("complete", "--prompt-ids", "1", "--read-ahead", "chosen", "--kernels", "native")
    assert done.returncode == 2 and "packed checkpoints" in done.stderr


def test_the_cache_finds_room_beside_experts_that_do_not(small, monkeypatch):
    runner = PlainRunner(load_model(small, CPU, torch.bfloat16))
    listed = {part.name: part.bytes for part in size.parts(runner.config, "int4")}
    experts, total = listed["routed experts"], sum(listed.values())
    monkeypatch.setattr(run_runner, "ram_bytes", lambda: total - experts // 2)
    assert 0 < runner.free_ram() < experts
    monkeypatch.setattr(run_runner, "ram_bytes", lambda: 4 * total)
    assert runner.free_ram() == pytest.approx(3 * total, rel=0.01)


def test_info_says_what_to_expect_from_the_disk_and_nothing_where_all_fits(small):
    def told(*words):
        done = run_dsv2("info", str(small), *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    listed = {part.name: part for part in size.parts(DeepseekV2Config.load(small), "int4")}
    half = listed.pop("routed experts").bytes // 2
    half += size.PROCESS_BYTES + sum(part.read_bytes for part in listed.values())
    words = ("--context", "1", "--memory", str((half + 4096) / GB), "--bandwidth", "20", "--json")
    facts = json.loads(told(*words))["from_disk"]
    assert facts["kept_share"] == pytest.approx(0.5, abs=0.01) and 0 < facts["hit_rate"] < 0.5
    assert facts["disk_bytes_per_second"] > 0 and facts["tokens_per_second"] > 0
    assert "a token reads" in told("--memory", "0.31")
    assert json.loads(told("--memory", "8", "--json"))["from_disk"] is None
    done = run_dsv2("complete", "--model", str(small), "--prompt-ids", "1,2", "--dry-run", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["from_disk"] is None


def test_the_disk_is_measured_and_an_empty_folder_is_not(small, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(4 * disk.PIECE))
    assert (disk.bytes_per_second(tmp_path) or 0) > 0
    assert disk.bytes_per_second(small / "nowhere") is None


def test_limits_of_control_groups_are_those_of_all_parents_in_both_versions(tmp_path):
    for path, text in {
        "memory/memory.limit_in_bytes": "9223372036854771712",
        "memory/a/memory.limit_in_bytes": "3000",
        "memory/a/b/memory.limit_in_bytes": "4000",
        "memory.max": "max",
        "a/memory.max": "2000",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text + "\n")
    first = list(group_limits("4:memory:/a/b\n1:cpu:/a", tmp_path))
    assert first == [4000, 3000, 9223372036854771712]
    assert list(group_limits("0::/a/gone", tmp_path)) == [2000]


@pytest.fixture
def group():
    """A control group of our own that can limit memory: its folder, and the names of limit and peak."""
    lines = Path("/proc/self/cgroup").read_text().splitlines() if sys.platform == "linux" else []
    own = {names: path for _, names, path in (line.split(":", 2) for line in lines)}
    folder, names = GROUPS / "memory", ("memory.limit_in_bytes", "memory.max_usage_in_bytes")
    if "memory" not in own:
        folder, names = GROUPS / own.get("", "/").strip("/"), ("memory.max", "memory.peak")
    folder /= f"dsv2-tests-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        if not (folder / names[0]).exists():
            pytest.skip("control groups do not limit memory here")
        yield folder, *names
    finally:
        folder.rmdir()


def test_a_checkpoint_twice_as_large_as_memory_decodes(kernels, group, tmp_path):
    """Under a limit that the system holds to by killing; it answers as without one."""
    folder, limit, peak = group
    model = packed(
        tmp_path,
        **SMALL
        | {
            "hidden_size": 1024,
            "moe_intermediate_size": 1024,
            "num_hidden_layers": 9,
            "n_routed_experts": 80,
        },
    )
    files = list(model.glob("*.safetensors"))
    total = sum(file.stat().st_size for file in files)
    (folder / limit).write_text(str(total // 2 // 4096 * 4096))
    for file in files:  # what the tests have in memory counts for the tests
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    words = [sys.executable, "-m", "dsv2cli", "complete", "--model", str(model), "--device", "cpu", "--json"]
    words += ["--prompt-ids", "1,2,3", "--max-new-tokens", "8", "--temperature", "0", "--ignore-eos"]

    def answer(shell):
        done = subprocess.run(["sh", "-c", shell, "sh", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, (done.returncode, done.stderr)
        return json.loads(done.stdout)["token_ids"]

    limited = answer(f'echo $$ > {folder}/cgroup.procs && exec "$@"')
    assert int((folder / peak).read_text()) <= total // 2
    assert limited == answer('exec "$@"')
