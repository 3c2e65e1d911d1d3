"""Work on matrices, spread over processes or over the workers of a Dask cluster.

Every task runs with one thread of linear algebra, wherever it runs: sums are then taken in the same order, and what
comes out has the same bytes however the work was spread.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import joblib
from joblib.externals.loky import BrokenProcessPool
from threadpoolctl import threadpool_limits

from onnx_decomp.errors import UsageError

ATTEMPTS = 3
"""Times that work is spread anew after a worker died; what is left then is done in this process."""

CONNECTING = 10.0
"""Seconds that a scheduler has to answer."""

Item = TypeVar("Item")
Made = TypeVar("Made")


def spread(
    function: Callable[..., Made],
    items: Sequence[Item],
    arguments: Callable[[Item], tuple[Any, ...]],
    jobs: int = 1,
    scheduler: str | None = None,
) -> Iterator[Made]:
    """function(*arguments(item)) for each item, in their order, few at a time.

    jobs: processes; they map large arrays among the arguments from files. scheduler: address of a Dask cluster that
    does it instead. A worker that dies costs what it was at.
    Raises UsageError where the cluster can't be reached, and whatever `function` raises.
    """
    done = 0
    for _ in range(ATTEMPTS if jobs > 1 or scheduler is not None else 0):
        try:
            for made in _spread(function, items[done:], arguments, jobs, scheduler):
                done += 1
                yield made
            return
        except _deaths(scheduler):
            continue
    for item in items[done:]:
        yield _alone(function, arguments(item))


def check(scheduler: str | None) -> None:
    """Whether work can be spread there. Raises UsageError if not."""
    if scheduler is not None:
        _connect(scheduler).close()


def _spread(
    function: Callable[..., Made],
    items: Sequence[Item],
    arguments: Callable[[Item], tuple[Any, ...]],
    jobs: int,
    scheduler: str | None,
) -> Iterator[Made]:
    tasks = (joblib.delayed(_alone)(function, arguments(item)) for item in items)
    with ExitStack() as stack:
        where: Mapping[str, Any] = {"backend": "loky", "n_jobs": jobs}
        if scheduler is not None:
            client = stack.enter_context(_connect(scheduler))
            where = {"backend": "dask", "client": client, "n_jobs": -1}
        stack.enter_context(joblib.parallel_config(**where))
        # Files that are mapped: without a folder joblib would take one in memory.
        parallel = joblib.Parallel(return_as="generator", batch_size=1, temp_folder=tempfile.gettempdir())
        yield from parallel(tasks)


def _alone(function: Callable[..., Made], arguments: tuple[Any, ...]) -> Made:
    with threadpool_limits(limits=1, user_api="blas"):
        return function(*arguments)


def _deaths(scheduler: str | None) -> tuple[type[BaseException], ...]:
    """What is raised where workers, or the whole cluster, went away."""
    if scheduler is None:
        return (BrokenProcessPool,)
    from concurrent.futures import CancelledError

    from distributed.comm.core import CommClosedError
    from distributed.scheduler import KilledWorker

    return (KilledWorker, CommClosedError, CancelledError, TimeoutError)


def _connect(scheduler: str) -> Any:
    """A client of a Dask cluster."""
    try:
        import distributed
    except ImportError as error:
        raise UsageError("--scheduler needs Dask: pip install 'onnx-decomp[dask]'") from error
    client: Any = distributed.Client
    try:
        return client(scheduler, timeout=CONNECTING, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise UsageError(
            f"--scheduler {scheduler}: no Dask scheduler answers there: check the address"
        ) from error
