"""Whatever is wrong: the documented exit code, one line that names it, nothing written, nothing left behind.

Each case spoils one thing in a folder where everything else is right, and gives what to call the command with.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_decomp.cli import main
from onnx_decomp.runtime import cuda_problem
from tests.workplace import (
    CANNOT_VERIFY,
    INPUT,
    INTERRUPTED,
    PROVIDER,
    USAGE,
    Capture,
    Case,
    Spoil,
    Workplace,
    arguments,
    check_refused,
    contents,
    make_place,
    run_case,
)


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return make_place(tmp_path)


# The model


def content(data: Callable[[bytes], bytes]) -> Spoil:
    """The model's bytes replaced."""

    def spoil(place: Workplace) -> list[str]:
        place.model.write_bytes(data(place.model.read_bytes()))
        return []

    return spoil


def edited(change: Callable[[onnx.ModelProto], object]) -> Spoil:
    def spoil(place: Workplace) -> list[str]:
        model = place.edit()
        change(model)
        onnx.save(model, place.model)
        return []

    return spoil


def set_weight(name: str, number: float) -> Spoil:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == name)
        array = numpy_helper.to_array(tensor).copy()
        array.flat[5] = number
        tensor.CopyFrom(numpy_helper.from_array(array, name))

    return edited(change)


def external(location: str, prepare: Callable[[Path, bytes], object] = lambda _folder, _data: None) -> Spoil:
    """The first weight outside the file, where `location` says; `prepare` puts the data somewhere."""

    def spoil(place: Workplace) -> list[str]:
        model = place.edit()
        tensor = model.graph.initializer[0]
        prepare(place.folder, tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location.format(folder=place.folder))
        place.model.write_bytes(model.SerializeToString())
        return []

    return spoil


def outside(folder: Path, data: bytes) -> Path:
    """The data in the folder above the model's, where it must not be read from."""
    path = folder.parent / "secret.bin"
    path.write_bytes(data)
    return path


MODELS = {
    "truncated": Case(content(lambda data: data[:-500]), INPUT, "in.onnx"),
    "empty": Case(content(lambda _: b""), INPUT, "in.onnx"),
    "random": Case(content(lambda _: np.random.default_rng(0).bytes(5000)), INPUT, "in.onnx"),
    "text": Case(content(lambda _: b"# This is a README.\n" * 40), INPUT, "in.onnx"),
    "another message": Case(
        content(lambda _: onnx.OperatorSetIdProto(domain="x", version=3).SerializeToString()),
        INPUT,
        "in.onnx",
    ),
    "missing": Case(lambda place: [str(place.folder / "none.onnx"), str(place.out)], INPUT, "none.onnx"),
    "no graph": Case(edited(lambda model: model.ClearField("graph")), INPUT, "no graph"),
    "an input that nobody makes": Case(
        edited(lambda model: model.graph.node[0].input.__setitem__(0, "nobody")), INPUT, "nobody"
    ),
    "an unknown operator": Case(
        edited(lambda model: setattr(model.graph.node[0], "op_type", "NoSuchOp")), INPUT, "NoSuchOp"
    ),
    "a weight with NaN": Case(set_weight("layers.1.weight", np.nan), INPUT, "layers.1.weight"),
    "a weight with infinity": Case(set_weight("layers.0.weight", np.inf), INPUT, "layers.0.weight"),
    "a bias with NaN": Case(set_weight("layers.0.bias", np.nan), INPUT, "layers.0.bias"),
    "too few bytes in a weight": Case(
        edited(lambda model: setattr(model.graph.initializer[0], "raw_data", b"\0" * 8)),
        INPUT,
        "layers.0.weight",
    ),
    "missing data": Case(external("gone.bin"), INPUT, "gone.bin"),
    "short data": Case(external("w.bin", lambda at, _: (at / "w.bin").write_bytes(b"123")), INPUT, "w.bin"),
    "data above the folder": Case(external("../secret.bin", outside), INPUT, "../secret.bin"),
    "data by an absolute path": Case(
        external("{folder}/w.bin", lambda at, data: (at / "w.bin").write_bytes(data)), INPUT, "w.bin"
    ),
    "data through a symbolic link": Case(
        external("w.bin", lambda at, data: (at / "w.bin").symlink_to(outside(at, data))),
        INPUT,
        "symbolic link",
    ),
    "data through a hard link": Case(
        external("w.bin", lambda at, data: (at / "w.bin").hardlink_to(outside(at, data))), INPUT, "hard link"
    ),
    "data through a linked folder": Case(
        external("d/secret.bin", lambda at, data: (outside(at, data), (at / "d").symlink_to(at.parent))),
        INPUT,
        "symbolic link",
    ),
    "data that is a folder": Case(external("w.bin", lambda at, _: (at / "w.bin").mkdir()), INPUT, "w.bin"),
}


