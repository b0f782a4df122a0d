"""Arrays of other owners than PyTorch, for the bindings."""

import ctypes

import torch


class OnCuda:
    """Memory of the CPU that says it is that of a GPU, by DLPack alone."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack_device__(self):
        return (2, 0)

    def __dlpack__(self, stream=None):
        assert stream == -1
        capsule = torch.utils.dlpack.to_dlpack(self.tensor)
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        device_type = ctypes.c_int32.from_address(get(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p))
        assert device_type.value == 1
        device_type.value = 2
        return capsule
