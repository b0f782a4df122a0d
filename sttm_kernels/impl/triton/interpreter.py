"""What Triton's interpreter needs to run the kernels on every supported Triton and NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def mend() -> None:
    """NumPy 2.4 may use a scalar as a bound of a loop (Triton 3.5, 3.6), and masks are truth values (3.9)."""
    patch_tensor, builder = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def patched(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        put = scope[0].set_attr if scope else setattr
        put(tensor, "__index__", lambda self: int(np.squeeze(self.handle.data)))

    def truth(mask: Any) -> Any:
        return interpreter.TensorHandle(mask.data.astype(np.bool_), tl.int1)

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        return load(self, pointers, truth(mask), *rest)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(self, pointers, value, truth(mask), *rest)

    interpreter._patch_lang_tensor = patched
    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