def test_what_onnx_runtime_cannot_load_is_copied(place: Workplace, capsys: Capture) -> None:
    """An operator of somebody's own: it may run where it will run."""
    model = place.edit()
    model.opset_import.append(helper.make_opsetid("custom", 1))
    model.graph.node[2].domain = "custom"
    onnx.save(model, place.model)
    assert main([*arguments(place, []), "--provider", "cpu"]) == 0
    assert "custom" in capsys.readouterr().err
    assert place.out.read_bytes() == place.model.read_bytes()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("existing", [False, True], ids=["", "over an older output"])
def test_a_bad_model(name: str, existing: bool, place: Workplace, capsys: Capture) -> None:
    run_case(MODELS[name], place, capsys, existing)


# Statistics and calibration data


class Exploit:
    """What a pickle may do to whoever loads it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploited",)


def arrays(option: str, change: Callable[[dict[str, Any]], object]) -> Spoil:
    """The arrays of --init or --calib changed in place."""

    def spoil(place: Workplace) -> list[str]:
        path = place.init if option == "--init" else place.calib
        with np.load(path) as archive:
            values: dict[str, Any] = dict(archive)
        change(values)
        np.savez(path, **values)
        return []

    return spoil


def file(option: str, name: str, data: bytes | str) -> Spoil:
    """Another file given as --init or --calib."""

    def spoil(place: Workplace) -> list[str]:
        path = place.folder / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return [option, str(path)]

    return spoil


def objects(values: dict[str, Any]) -> None:
    """An array of objects, which only pickle can hold."""
    name = next(iter(values))
    values[name] = np.array([Exploit()], dtype=object)


def spec(**fields: Any) -> str:
    pattern = {"match": "*", "family": "uniform", "bound": 0.1} | fields
    return json.dumps({"onnx_decomp_init": 1, "patterns": [pattern]})


def safetensors(shape: list[int], end: int) -> bytes:
    """A header that says what it likes, and 64 bytes."""
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}
    header = json.dumps({"layers.0.weight": entry}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(64)


PICKLE = pickle.dumps(Exploit())

STATISTICS = {
    "missing": Case(lambda _: ["--init", "no-such.npz"], INPUT, "no-such.npz"),
    "other names and shapes": Case(
        arrays("--init", lambda values: (values.clear(), values.update(conv=np.ones((3, 3, 3))))),
        INPUT,
        "init.npz",
    ),
    "other shapes": Case(
        arrays("--init", lambda values: values.update({n: a[:-1] for n, a in values.items()})),
        INPUT,
        "init.npz",
    ),
    "NaN": Case(
        arrays("--init", lambda values: values["layers.0.weight"].fill(np.nan)), INPUT, "layers.0.weight"
    ),
    "an array of objects": Case(arrays("--init", objects), INPUT, "init.npz"),
    "a pickle": Case(file("--init", "w.npz", PICKLE), INPUT, "w.npz"),
    "a checkpoint": Case(file("--init", "w.pt", PICKLE), INPUT, "w.pt"),
    "safetensors that aren't": Case(file("--init", "w.safetensors", b"\xff" * 64), INPUT, "w.safetensors"),
    "safetensors with a header of 4 EB": Case(
        file("--init", "w.safetensors", (2**62).to_bytes(8, "little") + b"{}"), INPUT, "w.safetensors"
    ),
    "safetensors that promise a terabyte": Case(
        file("--init", "w.safetensors", safetensors([2**20, 2**18], 2**40)), INPUT, "w.safetensors"
    ),
    "safetensors with dims that overflow": Case(
        file("--init", "w.safetensors", safetensors([2**32, 2**32, 4], 0)), INPUT, "w.safetensors"
    ),
    "a model that isn't": Case(file("--init", "w.onnx", b"\xff" * 64), INPUT, "w.onnx"),
    "broken JSON": Case(file("--init", "w.json", '{"onnx_decomp_init": 1, "patterns": ['), INPUT, "w.json"),
    "other JSON": Case(file("--init", "w.json", "[1, 2]"), INPUT, "w.json"),
    "an unknown family": Case(file("--init", "w.json", spec(family="cauchy")), INPUT, "w.json"),
    "code in an expression": Case(
        file("--init", "w.json", spec(bound="__import__('os').mkdir('exploited')")), INPUT, "pattern 0"
    ),
    "a pattern that matches nothing": Case(
        file("--init", "w.json", spec(match="encoder.*")), INPUT, "no pattern"
    ),
    "a broken pattern": Case(file("--init", "w.json", spec(match="re:(")), INPUT, "pattern 0"),
    "an unknown preset": Case(lambda _: ["--init-preset", "zero"], USAGE, "--init"),
}

CALIBRATION = {
    "missing": Case(lambda _: ["--calib", "no-such.npz"], INPUT, "no-such.npz"),
    "an empty folder": Case(
        lambda place: ["--calib", str((place.folder / "data").mkdir() or place.folder / "data")],
        INPUT,
        "data",
    ),
    "another name": Case(
        arrays("--calib", lambda values: values.update(input_ids=values.pop("x"))), INPUT, "'x'"
    ),
    "another width": Case(
        arrays("--calib", lambda values: values.update(x=values["x"][:, 1:])), INPUT, "'x'"
    ),
    "another rank": Case(arrays("--calib", lambda values: values.update(x=values["x"][0])), INPUT, "'x'"),
    "another type": Case(
        arrays("--calib", lambda values: values.update(x=values["x"].astype(int))), INPUT, "float32"
    ),
    "text": Case(arrays("--calib", lambda values: values.update(x=np.full((60, 32), "a"))), INPUT, "'x'"),
    "NaN": Case(arrays("--calib", lambda values: values["x"].fill(np.nan)), INPUT, "NaN"),
    "infinity": Case(arrays("--calib", lambda values: values["x"].fill(np.inf)), INPUT, "infinity"),
    "too large for its type": Case(
        arrays("--calib", lambda values: values.update(x=np.full((60, 32), 1e300))), INPUT, "infinity"
    ),
    "too few samples": Case(
        arrays("--calib", lambda values: values.update(x=values["x"][:3])), INPUT, "3 samples"
    ),
    "no samples": Case(
        arrays("--calib", lambda values: values.update(x=values["x"][:0])), INPUT, "0 samples"
    ),
    "an array of objects": Case(arrays("--calib", objects), INPUT, "calib.npz"),
    "a pickle": Case(file("--calib", "c.npz", PICKLE), INPUT, "c.npz"),
    "a broken archive": Case(file("--calib", "c.npz", b"PK\3\4" + b"\0" * 80), INPUT, "c.npz"),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_bad_statistics(
    name: str, place: Workplace, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.folder)  # where an exploit would leave its mark
    case = STATISTICS[name]
    given = case.spoil(place)
    line = arguments(place, given)
    if "--init-preset" in given:
        line = [str(place.model), str(place.out), *given]
    check_refused(place, line, case.code, case.says, capsys)


@pytest.mark.parametrize("name", CALIBRATION)
def test_bad_calibration(
    name: str, place: Workplace, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.folder)
    run_case(CALIBRATION[name], place, capsys)


# Options and outputs


def to(name: str, prepare: Callable[[Workplace], object] = lambda _: None) -> Spoil:
    """The output called `name` in the folder."""

    def spoil(place: Workplace) -> list[str]:
        prepare(place)
        return [str(place.model), f"{place.folder}/{name}"]

    return spoil


OUTPUTS = {
    "no such folder": Case(to("no/such/out.onnx"), USAGE, "no/such"),
    "a folder": Case(to("d", lambda place: (place.folder / "d").mkdir()), USAGE, "/d"),
    "the input": Case(to("in.onnx"), USAGE, "in.onnx"),
    "the input by another path": Case(to("./././in.onnx"), USAGE, "in.onnx"),
    "the input through a symbolic link": Case(
        to("link.onnx", lambda place: (place.folder / "link.onnx").symlink_to("in.onnx")), USAGE, "link.onnx"
    ),
    "the input through a hard link": Case(
        to("link.onnx", lambda place: (place.folder / "link.onnx").hardlink_to(place.model)),
        USAGE,
        "link.onnx",
    ),
    "the statistics": Case(to("init.npz"), USAGE, "--init"),
    "the calibration data": Case(to("calib.npz"), USAGE, "--calib"),
    "the report": Case(
        lambda place: [str(place.model), str(place.out), "--report", str(place.out)], USAGE, "--report"
    ),
    "the script": Case(
        lambda place: [str(place.model), str(place.folder / "score.py"), *scoring("return 1.0")(place)],
        USAGE,
        "--evaluate",
    ),
    "a report that is a device": Case(
        lambda place: [str(place.model), str(place.out), "--report", os.devnull], USAGE, os.devnull
    ),
    "a device": Case(lambda place: [str(place.model), os.devnull], USAGE, os.devnull),
}

OPTIONS = {
    "tolerance 0": (["--tolerance", "0"], USAGE, "--tolerance"),
    "tolerance -1": (["--tolerance", "-1"], USAGE, "--tolerance"),
    "tolerance nan": (["--tolerance", "nan"], USAGE, "--tolerance"),
    "tolerance inf": (["--tolerance", "inf"], USAGE, "--tolerance"),
    "unknown provider": (["--provider", "tpu"], USAGE, "--provider"),
    "tolerance of no output": (["--tolerance", "logits=0.1"], USAGE, "no output 'logits': it has 'y'"),
    "metric of no output": (["--metric", "logits=kl"], USAGE, "no output 'logits': it has 'y'"),
    "no script": (["--evaluate", "no-such.py:score"], INPUT, "no-such.py"),
    "no function": (["--evaluate", "score.py"], USAGE, "--evaluate"),
    "unknown metric": (["--metric", "psnr"], USAGE, "--metric"),
    "unknown option": (["--fast"], USAGE, "--fast"),
    "include": (["--include", "layers.["], USAGE, "--include"),
    "exclude": (["--exclude", "*"], USAGE, "--exclude"),
    "replay nothing": (["--replay", "no-such.json"], INPUT, "no-such.json"),
    "a name too long to be a file's": (["--replay", "a" * 5000], INPUT, "File name too long"),
    "an output too long for any folder": (["--report", "a" * 5000], USAGE, "File name too long"),
    "config nothing": (["--config", "no-such.toml"], USAGE, "no-such.toml"),
    "one argument too many": (["--seed", "1", "third.onnx"], USAGE, "third.onnx"),
}

FILES = {
    "config with infinity": ("--config", "seed = inf", USAGE, "seed"),
    "config with a book of a number": ("--config", f"min-speedup = {'9' * 400}", USAGE, "min-speedup"),
    "config with a number for a file": ("--config", "replay = -1", INPUT, "-1"),
    "config that runs code": ("--config", 'evaluate = "score.py:score"', USAGE, "on the command line"),
    "replay of brackets": ("--replay", "[" * 10**5, INPUT, "given"),
    "config with an unknown key": ("--config", "tolerence = 1", USAGE, "tolerence"),
    "config that isn't TOML": ("--config", "tolerance", USAGE, "given"),
    "config with an impossible value": ("--config", "tolerance = 0", USAGE, "tolerance"),
    "replay of text": ("--replay", "hello", INPUT, "given"),
    "replay of another file": ("--replay", "{}", INPUT, "given"),
    "replay of a list": ("--replay", "[1]", INPUT, "given"),
    "replay of a wrong field": ("--replay", '{"kept": 7}', INPUT, "given"),
    "replay of another model": (
        "--replay",
        '{"kept": ["region_000"], "input": {"sha256": "0"}}',
        INPUT,
        "another model",
    ),
}


def script(text: str, name: str = "score") -> Spoil:
    """A script for --evaluate, and the function that is asked for."""

    def spoil(place: Workplace) -> list[str]:
        (place.folder / "score.py").write_text(text)
        return ["--evaluate", f"{place.folder / 'score.py'}:{name}"]

    return spoil


def scoring(body: str) -> Spoil:
    return script(f"def score(run, part):\n    {body}\n")


SCRIPTS = {
    "no such function": Case(script("x = 1"), INPUT, "no function 'score'"),
    "no function": Case(script("score = 1"), INPUT, "'score' is no function"),
    "not Python": Case(script("def score(run part)"), INPUT, "SyntaxError"),
    "fails while it loads": Case(
        script("raise OSError('no data')"), INPUT, "score.py: line 1: OSError: no data"
    ),
    "leaves while it loads": Case(script("import sys; sys.exit(0)"), INPUT, "SystemExit: 0"),
    "fails": Case(scoring("raise KeyError('label')"), INPUT, "score: line 2: KeyError: 'label'"),
    "leaves": Case(scoring("raise SystemExit"), INPUT, "SystemExit"),
    "NaN": Case(scoring("return float('nan')"), INPUT, "returned nan for 'select'"),
    "None": Case(scoring("pass"), INPUT, "returned None"),
    "text": Case(scoring("return 'good'"), INPUT, "returned 'good'"),
    "another input": Case(scoring("return run({'z': 1})['y'].mean()"), INPUT, "the model fails to run"),
    "fails only at the end": Case(scoring("return {'select': 1.0}[part]"), INPUT, "KeyError: 'report'"),
    "chance": Case(scoring("import random; return random.random()"), CANNOT_VERIFY, "remove the randomness"),
    "interrupted": Case(scoring("raise KeyboardInterrupt"), INTERRUPTED, "interrupted"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_that_gives_no_score(name: str, place: Workplace, capsys: Capture) -> None:
    case = SCRIPTS[name]
    line = [*arguments(place, case.spoil(place)), "--objective", "flops", "--quiet"]
    check_refused(place, line, case.code, case.says, capsys)


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_that_cannot_be(name: str, place: Workplace, capsys: Capture) -> None:
    run_case(OUTPUTS[name], place, capsys)


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="root may write anywhere")
def test_a_read_only_folder(place: Workplace, capsys: Capture) -> None:
    locked = place.folder / "locked"
    locked.mkdir(mode=0o500)
    check_refused(
        place, arguments(place, [str(place.model), str(locked / "o.onnx")]), USAGE, "locked", capsys
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_that_makes_no_sense(name: str, place: Workplace, capsys: Capture) -> None:
    given, code, says = OPTIONS[name]
    check_refused(place, [str(place.model), str(place.out), *given], code, says, capsys)


@pytest.mark.parametrize("name", FILES)
def test_an_options_file_that_makes_no_sense(name: str, place: Workplace, capsys: Capture) -> None:
    option, text, code, says = FILES[name]
    path = place.folder / "given"
    path.write_text(text)
    check_refused(place, arguments(place, [option, str(path)]), code, says, capsys)


def test_cuda_where_there_is_none(place: Workplace, capsys: Capture) -> None:
    if cuda_problem() is None:
        pytest.skip("CUDA works here")
    line = [*arguments(place, []), "--latency-gate", "--provider", "cuda"]
    check_refused(place, line, PROVIDER, "--provider cpu", capsys)


def test_the_unspoiled_folder_compiles(place: Workplace) -> None:
    """What every case above starts from is sound, so that each fails for its own reason."""
    line = [*arguments(place, []), "--objective", "flops", "--no-latency-gate", "--provider", "cpu", "-q"]
    before = contents(place.folder)
    assert main(line) == 0
    after = contents(place.folder)
    assert set(after) - set(before) == {"out.onnx"}
    assert after.pop("out.onnx")[1] != before["in.onnx"][1]
    assert after == before


DAMAGED = {
    "no sites": '{"schema": "onnx-decomp/1"}',
    "sites that are none": '{"schema": "onnx-decomp/1", "sites": [7]}',
    "a site with nothing in it": '{"schema": "onnx-decomp/1", "sites": [{"node": "a", "weight": "b"}]}',
    "brackets": "[" * 10**5,
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("more", [[], ["--json"]], ids=["", "json"])
def test_a_damaged_report(name: str, more: list[str], tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "r.json"
    path.write_text(DAMAGED[name])
    code = main(["explain", str(path), "a", *more])
    captured = capsys.readouterr()
    if code == 0:  # as JSON a site is shown as it is
        assert json.loads(captured.out)["sites"] == [{"node": "a", "weight": "b"}]
    else:
        assert code == INPUT
        assert "give a file that --report wrote" in captured.err
        assert len(captured.err.splitlines()) == 1
