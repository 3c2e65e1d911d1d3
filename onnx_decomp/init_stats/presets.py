"""Laws that frameworks draw weights from by default. docs/init.md lists them with their sources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

from onnx_decomp.init_stats.nulls import Law

TRUNCATED = Law("truncnorm", 0.0, 1.0).std()
"""Deviation left of a unit normal cut at two, 0.8796: Keras and JAX divide by it, Google's BERT does not."""


@dataclass(frozen=True)
class Shape:
    """What a preset may depend on; the fans are K and N of the canonical W."""

    fan_in: int
    fan_out: int
    residual_layers: int = 0
    """Layers of the network if this projects back into its residual stream (GPT-2's `c_proj`), else 0."""


Preset = Callable[[Shape], Law]


def _normal(std: float) -> Law:
    return Law("normal", 0.0, std)


def _uniform(bound: float) -> Law:
    return Law("uniform", 0.0, bound)


def _torch_linear(shape: Shape) -> Law:
    """torch.nn.Linear: kaiming_uniform_ with a = sqrt(5)."""
    return _uniform(1.0 / sqrt(shape.fan_in))


def _kaiming_normal(shape: Shape) -> Law:
    """He et al. 2015, gain sqrt(2) of ReLU."""
    return _normal(sqrt(2.0 / shape.fan_in))


def _kaiming_uniform(shape: Shape) -> Law:
    return _uniform(sqrt(6.0 / shape.fan_in))


def _xavier_uniform(shape: Shape) -> Law:
    """Glorot and Bengio 2010, gain 1."""
    return _uniform(sqrt(6.0 / (shape.fan_in + shape.fan_out)))


def _xavier_normal(shape: Shape) -> Law:
    return _normal(sqrt(2.0 / (shape.fan_in + shape.fan_out)))


def _lecun_normal(shape: Shape) -> Law:
    """As Keras and Flax draw it: cut at two, and divided so that the variance is 1 / fan_in."""
    return Law("truncnorm", 0.0, 1.0 / sqrt(shape.fan_in) / TRUNCATED)


def _bert(_: Shape) -> Law:
    """Hugging Face's BERT: normal, never cut."""
    return _normal(0.02)


def _bert_truncated(_: Shape) -> Law:
    """Google's BERT: truncated_normal_initializer(0.02)."""
    return Law("truncnorm", 0.0, 0.02)


def _gpt2(shape: Shape) -> Law:
    """Radford et al. 2019: what writes the residual stream is scaled by 1 / sqrt(2 layers)."""
    return _normal(0.02 / sqrt(2 * shape.residual_layers) if shape.residual_layers else 0.02)


PRESETS: dict[str, Preset] = {
    "torch-linear": _torch_linear,
    "kaiming-normal": _kaiming_normal,
    "kaiming-uniform": _kaiming_uniform,
    "kaiming": _kaiming_normal,
    "xavier-uniform": _xavier_uniform,
    "xavier-normal": _xavier_normal,
    "xavier": _xavier_uniform,
    "glorot": _xavier_uniform,
    "tf-dense": _xavier_uniform,
    "lecun-normal": _lecun_normal,
    "bert": _bert,
    "bert-truncated": _bert_truncated,
    "gpt2": _gpt2,
}
