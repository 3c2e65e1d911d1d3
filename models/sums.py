"""Digits side by side, each task a sum or distance of two of them: inputs that tasks share, at two degrees.

In "shared" three tasks have a digit of their own each and one digit in common. In "coupled", a control, both tasks
need both digits: nothing in it is independent of anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from models.digits import SHIFTS, Samples, shifted, split_digits
from models.training import Arrays, Mlp, batches, finish, save, train

INPUT = "pixels"
CLASSES, PIXELS, HIDDEN = 10, 64, 512
STEPS, BATCH, DECAY = 12_000, 128, 0.1
CALIBRATED, HELD_BACK = 6_000, 1_000


RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a + b mod 10": lambda a, b: (a + b) % CLASSES,
    "a - b mod 10": lambda a, b: (a - b) % CLASSES,
    "|a - b|": lambda a, b: (a - b).abs(),
}


@dataclass(frozen=True)
class Task:
    """Its label is a rule of the digits at two places, in ten classes."""

    first: int
    second: int
    rule: str


@dataclass(frozen=True)
class Case:
    """One of the networks: how many digits it sees, and what it is to say of them."""

    name: str
    digits: int
    tasks: tuple[Task, ...]
    rate: float

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the inputs, the hidden layers and the logits."""
        return (self.digits * PIXELS, HIDDEN, HIDDEN, len(self.tasks) * CLASSES)

    @property
    def recipe(self) -> str:
        """How it is trained, in words."""
        labels = (f"{task.rule} of digits {task.first} and {task.second}" for task in self.tasks)
        return (
            f"{', '.join(labels)}; AdamW, learning rate {self.rate} along a cosine, "
            f"weight decay {DECAY}, {STEPS} steps of {BATCH}, digits shifted by one pixel"
        )

    @property
    def inputs(self) -> list[list[int]]:
        """The input columns that each task depends on; what two tasks name is shared."""
        places = (sorted((task.first, task.second)) for task in self.tasks)
        return [[place * PIXELS + at for place in both for at in range(PIXELS)] for both in places]

    @property
    def outputs(self) -> list[list[int]]:
        """The output columns of each task."""
        return [list(range(at * CLASSES, (at + 1) * CLASSES)) for at in range(len(self.tasks))]

    def labels(self, digits: Tensor) -> Tensor:
        """Labels [n, tasks] of digits [n, digits]."""
        return torch.stack(
            [RULES[t.rule](digits[:, t.first], digits[:, t.second]) for t in self.tasks], dim=1
        )


CASES = (
    # Sums modulo ten of a shared digit want a smaller rate still, and reach less: 0.49 at 2e-3, 0.91 at 5e-4.
    Case("shared", 4, tuple(Task(own, 3, "|a - b|") for own in range(3)), 1e-3),
    Case("coupled", 2, (Task(0, 1, "a + b mod 10"), Task(0, 1, "a - b mod 10")), 2e-3),
)


def loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy summed over the tasks, averaged over the batch."""
    return target.shape[1] * cross_entropy(logits.reshape(-1, CLASSES), target.reshape(-1))


def drawn(case: Case, samples: Samples, count: int, seed: int) -> Arrays:
    """`count` random samples: pixels [count, digits * 64] and labels [count, tasks]."""
    pixels, target = samples
    chosen = np.random.default_rng(seed).integers(len(pixels), size=(count, case.digits))
    labels: NDArray[np.int64] = case.labels(torch.from_numpy(target[chosen])).numpy()
    return {INPUT: pixels[chosen].reshape(count, -1), "target": labels}


def labelled(case: Case, samples: Samples, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random batches of pixels and labels."""
    for pixels, digits in batches(*samples, (BATCH, case.digits), seed):
        yield pixels, case.labels(digits)


def main(seed: int = 0) -> None:
    """Train both networks in the ordinary way: every weight learns."""
    (pixels, target), held_back = split_digits()
    samples = shifted(pixels), np.tile(target, len(SHIFTS))
    for case in CASES:
        report = drawn(case, held_back, HELD_BACK, seed + 1)
        network = Mlp(case.widths, seed)
        save(case.name, "init", network.arrays())
        save(case.name, "calib", {INPUT: drawn(case, samples, CALIBRATED, seed + 2)[INPUT]})
        save(case.name, "report", report)
        optimizer = torch.optim.AdamW(network.parameters(), case.rate, weight_decay=DECAY)
        shrink = train(network, optimizer, labelled(case, samples, seed), loss, STEPS)
        facts: dict[str, Any] = {
            "seed": seed,
            "shrink": shrink,
            "inputs": case.inputs,
            "outputs": case.outputs,
        }
        finish(network, case.name, INPUT, report, recipe=case.recipe, **facts)


if __name__ == "__main__":
    main()
