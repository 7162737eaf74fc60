"""One model in several processes: the same numbers and words as in one, and all of them end together."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pexpect
import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import CPU, DATA, golden_folders, load
from rows import Rows, answered, scores_of
from running import run_dsv2, run_process
from safetensors.torch import load_file, save_file

from dsv2cli.checkpoint.blueprint import empty_model, make_quantized, weights_bytes
from dsv2cli.checkpoint.load import load_model, random_model
from dsv2cli.checkpoint.names import destinations
from dsv2cli.checkpoint.pack import quantize_checkpoint
from dsv2cli.engine.request import Request, SamplingParams
from dsv2cli.engine.scheduler import Job, Scheduler
from dsv2cli.errors import UsageError
from dsv2cli.formats import PAGE
from dsv2cli.kernels import linear, native
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.model.share import share_of, split
from dsv2cli.model.size import bytes_by_rank, kv_bytes_per_token
from dsv2cli.run import numa
from dsv2cli.run.cpu import CppRunner
from dsv2cli.run.launch import first_cause
from dsv2cli.run.leader import Leader, follow
from dsv2cli.run.page_store import PageStore
from dsv2cli.run.plan import Plan, ranks_needed, refuse_what_does_not_fit
from dsv2cli.team import Team

V2 = str(DATA / "golden" / "v2")
STEPS = 12  # tokens generated, where a team's are compared with those of one process
GREEDY = ("--temperature", "0")
TEAM = ("--device", "cpu", "--gpus", "2")
TORCHRUN = ("-m", "torch.distributed.run")


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("total", "unit"), [(16, 1), (171 * 64, 64), (5, 1), (2, 1), (100, 64)])
def test_shares_are_whole_units_that_make_up_the_whole(total, unit, size):
    parts = [split(total, unit, rank, size) for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(total))
    assert all(part.start % unit == 0 for part in parts if part)
    assert max(map(len, parts)) - min(map(len, parts)) <= 2 * unit


def in_ranks(work, size, *arguments, method="fork"):
    """Call work(rank, size, port, *arguments) in `size` processes, which join each other there.

    They are forked, and so need not import torch again: in this process no ranks have ever come together.
    """
    arguments = (size, free_port(), *arguments)
    ranks = mp.start_processes(work, arguments, nprocs=size, join=False, start_method=method)
    try:
        while not ranks.join():
            pass
    finally:
        for process in ranks.processes:
            process.kill()


def join(rank, size, port):
    """Make this process one rank of `size`."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)


def compare(rank, size, port, format, folders, out):
    """A rank: the leader writes down how far its logits are from the golden ones (or one process's), and its
    greedy ids.
    """
    join(rank, size, port)
    results = {}
    for folder in folders:
        own = load(folder, format=format, team=Team(rank, size))
        if rank > 0:
            follow(own)
            continue
        model = Leader(own)
        with torch.inference_mode():
            results[folder.name] = distances(model, folder, format)
        model.stop()
    if rank == 0:
        Path(out).write_text(json.dumps(results))
    dist.destroy_process_group()


def distances(model, folder, format):
    golden = load_file(folder / "golden.safetensors")
    alone = load(folder, format=format)
    worst, same = 0.0, True
    for prompt in "ABC":
        ids = golden[f"{prompt}.input_ids"].flatten().tolist()
        row, own = Rows(model), Rows(alone)
        found, expected = row.scores(ids, whole=True), own.scores(ids, whole=True)
        expected = golden[f"{prompt}.logits"] if format is None else expected
        # Every rank holds all latents, also one that has no head.
        pages = row.sequences[0].pages
        pairs = zip(model.read(row.pool, pages, len(ids)), alone.read(own.pool, pages, len(ids)), strict=True)
        distances = [float((a - b).abs().max()) for a, b in pairs]
        worst = max(worst, *distances, float((found - expected).abs().max()))
        if prompt != "A":  # ranks on few cores wait for each other most of the time
            continue
        request = Request(SamplingParams(0.0), STEPS)
        greedy, wanted = (answered(one, ids, request).token_ids for one in (model, alone))
        same = greedy == (golden[f"{prompt}.greedy_ids"].tolist()[:STEPS] if format is None else wanted)
    return worst, same


