"""Floating-point operations of the vision models of Qwen2.5-VL 7B and Qwen3-VL 8B for a clip of 64 frames.

python -m benchmarks.qwen_flops: counted on PyTorch's meta device, so nothing is computed and no weights are needed.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl

import sttm_kernels as sttm
from sttm_kernels.integrations import qwen
from sttm_kernels.nn.flops import count

FRAMES, PIXELS, SHARES = 64, 448, (0.02, 0.05)
QWEN2_5 = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
QWEN3 = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096}


def towers() -> dict[str, nn.Module]:
    with torch.device("meta"):
        first = modeling_qwen2_5_vl.Qwen2_5_VLVisionConfig(**QWEN2_5, attn_implementation="sdpa")
        second = modeling_qwen3_vl.Qwen3VLVisionConfig(**QWEN3, attn_implementation="sdpa")
        return {
            "Qwen2.5-VL 7B": modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel._from_config(first).eval(),
            "Qwen3-VL 8B": modeling_qwen3_vl.Qwen3VLVisionModel._from_config(second).eval(),
        }


def operations(tower: nn.Module, given: dict[str, torch.Tensor]) -> int:
    return count(lambda: tower(**given))


def main() -> None:
    print("model, r, tokens, GFLOP, share")
    for name, tower in towers().items():
        given = qwen.clip(tower, FRAMES, PIXELS, PIXELS)
        plain = operations(tower, given)
        print(f"{name}, 0, {len(given['hidden_states'])}, {plain / 1e9:.0f}, 1", flush=True)
        for share in SHARES:
            sttm.apply(tower, r=share, trace=True)
            merged = operations(tower, given)
            left = sttm.trace(tower)[-1].size.shape[1]
            print(f"{name}, {share}, {left}, {merged / 1e9:.0f}, {merged / plain:.3f}", flush=True)


if __name__ == "__main__":
    main()
