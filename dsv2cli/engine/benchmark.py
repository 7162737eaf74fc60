"""How fast the model runs here: prefill, decode, first token, memory; and the same work through transformers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv2cli.checkpoint.weights import destinations, state_of
from dsv2cli.device import synchronize
from dsv2cli.engine.generate import Request, generate_batch, prefill
from dsv2cli.engine.sampling import SamplingParams
from dsv2cli.errors import Dsv2Error
from dsv2cli.kernels.native import Kernels
from dsv2cli.model import size
from dsv2cli.model.transformer import DeepseekV2

READ_BYTES = 2**28  # far more than a cache holds
GEMM_SIZE = 1024
GREEDY = Request(SamplingParams(temperature=0.0))


@dataclass
class Timing:
    """One configuration, measured over several repetitions; every list has one entry a repetition."""

    engine: str
    prompt_tokens: int
    generated_tokens: int
    batch: int
    prefill_tokens_per_second: list[float] = field(default_factory=list)
    decode_tokens_per_second: list[float] = field(default_factory=list)
    ttft_seconds: list[float] = field(default_factory=list)
    # What the machine gave just before each repetition: a shared one changes by the minute.
    read_bytes_per_second: list[float] = field(default_factory=list)
    gemm_flops_per_second: list[float] = field(default_factory=list)

    def add(self, prefill_seconds: float, decode_seconds: float) -> None:
        self.ttft_seconds.append(prefill_seconds)
        self.prefill_tokens_per_second.append(self.batch * self.prompt_tokens / prefill_seconds)
        self.decode_tokens_per_second.append(self.batch * (self.generated_tokens - 1) / decode_seconds)

    def as_json(self) -> dict[str, Any]:
        lists = {name: values for name, values in vars(self).items() if isinstance(values, list)}
        plain = {name: getattr(self, name) for name in ("engine", "prompt_tokens", "generated_tokens", "batch")}
        return plain | {name: spread(values) | {"all": values} for name, values in lists.items()}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def read_bytes_per_token(model: DeepseekV2, context: int) -> float:
    """Bytes of weights and cache that one token at batch 1 needs, each read once; the embedding gives one row."""
    config = model.config
    total = float(model.new_cache().bytes_per_token() * context)
    for name, tensor in state_of(model).items():
        used = 1.0
        if ".mlp.experts." in name:
            used = (config.num_experts_per_tok or 0) / (config.n_routed_experts or 1)
        if name == "model.embed_tokens.weight" and not config.tie_word_embeddings:
            used = 1 / config.vocab_size
        total += used * tensor.numel() * tensor.element_size()
    return total


def prefill_flops_per_token(model: DeepseekV2) -> int:
    """Multiplications and additions with weights; the head runs for the last token only, attention scores are left out."""
    return 2 * sum(part.read for part in size.parts(model.config) if part.name not in ("embedding", "head"))


class Machine:
    """Two ceilings, measured beside the model: reading memory with all threads, and torch's matrix product."""

    def __init__(self, device: torch.device, dtype: torch.dtype, kernels: Kernels | None) -> None:
        self.device, self.kernels = device, kernels
        self.data = torch.ones(READ_BYTES // 8, dtype=torch.int64, device=device)
        self.square = torch.ones(GEMM_SIZE, GEMM_SIZE, dtype=dtype, device=device)

    def seconds(self, work: Callable[[], object]) -> float:
        synchronize(self.device)
        began = time.perf_counter()
        work()
        synchronize(self.device)
        return time.perf_counter() - began

    def read_bytes_per_second(self) -> float:
        kernels = self.kernels
        return READ_BYTES / self.seconds(lambda: self.data.sum() if kernels is None else kernels.read(self.data))

    def gemm_flops_per_second(self) -> float:
        return 2 * GEMM_SIZE**3 / self.seconds(lambda: self.square @ self.square)


def random_prompts(model: DeepseekV2, batch: int, length: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator).tolist()  # type: ignore[no-any-return]


def time_ours(model: DeepseekV2, prompts: list[list[int]], generate: int) -> tuple[float, float]:
    """Seconds to the first token, and for the remaining generate - 1. Greedy, EOS ignored."""
    cache = model.new_cache(len(prompts))
    cache.reserve(len(prompts[0]) + generate)
    synchronize(model.device)
    began = time.perf_counter()
    logits = prefill(model, prompts, cache)
    request = Request(GREEDY.sampling, max_new_tokens=generate)
    first = 0.0
    for _ in generate_batch(model, prompts, request, cache, logits):
        first = first or time.perf_counter()
    return first - began, time.perf_counter() - first


@torch.inference_mode()
def time_transformers(twin: Any, prompts: list[list[int]], generate: int) -> tuple[float, float]:
    """The same work through transformers' own forward and cache, in one prefill and greedy steps."""
    device = twin.device
    ids = torch.tensor(prompts, device=device)
    synchronize(device)
    began = time.perf_counter()
    out = twin(input_ids=ids, use_cache=True, logits_to_keep=1)
    new = out.logits[:, -1].argmax(-1, keepdim=True)
    int(new[0])
    first = time.perf_counter()
    for _ in range(generate - 1):
        out = twin(input_ids=new, past_key_values=out.past_key_values, use_cache=True)
        new = out.logits[:, -1].argmax(-1, keepdim=True)
        int(new[0])
    return first - began, time.perf_counter() - first


def transformers_twin(model: DeepseekV2, folder: Path) -> Any:
    """transformers' DeepseekV2 over the very same tensors, so that both fit into memory and read the same bytes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    ours: dict[str, Tensor] = dict(model.named_parameters()) | destinations(model)
    ours["lm_head.weight"] = model.lm_head.weight
    state = {}
    for name, parameter in twin.named_parameters(remove_duplicate=False):
        if name not in ours or ours[name].shape != parameter.shape:
            raise Dsv2Error("transformers builds another model from this config", why=f"its {name} has no match here")
        state[name] = ours[name].detach().to(parameter.dtype)
    twin.load_state_dict(state, assign=True, strict=True)
    twin.model.rotary_emb = type(twin.model.rotary_emb)(config).to(model.device)  # its buffers were on meta
    return twin.eval()


def run(
    model: DeepseekV2,
    prompt: int,
    generate: int,
    batch: int,
    repetitions: int,
    twin: Any = None,
    tick: Callable[[], None] = lambda: None,
    kernels: Kernels | None = None,
) -> list[Timing]:
    """Warm up once, then measure; with a twin the two alternate A B A B, so that both see the same machine."""
    if prompt + generate > model.config.max_position_embeddings:
        raise Dsv2Error(
            f"{prompt} + {generate} tokens do not fit",
            why=f"this model's context holds {model.config.max_position_embeddings}",
            fix="dsv2 bench --prompt N --generate M with a smaller sum",
        )
    engines: list[tuple[Callable[[list[list[int]], int], tuple[float, float]], Timing]] = [
        (lambda prompts, count: time_ours(model, prompts, count), Timing("dsv2", prompt, generate, batch))
    ]
    if twin is not None:
        measure = lambda prompts, count: time_transformers(twin, prompts, count)  # noqa: E731
        engines.append((measure, Timing("transformers", prompt, generate, batch)))
    machine = Machine(model.device, model.dtype, kernels)
    for repetition in range(-1, repetitions):
        reading, multiplying = machine.read_bytes_per_second(), machine.gemm_flops_per_second()
        prompts = random_prompts(model, batch, prompt, seed=repetition + 1)
        for measure, timing in engines:
            seconds = measure(prompts, generate if repetition >= 0 else 2)
            if repetition >= 0:
                timing.add(*seconds)
                timing.read_bytes_per_second.append(reading)
                timing.gemm_flops_per_second.append(multiplying)
            tick()
    return [timing for _, timing in engines]
