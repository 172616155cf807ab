"""The numbers of context parallel, a section at a time; each prints a table in Markdown, and JSON where asked.

Usage: python benchmarks/parallel SECTION [--json FILE] [options of the section]
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

SECTIONS = {
    "bytes": "bytes that ranks send, against the formulas, and keys that they hold",
    "seed": "beside the rings of diffusers and yunchang, on a CPU",
    "step": "CPU time of a ring step on top of its kernel",
    "merge": "merging partial results over the time to move their bytes",
    "balance": "the busiest rank over 1/P of the whole, rank by rank on one GPU",
    "training": "the loss curve of a tiny transformer on several ranks and on one",
    "model": "from measured times and link speeds: where a ring hides what it sends, and the fastest way",
    "beside": "beside the rings of ring-flash-attention, yunchang and torch, on real GPUs; under torchrun",
    "overlap": "ring and ulysses on real GPUs: right, and how fast; under torchrun",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/parallel", description=__doc__.splitlines()[0])
    sections = parser.add_subparsers(dest="section", required=True)
    chosen = next((name for name in sys.argv[1:] if name in SECTIONS), None)
    for name, help_ in SECTIONS.items():
        section = sections.add_parser(name, help=help_)
        section.add_argument("--json", help="write what was measured to this file")
        if name == chosen:
            module = import_module(f"section_{name}")
            module.add_options(section)
    options = parser.parse_args()
    module.run(options)


if __name__ == "__main__":
    main()
