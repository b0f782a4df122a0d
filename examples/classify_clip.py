"""Classifies a clip with VideoMAE, with and without token merging, and says what became of the tokens.

python examples/classify_clip.py [VIDEO] --model MCG-NJU/videomae-base-finetuned-kinetics
"""

from __future__ import annotations

import torch
from clips import arguments, clip, videomae

import sttm_kernels as sttm


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("video", nargs="?", help="default: a clip of moving shapes")
    options = parser.parse_args()
    model = videomae(options.model, options.device)
    frames = clip(model, options.video)

    with torch.inference_mode():
        before = model(frames).logits.softmax(-1)[0]
        sttm.apply(model, r=options.r, trace=True)
        after = model(frames).logits.softmax(-1)[0]

    print(f"{'without':>9}{'with':>9}  merging {options.r} tokens in each layer")
    for label in before.topk(5).indices.tolist():
        print(f"{before[label]:>9.4f}{after[label]:>9.4f}  {model.config.id2label[label]}")
    traced = sttm.trace(model)
    print(f"\ntokens: {traced[0].index.shape[1]}, then {', '.join(str(each.size.shape[1]) for each in traced)}")
    print(f"largest group: {int(traced[-1].size.max())} tokens")


if __name__ == "__main__":
    main()
