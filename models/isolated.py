"""Tasks in processes of their own: a crash or a hang is the fault of one task, and costs no other."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_CONTEXT = multiprocessing.get_context("spawn")  # a fork would copy ONNX Runtime's threads half


@dataclass(frozen=True)
class Lost:
    """A task without a result. why: `crashed: ...`, `hung`, or `raised: ...` with the exception's type and message."""

    why: str


def run_each(
    task: Callable[[T], R],
    items: Sequence[T],
    processes: int = 2,
    seconds: float = 120.0,
    fresh: bool = False,
) -> Iterator[tuple[T, R | Lost]]:
    """Every item with what `task`, a function of a module, makes of it, as they are done.

    seconds: what one item may take. fresh: a process for each item, so that it can tell its own memory.
    """
    waiting = deque(items)
    workers: list[_Worker[T, R]] = [_Worker(task) for _ in range(min(processes, len(waiting)))]
    try:
        for worker in workers:
            worker.give(waiting.popleft())
        while busy := [worker for worker in workers if worker.item]:
            connection.wait([worker.pipe for worker in busy], timeout=1.0)
            for worker in busy:
                if not worker.settled(seconds):
                    continue
                yield worker.item.pop(), worker.results.pop()
                if fresh:
                    worker.stop()
                if waiting:
                    worker.give(waiting.popleft())
    finally:
        for worker in workers:
            worker.stop()


class _Worker(Generic[T, R]):
    """A process that does one item at a time; it is started anew after it was lost."""

    def __init__(self, task: Callable[[T], R]) -> None:
        self.task = task
        self.item: list[T] = []  # the one under way, if any
        self.results: list[R | Lost] = []  # what came of it
        self.since = 0.0
        self.process: Any = None

    def give(self, item: T) -> None:
        if self.process is None:
            self.pipe, theirs = _CONTEXT.Pipe()
            self.process = _CONTEXT.Process(target=_serve, args=(self.task, theirs), daemon=True)
            self.process.start()
            theirs.close()
            self.pipe.recv()  # it has read the program, which is no part of its first item
        self.item.append(item)
        self.since = time.monotonic()
        self.pipe.send(item)

    def settled(self, seconds: float) -> bool:
        """Whether anything came of the item."""
        try:
            if self.pipe.poll():
                self.results.append(self.pipe.recv())
                return True
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            self.stop()
            self.results.append(
                Lost(f"crashed: {signal.Signals(-code).name if code < 0 else f'exit {code}'}")
            )
            return True
        if time.monotonic() - self.since > seconds:
            self.stop()
            self.results.append(Lost("hung"))
            return True
        return False

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.process = None


def _serve(task: Callable[[Any], Any], pipe: Any) -> None:
    pipe.send("ready")
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        try:
            result = task(item)
        except Exception as error:
            result = Lost(f"raised: {type(error).__name__}: {error}")
        pipe.send(result)
