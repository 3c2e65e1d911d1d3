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

from models import METRICS, ROOT

torch.set_num_threads(1)

Arrays = dict[str, NDArray[Any]]
OUTPUT = "logits"


class Network(nn.Module):
    """What the loop, the export and meta.json ask of a torch module."""

    @property
    def shape(self) -> dict[str, Any]:
        """The sizes that meta.json names."""
        raise NotImplementedError

    def arrays(self) -> Arrays:
        """A copy of every parameter by name."""
        return {name: parameter.detach().numpy().copy() for name, parameter in self.named_parameters()}


class Mlp(Network):
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

    @property
    def shape(self) -> dict[str, Any]:
        """The sizes that meta.json names."""
        return {"widths": self.widths}


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
    network: Network,
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


def export(network: Network, path: Path, input_name: str, example: Tensor) -> onnx.ModelProto:
    """Write the network as ONNX: free batch axis, all weights inside, no trace of the machine."""
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
    return model


def stored(model: onnx.ModelProto, network: Network, initial: Arrays) -> Arrays:
    """The initial values of a network's parameters, by the names and in the layouts of its export.

    Linear layers on more than two axes become MatMul: their weights are transposed and lose their names, so that they
    are known by their values. What equals no parameter either way round is a constant of the graph.
    """
    origin: dict[bytes, NDArray[Any]] = {}
    for name, array in network.arrays().items():
        origin |= {array.T.tobytes(): initial[name].T, array.tobytes(): initial[name]}
    values = {tensor.name: onnx.numpy_helper.to_array(tensor).tobytes() for tensor in model.graph.initializer}
    return {name: np.ascontiguousarray(origin[key]) for name, key in values.items() if key in origin}


def save(name: str, file: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays to models/<name>/<file>.npz, always the same bytes for the same values."""
    path = ROOT / name / f"{file}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def finish(
    network: Network,
    name: str,
    input_name: str,
    report: Mapping[str, NDArray[Any]],
    metric: str = "accuracy",
    **meta: Any,
) -> onnx.ModelProto:
    """Export, measure through ONNX Runtime on the report data, and write models/<name>/meta.json."""
    path = ROOT / name / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    model = export(network, path, input_name, torch.from_numpy(report[input_name][:2]))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run([OUTPUT], {input_name: report[input_name]})
    value = METRICS[metric].measure(logits, report["target"])
    facts = {
        "input": input_name,
        "output": OUTPUT,
        **network.shape,
        "metric": metric,
        "value": value,
        "samples": len(logits),
        "masked": False,
        **meta,
    }
    (path.parent / "meta.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(f"{name}: {metric} {value:.4f} on {len(logits)} samples")
    return model
