"""A clip in fewer tokens for a video-language model: the tower's tokens merge, and the prompt gets shorter.

python examples/shorter_prompt.py --keep 0.25 --method sttm
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import sttm_kernels as sttm
from sttm_kernels.nn import shorten_prompt
from sttm_kernels.nn.compression import COMPRESSIONS

WIDTH = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
ROTARY = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
TEXT = {**WIDTH, "num_hidden_layers": 2, "vocab_size": 200, "rope_parameters": ROTARY}
VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
WINDOWS = {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}
IDS = {"image_token_id": 190, "video_token_id": 191, "vision_start_token_id": 192, "vision_end_token_id": 193}
ENDS = {"bos_token_id": 0, "eos_token_id": 198, "pad_token_id": 199}


def small() -> Qwen2_5_VLForConditionalGeneration:
    """One of random weights, in evaluation mode."""
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(text_config={**TEXT, **ENDS}, vision_config={**VISION, **WINDOWS}, **IDS)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def prompt(model: Qwen2_5_VLForConditionalGeneration, grid: tuple[int, int, int]) -> dict[str, Tensor]:
    """What a processor makes of a question about a clip of noise, its grid in patches."""
    config, (t, h, w) = model.config, grid
    clip = [config.vision_start_token_id, *[config.video_token_id] * (t * h * w // 4), config.vision_end_token_id]
    input_ids = torch.tensor([[1, 2, 3, *clip, 4, 5, 6]])
    patch = (
        config.vision_config.in_channels * config.vision_config.temporal_patch_size * config.vision_config.patch_size**2
    )
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": 2 * (input_ids == config.video_token_id).int(),
        "pixel_values_videos": torch.randn(t * h * w, patch, generator=torch.Generator().manual_seed(1)),
        "video_grid_thw": torch.tensor([grid]),
    }


@torch.no_grad()
def shortened(
    model: Qwen2_5_VLForConditionalGeneration, inputs: dict[str, Tensor], keep: float, method: str
) -> dict[str, Tensor]:
    """The arguments of `generate` for the prompt with its clips compressed."""
    config, grid, token_id = model.config, inputs["video_grid_thw"], model.config.video_token_id
    merged = config.vision_config.spatial_merge_size
    tower = model.get_video_features(inputs["pixel_values_videos"], grid)
    clips = sttm.compress(tower.pooler_output, grid // torch.tensor([1, merged, merged]), keep, method)

    input_ids, mask = inputs["input_ids"], inputs["attention_mask"]
    rope = {name: inputs[name] for name in ("input_ids", "mm_token_type_ids", "video_grid_thw", "attention_mask")}
    position_ids, _ = model.model.get_rope_index(**rope)
    ids, real = shorten_prompt(input_ids, token_id, clips)
    input_ids, mask = input_ids.gather(1, ids), mask.gather(1, ids) * real
    embeddings = model.get_input_embeddings()(input_ids)
    embeddings = embeddings.masked_scatter((input_ids == token_id)[..., None], clips.x.to(embeddings.dtype))
    return {
        "inputs_embeds": embeddings,
        "attention_mask": mask,
        "position_ids": position_ids.gather(2, ids.expand(3, -1, -1)),
    }


def main(arguments: list[str] | None = None) -> Tensor:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=float, default=0.25, help="share of the clip's tokens (default: %(default)s)")
    parser.add_argument("--method", choices=COMPRESSIONS, default="sttm")
    options = parser.parse_args(arguments)
    model = small()
    inputs = prompt(model, (4, 8, 8))
    fewer = shortened(model, inputs, options.keep, options.method)
    told = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": ENDS["pad_token_id"]}
    for name, each in (("whole", inputs), ("shorter", fewer)):
        answer = model.generate(**each, **told)[:, -told["max_new_tokens"] :]
        print(f"{name}: {each['attention_mask'].shape[1]} tokens, answer {answer[0].tolist()}")
    return answer


if __name__ == "__main__":
    main()
