"""Ctrl-C and SIGTERM that are heard at once, even while ONNX Runtime computes, and a limit for runs that never end.

Python raises KeyboardInterrupt only after the call that it is in returns, and one run of a model may take minutes, or,
with a Loop in it, for ever. So a signal also wakes a thread here, which ends the run; then everything goes as always.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Stop = Callable[[], None]

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_heard = threading.Event()
_under_way: dict[int, Stop] = {}
"""How to end each call that is under way, by the number of its thread."""


@contextmanager
def stoppable(stop: Stop, seconds: float | None = None) -> Iterator[None]:
    """A call in the block is ended by `stop`, from another thread, on a signal or after so many seconds."""
    thread = threading.get_ident()
    _under_way[thread] = stop
    timer = threading.Timer(seconds, stop) if seconds is not None else None
    try:
        if timer is not None:
            timer.daemon = True
            timer.start()
        yield
    finally:
        del _under_way[thread]
        if timer is not None:
            timer.cancel()


@contextmanager
def interruptible() -> Iterator[None]:
    """In the block, SIGINT and SIGTERM end what is `stoppable` and raise KeyboardInterrupt. For the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    watcher = threading.Thread(target=_watch, args=(theirs,), daemon=True)
    watcher.start()
    woken = signal.set_wakeup_fd(ours.fileno(), warn_on_full_buffer=False)
    _heard.clear()
    usual = (signal.SIG_DFL, signal.default_int_handler)  # what is ignored, or handled by others, stays so
    before = {number: signal.getsignal(number) for number in SIGNALS if signal.getsignal(number) in usual}
    for number in before:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken)
        ours.shutdown(socket.SHUT_RDWR)  # closing is not enough: a script's own child may hold a copy of it
        watcher.join()
        ours.close()
        theirs.close()


def _watch(signals: socket.socket) -> None:
    """Ends what is under way for every byte, which is the number of a signal; returns when the other side closes."""
    while received := signals.recv(1):
        if received[0] in SIGNALS:
            for stop in list(_under_way.values()):
                stop()


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    _heard.set()
    raise KeyboardInterrupt


def interrupted() -> bool:
    """Whether a signal came: some libraries turn the KeyboardInterrupt into an error of their own."""
    return _heard.is_set()
