"""What DeepSeek published of its models, in percent (arXiv 2405.04434, section 3.2 and the tables of its
appendices; V2-Lite and V2-Lite-Chat from appendix B).
"""

from __future__ import annotations

import re

TASKS = ("mmlu", "bbh", "ceval", "cmmlu", "humaneval", "mbpp", "gsm8k", "math")
SCORES = {
    "DeepSeek-V2": (78.5, 78.9, 81.7, 84.0, 48.8, 66.6, 79.2, 43.6),
    "DeepSeek-V2-Lite": (58.3, 44.1, 60.3, 64.3, 29.9, 43.2, 41.1, 17.1),
    "DeepSeek-V2-Chat": (77.8, 79.7, 78.0, 81.6, 81.1, 72.0, 92.2, 53.9),
    "DeepSeek-V2-Chat (SFT)": (78.4, 81.3, 80.9, 82.4, 76.8, 70.4, 90.8, 52.7),
    "DeepSeek-V2-Lite-Chat": (55.7, 48.1, 60.1, 62.5, 57.3, 45.8, 72.0, 27.9),
}
SHORT = {
    "v2": "DeepSeek-V2",
    "v2-lite": "DeepSeek-V2-Lite",
    "v2-chat": "DeepSeek-V2-Chat",
    "v2-lite-chat": "DeepSeek-V2-Lite-Chat",
}


def published(name: str) -> tuple[str, dict[str, float]]:
    """The name of the published model that a model's name or folder stands for, and its score by task; empty
    where nothing is known.

    A packed copy, a revision or another program's file of the same model stands for it, too.
    """
    last = re.split(r"[/:@]", re.sub(r"^(hf|ms|ollama):", "", name.strip().rstrip("/")))
    for part in last:
        if part.lower() in SHORT:
            return found(SHORT[part.lower()])
    for part in last:
        match = re.search(r"deepseek-v2(-lite)?(-chat)?(?![a-z\d]|\.\d)(.*)", part.lower())
        if match and not re.match(r"[._-]?(lite|chat|coder|0628|sft)", match[3]):
            return found("DeepSeek-V2" + "-Lite" * bool(match[1]) + "-Chat" * bool(match[2]))
    return "", {}


def found(model: str) -> tuple[str, dict[str, float]]:
    return model, dict(zip(TASKS, SCORES[model], strict=True))
