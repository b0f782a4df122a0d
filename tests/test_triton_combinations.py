"""Every combination of present and absent optional arguments of every operator compiles, on the installed Triton.

The combinations are those of the operators' schemas: every `Tensor?` and `bool[n]` argument, and every value of every
setting. The operators are called on small CPU tensors as if a GPU were there, and `launch` hands over what it would
have compiled: nothing here knows the functions below the operators. Each form that comes of it goes through the front
end, where an absent argument that is read shows; a part that covers every parameter's presence and absence and every
setting is compiled to machine code.
"""

import importlib.util
import itertools
from functools import partial

import pytest
import torch

from sttm_kernels import dispatch

if dispatch.interpreting():
    pytest.skip("compiles, which TRITON_INTERPRET=1 replaces", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend

from benchmarks.codegen import table
from benchmarks.codegen.recording import recorded
from sttm_kernels import ops as ops  # registers the operators
from sttm_kernels.impl import triton as implementation
from sttm_kernels.impl.triton.config import ARCHITECTURES

B, N, K, C, D, P, H = 2, 49, 25, 48, 32, 3, 2
KINDS = ((torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "tf32"), (torch.float16, "tf32"))
FULL = (torch.bfloat16, 90)
"""Where every combination of optional tensors is taken."""
SETTINGS = {
    "similarity": ("cosine", "l2", "dot"),
    "reduce": ("mean", "sum", "max", "first"),
    "normalize": ("meta", "tokens"),
    "weight": ("softmax", "uniform"),
    "temperature": (0.5,),
    "impl": ("triton",),
    "num_groups": (K,),
    "r": (K - 1,),
    "num_prefix": (1,),
}
ALONG = {"positions_out": "positions", "offsets": "order", "dst": "src"}
"""Optional tensors that are there when another is."""
NAMES = [name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("sttm_kernels::")]
OPERATORS = [name for name in sorted(NAMES) if hasattr(implementation, name)]


def tensor(op, name, dtype):
    """An argument of an operator, by its name."""
    small = {
        "x": (B, K, C) if op == "unmerge" else (B, N, C),
        "q": (B, H, N, D) if op != "assign_merge" else (B, N, D),
        "meta": (B, K, D),
        "metric": (B, H, N, D),
        "fill": (B, K, C),
        "y": (B, K, C),
        "grad_y": (B, K, C),
    }
    if name in small:
        return torch.zeros(small[name], dtype=dtype)
    if name in ("mask",):
        return torch.ones(B, N, dtype=torch.bool)
    whole = {"index": (B, N), "index1": (B, N), "index2": (B, K), "order": (B, N), "offsets": (B, K + 1)}
    whole |= {"src": (1, 2, 8), "dst": (1, 2, 4)}
    if name in whole:
        return torch.zeros(whole[name], dtype=torch.int32)
    wide = {
        "size": (B, N), "weight": (B, N), "score": (B, N), "lse": (B, N), "grad_score": (B, N), "grad_lse": (B, N),
        "positions": (B, N, P), "grad_size": (B, K), "mass": (B, K), "size_out": (B, K),
        "grad_positions": (B, K, P), "positions_out": (B, K, P),
    }  # fmt: skip
    return torch.zeros(wide[name])


def choices(argument, results):
    """What is passed for an argument, the usual value first: settings, and for tensors whether they are there."""
    kind = str(argument.type)
    if kind == "Optional[Tensor]" and argument.name not in ALONG:
        return True, False
    if "Tensor" in kind:
        return (True,)
    if kind == "List[bool]":
        n = results
        return tuple([True] * n if at == n else [i == at for i in range(n)] for at in (n, *range(n)))
    return SETTINGS[argument.name]


def combinations(op, full):
    """Combinations of optional tensors: every one with the usual settings, and the ends with each other value of one.

    The ends: all there, none, one, all but one. Unless `full`, only all and none with the usual settings.
    """
    schema = getattr(torch.ops.sttm_kernels, op).default._schema
    arguments = schema.arguments
    options = [choices(argument, len(schema.returns)) for argument in arguments]
    optional = [at for at, values in enumerate(options) if values == (True, False)]
    usual = [values[0] for values in options]
    others = [
        [*usual[:at], value, *usual[at + 1 :]]
        for at, values in enumerate(options)
        if at not in optional
        for value in values[1:]
    ]
    for setting in [usual, *others] if full else [usual]:
        for there in itertools.product((True, False), repeat=len(optional)):
            few = min(sum(there), len(there) - sum(there))
            if few == 0 or (full and (setting is usual or few == 1)):
                chosen = list(setting)
                for at, present in zip(optional, there, strict=True):
                    chosen[at] = present
                yield arguments, chosen


def call(op, dtype, arguments, chosen):
    given = [
        (tensor(op, argument.name, dtype) if value else None) if "Tensor" in str(argument.type) else value
        for argument, value in zip(arguments, chosen, strict=True)
    ]
    named = {argument.name: at for at, argument in enumerate(arguments)}
    for follower, leader in ALONG.items():
        if follower in named and leader in named and given[named[leader]] is None:
            given[named[follower]] = None
    if op == "assign_merge" and given[named["q"]] is None:
        given[named["meta"]] = torch.zeros(B, K, C, dtype=dtype)
    return getattr(torch.ops.sttm_kernels, op).default(*given)


def key(one):
    """What the front end sees of a form: everything but the options of the compiler behind it."""
    return one.kernel.__name__, tuple(one.signature.items()), repr(sorted(one.constexprs.items(), key=str))


def forms(op):
    """Every different (architecture, specialization) that calls of an operator launch."""
    found = {}
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        everywhere = sorted(itertools.product(KINDS, ARCHITECTURES), key=lambda one: (one[0][0], one[1]) != FULL)
        for (dtype, rounding), arch in everywhere:
            torch.backends.cuda.matmul.fp32_precision = rounding
            for arguments, chosen in combinations(op, (dtype, arch) == FULL):
                for one in recorded(op, partial(call, op, dtype, arguments, chosen), arch):
                    found.setdefault(key(one), (arch, one))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    return list(found.values())


@pytest.fixture
def as_if_there_were_a_gpu(monkeypatch):
    monkeypatch.setattr(dispatch, "why_not", lambda *args: None)
    dispatch.kernel.cache_clear()
    yield
    dispatch.kernel.cache_clear()


def front_end(arch, one):
    """Compiles a form as far as Triton's own intermediate representation."""
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    options = backend.parse_options(dict(one.options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    table.source(one).make_ir(target, options, functions, modules, context)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("op", OPERATORS)
def test_every_combination_compiles(op, as_if_there_were_a_gpu):
    work = forms(op)
    for item in work:
        front_end(*item)
    whole = table.covering([item for item in work if item[0] == FULL[1]])
    faults = {table.describe(*item): table.faults(*item, table.build(*item)) for item in whole}
    assert not {name: found for name, found in faults.items() if found}
    print(f"{op}: {len(work)} forms, {len(whole)} of them to machine code")


def test_the_operators_are_those_of_the_package():
    assert {"assign", "assign_merge", "match", "merge", "merge_backward", "soft_merge", "unmerge"} <= set(OPERATORS)