@pytest.mark.parametrize("format", [None, "int8"])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_say_what_one_says(size, format, tmp_path):
    out = tmp_path / "out.json"
    in_ranks(compare, size, format, golden_folders(), str(out))
    results = json.loads(out.read_text())
    assert len(results) == len(golden_folders())
    for name, (worst, same) in results.items():
        assert worst < 1e-3 and same, (name, worst, same)


def keep_pages(rank, size, port, folder, out):
    """A rank: the leader writes down how many tokens it computes for a prompt at first, and how many where
    all ranks get its pages from a store.
    """
    join(rank, size, port)
    own = load(Path(V2), team=Team(rank, size))
    if rank > 0:
        follow(own)
    else:
        model, request, told = Leader(own), Request(SamplingParams(0.0), STEPS), []
        for _ in range(2):
            store = PageStore(Path(folder), 10**9, "a" * 64)
            scheduler, job = Scheduler(model, store=store), Job([*range(3, 150)], request)
            list(scheduler.in_order([job]))
            store.close()
            told.append((scheduler.computed, job.result.token_ids))
        model.stop()
        Path(out).write_text(json.dumps(told))
    dist.destroy_process_group()


def test_every_rank_gets_the_pages_of_a_store(tmp_path):
    in_ranks(keep_pages, 3, str(tmp_path / "pages"), str(tmp_path / "out"))
    (computed, ids), (again, same) = json.loads((tmp_path / "out").read_text())
    assert computed == 147 + STEPS - 1 and again == computed - 2 * PAGE and same == ids


def compare_packed(rank, size, port, folder, out):
    """As compare, over a packed checkpoint: each rank maps its part of the files."""
    join(rank, size, port)
    worst = {}
    for packed in sorted(Path(folder).iterdir()):
        own = load(packed, team=Team(rank, size))
        if rank > 0:
            follow(own)
            continue
        model = Leader(own)
        found, expected = (scores_of(one, [*range(1, 30)]) for one in (model, load(packed)))
        model.stop()
        worst[packed.name] = float((found - expected).abs().max())
    if rank == 0:
        Path(out).write_text(json.dumps(worst))
    dist.destroy_process_group()


@pytest.mark.parametrize(("size", "format", "group"), [(2, "int4-all", 64), (3, "int8", 32)])
def test_ranks_share_a_packed_checkpoint(size, format, group, tmp_path):
    for folder in golden_folders():
        quantize_checkpoint(folder, tmp_path / "packed" / folder.name, format, group)
    in_ranks(compare_packed, size, str(tmp_path / "packed"), str(tmp_path / "out"))
    worst = json.loads((tmp_path / "out").read_text())
    assert len(worst) == len(golden_folders()) and max(worst.values()) < 1e-3, worst


def prompt_and_steps(runner):
    """Scores of two prompts, one of them read as a whole, and of what is decoded after both."""
    rows = Rows(runner, 2, 128)
    first = [rows.scores([*range(1, 30)], [], whole=True), rows.scores([], [*range(40, 60)])]
    return torch.cat([*first, *(rows.decode([i], [i + 1]).flatten(0, 1) for i in range(3))]).float()


