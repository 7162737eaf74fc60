"""`dsv2 manual`: the manual page dsv2(1), from the commands' own help and from what is said here once."""

from __future__ import annotations

import importlib.metadata
import re
from typing import Any

import typer

from dsv2cli.cli import ui
from dsv2cli.cli.fields import FIELDS

DESCRIPTION = (
    "stdout carries the model's text or JSON and nothing else; progress and remarks go to stderr, and "
    "only where it is a terminal."
)
TOPICS = {
    "CONVERSATIONS": (
        "Enter sends; Alt-Enter, Shift-Enter where the terminal tells it, Ctrl-J or a backslash at the "
        'end begin a new line, and what is pasted, or stands between """ marks, is one message. The '
        "prompt is there while the model is loaded and while it answers: what is sent then waits its "
        "turn. Ctrl-C stops an answer and keeps what was said, a second one within a second leaves; "
        "before the first word the message is back at the prompt. Ctrl-G opens your editor, Ctrl-R "
        "searches what you typed, Ctrl-Z suspends, Ctrl-D leaves. A message that begins with a slash is "
        "typed with two.",
        "/help lists the commands. /undo and /redo, /retry N with /answers N, /edit N and /branch NAME go "
        "back and try another way; nothing that was said is ever lost by it. /file PATH puts files before "
        "the next message, with lines (a.py:10-40), patterns, folders (what git ignores is left out) or "
        "what a command writes (!git diff); @path in a sentence does so, too. The bar above the prompt "
        "shows how much of the context is used, the message and its files included.",
        "A conversation is saved in a file that only you can read, and that only grows: a message before "
        "the model is asked, an answer as it comes. --continue goes on with the latest, --resume NAME "
        "with any, or with a JSON list of messages; the cache saved beside the text makes that cost no "
        "prefill. A message that had no answer when the program was killed is back at the prompt. One "
        "that is open in another terminal can be gone on with on a branch of its own, in the same file. "
        "dsv2 sessions and /sessions list them, /find searches them, /rename, /save and /delete do what "
        "they say.",
        "When the context is full, dsv2 asks whether to leave out the oldest turns of what is sent, to "
        "send a summary in their place, or to stop; --on-overflow answers beforehand. The record keeps "
        "them all.",
        "Every answer has random numbers of its own, all of them from the one seed: the same messages "
        "with the same --seed give the same talk.",
        "From a pipe each line is a turn, and only the answers are printed; with --json each line is a "
        "list of messages, and each answer an object; a line that is none has an object with its error, "
        "and the exit code is that of the first.",
    ),
    "PROMPTS AND ANSWERS": (
        "With --json a run of complete is one object, whose fields are below. --speculate drafts tokens from "
        "the text so far and checks several at once: the same words, sooner where they repeat. --samples "
        "reads one prompt once for several answers.",
        "--fim-prefix and --fim-suffix fill the hole between two texts, --fim-file FILE the place in a "
        "file that says <CURSOR>, with the checkpoints that were trained for it (Coder-V2's base "
        "models); others are refused for want of the tokens.",
        "A line of --batch holds prompt, prompt_ids or messages, and may have an id, seed, stop, "
        "max_new_tokens and sampling of its own. Answers stand in the order of the prompts, a line each: its "
        "id, line, the fields of --json, an error where there is one, and a fingerprint of the line, the "
        "options and the model. After an interruption the same command goes on where it was: no line is lost "
        "or repeated, and answers to other prompts, with other options or by another model are refused, "
        "unless --restart. IN.jsonl may be a pipe or -, and OUT.jsonl too: lines are answered as they come.",
        "What --json prints is strict JSON in UTF-8. A text that a message spells like a special token stays "
        "text; a prompt of complete may spell them. The end of the last line of piped text is no part of it.",
        "Ranges of bench and niah are a number, a list (64,512), or a range (512-2048+512, 64-4096*2).",
    ),
    "WEIGHTS": (
        "int8 has a scale for each 64 (or --group 32) numbers of a row. int4 has 16 values that lie "
        "closer together near zero, and a scale searched for the least squared error; the head "
        "and kv_a_proj_with_mqa, which makes the latents, keep 8 bits, but 4 in int4-all; embedding, "
        "kv_b_proj, router and norms are not packed. Of the small model in the package 4 bits for each alone "
        "change the loss on texts that it has not seen by +0.48% (experts and dense layers), +0.04% (q_proj "
        "and o_proj), +0.11% (kv_a_proj_with_mqa) and +1.00% (head, which is its embedding); int4 by 0.54%. "
        "Packed files are safetensors; config.json names the format and the SHA-256 of what "
        "they were made from.",
        "On a CPU, layers run through C++ kernels, compiled on first use for the very processor (AMX, "
        "AVX-512 with VNNI and BF16, AVX2 with or without VNNI, ARM's NEON, or whatever the compiler makes "
        "of it) and kept in the cache folder. "
        "Without a compiler, or with --kernels off, plain torch computes the same. They take bf16 "
        "activations: --dtype bfloat16 where a checkpoint is in fp32.",
        "On a CPU a packed checkpoint may be larger than memory, or than the limit of a control group: "
        "experts stay in the file, what every token reads is held in memory if it finds room there, and the "
        "system is asked for the chosen experts of a layer all at once, before their products. What was "
        "read last stays as long as there is room. --read-ahead guess also asks for those that the next "
        "layer would choose from what this one was given; off leaves all to the system; chosen asks where "
        "all fits, too. info, --dry-run and a line at the beginning say what speed to expect, from reading "
        "the files for a fifth of a second.",
        "On a GPU, Triton kernels do the same from bf16, fp16 or fp32 weights and from codes as they "
        "lie, and a decode step is one CUDA graph. --kernels triton-eager leaves the graphs out, "
        "--kernels off all of it.",
        "The latents of all that runs lie in one pool of pages of 64 tokens, and what begins like an "
        "earlier prompt finds its pages there. --cache int8, int6 or int4 holds them in fewer bits: for "
        "V2-Lite 17,334, 13,068 or 9,612 bytes a token instead of 31,104. On a CPU with its kernels an "
        "answer does not depend, to the last bit, on what else runs; elsewhere it may differ by rounding.",
        "--cache-store DIR (or auto, a place of our own) keeps full pages of prompts in files, readable by "
        "their owner only, and finds "
        "them again in any later run: a long document or system prompt is read once. A page counts only "
        "for the model, number formats and kernels that made it, and only as it was written; one that is "
        "damaged is read anew. Latents say nearly as much as the text itself: keep the folder as private.",
        "--attention fixes the attention path. auto counts the multiplications: a first prefill expands "
        "keys and values from the cached latents, a decode step attends to the latents themselves.",
    ),
    "MODELS": (
        "--model takes a folder; a short name (v2, v2-chat, v2-lite, v2-lite-chat, v2.5, coder-v2, "
        "coder-v2-lite and others); a repository, OWNER/NAME or with @REVISION behind it, with hf: or ms: "
        "before it where only that hub's copy is meant; or, with :int4 behind the name, a packed copy. It is "
        "looked for in the caches of Hugging Face and ModelScope and in this program's own folder; nobody "
        "is asked. One that is not here is offered at a terminal, fetched with --yes, and else an error that "
        "says what to type.",
        "dsv2 pull downloads safetensors, configs and tokenizer, never code, into the hub's own cache or a "
        "folder (--to). What it was stopped at it goes on with, at the byte. A file gets its name when its "
        "length and hash are those that were published, and SHA256SUMS, or a list beside the hub's "
        "snapshot, says them from then on. It uses plain HTTP only, which HF_ENDPOINT and proxies lead, and "
        "no other transport past them; a saved token goes to its own hub and, unless --send-token says "
        "otherwise, to no other host. --quantize packs each layer as its files have come, and deletes them.",
        "dsv2 models lists what is here, with Ollama's models of this family and downloads that were "
        "interrupted; verify reads a copy whole, without a network, or with --online against what the hub "
        "says today; rm deletes one, and no file that another revision needs.",
        "A GGUF file runs as it is: --model FILE.gguf (of one in parts any part), a folder with one, "
        "OWNER/NAME/FILE.gguf of a repository, or ollama:NAME:TAG of Ollama's store. F32, F16, BF16, Q4_0, "
        "Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, IQ4_NL and IQ4_XS are read, and no IQ1 to IQ3, TQ or MXFP4. "
        "Its codes and scales are kept to the bit, those of 5 and 6 bits in a byte and those of 2 and 3 bits "
        "in half of one, so that Q2_K takes the memory of Q4_K; on a GPU the K types' scales are multiplied "
        "out in fp16. kv_b_proj, norms and router are numbers. Settings, tokenizer and chat template are "
        "those in its metadata, sampling, too, or else what the official checkpoints have (temperature 0.3, "
        "top_p 0.95); Ollama's own template, system prompt and parameters are not read. Of a repository "
        "files in subfolders are neither fetched nor found by name: give their path.",
        "Checkpoints by AWQ, GPTQ, FP8 (E4M3), compressed-tensors (int4, int8, fp8) and MLX run so, too; "
        "those with act-order, whose columns are in another order, are packed anew in 8 bits. Activations "
        "are not rounded to what their settings say. info says what each part becomes; --quantize packs the "
        "weights that the codes stand for anew, and dsv2 quantize keeps the codes, in files that load at "
        "once.",
    ),
    "SERVING": (
        "dsv2 serve answers other programs by OpenAI's API: /v1/models, /v1/chat/completions and "
        "/v1/completions (texts, token ids, lists of them, suffix, echo with the prompt's logprobs), "
        "streamed or whole, with seeds, n, stop, logprobs, response_format and, in a chat, tools; by "
        "/v1/responses, of which nothing is kept; by Anthropic's /v1/messages and its count_tokens; and "
        "there are /tokenize, /detokenize, /tokenizer_info, /health and /metrics. A field is done or "
        "refused by its name, and "
        "a prompt is never cut. Requests run side by side, prompts that begin alike are read once, and "
        "who goes away frees the place at once. At / there is a page to talk with the model. It needs the "
        "extra serve.",
        "It listens on this machine alone, goes by the names localhost, 127.0.0.1 and ::1 only, and lets "
        "no web page from elsewhere in but those of --allow-origin. Any other --host needs a key, best "
        "in DSV2_API_KEY, or --no-auth. SIGTERM and Ctrl-C end it when open answers are done, within "
        "--grace.",
    ),
    "EVALUATION": (
        "dsv2 eval asks benchmarks in the settings of DeepSeek's paper (arXiv 2405.04434). mmlu, ceval and "
        "cmmlu (5 examples) compare the likelihoods of the letters, hellaswag (10) those of the endings a "
        "token, arc (ARC-Challenge, 25) those of the answers over what they have without the question; bbh "
        "(3), gsm8k (8) and math (4, Minerva's) read an answer out of what the model writes, humaneval and "
        "mbpp (3) run it. --chat puts each question to a chat model as a message. Examples stand before a "
        "question word by word as --dry-run shows them; what questions have in common is read once.",
        "Data sets come from the hub, or from --data: a folder with files or folders that are called like "
        "the tasks, in the shapes in which their authors or the hub publish them (JSON, JSON lines, CSV, "
        "Parquet with pyarrow, gzip). bbh's examples with reasoning are its authors' cot-prompts/NAME.txt: "
        "give a copy of their repository; else the first three of each task stand before the others with "
        "their answers alone, and the result says so. C-Eval's and HellaSwag's answers are published for "
        "val alone.",
        "A score has the standard error of a sample (of bbh, ceval and cmmlu that of a mean of subsets); "
        "one of perplexity is that between blocks of 128 tokens. The published score is of the same model "
        "where its name says which it is.",
        "--save writes what comes of each question, as it comes, and goes on there after an interruption; a "
        "file of another model, number format or option is refused. --against FILE, or --against with "
        "options in quotes for another set-up of this run (it runs first, in a process of its own), says "
        "what differs: of texts KL(the other || this) in nats a token, from at most 4,096 places and "
        "without a tail of 0.1% of probability (or beyond 1,024 tokens), so that it is a little less than "
        "the whole; the share of places with the same likeliest token; the ratio of perplexities. Of "
        "questions: those that only one of both answered rightly, with McNemar's exact test.",
        "Programs that a model writes are run with --run-code alone, each in a box: no network, no other "
        "process, nothing of the disk but Python itself, 10 s, 1 GiB. bubblewrap makes it, or else Linux's "
        "namespaces; where neither can, nothing is run. Without it they are saved for others to score, the "
        "whole program as program and, for HumanEval's own script, task_id and completion.",
        "lm-evaluation-harness runs its tasks over this engine (extra eval): python -m "
        "dsv2cli.engine.lm_eval --model_args model=DIR,quantize=int4 --tasks ...; over HTTP its "
        "local-completions does, beside dsv2 serve, with base_url=http://127.0.0.1:8000/v1/completions and "
        "tokenizer_backend=remote. Answers in the forms of MT-Bench's and AlpacaEval's judges are among the "
        "recipes.",
    ),
    "SEVERAL DEVICES": (
        "--gpus N shares one model out over N GPUs: attention heads, columns of the dense and shared "
        "MLPs, routed experts and vocabulary are split, each process reads only its slices of the "
        "shards, and every process has the latent cache. The command starts the other processes itself "
        "and ends them with it; where one dies, all end with a sentence that names it. With --device cpu "
        "they are processes on the CPU, which is for trying it out.",
        '--placement auto, or a JSON file such as {"model": 0, "model.layers.20": "cpu", "lm_head": '
        '"disk"}, puts whole layers in places; one in RAM or on disk is brought to the device each time '
        "it runs. --experts cpu does better for the routed experts: they are computed in RAM, and only "
        "the tokens travel; --quantize then packs the experts alone.",
        "With --split-attention sequences, batches give each process whole sequences instead of some "
        "heads of all: it keeps only their latents, and has all of attention's weights.",
        "info --bandwidth with --gpus predicts a speed, from the bytes that the busiest rank reads and "
        "from what others have published of kernels and sums: 85% of the bandwidth, 1.3 us a launch, 8 "
        "us a sum. It is not measured.",
        "info --bandwidth alone predicts one GPU with this version's kernels, from the code that they "
        "compile to and that has never run: 60% of the bandwidth, 6.2 instructions a weight in 4 bits and "
        "4.3 in 8, of which 40% hide behind reading, 132 multiprocessors at 1.7 GHz, and 2 us for each of "
        "some ten kernels a layer. It holds to 20% at best, and is not measured.",
    ),
}
EXIT_CODES = {
    "0": ("done: end of text, or the token limit; also when whoever reads the pipe has had enough"),
    "1": "failed: a damaged file, no tokenizer, a download that did not work",
    "2": (
        "wrong usage: an unknown option or value, no model there, an empty prompt, one longer than the "
        "context"
    ),
    "3": "with --fail-on-length only: the answer ended at the token limit",
    "130": "interrupted by Ctrl-C; what had been generated is printed",
    "143": "ended by SIGTERM, 129 by a terminal that was closed; what had been generated is printed",
}
ENVIRONMENT = {
    "DSV2_COMMAND_OPTION": (
        "the default of an option, such as DSV2_CHAT_TEMPERATURE=0.3; it comes before the configuration "
        "file, and the command line before both"
    ),
    "DSV2_CONFIG": "the configuration file; dsv2 config says where it is otherwise, and shows an example",
    "DSV2_API_KEY": (
        "the key that clients of dsv2 serve must send, and that --api sends, else OPENAI_API_KEY; a table "
        "[servers.NAME] may name another variable"
    ),
    "NO_COLOR": "no colours, and Markdown as it is written",
    "HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE": "where models are kept and come from, the key to "
    "private ones, and no downloads",
    "MODELSCOPE_CACHE, MODELSCOPE_ENDPOINT, MODELSCOPE_API_TOKEN": "the same of ModelScope",
    "OLLAMA_MODELS": "where Ollama keeps its models",
    "CXX": "the C++ compiler for the CPU kernels",
}


