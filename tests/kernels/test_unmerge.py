"""unmerge and compose against the specification, bit for bit, and gradients under the error budget."""

import torch
from cases import SMALL, each, each_dtype, each_layout, each_shape, unwritten

import sttm_kernels as sttm
from sttm_kernels import reference
from sttm_kernels.checks import check_compose, check_unmerge
from sttm_kernels.testing import assert_equal, make_index, make_tokens


def with_far_values(index, K):
    far = torch.tensor([K, -1, K + 1, 2**31 - 1, -2, -(2**31)], dtype=torch.int32, device=index.device)
    return torch.where(index < 0, far.repeat(-(-index.shape[1] // 6))[: index.shape[1]], index)


@each_dtype
@each_shape
def test_shapes(backend, shape, dtype):
    index = make_index(shape.B, shape.N, shape.K, backend.device)
    check_unmerge(backend.impl, make_tokens(shape.B, shape.K, shape.C, dtype, backend.device), index)


@each_layout
@each("C", [1, 20, 24] if SMALL else [1, 20, 24, 65, 2100])
def test_layouts_are_read_in_place_and_far_indices_are_none(backend, layout, C, dtype, outputs_amid_poison):
    x = make_tokens(2, 9, C, dtype, backend.device, layout=layout)
    with unwritten({"x": x, "index": with_far_values(make_index(2, 33, 9, backend.device), 9)}) as held:
        check_unmerge(backend.impl, held["x"], held["index"])


def test_along_match(backend):
    plan = sttm.match(make_tokens(2, 33, 8, device=backend.device), 10, impl=backend.impl)
    x = make_tokens(2, 23, 20, device=backend.device)
    assert_equal("x", sttm.unmerge(x, plan, backend.impl), reference.unmerge(x, plan))


@each_shape
def test_compose(backend, shape):
    B, N, K, D, _ = shape
    check_compose(backend.impl, make_index(B, N, K, backend.device), make_index(B, K, D, backend.device, seed=1), D)


def test_compose_of_far_indices(backend, outputs_amid_poison):
    first = with_far_values(make_index(2, 50, 20, backend.device, left_out=0.3), 20)
    second = with_far_values(make_index(2, 20, 7, backend.device, seed=1, left_out=0.3), 7)
    with unwritten({"first": first, "second": second}) as held:
        check_compose(backend.impl, held["first"], held["second"], 7)