def compare_fast(rank, size, port, format, folder, cache, sequences, out):
    """As compare, in bf16 through the C++ kernels, against fp32; and whether one rank's kernels attend."""
    join(rank, size, port)
    kernels, _ = native.load()
    options = {"format": format, "kernels": kernels}
    team = Team(rank, size, sequences=sequences)
    part = load_model(Path(folder), CPU, torch.bfloat16, team=team, **options)
    own = CppRunner(part, kernels, cache=cache)
    if rank > 0:
        follow(own)
    else:
        model = Leader(own)
        whole = load_model(Path(folder), CPU, torch.bfloat16, **options)
        exact = load(Path(folder), CPU, torch.float32, **options)
        runners = (model, CppRunner(whole, kernels, cache=cache), exact)
        together, alone, wanted = (prompt_and_steps(one) for one in runners)
        for layer in own.fused.attention:
            layer.scale = 1e4
        changed = prompt_and_steps(model)
        model.stop()
        # The median over tokens, as in test_native: a near tie in a router may fall the other way.
        size_of = wanted.norm(dim=-1)
        errors = [float(((found - wanted).norm(dim=-1) / size_of).median()) for found in (together, alone)]
        same = [
            torch.equal(*both) for both in zip(changed.split([29, 26]), together.split([29, 26]), strict=True)
        ]
        Path(out).write_text(json.dumps([errors, same, own.fused.heads]))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("size", "format", "cache", "sequences"),
    [
        (2, None, "auto", False),
        (2, "int8", "auto", False),
        (2, "int4", "int6", False),
        (3, "int4-all", "int8", False),
        (5, None, "auto", False),  # more than there are heads
        (2, "int4", "auto", True),
    ],
)
def test_ranks_on_a_cpu_use_its_kernels(size, format, cache, sequences, tmp_path):
    """As near to fp32 as one process with its kernels, which attend for all but whole prompts."""
    if native.load()[0] is None:
        pytest.skip(native.load()[1])
    in_ranks(compare_fast, size, format, str(V2), cache, sequences, str(tmp_path / "out"))
    (together, alone), same, heads = json.loads((tmp_path / "out").read_text())
    assert together < 1.5 * alone + 0.01
    assert same == [True, heads == 0], "a rank without heads, which packed ones' first is, keeps latents only"


NODES = {"node0": "0-3,8\n", "node1": "4-7,9\n", "node2": "\n", "node10": "10,11"}


@pytest.mark.parametrize(
    ("rank", "size", "allowed", "share"),
    [
        (0, 2, range(12), {0, 1, 2, 3, 8}),  # of three nodes with processors, one, and two
        (1, 2, range(12), {4, 5, 6, 7, 9, 10, 11}),
        (2, 3, range(12), {10, 11}),
        (3, 6, range(12), {4, 5, 6, 7, 9}),  # two ranks a node
        (0, 2, range(8), None),  # somebody has chosen
        (0, 1, range(12), None),
    ],
)
def test_a_rank_stays_near_one_memory(rank, size, allowed, share, tmp_path):
    for name, text in NODES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "cpulist").write_text(text)
    found = numa.processors_by_node(tmp_path)
    assert numa.share_of_processors(rank, size, found, set(allowed)) == share
    (tmp_path / "node1" / "cpulist").write_text("4-x")
    assert numa.processors_by_node(tmp_path) == numa.processors_by_node(tmp_path / "none") == []


BOUND = """
import os, sys, threading
from pathlib import Path
from dsv2cli.run import numa
other = threading.Thread(target=threading.Event().wait, daemon=True)
other.start()
share = numa.bind(1, 2, Path(sys.argv[1]))
print(share == {max(os.sched_getaffinity(0))} == os.sched_getaffinity(other.native_id), len(share))
"""