def manual(context: typer.Context) -> None:
    """Print the manual page: dsv2 manual | man -l -"""
    ui.emit(page(context.find_root().command))


FILES = {
    "~/.config/dsv2/config.toml": "the configuration",
    "~/.local/share/dsv2/sessions/NAME.jsonl": "a conversation, and beside it NAME.safetensors, its cache",
    "~/.local/share/dsv2/history": "what was typed at prompts",
    "~/.cache/dsv2/kernels": "compiled kernels, each with its SHA-256",
    "~/.cache/dsv2/gguf": "what GGUF files say of themselves, as a checkpoint's files",
}
EXAMPLES = {
    'dsv2 chat --system "You are a careful proof-reader."': "a conversation with the small model inside",
    "dsv2 complete --chat < question.txt": "one answer",
    "dsv2 complete --batch in.jsonl --output out.jsonl -m DIR": "many, going on where it was stopped",
    'dsv2 eval perplexity --text FILE -m DIR --quantize int4 --against "--quantize none"': (
        "what 4 bits cost on a text"
    ),
    "dsv2 quantize DIR OUT --to int4": "a checkpoint in a quarter of its size",
    "dsv2 chat -m ollama:deepseek-coder-v2": "with what Ollama has fetched",
    "dsv2 serve -m DIR": (
        "for other programs: an editor's base URL is http://127.0.0.1:8000/v1, and a browser finds a page at "
        "http://127.0.0.1:8000"
    ),
    "ANTHROPIC_BASE_URL=http://127.0.0.1:8000 claude": (
        "an agent that speaks Anthropic's API, beside dsv2 serve"
    ),
    "dsv2 chat --api https://HOST:PORT": "a talk with a model that a cluster serves",
    "dsv2 bench -m FILE.gguf --against PATH/TO/llama-bench": "in turn with llama.cpp, over the same file",
    "dsv2 doctor DIR --hash": "whether its files are what was published",
}
RECIPES = {
    "Answers for AlpacaEval's judge, from its alpaca_eval.json:": r"""
jq -c '.[] | {id: .instruction, messages: [{role: "user", content: .instruction}]}' \
    alpaca_eval.json > in.jsonl
dsv2 complete --batch in.jsonl --output out.jsonl -n 2048
jq -s '[.[] | {instruction: .id, output: .text, generator: "dsv2"}]' out.jsonl > model_outputs.json
""",
    "Answers for MT-Bench's judge, from its question.jsonl, in two turns, each kind at its temperature:": r"""
HEAT='({"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}[.category] // 0)'
jq -c "{id: .question_id, temperature: $HEAT, messages: [{role: \"user\", content: .turns[0]}]}" \
    question.jsonl > in1.jsonl
dsv2 complete --batch in1.jsonl --output out1.jsonl -n 1024
jq -nc --slurpfile asked in1.jsonl --slurpfile said out1.jsonl --slurpfile all question.jsonl \
    '[$asked, $said, $all] | transpose[] | .[2].turns[1] as $next | .[1].text as $text | .[0]
    | .messages += [{role: "assistant", content: $text}, {role: "user", content: $next}]' > in2.jsonl
dsv2 complete --batch in2.jsonl --output out2.jsonl -n 1024
jq -nc --slurpfile one out1.jsonl --slurpfile two out2.jsonl '[$one, $two] | transpose[]
    | {question_id: .[0].id, answer_id: "dsv2-\(.[0].id)", model_id: "dsv2", tstamp: 0,
    choices: [{index: 0, turns: [.[0].text, .[1].text]}]}' > dsv2.jsonl
""",
    "HumanEval's answers for its own script:": r"""
jq -c 'select(.task == "humaneval") | {task_id, completion}' run.jsonl > samples.jsonl
""",
}
KINDS = {"<str>": "TEXT", "<path>": "FILE", "<list[str]>": "TEXT", "<int>": "N", "<int range>": "N"}
KINDS |= {"<float>": "NUMBER", "<float range>": "NUMBER"}


