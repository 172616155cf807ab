"""``attn explain``."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from attn_core.commands import look

if TYPE_CHECKING:
    from collections.abc import Sequence

_SHAPE = "batch,length,heads,head_dim"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes: the options of ``attention``."""
    parser.add_argument(
        "--query", type=_shape, required=True, metavar=_SHAPE, help="shape of query, of the whole sequence"
    )
    parser.add_argument("--key", type=_shape, metavar=_SHAPE, help="shape of key; as query where not given")
    parser.add_argument("--value", type=_shape, metavar=_SHAPE, help="shape of value; as key where not given")
    parser.add_argument("--dtype", default="float32", help="such as bfloat16, float16, float32")
    parser.add_argument("--device", default="cpu", help="such as cpu, cuda; it need not be here")
    parser.add_argument("--causal", action="store_true", help="bottom-right causal")
    parser.add_argument(
        "--window-size", type=_integers, metavar="LEFT,RIGHT", help="in keys, -1 for unlimited, as in -1,0"
    )
    # What argparse takes for a number below 0 and not for an option; a window is two of them.
    parser._negative_number_matcher = re.compile(r"-\d+(,-?\d+)*|-\d*\.\d+")  # noqa: SLF001
    parser.add_argument("--scale", type=float, help="1/sqrt(head_dim) where not given")
    parser.add_argument("--softcap", type=float, help="cap of the scores")
    parser.add_argument("--dropout-p", type=float, default=0.0, help="probability to drop")
    parser.add_argument("--deterministic", action="store_true", help="the same bits twice")
    parser.add_argument("--return-lse", action="store_true", help="the log-sum-exp too")
    parser.add_argument(
        "--backend", type=_names, metavar="NAME,...", help="one name, or several in order of preference"
    )
    parser.add_argument("--ring", type=int, metavar="N", help="spread the sequence over a ring of N ranks")
    parser.add_argument(
        "--ulysses", type=int, metavar="N", help="spread the sequence over N ranks that share the heads"
    )
    parser.add_argument("--order", choices=("zigzag", "contiguous"), default="zigzag", help="of the sequence in a ring")
    parser.add_argument("--backward", action="store_true", help="with gradients")
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the explanation."""
    from attn_core.explanation import explain_shapes

    look()
    key = arguments.key or arguments.query
    explanation = explain_shapes(
        arguments.query,
        key,
        arguments.value or key,
        arguments.dtype,
        arguments.device,
        attn_mask=None,
        causal=arguments.causal,
        scale=arguments.scale,
        window_size=arguments.window_size,
        softcap=arguments.softcap,
        dropout_p=arguments.dropout_p,
        deterministic=arguments.deterministic,
        return_lse=arguments.return_lse,
        parallel=None,
        backend=arguments.backend,
        grid=_grid(arguments),
        backward=arguments.backward,
    )
    if arguments.json:
        from json import dumps

        print(dumps(explanation.as_data(), indent=2))  # noqa: T201
    else:
        print(explanation)  # noqa: T201
    return 0


def _grid(arguments: argparse.Namespace) -> tuple[int, int, str] | None:
    if arguments.ring is None and arguments.ulysses is None:
        return None
    return (
        1 if arguments.ring is None else arguments.ring,
        1 if arguments.ulysses is None else arguments.ulysses,
        arguments.order,
    )


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        msg = f"found {text!r}; accepted: whole numbers separated by commas"
        raise argparse.ArgumentTypeError(msg) from None


def _shape(text: str) -> tuple[int, ...]:
    sizes = _integers(text)
    if len(sizes) == len(_SHAPE.split(",")) and min(sizes) >= 0:
        return sizes
    msg = f"found {text!r}; accepted: {_SHAPE}, four whole numbers from 0 up"
    raise argparse.ArgumentTypeError(msg)


def _names(text: str) -> Sequence[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
