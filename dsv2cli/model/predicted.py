"""How long a decode step would take one GPU with this version's Triton kernels, from bytes, instructions and
launches. Predicted from compiled code that has never run: nothing here is measured. Needs no torch.
"""

from __future__ import annotations

from dsv2cli.model import size
from dsv2cli.model.config import DeepseekV2Config

# Counted in the machine code that Triton 3.9 makes for sm_90 (instructions: tests/compile_for_gpu.py, those
# of gate, up and down together), or in run/gpu.py (launches).
# The H100 and the H200 have these multiprocessors; 1.7 GHz is what they keep up under load.
INSTRUCTIONS = {4: 4.0, 8: 2.5}  # a weight of so many bits takes; of others they hide behind reading
A_SECOND = 132 * 4 * 32 * 1.7e9  # multiprocessors, schedulers of each, lanes, clock
LAYER_LAUNCHES = 8  # and one more with q_lora
STEP_LAUNCHES = 15  # embedding, positions, last norm, head, choice of the token
# Chosen so that the whole comes out as a review of the compiled code expects of it, to 20%: V2-Lite on an
# H200 in bf16 600 tokens a second, in int8 900 to 1,000, in int4 1,050 to 1,250, and V2 in int4 180. To be
# replaced by what is measured.
REACHED = (
    0.75  # of the bandwidth: three chunks of weights are under way, but a program's last waits for itself
)
NOT_HIDDEN = 0.3  # of the arithmetic on packed weights, while other programs' loads are under way
LAUNCH_SECONDS = 1.2e-6  # from one kernel's end to the next one's first load, which was brought up before


def step_seconds(config: DeepseekV2Config, format: str, dtype: str, bytes_per_second: float) -> float:
    """One token at batch 1 and a short context."""
    read, instructions = 0, 0.0
    for matrix, each in size.stored(config, format, dtype, gpu=True):
        weights = matrix.rows * matrix.cols * matrix.read
        read += each * matrix.read
        instructions += weights * instructions_of(8 * each / (matrix.rows * matrix.cols))
    moving = read / (REACHED * bytes_per_second)
    return moving + NOT_HIDDEN * instructions / A_SECOND + launches(config) * LAUNCH_SECONDS


def instructions_of(bits: float) -> float:
    """Those that a weight takes, by the bits it has, its part of the scales counted."""
    if bits >= 16:
        return 0.0
    return INSTRUCTIONS[8] if bits >= 8 else INSTRUCTIONS[4]


def launches(config: DeepseekV2Config) -> int:
    """Kernels of a step."""
    return config.num_hidden_layers * (LAYER_LAUNCHES + (config.q_lora_rank is not None)) + STEP_LAUNCHES
