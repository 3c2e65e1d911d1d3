"""What the training scripts share: the network, its loop, and the files that a training leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models import ROOT, accuracy

torch.set_num_threads(1)

Arrays = dict[str, NDArray[Any]]
OUTPUT = "logits"


class Mlp(nn.Module):
    """Linear layers with ReLU between them, drawn with torch's defaults from a seed of their own."""

    def __init__(self, widths: Sequence[int], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.widths = tuple(widths)
        self.layers = nn.ModuleList(nn.Linear(k, n) for k, n in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, N] of inputs [batch, K]."""
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        logits: Tensor = self.layers[-1](x)
        return logits

    def arrays(self) -> Arrays:
        """A copy of every parameter by name."""
        return {name: parameter.detach().numpy().copy() for name, parameter in self.named_parameters()}


def batches(
    inputs: NDArray[np.float32], target: NDArray[np.int64], shape: tuple[int, ...], seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random batches: inputs [shape[0], K] and labels [shape]; shape [n, m] joins m inputs to one."""
    x, y = torch.from_numpy(inputs), torch.from_numpy(target)
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(x), shape, generator=generator)
        yield x[chosen].reshape(shape[0], -1), y[chosen]


def train(
    network: Mlp,
    optimizer: torch.optim.Optimizer,
    samples: Iterator[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    masks: Mapping[str, Tensor] | None = None,
) -> float:
    """Train with the learning rate falling to zero along a cosine.

    masks: by parameter name, 0 where the gradient must not reach.
    Returns c, what weight decay leaves of a weight that has no gradient.
    """
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    shrink = 1.0
    for _ in range(steps):
        inputs, target = next(samples)
        optimizer.zero_grad()
        loss(network(inputs), target).backward()  # type: ignore[no-untyped-call]
        for name, parameter in network.named_parameters():
            if masks and name in masks and parameter.grad is not None:
                parameter.grad *= masks[name]
        group = optimizer.param_groups[0]
        shrink *= 1 - group["lr"] * group["weight_decay"]
        optimizer.step()
        schedule.step()
    return shrink


def export(network: Mlp, name: str, input_name: str) -> Path:
    """Write models/<name>/model.onnx: free batch axis, all weights inside, no trace of the machine."""
    path = ROOT / name / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    example = torch.zeros(2, network.widths[0])
    torch.onnx.export(
        network.eval(),
        (example,),
        path,
        input_names=[input_name],
        output_names=[OUTPUT],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    model = onnx.load(path)
    for node in model.graph.node:
        kept = [entry for entry in node.metadata_props if not entry.key.endswith("stack_trace")]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    onnx.save(model, path)
    return path


def save(name: str, file: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays to models/<name>/<file>.npz, always the same bytes for the same values."""
    path = ROOT / name / f"{file}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def finish(network: Mlp, name: str, input_name: str, report: Mapping[str, NDArray[Any]], **meta: Any) -> None:
    """Export, measure through ONNX Runtime on the report data, and write models/<name>/meta.json."""
    path = export(network, name, input_name)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run([OUTPUT], {input_name: report[input_name]})
    value = accuracy(logits, report["target"])
    facts = {
        "input": input_name,
        "output": OUTPUT,
        "widths": network.widths,
        "metric": "accuracy",
        "value": value,
        "samples": len(logits),
        "masked": False,
        **meta,
    }
    (path.parent / "meta.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(f"{name}: accuracy {value:.4f} on {len(logits)} samples")
