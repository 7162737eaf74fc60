"""How a model will run follows from what was asked and what is there, on machines that need not be here."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import DATA

from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.run.plan import OFF, TINY, Here, Plan, make_plan
from dsv2cli.run.wish import BatchWish, Wish

LITE, CHAT = (
    DeepseekV2Config.load(DATA / "configs" / name) for name in ("DeepSeek-V2-Lite", "DeepSeek-V2-Chat")
)
TINY_MODEL = DeepseekV2Config.load(DATA / "golden" / "v2")
GB = 10**9


def here(*gpus: int, **other) -> Here:
    """A machine with GPUs of so many GB, 16 cores, a compiler and triton."""
    memories = tuple(gpu * GB for gpu in gpus)
    machine = Here(memories, 16, 1, "", False, lambda target: (f"the {target} ones", ""), lambda *_: {})
    return replace(machine, **other)


def test_a_cpu_runs_the_kernels_made_for_it_and_a_tiny_model_none():
    plan = make_plan(LITE, Wish(), here())
    assert (plan.device, plan.dtype, plan.format, plan.ranks) == ("cpu", "bfloat16", "bfloat16", 1)
    assert (plan.kernels, plan.kernels_name, plan.threads) == ("native", "the native ones", None)
    tiny = make_plan(TINY_MODEL, Wish(), here())
    assert (tiny.kernels, tiny.why_slower, tiny.threads, tiny.surprising) == (None, TINY, 1, False)


def test_why_it_is_not_faster_is_said_where_a_person_would_wonder():
    wide = make_plan(LITE, Wish(dtype="float32"), here())
    assert wide.surprising and wide.why_slower == "they compute in bfloat16, and the model is float32"
    broken = here(cpu_kernels=lambda target: ("", "there is no C++ compiler"))
    assert make_plan(LITE, Wish(), broken).why_slower == "there is no C++ compiler"
    off = make_plan(LITE, Wish(kernels="off"), here())
    assert off.why_slower == OFF and not off.surprising
    with pytest.raises(Dsv2Error, match="avx2 kernels are not there"):
        make_plan(LITE, Wish(kernels="avx2"), broken)


def test_a_gpu_that_holds_the_model_runs_triton_with_graphs():
    plan = make_plan(LITE, Wish(), here(80))
    assert (plan.device, plan.ranks, plan.triton, plan.graphs) == ("cuda:0", 1, True, True)
    assert plan.kernels is None and plan.kernels_name == "triton with CUDA graphs"
    assert plan.early
    eager = make_plan(LITE, Wish(kernels="triton-eager"), here(80))
    assert not eager.graphs and not eager.early
    packed, exact = (
        make_plan(LITE, Wish(quantize="int4", kernels=kernels), here(80))
        for kernels in ("auto", "triton-exact")
    )
    assert packed.rounds and packed.kernels_name.endswith(", activations of experts in 8 bits")
    assert not exact.rounds and exact.kernels_name == "triton with CUDA graphs"
    assert make_plan(CHAT, Wish(experts="cpu", quantize="int4"), here(*[80] * 8)).ranks == 1
    amd = make_plan(LITE, Wish(), here(80, rocm=True))
    assert not amd.triton and "AMD" in amd.why_slower
    assert make_plan(LITE, Wish(kernels="triton"), here(80, rocm=True)).triton
    without = make_plan(LITE, Wish(), here(80, no_triton="triton is not installed"))
    assert without.surprising and without.kernels_name == "plain torch"


def test_as_many_gpus_as_the_weights_need_and_each_rank_its_own():
    assert make_plan(CHAT, Wish(), here(*[80] * 8)).ranks == 7
    plan = make_plan(CHAT, Wish(quantize="int4"), here(*[80] * 8))
    assert (plan.ranks, plan.format, plan.device) == (2, "int4", "cuda:0")
    assert plan.for_rank(1).device == "cuda:1" and plan.for_rank(1).ranks == 2
    assert make_plan(CHAT, Wish(device="cuda:3", quantize="int4"), here(*[192] * 8)).device == "cuda:3"
    with pytest.raises(UsageError, match="do not fit on 1 cuda device") as refused:
        make_plan(CHAT, Wish(gpus=1), here(80))
    assert refused.value.fix == "--gpus 7"


def test_experts_go_into_ram_from_the_layer_on_for_which_the_gpu_has_no_room():
    plan = make_plan(LITE, Wish(experts="cpu"), here(16))
    assert plan.experts_on_gpu is not None and 0 < plan.experts_on_gpu < LITE.moe_layers
    assert plan.kernels_name == "the native ones and triton" and not plan.graphs
    assert make_plan(LITE, Wish(experts="cpu"), here(80)).experts_on_gpu == LITE.moe_layers
    assert make_plan(LITE, Wish(experts="cpu"), here()).experts_on_gpu == 0


@pytest.mark.parametrize(
    ("wish", "machine", "words"),
    [
        (Wish(device="toaster"), here(), "Unknown device"),
        (Wish(device="cuda:"), here(80), "Unknown device"),
        (Wish(device="cuda:1"), here(80), "is not there"),
        (Wish(gpus=3, device="cuda"), here(80), "There are no 3 GPUs"),
        (Wish(gpus=3, device="cpu"), here(torchrun=2), "under torchrun"),
        (Wish(gpus=99, device="cpu"), here(), "can not share"),
        (BatchWish(split_attention="sequences"), here(), "several ranks"),
        (Wish(kernels="triton"), here(), "can not run this"),
        (Wish(experts="cpu", gpus=2, device="cpu"), here(), "one device"),
        (Wish(experts="cpu"), here(2), "too small even without"),
        (Wish(placement="auto", gpus=2, device="cpu"), here(), "do not go together"),
    ],
)
def test_what_can_not_be_is_refused_by_name(wish, machine, words):
    with pytest.raises(UsageError, match=words):
        make_plan(LITE, wish, machine)


def test_layers_are_spread_as_the_places_say_and_computed_by_the_first_gpu_that_has_some():
    places = {"model.layers.0": "cpu", "model.layers.1": 1, "lm_head": 2}
    plan = make_plan(LITE, Wish(placement="auto"), here(24, 24, 24, places=lambda *_: places))
    assert (plan.device, plan.places, plan.ranks) == ("cuda:1", places, 1)
    assert plan.kernels_name == "plain torch" and plan.surprising


def test_the_others_of_a_team_get_the_plan_itself():
    """As JSON and back."""
    plan = make_plan(CHAT, BatchWish(gpus=8, split_attention="sequences"), here(*[192] * 8))
    assert Plan(**plan.as_json()) == plan and plan.sequences
