"""The one loop: a job gets the same, bit by bit, however the others come and go; nothing is read twice."""

from __future__ import annotations

import itertools
import random
import resource
import time
from dataclasses import replace

import psutil
import pytest
import torch
from conftest import CPU, golden_folders
from rows import answered, scores_of

from dsv2cli.checkpoint.load import load_model
from dsv2cli.engine.grammar import Grammar
from dsv2cli.engine.pages import Pages
from dsv2cli.engine.request import Request, SamplingParams
from dsv2cli.engine.scheduler import Job, Scheduler
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.formats import PAGE
from dsv2cli.hubs.find import EMBEDDED
from dsv2cli.kernels import native
from dsv2cli.run.cpu import CppRunner
from dsv2cli.run.plan import cpp_refusal
from dsv2cli.run.runner import PlainRunner

GREEDY = SamplingParams(temperature=0.0)


def through_kernels(cache="auto"):
    """The embedded model through the C++ kernels."""
    kernels, why = native.load()
    if kernels is None:
        pytest.skip(why)
    return CppRunner(load_model(EMBEDDED, CPU, torch.bfloat16), kernels, cache=cache)


@pytest.fixture(scope="module")
def fast():
    return through_kernels()


def ids_of(count, seed, vocab=4000):
    numbers = random.Random(seed)
    return [numbers.randrange(vocab) for _ in range(count)]


def told(job):
    """All that came of a job, to the last bit of every score."""
    tokens = [(token.id, token.logprob, token.top) for token in job.result.tokens]
    return tokens, job.result.finish_reason, job.error


def fresh(job):
    """The same job, to be run again."""
    return Job(list(job.prompt_ids), job.request)


def alone(runner, job):
    again = fresh(job)
    list(Scheduler(runner).in_order([again]))
    return told(again)


class Poison(Pages):
    """Pages of which those that are given up hold NaN from then on."""

    def __init__(self, pool, *arguments):
        super().__init__(*arguments)
        self.pool, self.poisoned = pool, 0

    def spoil(self, page):
        for block in self.pool.blocks:
            block[page] = float("nan") if block.is_floating_point() else 255  # of which scales are NaN
        self.poisoned += 1

    def forget(self, page):
        super().forget(page)
        self.spoil(page)

    def drop(self, page):
        before = len(self.free)
        super().drop(page)
        if len(self.free) > before and self.free[-1] == page and page not in self.holders:
            self.spoil(page)


def random_jobs(numbers, count, vocab):
    """Some of which begin alike, with settings of their own."""
    begin = [ids_of(numbers.randrange(300), seed, vocab) for seed in range(3)]
    out = []
    for i in range(count):
        ids = [*numbers.choice(begin), *ids_of(numbers.choice([1, 5, 40, 63, 64, 65, 200]), i, vocab)]
        sampling = numbers.choice([GREEDY, SamplingParams(1.0), SamplingParams(0.8, top_p=0.9)])
        request = Request(sampling, numbers.choice([1, 3, 20, 70]), frozenset([7]), seed=i, logprobs=2)
        out.append(Job(ids, request))
    return out


@pytest.mark.parametrize(
    ("seed", "cache"), [*((seed, "auto") for seed in range(4)), (4, "int8"), (5, "int6")]
)
def test_a_job_gets_the_same_bits_however_it_is_scheduled(seed, cache):
    numbers, fast = random.Random(seed), through_kernels(cache)
    jobs = random_jobs(numbers, 12, 4000)
    wanted = [alone(fast, job) for job in jobs]
    preempted = reused = poisoned = 0
    for tokens, width in ((None, 16), (900, 8), (700, 3)):
        scheduler = Scheduler(fast, None, width, tokens)
        keep = numbers.choice([None, 0, 4])
        scheduler.books = [Poison(scheduler.pool, scheduler.pool.pages, keep)]
        again = [fresh(job) for job in jobs]
        for job in again:
            job.request = replace(job.request, speculate=numbers.random() < 0.5)
        coming = list(again)
        numbers.shuffle(coming)
        cancelled = [fresh(job) for job in coming[:4]]
        while coming or scheduler.busy:
            for _ in range(numbers.randrange(4)):
                if coming:
                    scheduler.submit(coming.pop())
            if numbers.random() < 0.1 and cancelled:
                scheduler.submit(cancelled[-1])
            if numbers.random() < 0.1 and cancelled:
                scheduler.cancel(cancelled.pop())
            scheduler.step()
        assert [told(job) for job in again] == wanted
        preempted, reused = preempted + scheduler.preempted, reused + scheduler.reused
        poisoned += scheduler.books[0].poisoned
        assert scheduler.books[0].held == 0 and not scheduler.expected
    assert preempted and reused and poisoned


