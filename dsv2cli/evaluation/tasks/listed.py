"""All tasks by name."""

from __future__ import annotations

from dsv2cli.evaluation.question import Task
from dsv2cli.evaluation.tasks import (
    arc,
    bbh,
    ceval,
    cmmlu,
    gsm8k,
    hellaswag,
    humaneval,
    math,
    mbpp,
    mmlu,
    perplexity,
)

TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK
    for module in (mmlu, bbh, ceval, cmmlu, humaneval, mbpp, gsm8k, math, hellaswag, arc, perplexity)
}
