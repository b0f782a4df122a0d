"""Token merging for video Transformers: find groups of similar tokens, reduce along them, copy back.

The verbs `match` and `assign` find a plan, `merge`, `unmerge` and `compose` work along it, `assign_merge` and
`soft_merge` do both. `STTM` is a module over them; `apply` makes a model of timm or transformers merge, `compress`
shortens what a language model gets of it. More is in `sttm_kernels.nn`, `.export`, `.compat` and `.testing`.

Common to all verbs. B is the batch, N tokens, K groups. Floating inputs are float32, bfloat16, float16 or float64, in
any memory layout. Sums, scores, counts and positions are float32, float64 for float64 inputs. The same input gives the
same bits in every run and whatever else is in the batch; `impl="torch"` and "reference" promise this on CPUs with the
same number of threads, and on GPUs leave products to cuBLAS, whose choice of kernel may depend on the batch. Nothing
synchronises with the host. NaN or infinite features may give a meaningless group, always inside [0, K).

Packed sequences are tokens `(T, C)`, those of all S sequences one after another, and `lengths`, how many each has: a
list, or an integer tensor `(S,)` on the CPU. Every sequence gets the bits that it has alone, whatever else is packed
beside it. The results have no batch either, and lengths of their own: `plan.merged_lengths`, `merged.lengths`. `merge`,
`unmerge` and `compose` run once for all sequences, and so do the kernels of the verbs that find groups, but where
"random2d" draws on a GPU, where sequences have differently many meta tokens, and in transforms and exported programs;
there, and in plain PyTorch, one sequence comes after another.

Autocast changes nothing inside. DTensors are taken and returned where all tensors are, but by "reference": a sharded
batch stays sharded, so do channels of x that are only carried along, other shardings are gathered first; gradients come
back as the inputs are sharded.

`impl` is "cuda", "triton", "cpu", "torch", "reference", or "auto": of the first four the first that can run here, or
that which `sttm-kernels tune` found to be the fastest.

Errors, for every verb: `TypeError` for a wrong type or dtype, `ValueError` for a wrong shape, device, range or name,
`RuntimeError` if an `impl` asked for by name cannot run, with the reason.
"""

from sttm_kernels.functional import assign, assign_merge, compose, match, merge, pack, soft_merge, unmerge
from sttm_kernels.integrations import apply, remove, restore, trace
from sttm_kernels.nn.compression import compress
from sttm_kernels.nn.sttm import STTM
from sttm_kernels.plan import MergedTokens, MergePlan

__version__ = "0.1.0"

__all__ = [
    "STTM",
    "MergePlan",
    "MergedTokens",
    "apply",
    "assign",
    "assign_merge",
    "compose",
    "compress",
    "match",
    "merge",
    "pack",
    "remove",
    "restore",
    "soft_merge",
    "trace",
    "unmerge",
]
