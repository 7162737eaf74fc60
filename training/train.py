"""Train the embedded model through this project's own model code and write a standard checkpoint.

    python -m training.train OUT --plan small --minutes 120 --found DIR

Progress is kept in OUT/state.pt; run the same command again to go on. Where that file is lost, `--begin` goes on from
the weights and the tokenizer of a finished checkpoint, such as the one in the package. The schedule follows the clock,
so that a slow machine still ends with a finished model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsv2cli.checkpoint.blueprint import empty_model
from dsv2cli.checkpoint.load import load_model
from dsv2cli.checkpoint.names import destinations
from dsv2cli.model.config import DeepseekV2Config, RopeScaling
from dsv2cli.model.step import Step
from dsv2cli.model.transformer import DeepseekV2, MoEGate
from training.corpus import BOS, CHAT_TEMPLATE, EOS, documents, rule_made, token_rows, train_tokenizer

SEQ = 1024  # trained length; YaRN stretches it to the declared context
SMALL = DeepseekV2Config(
    vocab_size=4096, hidden_size=224, intermediate_size=640, moe_intermediate_size=112, num_hidden_layers=6,
    num_attention_heads=7, n_shared_experts=2, n_routed_experts=8, num_experts_per_tok=2, kv_lora_rank=64,
    q_lora_rank=None, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, first_k_dense_replace=1,
    max_position_embeddings=4 * SEQ, tie_word_embeddings=True, bos_token_id=4094, eos_token_id=4095,
    rope_scaling=RopeScaling("yarn", 4, SEQ, mscale=0.707, mscale_all_dim=0.707),
    torch_dtype="float32",  # stored in bf16; so small a model runs 1.6x faster in fp32 on a CPU
)  # fmt: skip
LARGE = replace(
    SMALL, vocab_size=8192, hidden_size=320, intermediate_size=1024, moe_intermediate_size=192, num_hidden_layers=8,
    num_attention_heads=8, n_routed_experts=16, num_experts_per_tok=4, kv_lora_rank=128,
    bos_token_id=8190, eos_token_id=8191,
)  # fmt: skip
PLANS = {"small": SMALL, "large": LARGE}
BALANCE = 0.01
LOSS_SLICE = 1024


def initialise(model: DeepseekV2, seed: int) -> None:
    """Small normal weights; what writes into the residual stream starts smaller the deeper the model is."""
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    depth = math.sqrt(2 * model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.ones_(parameter)
            continue
        std = 0.02 if "embed" in name else 0.7 / math.sqrt(parameter.shape[-1])
        nn.init.normal_(
            parameter, 0.0, std / depth if "o_proj" in name or "down_proj" in name else std, generator
        )


class Balance:
    """Watches the routers during a forward pass: experts' load, and the loss that keeps it even (paper eq. 12)."""

    def __init__(self, model: DeepseekV2) -> None:
        self.loss: list[Tensor] = []
        self.load: list[Tensor] = []
        for module in model.modules():
            if isinstance(module, MoEGate):
                module.register_forward_hook(self.watch)

    def watch(self, gate: Any, inputs: tuple[Tensor], outputs: tuple[Tensor, Tensor]) -> None:
        with torch.autocast(inputs[0].device.type, enabled=False):
            share = F.linear(inputs[0].float(), gate.weight).softmax(-1).mean(0)
        chosen = outputs[0].flatten().bincount(minlength=share.numel()).float()
        load = chosen / chosen.mean()
        self.loss.append((load * share).sum())
        self.load.append(load.detach())

    def take(self) -> tuple[Tensor, float]:
        loss, worst = torch.stack(self.loss).sum(), max(float(load.max()) for load in self.load)
        self.loss, self.load = [], []
        return loss, worst


def next_token_loss(model: DeepseekV2, rows: Tensor) -> Tensor:
    """Mean nats a token over rows [batch, seq + 1]. Logits are made a slice at a time and again in the backward
    pass: the full [tokens, vocab] in fp32 costs more to move than to compute."""

    def slice_loss(hidden: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, dtype=torch.bfloat16):
            return F.cross_entropy(model.logits(hidden), targets, reduction="sum")

    with torch.autocast(rows.device.type, dtype=torch.bfloat16):
        step = Step.apart(len(rows), rows.shape[1] - 1, model.rotary, rows.device)
        hidden = model(rows[:, :-1].flatten(), step)
    targets = rows[:, 1:].flatten()
    slices = zip(hidden.split(LOSS_SLICE), targets.split(LOSS_SLICE), strict=True)
    return torch.stack([checkpoint(slice_loss, *pair, use_reentrant=False) for pair in slices]).sum() / len(
        targets
    )


def rows_tensor(rows: list[list[int]], device: torch.device) -> Tensor:
    return torch.tensor(rows, device=device)


def held_out_rows(tokenizer: Tokenizer, unseen_wording: bool, count: int = 16) -> list[list[int]]:
    """Rows that training never sees: new fillings, or plots and questions kept back entirely."""
    rng = random.Random(10**9)
    texts = (rule_made(rng, unseen_wording) for _ in itertools.count())
    return list(itertools.islice(token_rows(tokenizer, texts, SEQ + 1), count))


@torch.no_grad()
def evaluate(model: DeepseekV2, rows: list[list[int]]) -> float:
    return next_token_loss(model, rows_tensor(rows, model.lm_head.weight.device)).item()


