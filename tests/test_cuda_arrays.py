"""What the bindings take and refuse: arrays of any owner through DLPack, and messages that name the argument."""

import numpy as np
import pytest
import torch
from arrays import OnCuda

from sttm_kernels import dispatch, reference
from sttm_kernels.impl import cuda
from sttm_kernels.plan import MergePlan
from sttm_kernels.testing import assert_equal, make_index, make_tokens

if not dispatch.on_host():
    pytest.skip("needs STTM_CUDA_HOST: runs in a process of its own", allow_module_level=True)

C = cuda._extension()


def arguments(**changed):
    """Of unmerge, in order."""
    given = {"x": make_tokens(2, 3, 4), "index": make_index(2, 5, 3), "y": torch.empty(2, 5, 4), "stream": 0}
    return tuple({**given, **changed}.values())


def merge_arguments(**changed):
    """Of merge, by name."""
    B, N, K, D, P = 2, 7, 3, 4, 2
    given = {
        "x": make_tokens(B, N, D),
        "index": make_index(B, N, K),
        "num_groups": K,
        "weight": torch.ones(B, N),
        "size": None,
        "positions": torch.ones(B, N, P),
        "fill": None,
        "order": torch.empty(B, N, dtype=torch.int32),
        "offsets": torch.empty(B, K + 1, dtype=torch.int32),
        "other": torch.empty(cuda.SORT_ROOM * B, N, dtype=torch.int32),
        "reduce": "mean",
        "y": torch.empty(B, K, D),
        "size_out": torch.empty(B, K),
        "positions_out": torch.empty(B, K, P),
        "mass_out": torch.empty(B, K),
        "stream": 0,
    }
    return {**given, **changed}


class OnlyDLPack:
    """An array whose type offers no exchange API."""

    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __dlpack__(self, stream=None):
        return self.array.__dlpack__()


@pytest.mark.parametrize("wrap", [lambda t: t, torch.nn.Parameter, OnlyDLPack, torch.Tensor.numpy])
def test_arrays_of_any_owner(wrap):
    x, index, y, stream = arguments()
    C.unmerge(wrap(x), index.numpy(), y.numpy(), stream)
    assert_equal("y", y, reference.unmerge(x, MergePlan(index, 3)))


def test_tensors_that_require_grad_are_read():
    x, index, y, stream = arguments(x=make_tokens(2, 3, 4).requires_grad_())
    C.unmerge(x, index, y, stream)
    assert_equal("y", y, reference.unmerge(x.detach(), MergePlan(index, 3)))


def test_numpy_strides_are_read_in_place():
    x = np.arange(48, dtype=np.float32).reshape(2, 4, 6)[:, ::-1][:, :3, ::3][..., :2]
    index, y = np.array([[2, 0], [1, -1]], np.int32), np.empty((2, 2, 2), np.float32)
    C.unmerge(x, index, y, 0)
    assert (y == np.stack([x[0][[2, 0]], np.stack([x[1][1], 0 * x[1][1]])])).all()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": 3}, TypeError, "incompatible function arguments"),
        ({"x": None}, TypeError, "incompatible function arguments"),
        ({"x": torch.zeros(2, 3, 4).double()}, TypeError, "x must be float32, float16 or bfloat16, got float64"),
        ({"x": torch.zeros(3, 4)}, ValueError, r"x must have 3 dimensions, got shape \(3, 4\)"),
        ({"index": torch.zeros(2, 5)}, TypeError, "index must be int32, got float32"),
        ({"index": torch.zeros(2, 5, dtype=torch.int64)}, TypeError, "index must be int32, got int64"),
        ({"index": torch.zeros(3, 5, dtype=torch.int32)}, ValueError, r"index must have shape \(2, 5\), got \(3, 5\)"),
        ({"index": torch.zeros(5, 2, dtype=torch.int32).T}, ValueError, "index must be contiguous"),
        ({"y": torch.zeros(2, 5, 3)}, ValueError, r"y must have shape \(2, 5, 4\), got \(2, 5, 3\)"),
        ({"y": torch.zeros(2, 5, 4, dtype=torch.bfloat16)}, TypeError, "y must be float32, got bfloat16"),
        ({"y": torch.zeros(2, 4, 5).mT}, ValueError, "y must be contiguous"),
    ],
)
def test_unmerge_refuses(changed, error, message):
    with pytest.raises(error, match=message):
        C.unmerge(*arguments(**changed))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"weight": torch.ones(2, 7, dtype=torch.float64)}, TypeError, "weight must be float32, got float64"),
        ({"weight": torch.ones(7)}, ValueError, r"weight must have shape \(2, 7\), got \(7,\)"),
        ({"positions": torch.ones(2, 7, 3)}, ValueError, r"positions must have shape \(2, 7, 2\), got \(2, 7, 3\)"),
        ({"positions": torch.ones(2, 2, 7).mT}, ValueError, "positions must be contiguous within a batch item"),
        ({"positions": None}, ValueError, "positions must be an array where positions_out has features"),
        ({"fill": torch.ones(2, 3, 4).half()}, TypeError, "fill must be float32, got float16"),
        ({"reduce": "median"}, ValueError, "reduce must be 'mean', 'sum', 'max' or 'first', got 'median'"),
        ({"order": torch.zeros(2, 7)}, TypeError, "order must be int32"),
        ({"offsets": torch.zeros(2, 3, dtype=torch.int32)}, ValueError, r"offsets must have shape \(2, 4\)"),
        ({"num_groups": 4}, ValueError, r"offsets must have shape \(2, 5\)"),
        ({"num_groups": 0}, ValueError, "num_groups must be at least 1"),
        ({"num_groups": -1}, ValueError, "num_groups must be at least 1"),
    ],
)
def test_merge_refuses(changed, error, message):
    with pytest.raises(error, match=message):
        C.merge(**merge_arguments(**changed))


def test_another_device_is_refused():
    x, index, y, stream = arguments()
    with pytest.raises(ValueError, match="x must be on the CPU, where this build of the kernels runs"):
        C.unmerge(OnCuda(x), index, y, stream)


def test_build_info():
    assert C.build_info() == {"host": True, "nvcc": None, "architectures": ()}
    assert cuda.build_info()["reason"] is None