def test_binding_moves_the_threads_that_are_there(tmp_path):
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(allowed) < 2:
        pytest.skip("there is one processor")
    for i, some in enumerate((allowed[:-1], allowed[-1:])):
        (tmp_path / f"node{i}").mkdir()
        (tmp_path / f"node{i}" / "cpulist").write_text(",".join(map(str, some)))
    done = subprocess.run(
        [sys.executable, "-c", BOUND, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["True", "1"], done.stderr


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux alone tells where a file is mapped")
def test_a_rank_near_one_memory_has_its_part_there_and_not_in_the_file(tmp_path):
    quantize_checkpoint(DATA / "golden" / "v2", tmp_path / "packed", "int4", 32)

    told = []

    def loaded(copied):
        model = load_model(
            tmp_path / "packed", CPU, None, lambda *part: told.append(part), team=Team(1, 2), copied=copied
        )
        lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if "packed/" in line]
        files = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
        state = model.state_dict()
        return state, {
            name for name, it in state.items() if any(a <= it.data_ptr() < b for a, b in files) and it.numel()
        }

    state, mapped = loaded(False)
    assert any(".experts." in name for name in mapped) and not told
    other, mapped = loaded(True)
    assert not mapped and all(torch.equal(state[name], other[name]) for name in state)
    assert told == sorted(told) and told[-1][0] == told[-1][1] == told[0][1]


def compare_triton(rank, size, port, format, folder, out):
    """As compare, through the interpreted Triton kernels: prefill, and steps of which the leader tells;
    against plain torch.
    """
    join(rank, size, port)
    from dsv2cli.run.gpu import TritonRunner  # needs triton

    own = TritonRunner(load_model(folder, CPU, format=format, team=Team(rank, size)))
    if rank > 0:
        follow(own)
    else:
        model = Leader(own)
        alone, prompt = load(folder, format=format), [5, 6, 7]
        request, rows = Request(SamplingParams(0.0), 3), []
        texts = [answered(one, prompt, request).token_ids for one in (model, alone)]
        for one in (model, alone):
            both = Rows(one, 2, 128)
            both.scores(prompt, [8], whole=True)
            rows.append(both.decode([], [9])[0, 0])
        model.stop()
        Path(out).write_text(json.dumps([model.decodes_ahead, texts, float((rows[0] - rows[1]).abs().max())]))
    dist.destroy_process_group()


PATIENT = """
import datetime, torch, torch.distributed as dist
from dsv2cli.checkpoint.found import find
from dsv2cli.run import launch, machine, plan, wish
launch.connect(dist.HashStore(), 0, 1, plan.make_plan(find(None).config, wish.Wish(), machine.look_around()))
print(dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout > datetime.timedelta(days=30))
"""


def test_at_a_prompt_the_others_wait_for_as_long_as_nobody_types():
    done = subprocess.run([sys.executable, "-c", PATIENT], capture_output=True, text=True, timeout=100)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("format", [None, "int4"])
def test_ranks_decode_together_in_steps_of_their_kernels(format, smallest, tmp_path):
    pytest.importorskip("triton")
    in_ranks(compare_triton, 2, format, smallest, str(tmp_path / "out"))
    ahead, (together, alone), distance = json.loads((tmp_path / "out").read_text())
    assert together == alone and distance < 1e-3
    assert ahead == (format is None), "packed, the small heads are all one rank's, and products go one by one"


def compare_sequences(rank, size, port, format, folders, out):
    """As compare, for a batch of which each rank attends to some rows, in which rows end and others begin."""
    join(rank, size, port)
    results = {}
    for folder in folders:
        own = load(folder, format=format, team=Team(rank, size, sequences=True))
        if rank > 0:
            follow(own)
            continue
        model, alone = Leader(own), load(folder, format=format)
        prompts = [list(range(1, 20)), [5, 6], [7], list(range(3, 30))]
        texts, scores = [], []
        for one in (model, alone):
            rows = Rows(one, len(prompts), 128)
            scores.append(torch.stack([rows.last(*prompts, whole=True), rows.last(*[[9]] * 4)]))
            jobs = [Job(prompt, Request(SamplingParams(0.0), 2 + i)) for i, prompt in enumerate(prompts)]
            done = Scheduler(one, None, 3, 1024).in_order(jobs)
            texts.append([job.result.token_ids for job in done])
        model.stop()
        results[folder.name] = float((scores[0] - scores[1]).abs().max()), texts[0] == texts[1]
    if rank == 0:
        Path(out).write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.mark.parametrize(("size", "format"), [(2, None), (3, "int8")])
def test_ranks_with_sequences_of_their_own_say_what_one_says(size, format, tmp_path):
    out = tmp_path / "out.json"
    in_ranks(compare_sequences, size, format, golden_folders(), str(out))
    results = json.loads(out.read_text())
    assert len(results) == len(golden_folders())
    for name, (distance, same) in results.items():
        assert distance < 1e-3 and same, (name, distance, same)


def own_latents(rank, size, port, folder, out):
    """A rank writes down which pages of its pool hold something after a step of all."""
    join(rank, size, port)
    own = load(folder, team=Team(rank, size, sequences=True))
    pools, new_pool = [], own.new_pool
    own.new_pool = lambda tokens=None: pools.append(new_pool(tokens)) or pools[-1]
    if rank > 0:
        follow(own)
    else:
        model = Leader(own)
        Rows(model, 5, 64).scores(*[[7, 8, 9]] * 5, whole=True)
        model.stop()
    held = [int((layer != 0).flatten(1).any(1).sum()) for layer in pools[0].layers]
    Path(f"{out}.{rank}").write_text(json.dumps(held))
    dist.destroy_process_group()


@pytest.mark.parametrize(("size", "held"), [(2, [3, 2]), (3, [2, 2, 1])])
def test_a_rank_keeps_the_latents_of_its_own_sequences_only(size, held, tmp_path):
    out = tmp_path / "out"
    in_ranks(own_latents, size, Path(V2), str(out))
    for rank, pages in enumerate(held):
        assert set(json.loads(Path(f"{out}.{rank}").read_text())) == {pages}


def test_sequences_of_their_own_are_for_batches_and_for_several_ranks(tmp_path):
    alone = run_dsv2("complete", "hello", "--device", "cpu", "--gpus", "2", "--split-attention", "sequences")
    assert alone.returncode == 2 and "is for --batch" in alone.stderr
    one = run_dsv2("bench", "--device", "cpu", "--split-attention", "sequences")
    assert one.returncode == 2 and "is for several ranks" in one.stderr
    (tmp_path / "in").write_text('{"prompt_ids": [1, 2]}\n{"prompt_ids": [3]}\n')
    texts = []
    for options in ((), (*TEAM, "--split-attention", "sequences")):
        run = run_process if options else run_dsv2
        done = run(
            "complete",
            "-m",
            V2,
            "--batch",
            str(tmp_path / "in"),
            "--output",
            str(tmp_path / f"out{len(options)}"),
            *GREEDY,
            "-n",
            "5",
            *options,
        )
        assert done.returncode == 0, done.stderr
        texts.append(
            [
                json.loads(line)["token_ids"]
                for line in (tmp_path / f"out{len(options)}").read_text().splitlines()
            ]
        )
    assert texts[0] == texts[1]
    plan = json.loads(
        run_dsv2(
            "complete",
            "-m",
            V2,
            "--prompt-ids",
            "1",
            *TEAM,
            "--split-attention",
            "sequences",
            "--dry-run",
            "--json",
        ).stdout
    )
    split_heads = json.loads(
        run_dsv2("complete", "-m", V2, "--prompt-ids", "1", *TEAM, "--dry-run", "--json").stdout
    )
    assert plan["split_attention"] == "sequences" and sum(plan["weights_bytes_by_rank"]) > sum(
        split_heads["weights_bytes_by_rank"]
    )


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_parts_of_all_ranks_are_the_whole_and_little_more(size):
    """Only router, norms, and the small matrices that every rank needs are there more than once."""
    whole = load_model(DATA / "golden" / "v2", CPU)
    shared = [
        name
        for name, _ in whole.named_parameters()
        if re.search(r"norm|gate.weight|kv_a_proj|q_a_proj", name)
    ]
    repeated = sum(tensor.numel() for name, tensor in whole.named_parameters() if name in shared) * 4
    parts = [
        weights_bytes(load_model(DATA / "golden" / "v2", CPU, team=Team(rank, size))) for rank in range(size)
    ]
    assert sum(parts) == weights_bytes(whole) + (size - 1) * repeated
    config = whole.config
    assert sum(len(share_of(config, rank, size).experts) for rank in range(size)) == config.n_routed_experts


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("format", [None, "int8", "int4", "int4-all"])
def test_each_ranks_bytes_are_those_of_the_plan(size, format):
    for folder in golden_folders():
        config = DeepseekV2Config.load(folder)
        for rank, planned in enumerate(bytes_by_rank(config, format or "float32", "float32", size)):
            model = empty_model(
                config, torch.device("meta"), torch.float32, Team(rank, size), None if format is None else 64
            )
            if format is not None:
                make_quantized(model, format)
            assert weights_bytes(model) == planned


CONTEXT = 16384  # tokens in each of the four rows of the cache whose memory is measured


def measure(rank, size, port, folder, out):
    """A rank writes down by how much loading its part and filling a cache makes the process grow.

    What a process needs once, of whatever size its model is (the pages of torch's products in bfloat16,
    their scratch), is there before: a small model in the same dtype goes first.
    """
    join(rank, size, port)
    warm = load(DATA / "golden" / "v2", dtype=torch.bfloat16, team=Team(rank, size))
    memory = psutil.Process().memory_info
    for own in (warm, None):
        cache = None  # the one before's goes first
        before = memory().rss
        own = own or load(Path(folder), team=Team(rank, size))
        if rank > 0:
            follow(own)
        else:
            model = Leader(own)
            cache = Rows(model, 4, CONTEXT)
            cache.pool.blocks[0].fill_(0.5)  # as when all of it is used
            cache.scores(*[[0]] * 4)
            model.stop()
            grown = memory().rss - before
    if rank == 0:
        Path(out).write_text(str(grown))
    dist.destroy_process_group()


def test_a_ranks_memory_is_that_of_the_plan(tmp_path):
    """Within 5%, weights and cache of a rank that holds some 330 MB of them."""
    lite = json.loads((DATA / "configs" / "DeepSeek-V2-Lite" / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(
            lite
            | {"num_hidden_layers": 2, "n_routed_experts": 8, "vocab_size": 4000, "intermediate_size": 8192}
        )
    )
    config = DeepseekV2Config.load(tmp_path)
    whole = random_model(config, CPU, torch.bfloat16, None)
    save_file(
        {name: tensor.clone() for name, tensor in destinations(whole).items()}, tmp_path / "model.safetensors"
    )
    del whole
    in_ranks(measure, 2, str(tmp_path), str(tmp_path / "out"), method="spawn")  # forked, one has much memory
    planned = bytes_by_rank(config, "bfloat16", "bfloat16", 2)[0] + 4 * CONTEXT * kv_bytes_per_token(
        config, "bfloat16"
    )
    assert planned > 330e6 and int((tmp_path / "out").read_text()) == pytest.approx(planned, rel=0.05)


def test_what_does_not_fit_is_refused_with_the_nearest_plan_that_does():
    config, gb = DeepseekV2Config.load(DATA / "configs" / "DeepSeek-V2-Chat"), 10**9

    def refused(format, ranks, memories):
        plan = Plan("cuda:0", "bfloat16", format, ranks=ranks)
        try:
            refuse_what_does_not_fit(config, plan, memories)
        except UsageError as error:
            return error.fix
        return None

    assert refused("bfloat16", 8, [80 * gb] * 8) is None
    assert refused("bfloat16", 4, [80 * gb] * 8) == "--gpus 7"
    assert refused("bfloat16", 4, [80 * gb] * 4) == "--gpus 4 --quantize int8"
    assert refused("bfloat16", 1, [192 * gb]) == "--quantize int4"
    assert refused("int4", 1, [80 * gb]) == "--gpus 2 --quantize int4"
    assert refused("bfloat16", 1, [8 * gb]) == "a smaller checkpoint"
    assert ranks_needed(config, "bfloat16", "bfloat16", [80 * gb] * 8) == 7
    assert ranks_needed(config, "int4", "bfloat16", [80 * gb] * 8) == 2
    assert (
        ranks_needed(
            DeepseekV2Config.load(DATA / "configs" / "DeepSeek-V2-Lite"),
            "bfloat16",
            "bfloat16",
            [80 * gb] * 8,
        )
        == 1
    )


def test_every_command_works_through_it(start, tmp_path):
    def told(*arguments):
        process = start(*arguments)
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0 and errors == "", errors
        return out

    story = ("complete", "Once upon a time", *GREEDY, "-n", "20")
    plain = run_dsv2(*story).stdout
    assert run_process(*story, *TEAM).stdout == plain
    assert told(*story, "--speculate", "--device", "cpu", "--gpus", "3") == plain
    samples = ("complete", "Once upon a time", "--samples", "3", "--seed", "1", "--json", "-n", "8")
    texts = [
        [json.loads(line)["text"] for line in out.splitlines()]
        for out in (run_dsv2(*samples).stdout, told(*samples, *TEAM))
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 3
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"prompt": "Once upon " * i}) + "\n" for i in range(1, 8))
    )
    batch = ("complete", "--batch", str(tmp_path / "in.jsonl"), "--batch-size", "3", *GREEDY, "-n", "9")
    assert run_dsv2(*batch, "--output", str(tmp_path / "alone.jsonl")).returncode == 0
    told(*batch, "--output", str(tmp_path / "together.jsonl"), *TEAM)
    alone, answers = (
        [json.loads(line)["text"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("alone", "together")
    )
    assert alone == answers and len(alone) == 7
    sweep = ("--prompt", "8", "--depth", "0,9", "--generate", "3", "--batch", "1,2", "-r", "1")
    assert len(json.loads(told("bench", *sweep, "--json", *TEAM))["runs"]) == 4
    assert len(json.loads(told("niah", "--lengths", "128", "--depths", "0", "--json", *TEAM))["trials"]) == 1
    asked = ("eval", "cmmlu", "perplexity", "--data", str(DATA / "eval"), "--limit", "4", "--json")
    asked += ("--text", str(DATA / "eval" / "NOTICE"))
    one, two = (json.loads(out)["results"] for out in (run_dsv2(*asked).stdout, told(*asked, *TEAM)))
    assert one[0]["right"] == two[0]["right"] and one[0]["reused_tokens"] == two[0]["reused_tokens"]
    assert one[1]["nats_per_token"] == pytest.approx(two[1]["nats_per_token"], abs=1e-4)


def test_a_talk_goes_on_in_a_real_terminal_and_is_resumed_with_its_cache(person):
    nora = person("chat", *GREEDY, *TEAM)
    nora.wait("> ")
    for said, expected in (
        ("My name is Nora.", "Nice to meet you, Nora"),
        ("What is my name?", "your name is Nora"),
    ):
        assert expected in nora.ask(said)
    nora.type("Tell me a story.\r")
    nora.wait(r"\n(\d\d|[5-9]) tokens · .*Ctrl-C stops")
    nora.interrupt()
    nora.wait("interrupted")
    nora.ask("What is my name?")
    nora.leave()
    nora = person("chat", "--continue", *GREEDY, *TEAM)
    nora.wait("> ")
    text = nora.ask("What is my name?")
    assert int(re.search(r"prompt \d+, (\d+) reused", text)[1]) > 60
    nora.type("/quit\r")
    nora.end(0)


def followers(leader, count):
    """Waits until the ranks that a program has started are there."""
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        found = psutil.Process(leader.pid).children()
        if len(found) == count and all("dsv2cli.cli.app" in " ".join(child.cmdline()) for child in found):
            return found
        time.sleep(0.05)
    raise AssertionError("no ranks")


def named(text):
    """Whether a rank is said to have been killed, and nothing worse."""
    return (
        bool(re.search(r"Rank [12] of the model ended.*SIGKILL", text, re.DOTALL)) and "Traceback" not in text
    )


@pytest.mark.parametrize("moment", ["load", "decode"])
def test_a_rank_that_is_killed_ends_all_within_ten_seconds_and_is_named(start, moment):
    process = start("complete", "Once", "--ignore-eos", "-n", "3500", "--device", "cpu", "--gpus", "3")
    ranks = followers(process, 2)
    if moment == "decode":
        process.stdout.read(20)
    ranks[-1].kill()
    killed = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - killed < 10 and process.returncode == 1 and named(errors), errors
    assert not psutil.wait_procs(ranks, timeout=10)[1]


def test_the_rank_that_was_killed_is_named_and_not_one_that_aborts_for_want_of_it():
    lines = ("kill -ABRT $$", "exit 1", "sleep 0.3; kill -KILL $$", "exec sleep 60")
    processes = [subprocess.Popen(["sh", "-c", line]) for line in lines]
    try:
        assert first_cause(processes, 30) == 2
        assert first_cause(processes[:2], 0.3) == 1
        assert first_cause(processes[:1], 0.3) == 0
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_rank_that_is_killed_while_others_read_a_prompt_is_named_in_the_terminal_too(in_terminal):
    child = in_terminal("bench", "--prompt", "4000", "--generate", "2", "-r", "99", *TEAM)
    (rank,) = followers(child, 1)
    child.expect("measuring")  # which is, all but all of the time, reading prompts
    rank.kill()
    killed = time.monotonic()
    child.expect(pexpect.EOF)
    assert time.monotonic() - killed < 10 and named(child.before), child.before
    child.close()
    assert child.exitstatus == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_the_ranks_end_with_their_leader(start, number):
    process = start("complete", "Once", "-n", "3500", "--ignore-eos", *TEAM)
    ranks = followers(process, 1)
    assert process.stdout.read(20)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert not psutil.wait_procs(ranks, timeout=10)[1]


def test_a_rank_that_can_not_load_is_named_with_its_reason(copy_of_v2):
    """Only rank 1 looks for its experts' tensors in the file that is gone for it."""
    done = run_dsv2(
        "complete", "--prompt-ids", "1,2", "--model", str(copy_of_v2), "--device", "cpu", "--gpus", "99"
    )
    assert done.returncode == 2 and "can not share" in done.stderr
    shard = copy_of_v2 / "model-00002-of-000003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-9])
    done = run_process("complete", "--prompt-ids", "1,2", "--model", str(copy_of_v2), *TEAM)
    assert done.returncode == 1 and "truncated" in done.stderr and "Traceback" not in done.stderr


def test_under_torchrun_two_nodes_say_the_same(start):
    """Two agents, as on two machines, meet at one port."""
    asked = ("complete", "Once upon a time", *GREEDY, "-n", "20", "--device", "cpu")
    meet = ("--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(free_port()))
    nodes = [
        start(*asked, by=(*TORCHRUN, "--nnodes", "2", "--node-rank", node, *meet), GLOO_SOCKET_IFNAME="lo")
        for node in "01"
    ]
    outputs = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert outputs[0][0] == run_dsv2(*asked).stdout and outputs[1][0] == ""


def test_torchrun_with_nothing_to_load_ends(start):
    meet = ("--nproc-per-node", "2", "--master-port", str(free_port()))
    process = start("--version", by=(*TORCHRUN, *meet))
    assert process.communicate(timeout=120)[0].startswith("dsv2 0.") and process.returncode == 0


def test_a_rank_that_holds_no_column_adds_nothing(monkeypatch):
    """Also where a single row goes through matrix-vector, as with AMX."""
    monkeypatch.setattr(linear, "one_row_by_mv", lambda: True)
    assert linear.linear(torch.zeros(48, 0), torch.zeros(64, 0)).tolist() == torch.zeros(48, 64).tolist()
    assert linear.linear(torch.ones(1, 3), torch.ones(2, 3)).tolist() == [[3.0, 3.0]]