def lines_of(code: str) -> str:
    """A few lines of a shell, as they are typed."""
    return f".PP\n.nf\n{roff(code.strip())}\n.fi\n"


def roff(text: str) -> str:
    """Text that means itself: no line may begin a request, and dashes are those of the command line."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^([.'])", r"\\&\1", escaped, flags=re.MULTILINE)


def entry(head: str, text: str) -> str:
    """A word in bold with what it means below it."""
    return f".TP\n\\fB{roff(' '.join(head.split()))}\\fR\n{roff(' '.join(text.split()))}\n"


def paragraphs(texts: list[str]) -> str:
    """One after the other, with room between them."""
    return "\n.PP\n".join(roff(" ".join(text.split())) for text in texts) + "\n"


def options(command: Any, name: str) -> str:
    """Every argument and option with what the command's own help says of it, below its heading."""
    context, heading, out = typer.Context(command, info_name=name), None, []
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if parameter.name == "help" or record is None:
            continue
        if (below := getattr(parameter, "rich_help_panel", None)) and below != heading:
            heading = below
            out.append(f".SS {roff(below)}\n")
        head, text = record
        for name, shown in KINDS.items():
            head = head.replace(name, shown)
        if parameter.param_type_name == "argument":
            head = synopsis(parameter)
        out.append(entry(head, text))
    return "".join(out)


