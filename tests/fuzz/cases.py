"""One case: a folder with one spoiled file in it, and the command line to call there."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.external_data_helper import convert_model_to_external_data

from onnx_decomp.options import Options
from tests.fuzz import mutations
from tests.fuzz.seeds import CONFIG, SPEC, Seed

COMMON = ("--provider", "cpu", "--no-latency-gate", "--objective", "flops", "--threads", "1", "--quiet")
KEYS = tuple(name.replace("_", "-") for name in Options.__dataclass_fields__)


@dataclass(frozen=True)
class Sound:
    """Everything sound that cases are made from. folder: the seeds as files; report: of a real compilation."""

    folder: Path
    seeds: Mapping[str, Seed]
    report: Any


Spoil = Callable[[Sound, Path, random.Random], list[str]]
"""Writes the files of one case into a folder and gives its command line, with paths relative to that."""


def prepare(kind: str, seed: int, number: int, sound: Sound, folder: Path) -> list[str]:
    """The files and the command line of one case; the same for the same kind, seed and number."""
    rng = random.Random(f"{kind}/{seed}/{number}")
    while True:  # a file that can't be written so is none: the next draw
        with warnings.catch_warnings(action="ignore"), suppress(*mutations.REFUSED):
            return KINDS[kind][1](sound, folder, rng)


def _model(change: Callable[[Sound, str, random.Random], bytes]) -> Spoil:
    def spoil(sound: Sound, folder: Path, rng: random.Random) -> list[str]:
        name = rng.choice(sorted(sound.seeds))
        (folder / "in.onnx").write_bytes(change(sound, name, rng))
        return _on_model(sound, name, folder, rng)

    return spoil


def _on_model(sound: Sound, name: str, folder: Path, rng: random.Random) -> list[str]:
    """Mostly compiled, with data or without, sometimes only looked at."""
    kind = rng.random()
    if kind < 0.12:
        return ["inspect", "in.onnx", *(["--json"] if rng.random() < 0.5 else [])]
    if kind < 0.25:
        return _compiling()
    shutil.copy(sound.folder / f"{name}.calib.npz", folder / "calib.npz")
    if kind < 0.29:
        return [
            "frontier",
            "in.onnx",
            "--calib",
            "calib.npz",
            "--points",
            "1",
            *_without(COMMON, "--no-latency-gate"),
        ]
    more = ["--init-preset", "torch-linear"] if rng.random() < 0.3 else []
    return _compiling("--calib", "calib.npz", "--tolerance", "0.05", *more)


def _without(options: tuple[str, ...], left_out: str) -> list[str]:
    return [option for option in options if option != left_out]


def _compiling(*options: str) -> list[str]:
    return ["in.onnx", "out.onnx", *options, *COMMON, "--report", "report.json", "--html", "report.html"]


def _bytes(sound: Sound, name: str, rng: random.Random) -> bytes:
    other = sound.seeds[rng.choice(sorted(sound.seeds))].model.SerializeToString()
    return mutations.bytes_changed(sound.seeds[name].model.SerializeToString(), rng, other)


def _fields(sound: Sound, name: str, rng: random.Random) -> bytes:
    donor = sound.seeds[rng.choice(sorted(sound.seeds))].model
    return mutations.model_changed(sound.seeds[name].model, rng, donor).SerializeToString()


def _external(sound: Sound, folder: Path, rng: random.Random) -> list[str]:
    name = rng.choice(sorted(sound.seeds))
    model = onnx.ModelProto()
    model.CopyFrom(sound.seeds[name].model)
    convert_model_to_external_data(model, True, "w.bin", size_threshold=0, convert_attribute=True)
    onnx.save(model, folder / "in.onnx")
    model = onnx.load(folder / "in.onnx", load_external_data=False)
    (folder / "in.onnx").write_bytes(mutations.external_changed(model, rng).SerializeToString())
    if rng.random() < 0.2:
        data = folder / "w.bin"
        data.write_bytes(mutations.bytes_changed(data.read_bytes(), rng))
    return _on_model(sound, name, folder, rng)


def _statistics(name: str, change: Callable[[Sound, random.Random], bytes]) -> Spoil:
    def spoil(sound: Sound, folder: Path, rng: random.Random) -> list[str]:
        shutil.copy(sound.folder / "planted.onnx", folder / "in.onnx")
        (folder / name).write_bytes(change(sound, rng))
        more = []
        if rng.random() < 0.5:
            shutil.copy(sound.folder / "planted.calib.npz", folder / "calib.npz")
            more = ["--calib", "calib.npz"]
        return _compiling("--init", name, *more)

    return spoil


def _safetensors(sound: Sound, rng: random.Random) -> bytes:
    return mutations.safetensors_changed((sound.folder / "init.safetensors").read_bytes(), rng)


def _spec(_: Sound, rng: random.Random) -> bytes:
    return mutations.json_changed(SPEC, rng).encode(errors="surrogatepass")


def _calibration(sound: Sound, folder: Path, rng: random.Random) -> list[str]:
    name = rng.choice(sorted(sound.seeds))
    shutil.copy(sound.folder / f"{name}.onnx", folder / "in.onnx")
    arrays = sound.seeds[name].calib
    if rng.random() < 0.2:
        (folder / "calib").mkdir(exist_ok=True)
        (folder / "calib" / "a.npz").write_bytes(mutations.npz_changed(arrays, rng))
        np.savez(folder / "calib" / "b.npz", **arrays)
        return _compiling("--calib", "calib")
    (folder / "calib.npz").write_bytes(mutations.npz_changed(arrays, rng))
    return _compiling("--calib", "calib.npz")


def _config(sound: Sound, folder: Path, rng: random.Random) -> list[str]:
    shutil.copy(sound.folder / "planted.onnx", folder / "in.onnx")
    shutil.copy(sound.folder / "planted.calib.npz", folder / "calib.npz")
    text = mutations.toml_changed(CONFIG, rng, KEYS)
    (folder / "config.toml").write_text(text, encoding="utf-8", errors="surrogatepass")
    given = ["--calib", "calib.npz", "--provider", "cpu", "--no-latency-gate", "--jobs", "1", "--quiet"]
    return ["in.onnx", "out.onnx", *given, "--config", "config.toml"]


def _report(sound: Sound, folder: Path, rng: random.Random) -> list[str]:
    text = mutations.json_changed(sound.report, rng).encode(errors="surrogatepass")
    (folder / "old.json").write_bytes(text)
    if rng.random() < 0.6:
        node = rng.choice(["layers.0.weight", "layers.0/MatMul", "layers.0/Gemm", "x"])
        return ["explain", "old.json", node, *(["--json"] if rng.random() < 0.3 else [])]
    shutil.copy(sound.folder / "planted.onnx", folder / "in.onnx")
    shutil.copy(sound.folder / "planted.calib.npz", folder / "calib.npz")
    return _compiling("--calib", "calib.npz", "--replay", "old.json", "--tolerance", "0.05")


KINDS: Mapping[str, tuple[int, Spoil]] = {
    "model, bytes": (20, _model(_bytes)),
    "model, fields": (40, _model(_fields)),
    "external data": (8, _external),
    "init .npz": (
        5,
        _statistics("init.npz", lambda s, rng: mutations.npz_changed(dict(s.seeds["planted"].init), rng)),
    ),
    "init .safetensors": (5, _statistics("init.safetensors", _safetensors)),
    "init .json": (6, _statistics("init.json", _spec)),
    "init .onnx": (
        3,
        _statistics("init.onnx", lambda s, rng: rng.choice((_bytes, _fields))(s, "planted", rng)),
    ),
    "calibration": (6, _calibration),
    "configuration": (3, _config),
    "report": (4, _report),
}
"""Share in percent, and how a case of it is made."""


def kind_of(number: int) -> str:
    """Kinds in their shares, spread evenly."""
    at = (number * 37) % 100
    for kind, (share, _) in KINDS.items():
        at -= share
        if at < 0:
            return kind
    raise AssertionError("shares of less than 100 %")


def load_sound(folder: Path, seeds: Mapping[str, Seed]) -> Sound:
    """What `write_seeds` and one real compilation have put into a folder."""
    return Sound(folder, seeds, json.loads((folder / "report.json").read_text()))
