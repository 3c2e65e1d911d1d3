"""A sparse sentence encoder as PyTorch exports it, from the weights that a package carries; needs the extra `train`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from safetensors.numpy import load_file
from torch import nn

WIDTH, HEADS, LAYERS, WIDE, TOKENS, POSITIONS = 128, 2, 2, 512, 30_522, 512
EPSILON = 1e-12
OPSET = 17


class Norm(nn.LayerNorm):
    """With the names that the weights were stored under."""

    def __init__(self) -> None:
        super().__init__(WIDTH, eps=EPSILON)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor, away: torch.Tensor) -> torch.Tensor:
        batch, tokens = x.shape[0], x.shape[1]
        query, key, value = (
            part(x).view(batch, tokens, HEADS, WIDTH // HEADS).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(2, 3) / (WIDTH // HEADS) ** 0.5 + away
        return (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, tokens, WIDTH)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"self": Attention(), "output": _output(WIDTH)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(WIDTH, WIDE)})
        self.output = _output(WIDE)

    def forward(self, x: torch.Tensor, away: torch.Tensor) -> torch.Tensor:
        after = self.attention["output"]
        x = after["LayerNorm"](x + after["dense"](self.attention["self"](x, away)))
        wide = nn.functional.gelu(self.intermediate["dense"](x))
        return self.output["LayerNorm"](x + self.output["dense"](wide))


def _output(width: int) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(width, WIDTH), "LayerNorm": Norm()})


class Encoder(nn.Module):
    """input_ids, attention_mask [batch, tokens] -> terms [batch, 30522]: log(1 + relu(logit)), largest over tokens.

    The table of words reads the tokens and, transposed, makes the logits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(TOKENS, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.segments, self.norm = nn.Embedding(2, WIDTH), Norm()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.transform = _output(WIDTH)
        self.bias = nn.Parameter(torch.zeros(TOKENS))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        places = torch.arange(input_ids.shape[1])[None]
        x = self.words(input_ids) + self.places(places) + self.segments.weight[0]
        x = self.norm(x)
        away = (1 - attention_mask[:, None, None, :].float()) * -1e4
        for layer in self.layers:
            x = layer(x, away)
        x = self.transform["LayerNorm"](nn.functional.gelu(self.transform["dense"](x)))
        logits = x @ self.words.weight.T + self.bias
        return (torch.log1p(torch.relu(logits)) * attention_mask[..., None].float()).amax(1)


_NAMES = {
    "bert.embeddings.word_embeddings.": "words.",
    "bert.embeddings.position_embeddings.": "places.",
    "bert.embeddings.token_type_embeddings.": "segments.",
    "bert.embeddings.LayerNorm.": "norm.",
    "bert.encoder.layer.": "layers.",
    "cls.predictions.transform.": "transform.",
    "cls.predictions.": "",
    "LayerNorm.gamma": "LayerNorm.weight",
    "LayerNorm.beta": "LayerNorm.bias",
    "norm.gamma": "norm.weight",
    "norm.beta": "norm.bias",
}


def _renamed(name: str) -> str:
    for old, new in _NAMES.items():
        name = name.replace(old, new)
    return name


def export(weights: Path, path: Path, fold: bool) -> None:
    """Write the model as ONNX by PyTorch's exporter of TorchScript.

    fold: whether it folds constants; without that each weight lies behind a Transpose.
    """
    model = Encoder()
    stored: dict[str, Any] = {
        _renamed(name): torch.from_numpy(array) for name, array in load_file(weights).items()
    }
    model.load_state_dict(stored)
    model.eval()
    example = torch.ones(2, 8, dtype=torch.int64)
    names = ["input_ids", "attention_mask"]
    free = {name: {0: "batch", 1: "tokens"} for name in names} | {"terms": {0: "batch"}}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that this exporter is the old one
        torch.onnx.export(
            model,
            (example, example),
            str(path),
            input_names=names,
            output_names=["terms"],
            dynamic_axes=free,
            opset_version=OPSET,
            do_constant_folding=fold,
            dynamo=False,
        )
    _check(model, path)


def _check(model: nn.Module, path: Path) -> None:
    """Raises ValueError where ONNX Runtime and PyTorch disagree on the file."""
    from onnx_decomp.runtime import open_session

    onnx.checker.check_model(path, full_check=True)
    tokens = np.random.default_rng(0).integers(0, TOKENS, (3, 11))
    mask = np.ones_like(tokens)
    (made,) = open_session(path, threads=1).run({"input_ids": tokens, "attention_mask": mask}).values()
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens), torch.from_numpy(mask)).numpy()
    if not np.allclose(made, expected, rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"{path}: the export differs by {np.abs(made - expected).max():.2g} from PyTorch's own output"
        )
