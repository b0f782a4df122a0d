"""What `launch` hands to kernels: aligned inputs, the same code wherever they lie, grids that a GPU takes."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

import sttm_kernels as sttm
from sttm_kernels import dispatch

if dispatch.interpreting() or importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton's compiler", allow_module_level=True)

from benchmarks.codegen import table
from benchmarks.host_overhead import stubbed_driver
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


def verbs(q, meta, index):
    """Every verb on item 1 of a batch, whose address is no multiple of 16."""
    plan = sttm.MergePlan(index, meta.shape[1], weight=torch.ones(index.shape), order=index, offsets=index[:, :6])
    return {
        "assign": lambda: sttm.assign(q, meta, impl="triton"),
        "assign_merge": lambda: sttm.assign_merge(q, None, meta, impl="triton"),
        "soft_merge": lambda: sttm.soft_merge(q, q, meta, impl="triton"),
        "match": lambda: sttm.match(q, 5, impl="triton"),
        "merge": lambda: sttm.merge(q, plan, reduce="max", impl="triton"),
        "unmerge": lambda: sttm.unmerge(meta, plan, impl="triton"),
        "compose": lambda: sttm.compose(plan, sttm.MergePlan(index[:, :5], 2), impl="triton"),
    }


@pytest.mark.parametrize("verb", list(verbs(*(torch.zeros(1, 1, 1),) * 3)))
def test_a_misaligned_slice_is_given_the_code_of_its_clone(verb):
    """Other code adds up in another order: an item must have the same bits wherever it lies in its batch."""
    given = (torch.zeros(3, 17, 20).half(), torch.zeros(3, 5, 20).half(), torch.zeros(3, 17, dtype=torch.int32))
    items = [t[1:2] for t in given]
    assert all(t.data_ptr() % 16 for t in items)
    with stubbed_driver() as seen, torch.no_grad():
        verbs(*(t.clone() for t in items))[verb]()
        compiled = list(seen.compiled)
        verbs(*items)[verb]()
    assert compiled
    assert seen.compiled == compiled


def test_numbers_are_compiled_for_no_multiple_of_16():
    """So that what is left are the pointers that `launch` looks at, and another length compiles nothing."""
    for _, one in table.specializations((90,)):
        for at in launch._hinted(one.kernel):
            name = one.kernel.params[at].name
            kind = one.signature[name]
            assert kind.startswith("*") or one.constexprs.get(name, 0) is None, (
                f"{one.kernel.__name__}: {name} is {kind}"
            )


@pytest.mark.parametrize("grid", [(2**31,), (1, 65536)])
def test_a_grid_that_no_gpu_takes_is_refused(grid):
    with pytest.raises(ValueError, match="wide_kernel would take"):
        launch.launch(SimpleNamespace(__name__="wide_kernel"), grid, config=ONE)