def synopsis(argument: Any) -> str:
    """How an argument stands in a command line: in brackets where it may be left out."""
    name: str = (argument.metavar or argument.name).strip("[]")
    return name.upper() if argument.required else f"[{name.upper()}]"


def page(group: Any) -> str:
    """The whole page in roff, in the `man` macros; `group` is the program with its commands."""
    version = importlib.metadata.version("dsv2cli")
    out = [
        f'.TH DSV2 1 "" "dsv2 {version}" "User Commands"\n',
        f".SH NAME\ndsv2 \\- {roff(group.help)}\n.SH SYNOPSIS\n",
    ]
    for name, command in group.commands.items():
        words = [synopsis(each) for each in command.params if each.param_type_name == "argument"]
        words = ["[\\fIoptions\\fR]", *map(roff, words)]
        out.append(f".B dsv2 {name}\n{' '.join(words)}\n.br\n")
    out.append(f".SH DESCRIPTION\n{paragraphs([DESCRIPTION])}")
    for name, command in group.commands.items():
        out.append(f".SH {name.upper()}\n{paragraphs((command.help or '').split(chr(10) * 2))}")
        out.append(options(command, name))
    out += [f".SH {title}\n{paragraphs(list(texts))}" for title, texts in TOPICS.items()]
    out.append(".SH RECIPES\n")
    out += [f"{paragraphs([about])}{lines_of(code)}.PP\n" for about, code in RECIPES.items()]
    out.append(".SH JSON FIELDS\n")
    for name, fields in FIELDS.items():
        out.append(f".SS {roff(name)}\n" + "".join(entry(field, text) for field, text in fields.items()))
    lists = {"EXIT STATUS": EXIT_CODES, "ENVIRONMENT": ENVIRONMENT, "FILES": FILES, "EXAMPLES": EXAMPLES}
    for title, entries in lists.items():
        out.append(f".SH {title}\n" + "".join(entry(head, text) for head, text in entries.items()))
    return "".join(out)
