"""NVIDIA's driver, asked directly: which GPUs there are, and how much of their memory is taken."""

from __future__ import annotations

import ctypes
import sys
from functools import cache


@cache
def devices() -> tuple[str, ...]:
    """Names of the GPUs that the driver shows; none without a driver."""
    library = _library()
    count = ctypes.c_int(0)
    if library is None or library.cuInit(0) != 0 or library.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    return tuple(_name(library, number) for number in range(count.value))


def used_bytes() -> int | None:
    """Memory of the first GPU that is in use, by any program; None where the driver does not tell."""
    library = _library()
    if library is None or not devices():
        return None
    context = ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    # The context that ONNX Runtime uses too, so that asking takes no memory of its own.
    done = library.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
    done = done or library.cuCtxSetCurrent(context)
    done = done or library.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    return None if done else total.value - free.value


def _name(library: ctypes.CDLL, number: int) -> str:
    text = ctypes.create_string_buffer(128)
    device = ctypes.c_int()
    failed = library.cuDeviceGet(ctypes.byref(device), number)
    failed = failed or library.cuDeviceGetName(text, len(text), device)
    return f"GPU {number}" if failed else text.value.decode("utf-8", "replace")


def _library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
