"""dsv2 from outside: what reaches stdout and stderr, and with which exit code."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import DATA
from hubs import NAME, Hub, name_hub
from huggingface_hub import constants
from llama_bench import write
from running import run_dsv2, run_process

from dsv2cli.cli.fields import COMPLETE, FIELDS
from dsv2cli.cli.ui import harmless
from dsv2cli.hubs.find import EMBEDDED

V2 = str(DATA / "golden" / "v2")
GREEDY = ("--temperature", "0")


def fails(done, code, *words):
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize(
    ("arguments", "stdin", "environment"),
    [
        (("complete", "upon a time", "--seed", "1", "-n", "5"), "Once\n", {}),
        (("complete", "--prompt-ids", "1,2", "--dry-run", "--json", "--seed", "0"), "", {}),
        (("complete", "hi", "--model", V2), "", {}),
        (("complete", "hi", "--no-such-option"), "", {}),
        (("complete",), b"\xff", {}),
        (
            ("complete", "hi"),
            "",
            {"DSV2_LAUNCHED": "no number", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
        ),
    ],
    ids=["text", "json", "failure", "wrong usage", "bytes", "a bug"],
)
def test_within_this_process_the_program_is_what_it_is_in_its_own(arguments, stdin, environment):
    """Most tests run it within this process, and would prove nothing if it were another one there."""
    own, mine = (run(*arguments, stdin=stdin, **environment) for run in (run_process, run_dsv2))
    assert (mine.returncode, mine.stdout) == (own.returncode, own.stdout)
    if environment:
        assert own.returncode == 1 and own.stderr.startswith("Traceback")
        assert mine.stderr.startswith("Traceback")
        assert mine.stderr.splitlines()[-1] == own.stderr.splitlines()[-1]
    else:
        assert mine.stderr == own.stderr


def test_a_process_may_be_forked_from_this_one(start):
    process = start("complete", "upon a time", "--seed", "1", "-n", "5", "--json", stdin=subprocess.PIPE)
    out, errors = process.communicate("Once\n")
    assert process.returncode == 0 and errors == ""
    done = run_dsv2("complete", "upon a time", "--seed", "1", "-n", "5", "--json", stdin="Once\n")
    assert json.loads(out)["token_ids"] == json.loads(done.stdout)["token_ids"]


def test_complete_prints_the_text_and_nothing_else():
    done = run_dsv2("complete", "Once upon a time", "--seed", "1", "-n", "20")
    assert done.returncode == 0 and done.stderr == ""
    as_json = json.loads(run_dsv2("complete", "Once upon a time", "--seed", "1", "-n", "20", "--json").stdout)
    assert done.stdout == as_json["text"] != ""


def test_the_prompt_is_the_argument_or_all_of_stdin_or_both():
    options = ("--json", "-n", "1", "--seed", "0")
    whole = json.loads(run_dsv2("complete", "Once upon\na time", *options).stdout)["prompt_ids"]
    assert json.loads(run_dsv2("complete", *options, stdin="Once upon\na time").stdout)["prompt_ids"] == whole
    assert (
        json.loads(run_dsv2("complete", "a time", *options, stdin="Once upon\n").stdout)["prompt_ids"]
        == whole
    )


def test_json_tells_all_there_is_to_know():
    done = run_dsv2(
        "complete",
        "--prompt-ids",
        "1,2,3",
        "-m",
        V2,
        "--json",
        "--logprobs",
        "2",
        "-n",
        "4",
        "--ignore-eos",
        *GREEDY,
    )
    assert done.stdout.count("\n") == 1
    out = json.loads(done.stdout)
    assert set(out) == {
        "text",
        "prompt_ids",
        "token_ids",
        "finish_reason",
        "logprobs",
        "prompt_logprobs",
        "usage",
        "timing",
        "seed",
        "model",
    }
    assert out["prompt_ids"] == [1, 2, 3] and len(out["token_ids"]) == 4 and out["finish_reason"] == "length"
    assert out["usage"] == {"prompt_tokens": 3, "generated_tokens": 4, "reused_tokens": 0}
    assert set(out["timing"]) == {
        "load_seconds",
        "ttft_seconds",
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
    }
    assert all(value > 0 for value in out["timing"].values())
    for token_id, entry in zip(out["token_ids"], out["logprobs"], strict=True):
        assert (
            entry["token_id"] == token_id
            and entry["top"][0] == [token_id, entry["logprob"]]
            and len(entry["top"]) == 2
        )


def test_without_a_tokenizer_ids_go_in_and_out():
    done = run_dsv2("complete", "--prompt-ids", "1 2 3", "-m", V2, "-n", "3", *GREEDY)
    assert done.returncode == 0
    assert len(done.stdout.strip().split(",")) == 3


def test_stop_and_finish_reason():
    story = json.loads(run_dsv2("complete", "Once upon a time", "--json", *GREEDY, "-n", "40").stdout)
    stop = story["text"][10:15]
    cut = json.loads(
        run_dsv2("complete", "Once upon a time", "--json", *GREEDY, "-n", "40", "--stop", stop).stdout
    )
    assert cut["finish_reason"] == "stop" and cut["text"] == story["text"][: story["text"].index(stop)]


def test_wrong_usage_is_exit_code_2_and_a_sentence():
    fails(run_dsv2("complete"), 2, "The prompt is empty", "fix:")
    fails(run_dsv2("complete", "hi", "--model", "/nowhere/at/all"), 2, "/nowhere/at/all")
    fails(run_dsv2("complete", "hi", "--model", __file__), 2, "is a file")
    fails(run_dsv2("complete", "hi", "--dtype", "int3"), 2, "int3", "bfloat16")
    fails(run_dsv2("complete", "hi", "--device", "toaster"), 2, "toaster")
    fails(run_dsv2("complete", "hi", "--device", "cuda:77"), 2, "cuda:77")
    fails(run_dsv2("complete", "hi", "--top-p", "7"), 2, "--top-p")
    fails(run_dsv2("complete", "hi", "--no-such-option"), 2, "--no-such-option")
    fails(run_dsv2("complete", "--prompt-ids", "1,x"), 2, "1,x")
    fails(run_dsv2("complete", "--prompt-ids", "1", "text"), 2, "--prompt-ids")
    fails(run_dsv2("complete", "--prompt-ids", "99999"), 2, "99999", "4095")
    fails(run_dsv2("complete", "word " * 5000), 2, "context", "4,096")
    fails(run_dsv2("complete", stdin=b"\xff\xfe"), 2, "UTF-8")
    fails(run_dsv2("bench", "--prompt", "many"), 2, "--prompt")


def test_a_failure_is_exit_code_1_and_a_sentence(copy_of_v2):
    fails(run_dsv2("complete", "hi", "--model", V2), 1, "no tokenizer", "--prompt-ids")
    fails(run_dsv2("chat", "--model", V2), 1, "no tokenizer")
    shard = copy_of_v2 / "model-00002-of-000003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    fails(run_dsv2("complete", "--prompt-ids", "1", "--model", str(copy_of_v2)), 1, shard.name, "truncated")
    offline = run_process("complete", "hi", "--model", "no-such/repository", "--yes", HF_HUB_OFFLINE="1")
    fails(offline, 1, "no-such/repository", "HF_HUB_OFFLINE")


def test_a_reader_that_leaves_early_is_no_failure():
    program = f"{sys.executable} -m dsv2cli complete Once -n 200 --ignore-eos"
    command = f"{program} </dev/null | head -c 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.stdout[1:].strip() == "0" and done.stderr == ""


def test_an_interruption_is_exit_code_130_and_keeps_what_there_was(start):
    process = start("complete", "Once", "-n", "4000", "--ignore-eos")
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors == "" and len(first + rest) > 0


def test_an_interruption_with_json_still_gives_the_object(start):
    process = start("complete", "Once", "-n", "4000", "--ignore-eos", "--json")
    while psutil.Process(process.pid).cpu_times().user < 3:  # it begins within 1, and 4,000 tokens take 10
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors == ""
    assert json.loads(out)["finish_reason"] == "interrupted"


def test_chat_from_a_pipe_answers_line_by_line_and_remembers():
    lines = "Hello\n\nWhat is your name?\n"
    done = run_dsv2("chat", "--system", "Be brief.", *GREEDY, "-n", "30", stdin=lines)
    assert done.returncode == 0 and done.stderr == ""
    assert run_dsv2("chat", "--system", "Be brief.", *GREEDY, "-n", "30", stdin=lines).stdout == done.stdout
    assert len(done.stdout.splitlines()) >= 2


def test_bench_measures_and_its_json_adds_up():
    out = json.loads(run_dsv2("bench", "--prompt", "16,32", "--generate", "4", "-r", "2", "--json").stdout)
    assert [run["prompt_tokens"] for run in out["runs"]] == [16, 32]
    for run in out["runs"]:
        for name in ("prefill_tokens_per_second", "decode_tokens_per_second", "ttft_seconds"):
            assert len(run[name]["all"]) == 2
            assert 0 < run[name]["min"] <= run[name]["median"] <= run[name]["max"]
    assert {run["kv_bytes_per_token"] for run in out["runs"]} == {6 * (64 + 16) * 4}
    assert out["kv_bytes_per_token_expanded"] == 6 * 7 * (48 + 32) * 4
    assert (
        out["weights_bytes"] > 20e6
        and out["load_seconds"] > 0
        and out["peak_memory_bytes"] > out["weights_bytes"]
    )


def test_bench_prints_a_table_and_the_ratio_to_transformers():
    done = run_dsv2("bench", "--prompt", "16", "--generate", "3", "-r", "1", "--against", "transformers")
    assert done.returncode == 0, done.stderr
    assert "decode tok/s" in done.stdout and "dsv2 / transformers: prefill" in done.stdout
    fails(run_dsv2("bench", "--prompt", "5000"), 1, "do not fit")


def test_escape_sequences_never_reach_a_terminal_raw():
    assert harmless("a\x1b[2J\x07b\r\x9b1m\x7f\n\tok 你好 🙂") == "a␛[2J␇b␍\\x9b1m␡\n\tok 你好 🙂"


def test_hostile_names_are_made_harmless_in_errors(in_terminal):
    child = in_terminal("complete", "hi", "--model", "/x\x1b]0;owned\x07")
    child.expect("There is no model at /x␛]0;owned␇")
    child.close()


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_output_is_utf8_whatever_the_locale(locale):
    done = run_process("complete", "--json", "-n", "1", stdin="你好", LC_ALL=locale, PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr


def test_no_model_is_needed_to_ask_for_help():
    for command in ("complete", "chat", "bench"):
        done = run_dsv2(command, "--help")
        assert done.returncode == 0 and "--model" in done.stdout


@pytest.mark.parametrize(
    "command", [("complete", "Once upon a time", "-n", "12"), ("chat", "-n", "12")], ids=["complete", "chat"]
)
def test_sampling_options_do_what_they_say(command):
    """The likeliest token always: the only one of top-k 1, and the only one as likely as the likeliest."""
    stdin = "Tell me a story.\n" if command[0] == "chat" else ""
    likeliest = run_dsv2(*command, "--temperature", "0", stdin=stdin).stdout
    assert (
        likeliest
        and run_dsv2(*command, "--temperature", "5", "--top-k", "1", stdin=stdin).stdout == likeliest
    )
    assert run_dsv2(*command, "--temperature", "5", "--min-p", "1", stdin=stdin).stdout == likeliest
    assert run_dsv2(*command, "--temperature", "5", "--top-p", "0.0001", stdin=stdin).stdout == likeliest
    assert (
        run_dsv2(*command, "--temperature", "0", "--repetition-penalty", "1000", stdin=stdin).stdout
        != likeliest
    )


def test_a_great_penalty_repeats_nothing():
    out = json.loads(
        run_dsv2(
            "complete", "Once", "--temperature", "0", "--repetition-penalty", "1000", "-n", "40", "--json"
        ).stdout
    )
    assert len(set(out["token_ids"])) == 40


def test_every_attention_path_says_the_same(start):
    for command, stdin in ((("complete", "Once upon a time"), ""), (("chat",), "Hello\n")):
        command += (*GREEDY, "-n", "12")
        plain = run_dsv2(*command, stdin=stdin).stdout
        for path in ("absorbed", "expanded", "reference"):
            options = ("--attention", path, "--threads", "2", "--kernels", "off")
            process = start(*command, *options, stdin=subprocess.PIPE)
            assert process.communicate(stdin)[0] == plain != ""


def test_bench_and_niah_run_as_they_are_told(start):
    paths = ("--attention", "absorbed", "--kernels", "off", "--threads", "2")
    process = start("bench", "--prompt", "8", "--generate", "2", "-r", "1", "--json", *paths)
    out = json.loads(process.communicate()[0])
    assert (out["attention"], out["kernels"], out["device"]) == ("absorbed", "plain torch", "CPU, 2 threads")
    process = start("niah", "--lengths", "128", "--depths", "50", "--json", *paths)
    assert len(json.loads(process.communicate()[0])["trials"]) == 1 and process.returncode == 0


def test_quantize_packs_in_the_groups_asked_for(tmp_path):
    done = run_dsv2(
        "quantize", V2, str(tmp_path / "out"), "--to", "int8", "--group", "32", "--kernels", "off"
    )
    assert done.returncode == 0
    packing = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (packing["bits"], packing["group"]) == (8, 32)


def test_a_full_context_from_a_pipe_is_dropped_from_or_refused():
    long = "word " * 1500
    done = run_dsv2(
        "chat", "--on-overflow", "drop", "-n", "3", *GREEDY, stdin=f"{long}\n{long}\n{long}\nHello\n"
    )
    assert done.returncode == 0, done.stderr
    assert (
        run_dsv2(
            "chat", "--on-overflow", "stop", "-n", "3", *GREEDY, stdin=f"{long}\n{long}\n{long}\nHello\n"
        ).returncode
        != 0
    )


def test_plain_shows_markdown_as_it_is_written(person):
    nora = person("chat", "--plain", "--no-save", *GREEDY, "-n", "5")
    nora.wait("> ")
    nora.ask("Hello")
    nora.type("/quit\r")
    nora.end(0)


def paths(value, before=""):
    """The names of all fields, those within others with a dot, of lists their first."""
    if isinstance(value, list):
        return paths(value[0], before) if value else set()
    if not isinstance(value, dict):
        return set()
    inner = [paths(each, f"{before}{name}.") for name, each in value.items()]
    return {before + name for name in value}.union(*inner)


def printed(command, folder):
    """One object as a command prints it, with all that it may hold."""
    brief = ("--temperature", "0", "-n", "3")
    if command == "complete --batch":
        (folder / "in.jsonl").write_text('{"prompt": "Hello", "id": "a"}\n')
        out = str(folder / "out.jsonl")
        run_dsv2("complete", "--batch", str(folder / "in.jsonl"), "--output", out, *brief)
        return (folder / "out.jsonl").read_text()
    if command.startswith(("pull", "models ")) and command != "models --json":
        return of_a_hub(command, folder)
    saved, text = str(folder / "saved.json"), str(DATA / "eval" / "NOTICE")
    known = ("-m", str(folder / "DeepSeek-V2-Lite"))
    words = {
        "complete --json": ("--logprobs", "2", *brief, "Hello"),
        "complete --dry-run --json": ("Hello",),
        "chat --json": brief,
        "info --json": ("--bandwidth", "100", "--gpus", "2"),
        "doctor --json": (),
        "bench --concurrency --json": ("2", "--prompt", "4", "--generate", "2", "-r", "1"),
        "bench --against --json": ("-m", str(DATA / "gguf" / "random-Q4_K_M.gguf"), "--against"),
        "bench --json": ("--prompt", "4", "--generate", "2", "-r", "1", "--profile", "--save", saved),
        "eval --json": ("cmmlu", "--data", str(DATA / "eval"), "--limit", "2", *known),
        "eval perplexity --json": ("--text", text, *known),
        "eval --dry-run --json": ("cmmlu", "--data", str(DATA / "eval"), "--limit", "1"),
        "niah --json": ("--lengths", "128", "--depths", "50"),
        "models --json": (),
        "sessions --json": (),
    }[command]
    if command == "bench --json":
        run_dsv2(*command.split(), *words)
        words += ("--compare", saved)
    if command in ("eval --json", "eval perplexity --json"):
        shutil.copytree(EMBEDDED, known[1])
        run_dsv2(*command.split(), *words, "--save", saved)
        words += ("--against", saved)
    if command == "bench --against --json":
        return run_dsv2("bench", "--json", "-r", "1", *words, write(folder)).stdout
    if command.startswith("bench --concurrency"):
        return run_dsv2("bench", "--json", "--concurrency", *words).stdout
    return run_dsv2(*command.split(), *words, stdin='[{"role": "user", "content": "Hello"}]').stdout


def of_a_hub(command, folder):
    """The same for what fetches, looks at or deletes a model."""
    with Hub(DATA / "golden" / "dense_only") as hub, pytest.MonkeyPatch.context() as patch:
        name_hub(patch, hub.url)
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
        words = command.split()
        if words[0] == "models":
            run_dsv2("pull", NAME)
            return run_dsv2(*words, NAME, *(["--yes"] if "rm" in words else [])).stdout
        return run_dsv2(*words, NAME).stdout


@pytest.mark.parametrize("command", FIELDS)
def test_the_manual_says_what_every_field_of_json_means(command, tmp_path):
    """Each that is printed is named, or lies within one that is; each that is named is printed."""
    known = set(FIELDS[command]) - {"..."} | (set(COMPLETE) if "..." in FIELDS[command] else set())
    shown = paths(json.loads(printed(command, tmp_path)))
    # What the manual says "and so on" about, and what stands there only where something went wrong.
    loose = {
        "info --json": FIELDS["info --json"]["layers"],
        "bench --concurrency --json": " ".join(FIELDS["bench --json"]),
    }.get(command, "")
    named = known | (set(FIELDS["bench --json"]) if command == "bench --against --json" else set())
    unknown = {path for path in shown if not any(f"{path}.".startswith(f"{name}.") for name in named)}
    parents = {name.rpartition(".")[0] for name in named}
    assert {path for path in unknown - parents if path not in loose} == set()
    assert known - shown - {"error"} == set()
