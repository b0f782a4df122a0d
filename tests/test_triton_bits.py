"""What `launch` hands to kernels: aligned inputs, grids that a GPU takes."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from sttm_kernels import dispatch

if dispatch.interpreting() or importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton's compiler", allow_module_level=True)

from sttm_kernels.impl.triton import config, launch
from sttm_kernels.impl.triton.unmerge import compose_kernel

ONE = config.Config(4, 1, {})


@pytest.mark.parametrize("expand", [False, True])
def test_a_misaligned_input_is_read_from_aligned_memory(expand):
    seen = []

    class Kernel:
        params = compose_kernel.params[:1]

        def __getitem__(self, grid):
            return lambda *args, **options: seen.extend(args)

    given = torch.arange(1.0, 32.0)[1:16].view(3, 5)
    given = given[:1].expand(4, 5) if expand else given
    assert given.data_ptr() % 16 != 0
    launch.launch(Kernel(), (1,), given, config=ONE)
    (got,) = seen
    assert got.data_ptr() % 16 == 0
    assert got.stride() == given.stride()
    assert torch.equal(got, given)


@pytest.mark.parametrize("grid", [(2**31,), (1, 65536)])
def test_a_grid_that_no_gpu_takes_is_refused(grid):
    with pytest.raises(ValueError, match="wide_kernel would take"):
        launch.launch(SimpleNamespace(__name__="wide_kernel"), grid, config=ONE)
