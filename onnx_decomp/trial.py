"""What may crash, never end, or take all memory is done once in a process of its own, to see whether it survives.

Shape inference and ONNX Runtime are native code: an odd model can end the whole process in them, without an exception.
Linux only: elsewhere a process can't be copied as it stands, and nothing is tried.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from onnx_decomp.errors import InputError
from onnx_decomp.guards import limited_memory

_MEMORY = 77
"""Exit code of a trial that ran out of memory."""


def attempt(action: Callable[[], object], what: str, seconds: float, memory: int) -> None:
    """Try `action` in a copy of this process. What it returns or raises is left for the caller to meet again.

    what: it is, for messages. seconds: it may take. memory: bytes it may take beside what is held here.
    Raises InputError where it crashes or exceeds either.
    """
    if sys.platform != "linux":
        return
    reader, writer = os.pipe()
    with _no_garbage():
        child = os.fork()
        if child == 0:
            os._exit(_quietly(action, memory))
    os.close(writer)
    ended = False
    try:
        ended = bool(select.select([reader], [], [], seconds)[0])  # the copy's end of it closes when it ends
    finally:
        os.close(reader)
        if not ended:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if not ended:
        raise InputError(f"{what} takes more than {seconds:.0f} s: is there a Loop without end in it?")
    if code == _MEMORY:
        raise InputError(f"{what} takes more than {memory} bytes: look for a tensor of enormous size in it")
    if code != 0:
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise InputError(f"{what} makes onnx or ONNX Runtime crash ({name}): export the model again")


@contextmanager
def _no_garbage() -> Iterator[None]:
    """The copy must not destroy what it has copied: a session of ONNX Runtime waits for threads that are not there."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _quietly(action: Callable[[], object], memory: int) -> int:
    """Exit code of the copy. Nothing that it says is shown: the caller will say it again."""
    faulthandler.disable()
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for handle in (1, 2):
            os.dup2(nowhere, handle)
        with limited_memory(memory):
            action()
    except BaseException as error:
        short = isinstance(error, MemoryError) or "bad_alloc" in str(error) or "allocate" in str(error)
        return _MEMORY if short else 0
    return 0