@pytest.mark.parametrize("format", [None, "int8", "int4", "int4-all"])
@pytest.mark.parametrize("folder", golden_folders(), ids=lambda folder: folder.name)
def test_every_kind_of_layer_and_weight_gives_the_same_bits_in_company(folder, format):
    kernels, why = native.load()
    model = load_model(folder, CPU, torch.bfloat16, format=format, kernels=kernels)
    if why := why or cpp_refusal(model.config, "cpu", "bfloat16"):
        pytest.skip(why)
    runner, vocab = CppRunner(model, kernels), model.config.vocab_size
    part = min(50, model.config.max_position_embeddings // 6)
    begin = ids_of(3 * part, 1, vocab)
    lengths = (1, part, 2 * part)
    jobs = [
        Job(begin[: part * i] + ids_of(count, i, vocab), Request(SamplingParams(1.0), 6, seed=i, logprobs=1))
        for i, count in enumerate(lengths)
    ]
    wanted = [alone(runner, job) for job in jobs]
    again = [Job(job.prompt_ids, replace(job.request, speculate=i == 1)) for i, job in enumerate(jobs)]
    again.append(Job(begin, Request(GREEDY, 20)))
    list(Scheduler(runner, None, 4, 640).in_order(again))
    assert [told(job) for job in again[:3]] == wanted


def test_prompts_that_begin_alike_read_their_beginning_once(fast):
    begin, rest = ids_of(2000, 0), 40
    jobs = [Job(begin + ids_of(rest, seed), Request(GREEDY, 1)) for seed in range(1, 33)]
    scheduler = Scheduler(fast)
    list(scheduler.in_order(jobs))
    assert scheduler.computed <= 1.15 * (len(begin) + len(jobs) * rest)
    assert scheduler.computed == len(begin) + len(jobs) * rest, "also what they share of a page"
    assert scheduler.computed + scheduler.reused == sum(len(job.prompt_ids) for job in jobs)
    assert {job.result.reused_tokens for job in jobs} == {0, 2000}
    assert [told(job) for job in jobs[::8]] == [alone(fast, job) for job in jobs[::8]]


def test_an_answer_gets_a_token_in_every_step_while_a_long_prompt_is_read(embedded):
    scheduler = Scheduler(embedded)
    talker, reader = Job([1, 2, 3], Request(GREEDY, 100)), Job(ids_of(3500, 0), Request(GREEDY, 1))
    scheduler.submit(talker)
    scheduler.step()
    scheduler.submit(reader)
    steps = 0
    while not reader.result.tokens:
        news, computed = scheduler.step(), scheduler.computed
        assert [each.job for each in news if each.job is talker] == [talker]
        steps += 1
    assert computed and steps == -(-3500 // (embedded.chunk // 2 - 1))
    late = Job([5, 6, 7], Request(GREEDY, 1))
    scheduler.submit(Job(ids_of(3500, 1), Request(GREEDY, 1)))
    scheduler.submit(late)
    scheduler.step()
    assert late.result.tokens, "a short prompt does not wait for a long one"


def test_a_pool_too_small_for_two_serves_both_and_one_that_never_fits_is_refused(embedded):
    jobs = [Job(ids_of(100, seed), Request(GREEDY, 120)) for seed in range(2)]
    scheduler = Scheduler(embedded, tokens=5 * PAGE)
    list(scheduler.in_order(jobs))
    assert scheduler.preempted and [job.result.finish_reason for job in jobs] == ["length", "length"]
    assert [job.result.token_ids for job in jobs] == [
        answered(embedded, job.prompt_ids, job.request).token_ids for job in jobs
    ]
    big = Job(ids_of(400, 3), Request(GREEDY, 1))
    with pytest.raises(UsageError) as refused:
        list(scheduler.stream(big))
    assert "400 tokens" in refused.value.sentence and "319" in refused.value.sentence
    assert big.result.finish_reason == "error" and not scheduler.busy
    fills = Job(ids_of(300, 4), Request(GREEDY))  # goes on until the pool is full
    list(scheduler.stream(fills))
    assert fills.result.finish_reason == "length" and len(fills.result.tokens) == 20


def test_samples_read_their_prompt_once_and_share_its_pages(fast):
    ids = ids_of(300, 0)
    jobs = [Job(ids, Request(SamplingParams(1.0), 40, seed=seed, logprobs=1)) for seed in range(8)]
    scheduler = Scheduler(fast)
    list(scheduler.samples(jobs))
    assert scheduler.computed == 300 + sum(len(job.result.tokens) - 1 for job in jobs)
    assert [told(job) for job in jobs] == [alone(fast, job) for job in jobs]
    narrow = [fresh(job) for job in jobs]
    assert list(Scheduler(fast, width=3).samples(narrow)) == narrow
    assert [told(job) for job in narrow] == [told(job) for job in jobs]


@pytest.mark.parametrize("tokens", [None, 400])
def test_the_prompts_own_scores_are_those_of_one_pass(embedded, tokens):
    ids = ids_of(300, 0)
    with torch.inference_mode():
        hidden = embedded.model(torch.tensor(ids))
        wanted = embedded.logits(hidden).log_softmax(-1)
    other = Job(ids_of(200, 1), Request(GREEDY, 100))
    job = Job(ids, Request(GREEDY, 5, prompt_logprobs=2))
    list(Scheduler(embedded, tokens=tokens).in_order([other, job]))
    scored = job.result.prompt_tokens
    assert [token.id for token in scored] == ids[1:]
    torch.testing.assert_close(
        torch.tensor([token.logprob for token in scored]),
        wanted[torch.arange(299), ids[1:]],
        rtol=0,
        atol=1e-4,
    )
    assert all(token.top[0][1] >= token.top[1][1] for token in scored)
    assert job.result.token_ids == answered(embedded, ids, Request(GREEDY, 5)).token_ids


def test_a_deadline_a_cancelled_job_and_a_closed_stream_free_their_pages(embedded):
    scheduler = Scheduler(embedded)
    late = Job(ids_of(50, 0), Request(GREEDY, 500), deadline=time.monotonic() + 1)
    never = Job(ids_of(50, 1), Request(GREEDY, 5), deadline=time.monotonic() - 1)
    gone, stays = Job(ids_of(50, 2), Request(GREEDY, 500)), Job(ids_of(9, 3), Request(GREEDY, 5))
    for job in (late, never, gone, stays):
        scheduler.submit(job)
    for _ in range(3):
        scheduler.step()
    scheduler.cancel(gone)
    while scheduler.busy:
        scheduler.step()
    assert late.result.finish_reason == "deadline" and 1 < len(late.result.tokens) < 500
    assert never.result.finish_reason == "deadline" and not never.result.tokens
    assert gone.result.finish_reason == "interrupted" and 0 < len(gone.result.tokens) <= 3
    assert stays.result.finish_reason == "length" and len(stays.result.tokens) == 5
    stream = scheduler.stream(job := Job(ids_of(9, 4), Request(GREEDY, 50)))
    next(stream)
    stream.close()
    assert job.result.finish_reason == "interrupted" and scheduler.books[0].held == 0


def test_grammars_stops_and_drafts_hold_beside_one_another(embedded, embedded_tokenizer):
    encode, eos = embedded_tokenizer.encode, frozenset({4095})
    grammar = Grammar(embedded_tokenizer, 4096, eos, r"( (one|two) and){3,9} three", None, "")
    requests = [
        Request(SamplingParams(1.0), 60, eos, seed=5, grammar=grammar),
        Request(GREEDY, 60, eos, stop=("and",)),
        Request(SamplingParams(0.7, repetition_penalty=1.3), 60, eos, seed=2, speculate=True),
        Request(GREEDY, 60, eos, speculate=True, logprobs=3),
    ]
    jobs = [Job(encode("1 2 3 1 2 3 The bear"), request) for request in requests]
    for many in (jobs, *[*itertools.permutations(jobs)][1::4]):  # six orders, each with another at its head
        list(Scheduler(embedded, embedded_tokenizer, 3).in_order([fresh(job) for job in many]))
    list(Scheduler(embedded, embedded_tokenizer, 4).in_order(jobs))
    for job in jobs:
        wanted = answered(embedded, job.prompt_ids, job.request, embedded_tokenizer)
        assert (job.result.text, job.result.finish_reason) == (wanted.text, wanted.finish_reason)


def test_memory_is_that_of_the_tokens_held(v2):
    """One long row and fifteen short ones: pages that are in use, and not sixteen long rows."""
    config = PlainRunner(v2.model).config
    jobs = [Job(ids_of(2000, 0, 257), Request(GREEDY, 30))]
    jobs += [Job(ids_of(100, seed, 257), Request(GREEDY, 30)) for seed in range(1, 16)]
    scheduler = Scheduler(v2, width=16)
    most = 0
    for job in jobs:
        scheduler.submit(job)
    while scheduler.busy:
        scheduler.step()
        tokens = sum(active.sequence.length for active in scheduler.active)
        most = max(most, tokens)
        assert scheduler.books[0].held <= -(-tokens // PAGE) + len(scheduler.active)
    used = scheduler.books[0].touched * PAGE * scheduler.pool.bytes_per_token()
    assert config.max_position_embeddings > 2000 < most
    assert used <= 1.05 * (most + 16 * PAGE) * scheduler.pool.bytes_per_token()


def test_where_address_space_is_short_the_pool_is_smaller_and_at_last_refused(embedded):
    before = resource.getrlimit(resource.RLIMIT_AS)
    whole = embedded.new_pool().pages
    size = embedded.new_pool(1).bytes_per_token() * PAGE * whole
    try:
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + size // 3, before[1]))
        pool = embedded.new_pool()
        with pytest.raises(Dsv2Error, match="no memory for the latents"):
            embedded.new_pool(whole * PAGE)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert whole // 8 <= pool.pages < whole


class Device(PlainRunner):
    """Chooses tokens by itself, as a GPU does."""

    decodes_ahead = True
    chunk = 128


@pytest.mark.parametrize("length", [100, 128, 129, 200, 256, 257, 300])
def test_a_device_chooses_only_after_the_last_piece_of_a_prompt(embedded, length):
    ids = ids_of(length, seed=length)
    wanted = answered(embedded, ids, Request(GREEDY, 4)).token_ids
    assert answered(Device(embedded.model), ids, Request(GREEDY, 4)).token_ids == wanted


class Ears:
    """What a job's listener was told."""

    def __init__(self):
        self.rows = {}

    def hear(self, scores, first):
        for row, place in zip(scores, range(first, first + len(scores)), strict=True):
            assert place not in self.rows
            self.rows[place] = row.clone()


@pytest.mark.parametrize("kind", ["plain", "device", "fast"])
def test_a_listener_hears_the_scores_of_the_places_it_asked_for_once(embedded, kind, request):
    """However long the prompts, whatever they share, and with a pool too small for all of them at once."""
    runner = {"plain": embedded, "device": Device(embedded.model)}.get(kind)
    runner = request.getfixturevalue("fast") if runner is None else runner
    common, numbers = ids_of(150, seed=1), random.Random(2)
    prompts = [common + ids_of(length, seed=length) for length in (1, 63, 64, 600)] + [[9], [7, 8]]
    for tokens, width in ((None, 64), (832, 8)):
        scheduler, told = Scheduler(runner, None, width, tokens), []
        for ids in prompts:
            ears, start = Ears(), numbers.randrange(len(ids))
            told.append((Job(ids, Request(GREEDY, 60), listener=ears.hear, from_place=start), ears, start))
        list(scheduler.in_order(job for job, _, _ in told))
        assert tokens is None or scheduler.preempted
        for job, ears, start in told:
            assert not job.error and sorted(ears.rows) == [*range(start, len(job.prompt_ids))]
            wanted = scores_of(runner, job.prompt_ids)[start:]
            found = torch.stack([ears.rows[place] for place in sorted(ears.rows)])
            if kind == "fast":  # where a router may choose another expert for the last bit of a number
                assert torch.cosine_similarity(found, wanted).min() > 0.8
            else:
                assert (found - wanted).abs().max() < 1e-3
            if kind != "fast":  # whose sums in bfloat16 depend on what is read at once
                wanted = answered(runner, job.prompt_ids, Request(GREEDY, 60)).token_ids
                assert job.result.token_ids == wanted
        assert scheduler.reused >= 128  # what is before the places that are asked for is read once
