"""The checks themselves: each passes what is right and fails what is not."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import sttm_kernels as sttm
from sttm_kernels import partition as partitions
from sttm_kernels import testing

F64 = torch.float64
TRUTH = torch.tensor([1.0, -4.0, 2.0], dtype=F64)


def test_error_budget_is_the_formula():
    plain = torch.tensor([1.0, -4.0, 2.5])
    eps = torch.finfo(torch.float32).eps
    assert testing.error_budget(TRUTH, plain, torch.float32, 9) == 2 * 0.5 + eps * 4 * 3
    assert testing.error_budget(TRUTH[:0], plain[:0], torch.float32, 9) == 0
    broken = torch.tensor([math.nan, -4.0, math.inf])
    assert testing.error_budget(TRUTH, broken, torch.float32, 1) == eps * 4
    half = testing.error_budget(TRUTH, plain, F64, 1)
    assert half == pytest.approx((2 * 0.5 / eps + 4) * torch.finfo(F64).eps)


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        (torch.tensor([1.0, -4.0, 2.1]), r"y\[2\] is 2\.0999999, must be 2: off by 0\.1, budget .*; 1 of 3"),
        (torch.tensor([1.0, math.nan, 2.0]), r"y\[1\] is nan, must be -4"),
        (torch.tensor([1.0, -4.0, math.inf]), r"y\[2\] is inf, must be 2"),
        (torch.tensor([1.0, -4.0]), r"y must have shape \(3,\), got \(2,\)"),
        (torch.tensor([1.0, -4.0, 2.0], dtype=torch.float16), r"y must have dtype torch\.float32, got torch\.float16"),
    ],
)
def test_what_is_off_fails(actual, message):
    testing.assert_within_budget("y", TRUTH.float(), TRUTH, TRUTH.float(), 4)
    with pytest.raises(AssertionError, match=message):
        testing.assert_within_budget("y", actual, TRUTH, TRUTH.float(), 4)


def test_where_the_truth_overflows_the_result_must():
    truth = torch.tensor([1e6, 1.0], dtype=F64)
    testing.assert_within_budget("y", truth.half(), truth, truth.half(), 1)
    with pytest.raises(AssertionError, match=r"y\[0\] is 65504, must be 1000000"):
        testing.assert_within_budget("y", torch.tensor([65504.0, 1.0]).half(), truth, truth.half(), 1)


def test_equality_is_of_bits_shape_and_dtype():
    testing.assert_equal("y", torch.tensor([math.nan, 1.0]), torch.tensor([math.nan, 1.0]))
    for other in (TRUTH.float(), TRUTH[:2], TRUTH + 1e-12):
        with pytest.raises(AssertionError):
            testing.assert_equal("y", other, TRUTH)


def test_a_near_tie_may_flip_and_a_clear_winner_may_not():
    q, meta = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, 1e-5], [1.0, 0.0], [0.0, 1.0]]])
    plan = sttm.assign(q, meta, impl="reference")
    testing.assert_assign_within_budget(plan, q, meta)
    for index, passes in ((0, True), (1, True), (2, False)):
        chosen = torch.tensor([[index]], dtype=torch.int32)
        flipped = testing.assign_at(chosen, q, meta)
        if passes:
            testing.assert_assign_within_budget(flipped, q, meta)
        else:
            with pytest.raises(AssertionError, match=r"index\[0\]: the choice scores 0, the best 1"):
                testing.assert_assign_within_budget(flipped, q, meta)
    with pytest.raises(AssertionError, match="must be in"):
        testing.assert_assign_within_budget(replace(plan, index=plan.index + 9), q, meta)
    with pytest.raises(AssertionError, match="lse"):
        testing.assert_assign_within_budget(replace(plan, lse=plan.lse + 1), q, meta)
    with pytest.raises(AssertionError, match="index >= 0"):
        testing.assert_assign_within_budget(plan, q, meta, mask=torch.tensor([[False]]))


def test_a_wrong_plan_of_match_fails():
    angle = torch.tensor([[0.0, 5, 90, 110, 45, 55]]).deg2rad()  # src 0, 2, 4 lie 5, 20 and 10 degrees from dst 1, 3, 5
    metric, is_dst = torch.stack([angle.cos(), angle.sin()], -1), torch.arange(6) % 2 == 1
    plan = sttm.match(metric, 2, impl="reference")
    testing.assert_match_within_budget(plan, metric, 2, 0, is_dst)
    assert plan.index.tolist() == [[1, 1, 0, 2, 3, 3]]

    def fails(message, index=None, block=None, **changed):
        index = plan.index if index is None else torch.tensor([index], dtype=torch.int32)
        with pytest.raises(AssertionError, match=message):
            testing.assert_match_within_budget(replace(plan, index=index, **changed), metric, 2, 0, is_dst, block)

    fails("partner", [2, 1, 0, 2, 3, 3])
    fails("set of merged tokens", [1, 1, 2, 2, 0, 3])
    fails("index of tokens that stay", [1, 2, 0, 1, 3, 3])
    fails("merged tokens per item", [0, 1, 0, 2, 3, 3])
    fails("must be in", [99, 1, 0, 2, 3, 3])
    fails("num_groups must be", num_groups=5)
    fails("score", score=plan.score + 0.01)
    fails("order", order=torch.arange(6, dtype=torch.int32)[None])
    fails("another window", block=torch.arange(6))


def test_layouts_hold_the_same_values_in_other_places():
    plain = testing.make_tokens(2, 5, 6)
    for layout in testing.LAYOUTS[1:]:
        other = testing.make_tokens(2, 5, 6, layout=layout)
        assert not other.is_contiguous()
        testing.assert_equal(layout, other, plain[:1].expand(2, -1, -1) if layout == "expanded" else plain)


@pytest.mark.parametrize(("kind", "groups"), [("random", 6), ("even", 3), ("one", 1), ("none", 0)])
def test_indices_are_of_their_kind(kind, groups):
    index = testing.make_index(2, 400, 6, kind=kind)
    testing.assert_index_in_range("index", index, 6)
    assert len(set(index.flatten().tolist()) - {-1}) == groups


@pytest.mark.unpoisoned
def test_poison_fills_what_is_not_written():
    with testing.poisoned_empty():
        x = torch.zeros(2)
        made = [torch.empty(3), torch.empty_like(x), torch.empty_strided((2,), (1,)), x.new_empty(3)]
        made += [x.new_empty_strided((2,), (1,)), torch.empty(2, dtype=torch.bfloat16, requires_grad=True)]
        assert all(bool(t.isnan().all()) for t in made)
        assert made[-1].requires_grad
        assert torch.empty(2, dtype=torch.int32).tolist() == [-77, -77]
        assert torch.empty(2, dtype=torch.uint8).tolist() == [255, 255]
    assert torch.empty.__name__ == "empty"


@pytest.mark.unpoisoned
def test_poison_leaves_device_contexts_alone():
    """In a process that has not used any: PyTorch makes its table of functions at the first use."""
    program = """if True:
        import torch
        from sttm_kernels import testing
        with testing.poisoned_empty(), torch.device("meta"):
            assert torch.empty(2).is_meta
        with torch.device("meta"):
            assert torch.empty(2).is_meta and torch.zeros(2).new_empty(2).is_meta
    """
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_guards_notice_a_write_outside(layout):
    x = testing.make_tokens(2, 3, 4, layout=layout)
    held = testing.guarded(x)
    testing.assert_equal("copy", held.tensor, x)
    assert held.tensor.stride() == x.stride()
    if layout != "expanded":
        held.tensor.fill_(7.0)
    held.check()
    start = held.tensor.storage_offset()
    for at in (start - 1, start + 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))):
        touched = testing.guarded(x)
        touched.tensor.as_strided((1,), (1,), at).fill_(3.0)
        with pytest.raises(AssertionError, match="memory outside of it was written"):
            touched.check()


def test_destinations_exclude_the_prefix():
    is_dst = partitions.destinations("alternate", 6, 2, None, (2, 2), None, torch.device("cpu"))
    assert is_dst.tolist() == [[False, False, False, True, False, True]]
