"""Work spread over processes or a cluster comes out the same, whatever dies on the way."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.planted import Planted, build
from onnx_decomp.cli import main
from onnx_decomp.errors import InputError
from onnx_decomp.scratch import kept
from onnx_decomp.workers import spread
from tests.test_end_to_end import FREE, Job, planted_job


def product(matrix: np.ndarray, number: int) -> tuple[int, np.ndarray]:
    return number, number * matrix @ matrix.T


def dying(number: int, parent: int, marks: Path, often: bool) -> tuple[int, bool]:
    """Number and whether the parent itself did it; item 2 kills the process that it is in, once or always."""
    mark = marks / "died"
    if number == 2 and os.getpid() != parent and (often or not mark.exists()):
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number, os.getpid() == parent


def refusing(_number: int) -> None:
    raise InputError("weight 'w' holds NaN")


def test_order_and_bytes_are_those_of_the_serial_run() -> None:
    matrix = kept(np.random.default_rng(0).standard_normal((700, 300)).astype(np.float32), 1)
    found = [list(spread(product, range(6), lambda n: (matrix, n), jobs)) for jobs in (1, 2)]
    for (a, serial), (b, parallel) in zip(*found, strict=True):
        assert a == b
        assert serial.tobytes() == parallel.tobytes()


def test_arguments_are_made_few_at_a_time() -> None:
    made: list[int] = []

    def arguments(number: int) -> tuple[np.ndarray, int]:
        made.append(number)
        return np.ones((2, 2)), number

    results = spread(product, range(100), arguments, jobs=2)
    next(results)
    assert len(made) < 50
    assert [number for number, _ in results] == list(range(1, 100))


@pytest.mark.parametrize("often", [False, True])
def test_a_worker_that_dies_costs_a_retry(tmp_path: Path, often: bool) -> None:
    found = list(spread(dying, range(5), lambda n: (n, os.getpid(), tmp_path, often), jobs=2))
    assert [number for number, _ in found] == list(range(5))
    assert found[2][1] == often  # only what kills every worker is done here
    assert (tmp_path / "died").exists()


@pytest.mark.parametrize("jobs", [1, 2])
def test_errors_come_through(jobs: int) -> None:
    with pytest.raises(InputError, match="weight 'w' holds NaN"):
        list(spread(refusing, range(3), lambda n: (n,), jobs))


def outcome(made: Job, *options: str) -> tuple[bytes, dict[str, Any]]:
    """Bytes of the model, and the report without what is about this very run."""
    code, report = made.run(*FREE, *options)
    assert code == 0
    assert report["kept"]
    del report["seconds"], report["options"]["jobs"], report["options"]["scheduler"]
    return made.out.read_bytes(), report


@pytest.fixture
def made(tmp_path: Path) -> Job:
    """Jitter, so that blocks are found by annealing."""
    return planted_job(tmp_path, build(Planted((96, 192, 96), jitter=0.05, gain=3)))


def test_jobs_change_nothing(made: Job) -> None:
    assert outcome(made, "--jobs", "2", "--tolerance", "0.5") == outcome(made, "--tolerance", "0.5")


# Dask


@pytest.fixture
def cluster() -> Iterator[Any]:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as found:
        yield found


@pytest.mark.slow
def test_a_cluster_changes_nothing(made: Job, cluster: Any) -> None:
    serial = outcome(made, "--tolerance", "0.5")
    assert outcome(made, "--tolerance", "0.5", "--scheduler", cluster.scheduler_address) == serial


@pytest.mark.slow
def test_a_cluster_worker_that_dies_costs_a_retry(cluster: Any, tmp_path: Path) -> None:
    found = spread(
        dying, range(5), lambda n: (n, os.getpid(), tmp_path, False), scheduler=cluster.scheduler_address
    )
    assert list(found) == [(number, False) for number in range(5)]
    assert (tmp_path / "died").exists()


def refused(made: Job, address: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([str(made.source), str(made.out), "--scheduler", address]) == 2
    assert not made.out.exists()
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_cluster_needs_the_extra(
    made: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert "pip install 'onnx-decomp[dask]'" in refused(made, "tcp://127.0.0.1:1", capsys)


def test_a_cluster_has_to_answer(
    made: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr("onnx_decomp.workers.CONNECTING", 0.5)
    for address in ("tcp://127.0.0.1:1", "nonsense://"):
        assert f"--scheduler {address}: no Dask scheduler answers" in refused(made, address, capsys)
