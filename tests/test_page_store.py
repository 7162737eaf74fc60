"""Pages on disk: what was read once is found again, to the last bit, and what is damaged is read again."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from running import run_dsv2
from safetensors.torch import load_file, save_file
from test_scheduler import GREEDY, alone, fresh, ids_of, through_kernels, told

from dsv2cli.engine.pages import Pages, names_of
from dsv2cli.engine.request import Request, Result
from dsv2cli.engine.scheduler import Job, Scheduler
from dsv2cli.engine.session import Session
from dsv2cli.formats import PAGE
from dsv2cli.hubs.find import EMBEDDED
from dsv2cli.run.page_store import PageStore, digest_of

REQUEST = Request(GREEDY, 12, frozenset([7]), logprobs=2)
PROMPT = "The hedgehog went to the market to buy bread and honey for his friends. " * 12
GB = 10**9


@pytest.fixture
def open_store(tmp_path):
    """A store of one model after the other in the same folder; all are closed in the end."""
    opened = []

    def open_store(limit=GB, model="a" * 64):
        opened.append(PageStore(open_store.folder, limit, model))
        return opened[-1]

    open_store.folder = tmp_path / "pages"
    yield open_store
    for store in opened:
        store.close()


@pytest.fixture(scope="module")
def fast():
    return through_kernels()


def files(folder):
    return sorted(folder.rglob("*.safetensors"))


def run(runner, job, store, **options):
    """A job alone, in a pool of its own; gives what came of it and how many tokens were computed."""
    scheduler, again = Scheduler(runner, store=store, **options), fresh(job)
    list(scheduler.in_order([again]))
    return told(again), scheduler.computed


@pytest.mark.parametrize("cache", ["auto", "int8", "int6", "int4"])
def test_what_is_on_disk_is_not_read_again_and_gives_the_same_bits(open_store, cache):
    fast, first = through_kernels(cache), open_store()
    job = Job(ids_of(5 * PAGE + 10, seed=1), REQUEST)
    wanted, computed = run(fast, job, first)
    assert wanted == alone(fast, job) and first.loaded == 0
    first.close()
    assert first.written == 5
    second = open_store()
    assert run(fast, job, second) == (wanted, computed - 5 * PAGE) and second.loaded == 5
    other = Job([*job.prompt_ids[: 2 * PAGE + 7], *ids_of(90, seed=2)], REQUEST)
    assert run(fast, other, second)[0] == alone(fast, other) and second.loaded == 7


def test_a_job_that_had_to_leave_its_pages_finds_them_on_disk(open_store, fast):
    store = open_store()
    jobs = [Job(ids_of(5 * PAGE, seed), Request(GREEDY, 100, logprobs=2)) for seed in range(2)]
    scheduler, again = Scheduler(fast, None, 2, 11 * PAGE, store=store), [fresh(job) for job in jobs]
    scheduler.books = [Pages(scheduler.pool.pages, keep=0)]  # RAM keeps none of them
    list(scheduler.in_order(again))
    assert [told(job) for job in again] == [alone(fast, job) for job in jobs]
    assert scheduler.preempted and store.loaded


def flipped(path):
    data = bytearray(path.read_bytes())
    data[random.Random(0).randrange(len(data) // 2, len(data))] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def emptied(path):
    path.write_bytes(b"")


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def a_loop(path):
    path.unlink()
    path.symlink_to(path)


def of_another_size(path):
    """With a hash that is right."""
    held = load_file(path)["page"][:-64].contiguous()
    about = {"format": "dsv2 page 1", "model": "a" * 64, "name": path.stem}
    save_file({"page": held}, path, about | {"sha256": digest_of({"page": held})})


def another_page(path):
    other = next(each for each in files(path.parent.parent) if each != path)
    path.write_bytes(other.read_bytes())


def of_another_model(path):
    held = load_file(path)["page"]
    about = {"format": "dsv2 page 1", "model": "b" * 64, "name": path.stem}
    save_file({"page": held}, path, about | {"sha256": digest_of({"page": held})})


@pytest.mark.parametrize(
    "damage", [flipped, cut, emptied, a_pipe, a_loop, of_another_size, another_page, of_another_model]
)
def test_a_damaged_page_is_read_again_and_written_anew(open_store, fast, damage):
    job = Job(ids_of(4 * PAGE + 1, seed=3), REQUEST)
    first = open_store()
    wanted, computed = run(fast, job, first)
    first.close()
    second = open_store()
    bad = second.file(names_of(job.prompt_ids)[2])
    damage(bad)
    assert run(fast, job, second) == (wanted, computed - 2 * PAGE)
    second.close()
    assert not second.trouble and second.written == 1  # the fourth was whole, but not reached
    assert run(fast, job, open_store())[1] == computed - 4 * PAGE


def test_another_model_or_format_has_other_pages(tmp_path):
    prompt, folder, bf16 = PROMPT, str(tmp_path / "pages"), ("--dtype", "bfloat16", "--cache-store-gb", "1")
    reused = []
    for options in ((), (), ("--cache", "int8"), bf16, (*bf16, "--kernels", "native"), ()):
        asked = ("--json", "--max-new-tokens", "1", "--cache-store", folder, *options)
        done = run_dsv2("complete", prompt, *asked)
        assert done.returncode == 0 and not done.stderr.count("why:"), done.stderr
        reused.append(json.loads(done.stdout)["usage"]["reused_tokens"])
    count = reused[1]
    assert count >= 2 * PAGE and reused == [0, count, 0, 0, 0, count]


def test_the_least_recently_used_go_where_there_are_too_many(open_store):
    store, names = open_store(), names_of(ids_of(40 * PAGE, 4))
    for number, name in enumerate(names[:20]):
        store.write(name, torch.full((10_000,), number, dtype=torch.uint8))
        os.utime(store.file(name), (number, number))
    assert store.load(names[0], 10_000) is not None  # and so it is the latest used
    size = store.file(names[0]).stat().st_size
    other = open_store(limit=10 * size, model="b" * 64)  # a limit for all models together
    other.write(names[30], torch.zeros(10_000, dtype=torch.uint8))
    left = [number for number, name in enumerate(names[:20]) if store.has(name)]
    assert left == [0, *range(13, 20)] and other.has(names[30])
    assert sum(path.stat().st_size for path in files(store.root)) <= 9 * size


def test_a_store_is_its_owners_alone(open_store):
    store = open_store()
    store.save(b"name", torch.zeros(100, dtype=torch.uint8))
    store.close()
    for path in (store.root, *store.root.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path


def write_endlessly(folder, ready):
    store = PageStore(folder, GB, "a" * 64)
    for number in range(10**6):
        store.save(names_of([number] * PAGE)[0], torch.full((200_000,), number % 256, dtype=torch.uint8))
        if number == 3:
            os.write(ready, b"!")


def test_kill_9_while_pages_are_written_leaves_a_store_that_loads(open_store):
    for wait in (0.0, 0.03, 0.1, 0.25):
        heard, ready = os.pipe()
        child = os.fork()
        if not child:
            write_endlessly(Path(open_store.folder), ready)
        os.close(ready)
        assert os.read(heard, 1) == b"!"
        os.close(heard)
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    store = open_store()
    names = {names_of([number] * PAGE)[0]: number for number in range(len(files(store.root)) + 100)}
    assert files(store.root)
    for path in files(store.root):
        name = bytes.fromhex(path.stem)
        held = store.load(name, 200_000)
        assert held is not None and bool((held == names[name] % 256).all())
    for path in list(store.root.rglob("*.unfinished")):  # what was cut short goes with the next page there
        store.write(bytes.fromhex(path.parent.name) + b"more", torch.zeros(10, dtype=torch.uint8))
    assert not list(store.root.rglob("*.unfinished"))


def test_a_full_disk_costs_no_answer_and_is_said_once(tmp_path):
    asked = ("complete", PROMPT, "--max-new-tokens", "5", "--temperature", "0")
    wanted, limits = run_dsv2(*asked), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        done = run_dsv2(*asked, "--cache-store", str(tmp_path / "pages"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.returncode == 0 and done.stdout == wanted.stdout
    assert done.stderr.count("keeps no more pages") == 1 and not files(tmp_path)


@pytest.mark.parametrize("kind", ["a file", "below a file", "read only"])
def test_a_folder_that_can_not_be_used_is_said_before_the_model_is_loaded(tmp_path, kind):
    path = tmp_path / "here"
    if kind == "read only":
        if os.geteuid() == 0:
            path = Path("/proc/self/nowhere")
        else:
            path.mkdir(mode=0o500)
    else:
        path.write_text("")
        path = path / "below" if kind == "below a file" else path
    done = run_dsv2("complete", "Hi", "--model", str(EMBEDDED), "--cache-store", str(path))
    assert done.returncode == 2 and "can not be used" in done.stderr and "loaded" not in done.stderr
    assert not done.stdout


def test_a_new_talk_begins_with_the_pages_of_one_with_the_same_system_prompt(
    open_store, embedded, embedded_tokenizer
):
    system = {"role": "system", "content": PROMPT}
    results = []
    for question in ("Who are you?", "What did he buy?"):
        session, store = Session(embedded, embedded_tokenizer, open_store()), None
        result = Result()
        "".join(session.reply([system, {"role": "user", "content": question}], REQUEST, result))
        turns = [system, {"role": "user", "content": question}, {"role": "assistant", "content": result.text}]
        again = Result()
        "".join(session.reply([*turns, {"role": "user", "content": "And?"}], REQUEST, again))
        store = session.scheduler.store
        store.close()
        results.append((result, again, store.loaded))
    (first, _, none), (second, again, loaded) = results
    assert first.reused_tokens == 0 and none == 0
    assert loaded >= 2 and second.reused_tokens >= loaded * PAGE
    assert again.reused_tokens >= len(second.prompt_ids)  # and a talk goes on as it did
    plain = Session(embedded, embedded_tokenizer)
    alone = Result()
    "".join(plain.reply([system, {"role": "user", "content": "What did he buy?"}], REQUEST, alone))
    assert [token.id for token in alone.tokens] == [token.id for token in second.tokens]


def test_a_store_beside_ranks_that_have_pages_of_their_own_is_refused(tmp_path):
    team = ("--device", "cpu", "--gpus", "2", "--split-attention", "sequences")
    lines = tmp_path / "in.jsonl"
    lines.write_text('{"prompt": "Hi"}\n')
    batch = ("--batch", str(lines), "--output", str(tmp_path / "out.jsonl"))
    done = run_dsv2("complete", *batch, *team, "--cache-store", str(tmp_path / "pages"))
    assert done.returncode == 2 and "--split-attention sequences" in done.stderr
