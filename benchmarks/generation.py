"""What one generation step costs, against the matrix products it cannot do without.

    python benchmarks/generation.py            # about 4 minutes on two cores
    python benchmarks/generation.py --quick    # dense, float32, batch 1

The model has the released sizes and random weights. The floor is measured in the same process, interleaved with the
model: every weight matrix that one step reads, multiplied with one vector per row, and nothing else. `ratio` is step /
floor, `real time` the seconds of speech one second of computing gives (a step is one frame of 80 ms once speech has
started).
"""

import argparse
import statistics
import time

import torch
from torch import nn

from minimind_o_hf import MiniMindOConfig, MiniMindOForConditionalGeneration

FRAME_SECONDS = 0.08
PROMPT_LENGTH = 32


def build(use_moe: bool, dtype: torch.dtype) -> MiniMindOForConditionalGeneration:
    torch.manual_seed(0)
    model = MiniMindOForConditionalGeneration(MiniMindOConfig(use_moe=use_moe)).eval().to(dtype)
    model.generation_config.eos_token_id = None
    return model


def step_matrices(model: MiniMindOForConditionalGeneration) -> list[torch.Tensor]:
    """Every matrix a step reads: the Linears, and one expert of each layer."""
    matrices = [model.lm_head.weight]
    for stack in (model.model, model.talker):
        matrices += [module.weight for module in stack.modules() if isinstance(module, nn.Linear)]
        for module in stack.modules():
            if hasattr(module, "gate_up_proj"):
                matrices += [module.gate_up_proj[0], module.down_proj[0]]
            elif hasattr(module, "top_k"):
                matrices.append(module.weight)
    return [matrix.detach() for matrix in matrices if matrix.dim() == 2]


def floor_seconds(matrices: list[torch.Tensor], batch_size: int, repeats: int = 8) -> float:
    vectors = [torch.randn(batch_size, matrix.shape[1], dtype=matrix.dtype) for matrix in matrices]
    times = []
    with torch.no_grad():
        for _ in range(repeats):
            begin = time.perf_counter()
            for matrix, vector in zip(matrices, vectors, strict=True):
                nn.functional.linear(vector, matrix)
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def generation_seconds(model: MiniMindOForConditionalGeneration, batch_size: int, num_steps: int) -> float:
    input_ids = torch.randint(300, 6400, (batch_size, PROMPT_LENGTH))
    begin = time.perf_counter()
    model.generate(input_ids, max_new_tokens=num_steps)
    return time.perf_counter() - begin


def measure(model: MiniMindOForConditionalGeneration, batch_size: int, rounds: int = 5) -> tuple[float, float]:
    """Medians of seconds a step (without the prompt's share) and of seconds a floor, taken in turns."""
    matrices = step_matrices(model)
    short, long = (8, 48) if batch_size == 1 else (8, 32)
    generation_seconds(model, batch_size, short)
    steps, floors = [], []
    for _ in range(rounds):
        floors.append(floor_seconds(matrices, batch_size))
        base = generation_seconds(model, batch_size, short)
        steps.append((generation_seconds(model, batch_size, long) - base) / (long - short))
    return statistics.median(steps), statistics.median(floors)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="dense, float32, batch 1 only")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, prompt of {PROMPT_LENGTH} tokens")
    print(f"{'model':6} {'dtype':9} {'batch':>5} {'ms/step':>8} {'floor ms':>9} {'ratio':>6} {'real time':>10}")
    for use_moe in (False,) if arguments.quick else (False, True):
        for dtype in (torch.float32,) if arguments.quick else (torch.float32, torch.bfloat16):
            model = build(use_moe, dtype)
            for batch_size in (1,) if arguments.quick else (1, 4, 16):
                step, floor = measure(model, batch_size)
                print(
                    f"{'moe' if use_moe else 'dense':6} {str(dtype).removeprefix('torch.'):9} {batch_size:5} "
                    f"{step * 1e3:8.1f} {floor * 1e3:9.1f} {step / floor:6.2f} "
                    f"{batch_size * FRAME_SECONDS / step:9.2f}x",
                    flush=True,
                )


if __name__ == "__main__":
    main()
