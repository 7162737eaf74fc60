"""A llama-bench that measures nothing: it answers as llama.cpp's does, and writes down what it was asked."""

from __future__ import annotations

import json
import sys
from pathlib import Path

SCRIPT = """#!{python} -S
import json, os, signal, sys, time
LOG = {log!r}
words = sys.argv[1:]
with open(LOG, "a") as log:
    log.write(json.dumps(words) + "\\n")
asked = dict(zip(words[::2], words[1::2]))
count = sum(1 for _ in open(LOG)) - 1  # 0 is the warm-up
row = {{
    "build_commit": "abc\\x1b[2Jdef", "build_number": 4321, "cpu_info": "A Processor", "backends": "BLAS",
    "model_filename": asked["-m"], "model_type": "deepseek2 16B Q4_0", "model_size": 3 * 2**30,
    "n_threads": int(asked["-t"]), "n_depth": int(asked.get("-d", 0)),
}}
prompt = row | {{"n_prompt": int(asked["-p"]), "n_gen": 0, "avg_ts": 1000.0 * max(count, 1)}}
decode = row | {{"n_prompt": 0, "n_gen": int(asked["-n"]), "avg_ts": 10.0 * max(count, 1)}}
rows = [prompt, decode]
{more}
print(json.dumps(rows))
"""


def write(folder: Path, more: str = "") -> str:
    """Its path; `more` is done before it prints `rows`."""
    path = folder / "llama-bench"
    path.write_text(SCRIPT.format(python=sys.executable, log=str(folder / "log"), more=more))
    path.chmod(0o755)
    return str(path)


def asked_of(folder: Path) -> list[list[str]]:
    """The arguments of each time that it was run."""
    log = folder / "log"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