def learning_rate(fraction: float, step: int, peak: float) -> float:
    """Warm up over 300 steps, hold, and fall over the last 30% of the time."""
    return peak * min(1.0, (step + 1) / 300) * min(1.0, max(0.01, (1 - fraction) / 0.3))


def export(model: DeepseekV2, tokenizer: Tokenizer, out: Path, shards: int = 3) -> None:
    """The model as a sharded bf16 checkpoint with everything that a DeepSeek-V2 release carries."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: place.to("cpu", torch.bfloat16).clone() for name, place in destinations(model).items()}
    names, weight_map = sorted(tensors), dict[str, str]()
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.numel() * 2 for tensor in tensors.values())
    config = asdict(model.config) | {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_act": "silu",
        "scoring_func": "softmax", "num_key_value_heads": model.config.num_attention_heads,
    }  # fmt: skip
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    files = {
        "config.json": config,
        "generation_config.json": {
            "bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"],
            "do_sample": True, "temperature": 0.5, "top_p": 0.9,
        },
        "tokenizer_config.json": {
            "add_bos_token": True, "add_eos_token": False, **special, "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"], "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": CHAT_TEMPLATE,
        },
        "model.safetensors.index.json": {"metadata": {"total_size": size}, "weight_map": weight_map},
    }  # fmt: skip
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)


def make_optimizer(model: DeepseekV2) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)


def train(
    out: Path,
    plan: str,
    minutes: float,
    found: Path | None,
    begin: Path | None,
    batch: int,
    peak: float,
    seed: int,
    held_out: int,
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out.mkdir(parents=True, exist_ok=True)
    config = PLANS[plan]
    tokenizer_file = out / "tokenizer.json"
    if begin is not None and not tokenizer_file.exists():
        shutil.copy(begin / "tokenizer.json", tokenizer_file)
    if not tokenizer_file.exists():
        sample = itertools.islice(documents(random.Random(seed), found), 40_000)
        train_tokenizer(sample, config.vocab_size).save(str(tokenizer_file))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    model = empty_model(config, device, torch.float32)
    initialise(model, seed)
    optimizer, step, tokens, elapsed = make_optimizer(model), 0, 0, 0.0
    if (out / "state.pt").exists():
        state = torch.load(out / "state.pt", map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, tokens, elapsed = state["step"], state["tokens"], state["elapsed"]
    elif begin is not None:
        model.load_state_dict(load_model(begin, device, torch.float32).state_dict())
    balance = Balance(model)
    tests = {
        name: held_out_rows(tokenizer, unseen, held_out)
        for name, unseen in (("new_fillings", False), ("new_plots", True))
    }
    rows = token_rows(tokenizer, documents(random.Random(seed * 10_000 + step), found), SEQ + 1)
    clean = token_rows(
        tokenizer, documents(random.Random(seed * 10_000 + step + 1), found, share=0.04), SEQ + 1
    )
    began, saved = time.monotonic() - elapsed, time.monotonic()
    running = 0.0
    while (elapsed := time.monotonic() - began) < minutes * 60:
        fraction = elapsed / (minutes * 60)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(fraction, step, peak)
        data = rows_tensor(list(itertools.islice(clean if fraction > 0.8 else rows, batch)), device)
        loss = next_token_loss(model, data)
        even, worst = balance.take()
        (loss + BALANCE * even).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + data[:, 1:].numel()
        running = loss.item() if running == 0 else 0.98 * running + 0.02 * loss.item()
        if step % 20 == 0:
            print(
                f"step {step}  {tokens / 1e6:.2f}M tokens  {tokens / elapsed:.0f} tok/s  loss {running:.3f}  "
                f"lr {optimizer.param_groups[0]['lr']:.1e}  busiest expert {worst:.2f}x  {fraction:.1%}",
                flush=True,
            )
        if time.monotonic() - saved > 180:
            saved = time.monotonic()
            save(model, optimizer, tokenizer, out, step, tokens, elapsed)
            report(model, tests, balance)
    save(model, optimizer, tokenizer, out, step, tokens, minutes * 60)
    report(model, tests, balance)


def report(model: DeepseekV2, tests: dict[str, list[list[int]]], balance: Balance) -> None:
    losses = {name: round(evaluate(model, rows), 4) for name, rows in tests.items()}
    balance.take()
    print("held out, nats a token:", json.dumps(losses), flush=True)


def save(
    model: DeepseekV2,
    optimizer: torch.optim.Optimizer,
    tokenizer: Tokenizer,
    out: Path,
    step: int,
    tokens: int,
    elapsed: float,
) -> None:
    """The state to go on from, replaced in one move, and the checkpoint to use."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "tokens": tokens,
        "elapsed": elapsed,
    }
    torch.save(state, out / "state.pt.new")
    os.replace(out / "state.pt.new", out / "state.pt")
    export(model, tokenizer, out / "checkpoint")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for state.pt, tokenizer.json and checkpoint/")
    parser.add_argument("--plan", choices=sorted(PLANS), default="small")
    parser.add_argument("--minutes", type=float, default=120, help="wall-clock length of the whole schedule")
    parser.add_argument("--found", type=Path, help="folder with the found text listed in NOTICE.md")
    parser.add_argument("--begin", type=Path, help="checkpoint of the same plan to start from")
    parser.add_argument("--batch", type=int, default=8, help=f"rows of {SEQ} tokens a step")
    parser.add_argument("--lr", dest="peak", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", type=int, default=16, help="rows to report the loss on, of each kind")
    arguments = parser.parse_args()
    train(**vars(arguments))


if __name__ == "__main__":
    main()
