"""lm-evaluation-harness through our own code and through its HFLM with transformers: the same numbers."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, golden_folders
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsv2cli.errors import UsageError
from dsv2cli.hubs.find import EMBEDDED

pytest.importorskip("lm_eval", minversion="0.4.13")

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from dsv2cli.engine.lm_eval import Dsv2, wish_of

CLOSE = 1e-3
TEXT = (
    "The water in the lake was cold and clear, and the boy who had come to fish sat down beside his father. "
    "They did not speak for a long time. Then the sun came over the hill, and all the birds began to sing."
)
QUESTIONS = [
    ("Grass is green. The sky is", ["blue", "an old man", "seven"], 0),
    ("One, two, three,", ["water", "four", "the house"], 1),
    ("The cat sat on the", ["running", "blue", "floor"], 2),
    ("In the morning she drank a cup of", ["tea", "stones", "birds"], 0),
    ("The opposite of hot is", ["warm", "cold", "sun"], 1),
    ("A dog has four", ["legs", "letters", "mornings"], 0),
]
# Where transformers' port (5.24) is another model than DeepSeek's own code.
OTHERWISE = {
    "dense_only": "its config refuses n_routed_experts: null",
    "moe_freq2": "it knows no moe_layer_freq",
    "norm_topk": "it leaves norm_topk_prob out",
    "yarn_mscale_only": "without mscale_all_dim it takes mscale for 1",
}


def asked(*arguments):
    """Requests of lm_eval, as far as models look at them."""
    return [SimpleNamespace(args=each, task_name="test") for each in arguments]


def through_hflm(model, tokenizer, **settings):
    """Without its cache of logits: in 0.4.13 that takes those of other tokens where one text is parted in
    several places.
    """
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, logits_cache=False, **settings)


def theirs_of(folder, **settings):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return through_hflm(model, AutoTokenizer.from_pretrained(EMBEDDED), **settings)


@pytest.fixture(scope="module")
def ours():
    return Dsv2()


@pytest.fixture(scope="module")
def theirs():
    return theirs_of(EMBEDDED)


@pytest.fixture
def golden(tmp_path):
    """Makes our model of a golden checkpoint, which needs a tokenizer that it never asks for tokens."""

    def make(source, **settings):
        folder = tmp_path / source.name
        folder.mkdir()
        files = [file for file in source.iterdir() if file.name != "golden.safetensors"]
        for file in (*files, EMBEDDED / "tokenizer.json", EMBEDDED / "tokenizer_config.json"):
            shutil.copyfile(file, folder / file.name)
        return Dsv2(folder, kernels="off", dtype="float32", **settings)

    return make


def assert_same(ours, theirs):
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert max(abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True)) < CLOSE


def random_pairs(vocab, seed, longest, count=40):
    """Token triples with shared beginnings, one-token choices, and likeliest continuations to be found."""
    draw = random.Random(seed)
    begin = [draw.randrange(2, vocab) for _ in range(longest // 2)]
    triples = []
    for i in range(count):
        context = begin[: draw.randrange(1, len(begin))]
        context += [draw.randrange(2, vocab) for _ in range(draw.randrange(longest // 4))]
        for _ in range(2):
            tokens = [draw.randrange(2, vocab) for _ in range(draw.randrange(1, 4))]
            triples.append(((str(i), str(tokens)), context, tokens))
    return triples


@pytest.mark.parametrize(
    "folder",
    [each for each in golden_folders() if each.name not in OTHERWISE],
    ids=lambda folder: folder.name,
)
def test_log_likelihoods_are_those_of_transformers_on_every_checkpoint(folder, golden):
    mine, theirs = golden(folder), theirs_of(folder)
    triples = random_pairs(mine.opened.config.vocab_size, 7, min(100, mine.max_length))
    likeliest = best_of(theirs, [context for _, context, _ in triples[::8]])
    triples += [(("best", str(i)), triples[8 * i][1], [best]) for i, best in enumerate(likeliest)]
    found = mine._loglikelihood_tokens(triples, disable_tqdm=True)
    assert_same(found, theirs._loglikelihood_tokens(triples, disable_tqdm=True))
    assert all(greedy for _, greedy in found[-len(likeliest) :])


@torch.inference_mode()
def best_of(theirs, contexts):
    return [int(theirs.model(torch.tensor([ids])).logits[0, -1].argmax()) for ids in contexts]


def test_texts_are_as_likely_as_through_hflm(ours, theirs):
    pairs = [(question, " " + choice) for question, choices, _ in QUESTIONS for choice in choices]
    pairs += [(TEXT[:at], TEXT[at:]) for at in range(0, len(TEXT), 9)]  # within words, and of nothing
    pairs += [(f"{TEXT}  ", "two blanks"), ("<｜begin▁of▁sentence｜>Once", " upon a time"), ("你好", "，🙂")]
    assert_same(
        ours.loglikelihood(asked(*pairs), disable_tqdm=True),
        theirs.loglikelihood(asked(*pairs), disable_tqdm=True),
    )


@pytest.mark.parametrize("add", [True, False])
def test_bos_is_added_as_hflm_adds_it_where_that_is_asked_for(add, theirs):
    mine = Dsv2(add_bos_token=add)
    other = through_hflm(theirs.model, theirs.tokenizer, add_bos_token=add)
    for text in ("Hello there", "<｜begin▁of▁sentence｜>Hello"):
        assert mine.tok_encode(text) == other.tok_encode(text)
        assert mine.tok_encode(text, add_special_tokens=False) == other.tok_encode(text, False)
    assert mine.prefix_token_id == other.prefix_token_id and mine.eot_token_id == other.eot_token_id
    assert mine.max_length == other.max_length and mine.max_gen_toks == other.max_gen_toks


def test_rolling_likelihoods_are_those_of_hflm_without_its_second_bos(theirs):
    texts = asked((TEXT,), ("Hello",), (TEXT * 3,), (TEXT,))
    for length in (4096, 33):
        # Where the tokenizer adds a BOS, HFLM 0.4.13 asks how likely that is after the prefix, which is one.
        other = through_hflm(theirs.model, theirs.tokenizer, add_bos_token=False, max_length=length)
        mine = Dsv2(max_length=length).loglikelihood_rolling(texts, disable_tqdm=True)
        assert mine == pytest.approx(other.loglikelihood_rolling(texts, disable_tqdm=True), abs=CLOSE)


def test_what_is_too_long_loses_its_beginning_as_with_hflm(theirs):
    other = through_hflm(theirs.model, theirs.tokenizer, max_length=24)
    mine = Dsv2(max_length=24)
    pairs = asked((TEXT, " and so on"), (TEXT, TEXT[:60]), ("", "A"))
    assert_same(mine.loglikelihood(pairs, True), other.loglikelihood(pairs, True))
    prompts = asked((TEXT, {"until": [], "max_gen_toks": 10}))
    assert mine.generate_until(prompts, True) == other.generate_until(prompts, True)
    with pytest.raises(UsageError, match="continuation of"):
        mine.loglikelihood(asked(("A", TEXT)), True)
    with pytest.raises(UsageError, match="leaves no room"):
        mine.generate_until(asked((TEXT, {"max_gen_toks": 24})), True)


def test_a_prompt_may_fill_the_whole_context(golden):
    folder = next(each for each in golden_folders() if each.name in ("yarn_long_lite", "v2"))
    mine, theirs = golden(folder, max_length=128), theirs_of(folder, max_length=128)
    triples = [(None, list(range(2, 130)), [7]), (None, list(range(2, 90)), list(range(100, 150)))]
    assert_same(mine._loglikelihood_tokens(triples, True), theirs._loglikelihood_tokens(triples, True))


def test_answers_are_those_of_hflm_and_end_before_the_first_stop(ours, theirs):
    settings = [
        {"until": ["\n\n"], "max_gen_toks": 24},
        {"until": [".", ","], "max_gen_toks": 24, "do_sample": False},
        {"until": "the", "max_gen_toks": 12, "temperature": 0.0},
        {"until": [], "max_new_tokens": 20},
    ]
    prompts = [(question, each) for question, _, _ in QUESTIONS for each in settings]
    prompts += [(f"User: {question}?\n\nAssistant:", settings[3]) for question, _, _ in QUESTIONS]
    mine = ours.generate_until(asked(*prompts), disable_tqdm=True)
    assert mine == theirs.generate_until(asked(*prompts), disable_tqdm=True)
    assert not any("." in text or "," in text for text in mine[1:24:4]) and len(set(mine)) > 10


def test_a_stop_text_that_is_a_special_token_is_met_as_one(ours):
    token = ours.tokenizer.fast.token_to_id(ours.tokenizer.bos)
    assert token in ours.request_of({"until": [ours.tokenizer.bos]}).eos_ids
    assert token not in ours.request_of({"until": ["Q:"]}).eos_ids
    assert ours.request_of({"until": "Q:"}).stop == ("Q:",)


def test_sampled_answers_differ_and_come_again_with_torchs_seed(ours):
    settings = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "max_gen_toks": 12, "until": []}
    prompts = asked(*[("The boy", settings)] * 4)
    torch.manual_seed(3)
    first = ours.generate_until(prompts, True)
    assert len(set(first)) > 1
    torch.manual_seed(3)
    assert ours.generate_until(prompts, True) == first


@pytest.mark.parametrize(
    ("settings", "greedy"),
    [
        ({}, True),
        ({"temperature": 0.7}, False),
        ({"do_sample": False, "temperature": 0.7}, True),
        ({"do_sample": True}, False),
        ({"do_sample": True, "temperature": 0}, True),
    ],
    ids=str,
)
def test_do_sample_decides_and_else_the_temperature(settings, greedy, ours):
    assert (ours.request_of(settings).sampling.temperature == 0) is greedy


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_beams": 4}, "num_beams"),
        ({"max_length": 40}, "max_length"),
        ({"temperature": -1}, "temperature"),
        ({"top_k": 0.5}, "top_k"),
        ({"until": 3}, "until"),
        ({"max_gen_toks": 0}, "max_gen_toks"),
        ({"max_gen_toks": 3, "max_new_tokens": 4}, "max_new_tokens"),
        ({"do_sample": "yes"}, "do_sample"),
    ],
    ids=str,
)
def test_no_generation_setting_is_ignored(settings, named, ours):
    with pytest.raises(UsageError, match=named):
        ours.generate_until(asked(("Hello", settings)), True)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("quantise=int4", "quantise"),
        ("trust_remote_code=True", "trust_remote_code"),
        ("quantize=int5", "quantize"),
        ("threads=0", "threads"),
        ("threads=many", "threads"),
        ("cache=true", "cache"),
        ("device=7.5", "device"),
        ("batch_size=0", "batch_size"),
        ("max_length=5000", "max_length"),
        ("max_length=-1", "max_length"),
        ("max_gen_toks=none", "max_gen_toks"),
        ("add_bos_token=maybe", "add_bos_token"),
        ("model=a,pretrained=b", "pretrained"),
        ("model=./nowhere", "nowhere"),
    ],
)
def test_wrong_model_arguments_are_refused_by_name(arguments, named):
    with pytest.raises(UsageError, match=named):
        Dsv2.create_from_arg_string(arguments)


def test_arguments_become_what_their_fields_are():
    given = {"quantize": None, "threads": "2", "gpus": None, "offload_folder": "/tmp/x", "kernels": "off"}
    wish = wish_of(given)
    assert (wish.quantize, wish.threads, wish.gpus, wish.kernels) == ("none", 2, None, "off")
    assert str(wish.offload_folder) == "/tmp/x" and wish.dtype == wish_of({}).dtype


def test_model_args_have_the_last_word_over_options():
    given, options = "device=cpu,batch_size=2,kernels=off", {"device": "cuda:0", "batch_size": 1}
    assert Dsv2.create_from_arg_string(given, options).scheduler.width == 2


def test_arguments_of_the_command_line_choose_the_model_and_how_it_runs():
    text = f"pretrained={EMBEDDED},quantize=int8,cache=int8,threads=1,kernels=off,max_length=512"
    mine = Dsv2.create_from_arg_string(text, {"batch_size": "auto:4", "max_batch_size": 3, "device": None})
    plan = mine.opened.plan
    assert (plan.packing, plan.cache, plan.threads, plan.kernels) == ("int8", "int8", 1, None)
    assert mine.scheduler.width == 3 and mine.max_length == 512
    assert len(mine.generate_until(asked(("The boy", {"max_gen_toks": 5})), True)) == 1


def test_results_keep_their_order_and_go_to_the_cache(ours, monkeypatch):
    kept = {}

    def keep(kind, request, result):
        kept[kind, str(request)] = result

    monkeypatch.setattr(ours, "cache_hook", SimpleNamespace(add_partial=keep))
    pairs = [(question, " " + choice) for question, choices, _ in QUESTIONS for choice in choices]
    several = ours.loglikelihood(asked(*pairs), True)
    alone = [ours.loglikelihood(asked(pair), True)[0] for pair in pairs]
    assert [total for total, _ in several] == pytest.approx([total for total, _ in alone], abs=CLOSE)
    rolled = ours.loglikelihood_rolling(asked(("Hello",)), True)
    texts = ours.generate_until(asked(("Hello", {"max_gen_toks": 3})), True)
    assert set(kept) == {
        *(("loglikelihood", str(pair)) for pair in pairs),
        ("loglikelihood_rolling", "('Hello',)"),
        ("generate_until", "('Hello', {'max_gen_toks': 3})"),
    }
    assert kept["loglikelihood_rolling", "('Hello',)"] == rolled[0]
    assert kept["generate_until", "('Hello', {'max_gen_toks': 3})"] == texts[0]


def test_what_requests_have_in_common_is_read_once():
    mine = Dsv2(kernels="off")
    before = mine.scheduler.computed
    mine.loglikelihood(asked(*[(TEXT * 4, f" {letter}") for letter in "ABCD"]), True)
    prompt = len(mine.tok_encode(TEXT * 4))
    assert mine.scheduler.computed - before == prompt
    mine.loglikelihood(asked(*[(TEXT * 4 + end, " A") for end in (" One", " Two", " Three")]), True)
    assert mine.scheduler.computed - before < prompt + 3 * 64 + 3 * 8


# Whole evaluations.


@pytest.fixture
def task(tmp_path):
    """Makes a task of the questions above, of which lm_eval need not look through its own."""

    def make(kind="multiple_choice", **more):
        lines = [
            {"question": text, "choices": choices, "answer": answer} for text, choices, answer in QUESTIONS
        ]
        (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        own = {
            "multiple_choice": {"doc_to_target": "answer", "doc_to_choice": "choices"},
            "generate_until": {
                "doc_to_target": "{{choices[answer]}}",
                "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
            },
        }
        return {
            "task": f"questions_{kind}",
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(tmp_path / "questions.jsonl")},
                "cache_dir": str(tmp_path / "cache"),
            },
            "test_split": "test",
            "fewshot_split": "test",
            "output_type": kind,
            "doc_to_text": "{{question}}",
            **own[kind],
            **more,
        }

    return make


def evaluate(model, task, **settings):
    return lm_eval.simple_evaluate(
        model=model,
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        **settings,
    )


@pytest.mark.parametrize("shots", [0, 2])
def test_a_task_has_the_same_choices_and_scores_as_through_hflm(shots, task, ours, theirs):
    found = [evaluate(model, task(), num_fewshot=shots) for model in (ours, theirs)]
    name = task()["task"]
    mine, other = ([each["filtered_resps"] for each in result["samples"][name]] for result in found)
    for a, b in zip(mine, other, strict=True):
        assert_same(a, b)
        assert max(range(3), key=lambda i: a[i][0]) == max(range(3), key=lambda i: b[i][0])
    assert found[0]["results"][name] == found[1]["results"][name]


@pytest.mark.parametrize("multiturn", [True, False])
@pytest.mark.parametrize("kind", ["multiple_choice", "generate_until"])
def test_turns_are_sent_as_the_tokens_of_our_own_template(kind, multiturn, task, ours, monkeypatch):
    sent = list[list[int]]()
    submit = ours.scheduler.submit
    monkeypatch.setattr(ours.scheduler, "submit", lambda job: (sent.append(job.prompt_ids), submit(job)))
    result = evaluate(
        ours,
        task(kind, fewshot_config={"sampler": "first_n"}),
        num_fewshot=2,
        apply_chat_template=True,
        fewshot_as_multiturn=multiturn,
        system_instruction="Be brief.",
    )
    bos = ours.tokenizer.bos_id
    assert sent and all(ids.count(bos) == 1 and ids[0] == bos for ids in sent)
    samples = next(iter(result["samples"].values()))
    assert len(samples) == len(QUESTIONS)
    for sample in samples:
        question = sample["doc"]["question"]
        others = [each for each in QUESTIONS if each[0] != question][:2]
        turns = [("user", text, "assistant", choices[answer]) for text, choices, answer in others]
        if multiturn:
            flat = [part for turn in turns for part in (turn[:2], turn[2:])] + [("user", question)]
        else:
            shots = "".join(f"{text} {choice}\n\n" for _, text, _, choice in turns)
            flat = [("user", shots + question)]
        messages = [{"role": role, "content": text} for role, text in [("system", "Be brief."), *flat]]
        wanted = ours.tokenizer.encode_chat(messages)
        assert any(ids[: len(wanted)] == wanted for ids in sent)


def test_an_answer_that_was_begun_is_gone_on_with(ours, theirs):
    turns = [("user", "Which letter?"), ("assistant", "The letter is")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = ours.apply_chat_template(messages, add_generation_prompt=False)
    assert text == theirs.apply_chat_template(messages, add_generation_prompt=False)
    assert ours.tok_encode(text) == ours.tokenizer.encode_chat(messages[:1], "The letter is")
    assert ours.apply_chat_template(messages[:1]) == theirs.apply_chat_template(messages[:1])
    assert ours.chat_template(True) == theirs.chat_template(True)
    with pytest.raises(UsageError, match="no answer"):
        ours.apply_chat_template(messages[:1], add_generation_prompt=False)
    with pytest.raises(UsageError, match="tool_use"):
        ours.chat_template("tool_use")


def test_the_command_line_knows_the_model(tmp_path, task):
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "questions.yaml").write_text(json.dumps(task()))  # which is YAML, too
    words = ["--tasks", str(folder / "questions.yaml"), "--model_args", "kernels=off,threads=1"]
    done = subprocess.run(
        [sys.executable, "-m", "dsv2cli.engine.lm_eval", *words, "--output_path", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "dsv2 (" in done.stdout and "batch_size: auto" in done.stdout and "acc" in done.stdout
    (saved,) = (tmp_path / "out").rglob("results_*.json")
    assert "questions_multiple_choice" in json.loads(saved.read_text())["results"]
