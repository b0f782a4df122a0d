"""The ways proportional attention gets counts into a fused kernel, against its formula in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sttm_kernels.nn import attention, proportional_attention
from sttm_kernels.testing import DTYPES, assert_equal, assert_within_budget

METHODS = ["mask", "augment", "flex"]
methods = pytest.mark.parametrize("method", METHODS)
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")


def by_formula(q: Tensor, k: Tensor, v: Tensor, size: Tensor, scale: float) -> Tensor:
    weight = ((q @ k.mT) * scale).exp() * size[:, None, None, :].to(q.dtype)
    return weight / weight.sum(-1, keepdim=True) @ v


def assert_is_formula(name, out, q, k, v, size, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    truth = by_formula(q.double(), k.double(), v.double(), size, scale)
    assert_within_budget(name, out, truth, by_formula(q, k, v, size, scale), k.shape[2] + q.shape[-1])


def inputs(dtype: torch.dtype, B: int = 2, H: int = 3, M: int = 7, N: int = 19, D: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, n, D, generator=generator).to(dtype) for n in (M, N, N))
    size = torch.randint(1, 1025, (B, N), generator=generator).float()
    return [q, k, v, size]


@methods
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 30, 88])
def test_every_way_is_the_formula(method, dtype, head_dim):
    q, k, v, size = inputs(dtype, D=head_dim)
    out = proportional_attention(q, k, v, size, method=method)
    assert out.dtype == dtype
    assert_is_formula(method, out, q, k, v, size)


def test_augmenting_is_more_exact_than_a_mask():
    q, k, v, size = inputs(torch.bfloat16, N=64)
    truth = by_formula(q.double(), k.double(), v.double(), size, 0.25)
    error = {
        method: float((proportional_attention(q, k, v, size, method=method).double() - truth).norm())
        for method in METHODS
    }
    assert error["augment"] < 0.7 * error["mask"]
    assert error["flex"] < 0.7 * error["mask"]


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_empty_keys_are_never_attended_to(method, dtype):
    q, k, v, size = inputs(dtype)
    size[0, 3] = size[1, :9] = 0
    k[0, :, 3], v[0, :, 3] = 60, 1000  # what would win every query
    q = q.abs()
    kept = [[n for n in range(19) if n != 3], list(range(9, 19))]
    out = proportional_attention(q, k, v, size, method=method)
    for b, keys in enumerate(kept):
        item = slice(b, b + 1)
        assert_is_formula(method, out[item], q[item], k[item, :, keys], v[item, :, keys], size[item, keys])


@methods
@pytest.mark.parametrize("scale", [None, 0.3, 1e-3])
def test_scale(method, scale):
    q, k, v, size = inputs(torch.float32)
    size[:, 0] = 0
    assert_is_formula(method, proportional_attention(q, k, v, size, scale, method), q, k, v, size, scale)
    with pytest.raises(AssertionError, match="off by"):
        assert_is_formula(method, proportional_attention(q, k, v, size, 0.9, method), q, k, v, size, scale)


@pytest.mark.parametrize("method", ["mask", "augment"])
def test_gradients(method):
    q, k, v, size = inputs(torch.float64, 1, 2, 3, 5, 4)
    size[:, 1] = 0
    tensors = [t.requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *qkv: proportional_attention(*qkv, size, method=method), tensors)


@methods
def test_values_of_another_width(method):
    q, k, v, size = inputs(torch.float32)
    v = torch.cat((v, -v), -1)
    out = proportional_attention(q, k, v, size, method=method)
    assert out.shape[-1] == 32
    assert_is_formula(method, out, q, k, v, size)


def test_dropout():
    q, k, v, size = inputs(torch.float32)
    v = torch.ones_like(v)
    for method in ("mask", "augment", "off"):
        torch.manual_seed(0)
        out = proportional_attention(q, k, v, size, method=method, dropout=0.5)
        assert float(out.std()) > 0.05
    with pytest.raises(ValueError, match="dropout must be 0 with method 'flex'"):
        proportional_attention(q, k, v, size, method="flex", dropout=0.5)


@methods
def test_compiles_in_one_graph_for_any_length(method):
    lengths = []

    def counting(graph, inputs):
        lengths.append(1)
        return graph.forward

    compiled = torch.compile(
        lambda q, k, v, size: proportional_attention(q, k, v, size, method=method),
        fullgraph=True,
        dynamic=True,
        backend=counting,
    )
    for N in (19, 23, 31):
        q, k, v, size = inputs(torch.float32, N=N)
        assert_is_formula(method, compiled(q, k, v, size), q, k, v, size)
    assert len(lengths) == 1
    torch._dynamo.reset()


def test_without_size_it_is_plain_attention():
    q, k, v, size = inputs(torch.float32)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert_equal("no size", proportional_attention(q, k, v), plain)
    assert_equal("off", proportional_attention(q, k, v, size, method="off"), plain)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": 1}, TypeError, "q must be a torch.Tensor, got int"),
        ({"q": torch.ones(3, 4, 8)}, ValueError, r"q must have shape \(B, H, M, D\), got \(3, 4, 8\)"),
        ({"size": torch.ones(2, 5)}, ValueError, r"size must have shape \(B, N\) = \(2, 4\), got \(2, 5\)"),
        ({"size": [1.0]}, TypeError, "size must be a torch.Tensor, got list"),
        ({"method": "flash"}, ValueError, "method must be one of .* got 'flash'"),
    ],
)
def test_bad_inputs(change, error, message):
    tokens = torch.ones(2, 3, 4, 8)
    with pytest.raises(error, match=message):
        proportional_attention(**({"q": tokens, "k": tokens, "v": tokens, "size": torch.ones(2, 4)} | change))


def test_auto_is_the_mask_on_a_cpu():
    q, k, v, size = inputs(torch.float32)
    assert attention.choose_method(q.device, q.dtype, 64) == "mask"
    assert torch.equal(proportional_attention(q, k, v, size), proportional_attention(q, k, v, size, method="mask"))


@pytest.mark.parametrize(
    ("version", "capability", "dtype", "head_dim", "expected"),
    [
        ("2.13.0+cu130", (9, 0), torch.bfloat16, 80, "mask"),
        ("2.10.1", (9, 0), torch.bfloat16, 80, "augment"),
        ("2.10.1", (9, 0), torch.bfloat16, 64, "mask"),
        ("2.13.0", (8, 0), torch.float16, 80, "augment"),
        ("2.13.0", (8, 0), torch.float32, 80, "mask"),
        ("2.13.0", (8, 0), torch.bfloat16, 72, "augment"),
        ("2.13.0", (8, 0), torch.bfloat16, 128, "mask"),
    ],
)
def test_auto_on_gpus(monkeypatch, version, capability, dtype, head_dim, expected):
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert attention.choose_method(torch.device("cuda"), dtype, head_dim) == expected


@pytest.mark.gpu
@methods
@pytest.mark.parametrize("head_dim", [64, 80])
def test_on_a_gpu(method, head_dim):
    q, k, v, size = (t.cuda() for t in inputs(torch.bfloat16, N=300, D=head_dim))
    assert_is_formula(method, proportional_attention(q, k, v, size, method=method), q, k, v, size)


@methods
@pytest.mark.parametrize(
    ("lengths", "key_lengths"),
    [([7, 3, 7, 1], None), ([7, 3, 0, 7], [5, 4, 2, 9]), ([4, 4, 4], None), ([1], [6])],
    ids=str,
)
def test_packed_sequences_attend_as_each_alone(method, lengths, key_lengths):
    attend_as_each_alone(method, lengths, lengths if key_lengths is None else key_lengths)


@st.composite
def batches(draw):
    lengths = draw(st.lists(st.sampled_from([0, 1, 2, 3, 17, 40]), min_size=1, max_size=7).filter(any))
    keys = [n and draw(st.sampled_from([n, 1, 5, 33])) for n in lengths]
    how = {"dtype": draw(st.sampled_from(DTYPES[:3])), "seed": draw(st.integers(0, 99))}
    # As wide as this, and alike, PyTorch's own attention has the same bits in any batch.
    how |= {"heads": draw(st.integers(1, 3)), "width": draw(st.sampled_from([32, 64]))}
    return draw(st.sampled_from(["mask", "augment", "off"])), lengths, keys, how


def test_random_sequences_attend_as_each_alone(request):
    checked = []

    @settings(max_examples=request.config.getoption("batches") or 10, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(batches())
    def check(batch):
        method, lengths, keys, how = batch
        attend_as_each_alone(method, lengths, keys, **how)
        checked.append(len(lengths))

    check()
    print(f"proportional_attention: {len(checked)} batches, {sum(checked)} sequences")


def attend_as_each_alone(method, lengths, keys, heads=3, width=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(heads, sum(n), width, generator=generator).to(dtype) for n in (lengths, keys, keys))
    size = torch.randint(1, 9, (sum(keys),), generator=generator).float()
    given = [q, k, v] if method == "flex" else [each.requires_grad_() for each in (q, k, v)]
    told = {"method": method, "scale": 0.3}
    out = proportional_attention(*given, size, **told, lengths=torch.tensor(lengths), key_lengths=keys)
    assert out.shape == (heads, sum(lengths), width)
    parts = [q.split(lengths, 1), k.split(keys, 1), v.split(keys, 1), size.split(keys)]
    alone = [
        proportional_attention(*(each[None] for each in part), **told)[0]
        for part in zip(*parts, strict=True)
        if part[0].numel()
    ]
    if method == "flex":  # one call for all
        each = [[t[None] for t in part] for part in zip(*parts, strict=True) if part[0].numel()]
        for number, (own, given) in enumerate(zip(out.split([n for n in lengths if n], 1), each, strict=True)):
            assert_is_formula(f"sequence {number}", own[None], *given, scale=0.3)
    else:
        assert_equal("packed", out, torch.cat(alone, 1))
        weights = torch.randn(out.shape, generator=generator).to(dtype)
        expected = torch.autograd.grad((torch.cat(alone, 1) * weights).sum(), given)
        for name, grad, own in zip("qkv", torch.autograd.grad((out * weights).sum(), given), expected, strict=True):
            assert_equal(f"gradient of {name}", grad, own)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [3, 3]}, "lengths must be the tokens of each sequence, 7 together"),
        ({"key_lengths": [7]}, "key_lengths must have one number for each of 2 sequences, got 1"),
        ({"key_lengths": [7, 0]}, "key_lengths must be at least 1 where there are queries"),
        ({"lengths": None, "key_lengths": [7]}, "key_lengths must be None without lengths"),
        ({"size": torch.ones(3)}, "size must have shape"),
        ({"k": torch.ones(1, 3, 7, 8)}, "k must have shape"),
    ],
    ids=str,
)
def test_packed_sequences_that_do_not_fit_are_refused(change, message):
    given = {name: torch.ones(3, 7, 8) for name in "qkv"} | {"size": torch.ones(7), "lengths": [4, 3]}
    with pytest.raises(ValueError, match=message):
        proportional_attention(**(given | change))


def test_varlen_is_told_the_counts_in_the_head_dimension(monkeypatch):
    """The kernel is stood in for on a CPU: what it is called with is attention of each sequence."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    q, k, v, size = (t[0] for t in inputs(torch.float64, B=1, M=9, N=12))
    lengths, key_lengths = [4, 5], [5, 7]
    told = {"method": "varlen", "lengths": lengths, "key_lengths": key_lengths}
    with pytest.raises(RuntimeError, match="method 'varlen' cannot run: it runs on GPUs, not on cpu"):
        proportional_attention(q, k, v, size, **told)
    with pytest.raises(ValueError, match="dropout must be 0 with method 'varlen'"):
        proportional_attention(q, k, v, size, dropout=0.1, **told)
    with pytest.raises(ValueError, match="method must be one of"):
        proportional_attention(q[None], k[None], v[None], size[None], method="varlen")

    def kernel(q, k, v, ends, key_ends, longest, longest_keys, *, scale):
        assert (longest, longest_keys) == (5, 7)
        assert q.shape[2] == k.shape[2] == v.shape[2]
        assert q.shape[2] % 8 == 0
        parts = zip(
            *(t.tensor_split(e[1:-1].tolist()) for t, e in ((q, ends), (k, key_ends), (v, key_ends))), strict=True
        )
        each = [torch.einsum("nhd,mhd->hnm", a, b).mul(scale).softmax(-1) @ c.transpose(0, 1) for a, b, c in parts]
        return torch.cat(each, 1).transpose(0, 1)

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "why_not_varlen", lambda q: None)
    out = proportional_attention(q, k, v, size, **told)
    assert out.shape == q.shape
    firsts = zip(
        q.split(lengths, 1), k.split(key_lengths, 1), v.split(key_lengths, 1), size.split(key_lengths), strict=True
    )
    for own, part in zip(out.split(lengths, 1), firsts, strict=True):
        assert_is_formula("sequence", own[None], *(t[None] for t in part))
