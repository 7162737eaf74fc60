"""The C++ kernels as ARM's processors run them, emulated, held to what those of this one are."""

from __future__ import annotations

import gc
import hashlib
import shutil
from pathlib import Path

import pytest
import test_latents
import test_native
from conftest import DATA
from emulated import Emulated
from test_native import (  # noqa: F401
    test_a_gate_far_below_zero_shuts_and_one_far_above_lets_through,
    test_a_product_equals_the_plain_one,
    test_a_token_gets_the_same_bits_alone_and_among_others,
    test_codes_of_other_programs_mean_the_same_in_a_matrix_and_multiply_as_it,
)

from dsv2cli.kernels import build, native

SOURCE = Path(__file__).with_name("emulated.cpp")
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
PROCESSORS = {
    "armv8-a": "NEON",
    "armv8.2-a+dotprod": "NEON (dot products)",
    "armv8.6-a+dotprod+bf16": "NEON (dot products, BF16)",
}
V2 = DATA / "golden" / "v2"


@pytest.fixture(scope="module", params=PROCESSORS)
def kernels(request):
    for program in (COMPILER, EMULATOR):
        if shutil.which(program) is None:
            pytest.skip(f"there is no {program}")
    flags = [*build.FLAGS.replace("-shared", "-static").split(), f"-march={request.param}", str(SOURCE)]
    key = build.key_of(build.SOURCES, flags, hashlib.sha256(SOURCE.read_bytes()).hexdigest())
    built = build.safe_folder() / f"emulated-{key}"
    if not build.is_whole(built):
        build.build(COMPILER, flags, built)
    gc.collect()
    gc.freeze()  # what is there already is no part of a call, and need not be looked through in each
    emulated = Emulated([EMULATOR, "-cpu", "max", str(built)])
    loaded = native.Kernels(emulated)
    assert loaded.path == PROCESSORS[request.param]
    yield loaded
    emulated.end()
    gc.unfreeze()


@pytest.mark.parametrize("format", [None, "int8", "int4", "int4-all"])
def test_a_whole_model(kernels, format):
    test_native.test_a_whole_model_is_as_near_to_fp32_as_the_plain_path(kernels, V2, format)


@pytest.mark.parametrize("cache", test_latents.FORMATS)
def test_latents_in_a_few_bits(kernels, cache):
    test_latents.test_the_kernels_hold_and_read_the_same_codes(kernels, V2, cache)


def test_what_only_x86_has_is_refused_in_plain_words(monkeypatch):
    monkeypatch.setattr(build, "ARM", True)
    library, why = build.library.__wrapped__("avx2")
    assert library is None and why.startswith("AVX2 is of x86 processors, and this one is ")
