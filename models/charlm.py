"""A small character transformer, trained on the source of Python's own standard library.

That source differs between versions of Python: the same network comes out of the same version only, and the stored
one is what everything was measured on.
"""

from __future__ import annotations

import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu

from models.training import Arrays, Network, finish, save, stored, train

INPUT = "tokens"
LAYERS, WIDTH, HEADS, WIDE, CONTEXT = 3, 128, 4, 512, 64
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
VOCABULARY = 1 + len(CHARACTERS)
"""Token 0 is every other character."""
STEPS, BATCH, RATE, DECAY = 4_000, 32, 2e-3, 0.1
CALIBRATED, HELD_BACK = 2_000, 256
EVERY = 10
"""One module in so many is held back, the first of them in the order of names among these."""

Tokens = NDArray[np.int64]


class Block(nn.Module):
    """Causal attention and a feed-forward layer, each behind a LayerNorm and added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_attention, self.norm_feed = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, WIDE), nn.Linear(WIDE, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[batch, 64, 128] to the same; mask [64, 64] is added to the scores."""
        x = x + self.attended(self.norm_attention(x), mask)
        change: Tensor = self.down(gelu(self.up(self.norm_feed(x))))
        return x + change

    def attended(self, x: Tensor, mask: Tensor) -> Tensor:
        """What each position takes over from those before it and from itself."""
        query, key, value = (
            layer(x).reshape(-1, CONTEXT, HEADS, WIDTH // HEADS).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(2, 3) * (WIDTH // HEADS) ** -0.5 + mask
        mixed = torch.softmax(scores, dim=-1) @ value
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(-1, CONTEXT, WIDTH))
        return out


class Transformer(Network):
    """Logits of the next character at each position; written out, so that the export has standard operators."""

    mask: Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.characters = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        later = torch.full((CONTEXT, CONTEXT), -1e4).triu(1)
        self.register_buffer("mask", later, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, 64, 97] of tokens [batch, 64]."""
        x = self.characters(tokens) + self.positions
        for block in self.blocks:
            x = block(x, self.mask)
        logits: Tensor = self.head(self.norm(x))
        return logits

    @property
    def shape(self) -> dict[str, Any]:
        """The sizes that meta.json names."""
        return {
            "layers": LAYERS,
            "width": WIDTH,
            "heads": HEADS,
            "feed_forward": WIDE,
            "context": CONTEXT,
            "vocabulary": VOCABULARY,
        }


def modules() -> list[Path]:
    """The standard library's top-level modules by name, without those generated for one machine."""
    found = Path(sysconfig.get_paths()["stdlib"]).glob("*.py")
    return sorted(
        (path for path in found if not path.name.startswith("_sysconfigdata")), key=lambda path: path.name
    )


def encoded(paths: list[Path]) -> Tokens:
    """The text of all of them, one token a character."""
    text = "".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)
    table = np.zeros(0x110000, np.int64)
    table[[ord(character) for character in CHARACTERS]] = np.arange(1, VOCABULARY)
    return table[np.frombuffer(text.encode("utf-32-le"), np.uint32)]


def windows(text: Tokens, count: int, rng: np.random.Generator) -> tuple[Tokens, Tokens]:
    """`count` random windows [count, 64] of the text [n], and the characters that follow each of theirs."""
    starts = rng.integers(len(text) - CONTEXT, size=(count, 1))
    at = starts + np.arange(CONTEXT)
    return text[at], text[at + 1]


def batches(text: Tokens, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random batches of windows and their targets."""
    rng = np.random.default_rng(seed)
    while True:
        tokens, target = windows(text, BATCH, rng)
        yield torch.from_numpy(tokens), torch.from_numpy(target)


def loss(logits: Tensor, target: Tensor) -> Tensor:
    """Nats a character."""
    return cross_entropy(logits.flatten(0, 1), target.flatten())


def main(seed: int = 0) -> None:
    """Train on nine modules in ten, report on the others."""
    paths = modules()
    held_back = encoded(paths[::EVERY])
    text = encoded([path for at, path in enumerate(paths) if at % EVERY])
    rng = np.random.default_rng(seed + 1)
    tokens, target = windows(held_back, HELD_BACK, rng)
    report: Arrays = {INPUT: tokens, "target": target}
    network = Transformer(seed)
    save("charlm", "calib", {INPUT: windows(text, CALIBRATED, rng)[0]})
    save("charlm", "report", report)
    initial = network.arrays()
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=DECAY)
    shrink = train(network, optimizer, batches(text, seed), loss, STEPS)
    recipe = (
        f"AdamW, learning rate {RATE} along a cosine, weight decay {DECAY}, {STEPS} steps of {BATCH}; "
        f"source of Python {platform.python_version()}'s standard library"
    )
    held = [path.name for path in paths[::EVERY]]
    facts: dict[str, Any] = {"seed": seed, "shrink": shrink, "held_back": held}
    model = finish(network, "charlm", INPUT, report, metric="loss", recipe=recipe, **facts)
    save("charlm", "init", stored(model, network, initial))


if __name__ == "__main__":
    main()
