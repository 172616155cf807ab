"""A tiny transformer that learns to write like this repository's documents, on several ranks and on one: one loss curve.

The model, the data and the order of the data are the same; on several ranks each has a part of every sequence, attention is
given ``parallel=cp``, and gradients of the parameters are summed.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from processes import on_ranks
from reporting import keep, table
from section_bytes import mesh_of
from torch.nn import functional

from attn_core import attention
from attn_core.parallel import ContextParallel

ROOT = Path(__file__).parents[2]


def add_options(parser):
    parser.add_argument("--shape", type=int, nargs=2, default=[4, 1], help="ring, ulysses")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--plot", help="write a picture of the curves to this file; needs matplotlib")


def run(options):
    given = {"shape": tuple(options.shape), "steps": options.steps, "length": options.length}
    world = options.shape[0] * options.shape[1]
    curves = {
        f"{world} ranks": on_ranks(world, "section_training:trained", given)[0],
        "1 rank": on_ranks(1, "section_training:trained", {**given, "shape": (1, 1)})[0],
    }
    many, one = curves.values()
    differences = [abs(a - b) for a, b in zip(many["losses"], one["losses"], strict=True)]
    apart = float(abs(many["parameters"] - one["parameters"]).max())
    marks = sorted({0, *range(options.steps // 4 - 1, options.steps, options.steps // 4)})
    table(
        f"Loss of a tiny transformer, ring x ulysses of {options.shape[0]} x {options.shape[1]} beside one rank; the curves are "
        f"at most {max(differences):.1e} apart, the parameters in the end {apart:.1e}",
        ["step", *curves],
        [[step + 1, *(f"{curve['losses'][step]:.6f}" for curve in curves.values())] for step in marks],
    )
    losses = {name: curve["losses"] for name, curve in curves.items()}
    keep(
        options.json,
        "training",
        {**given, "losses": losses, "largest difference": max(differences), "parameters": apart},
    )
    if options.plot:
        plot(options.plot, losses, differences)


def plot(path, losses, differences):
    """Both curves in one picture, and how far they are apart below it."""
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, height_ratios=(3, 1), figsize=(7, 5))
    for (name, curve), style in zip(losses.items(), ({"linewidth": 4, "alpha": 0.4}, {"linewidth": 1}), strict=True):
        above.plot(range(1, len(curve) + 1), curve, label=name, **style)
    above.set_ylabel("loss, nats a character")
    above.legend()
    below.semilogy(
        range(1, len(differences) + 1), [max(one, 1e-9) for one in differences], color="black", linewidth=0.8
    )
    below.set_ylabel("difference")
    below.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


# --- on each rank -------------------------------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    """Attention and a perceptron, each added to what they read."""

    def __init__(self, width, heads, key_heads):
        super().__init__()
        self.heads, self.key_heads, self.dim = heads, key_heads, width // heads
        self.read, self.think = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.project = torch.nn.Linear(width, (heads + 2 * key_heads) * self.dim, bias=False)
        self.back = torch.nn.Linear(width, width, bias=False)
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, states, angles, parallel):
        """The states (B, S, width) after this layer."""
        projected = self.project(self.read(states)).unflatten(-1, (-1, self.dim))
        query, key, value = projected.split([self.heads, self.key_heads, self.key_heads], 2)
        query, key = rotated(query, angles), rotated(key, angles)
        found = attention(query, key, value, causal=True, backend="native_flash", parallel=parallel)
        states = states + self.back(found.flatten(2))
        return states + self.down(functional.gelu(self.up(self.think(states))))


class Model(torch.nn.Module):
    """Characters to the logits of the next one."""

    def __init__(self, characters, width=64, heads=4, key_heads=2, layers=2):
        super().__init__()
        self.embed = torch.nn.Embedding(characters, width)
        self.layers = torch.nn.ModuleList(Layer(width, heads, key_heads) for _ in range(layers))
        self.last, self.dim = torch.nn.LayerNorm(width), width // heads
        torch.nn.init.normal_(self.embed.weight, std=width**-0.5)  # it makes the logits, too

    def forward(self, text, positions, parallel):
        """Logits (B, S, characters) for text (B, S) that lies at these positions of its sequences."""
        speeds = 10000.0 ** (-torch.arange(0, self.dim, 2) / self.dim)
        states, angles = self.embed(text), positions[:, None, None] * speeds
        for layer in self.layers:
            states = layer(states, angles, parallel)
        return self.last(states) @ self.embed.weight.T


def rotated(tensor, angles):
    """Rotary positions: pairs of numbers turned by an angle for each position."""
    first, second = tensor.chunk(2, -1)
    return torch.cat([first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos()], -1)


def trained(given):
    """The losses of all steps, and the parameters after them."""
    options = SimpleNamespace(**given)
    cp = ContextParallel(mesh_of(options.shape)) if options.shape != (1, 1) else None
    text = written()
    torch.manual_seed(0)
    model = Model(int(text.max()) + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    order = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(options.steps):
        starts = torch.randint(0, len(text) - options.length - 1, (4,), generator=order)
        batch = torch.stack([text[start : start + options.length + 1] for start in starts.tolist()])
        losses.append(step(model, optimizer, batch, cp))
    return {"losses": losses, "parameters": torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy()}


def step(model, optimizer, batch, cp):
    """Learn from one batch; its loss over all positions of all ranks."""
    read, labels = batch[:, :-1], batch[:, 1:]
    positions, count = torch.arange(read.shape[1]), labels.numel()
    if cp is not None:
        read, labels, positions = cp.shard(read), cp.shard(labels), cp.positions(read.shape[1])
    logits = model(read, positions, cp)
    loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / count
    optimizer.zero_grad()
    loss.backward()
    total = loss.detach()
    if cp is not None:
        total = summed(total, [parameter.grad for parameter in model.parameters()])
    optimizer.step()
    return total.item()


def summed(total, gradients):
    """The loss of all ranks together; the gradients become those of all, in one message."""
    flat = torch.cat([total[None], *(gradient.flatten() for gradient in gradients)])
    dist.all_reduce(flat)
    for gradient, sums in zip(gradients, flat[1:].split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(sums.view_as(gradient))
    return flat[0]


def written():
    """The documents that every checkout has, as numbers of their characters."""
    paths = [ROOT / "LICENSE", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    characters = {character: number for number, character in enumerate(sorted(set(text)))}
    return torch.tensor([characters[character] for character in text])
