"""Compiled flex_attention for eager callers: code of its own for each kind of call, and errors instead of eager code.

Dynamo keeps what it compiles with a code object and stops at ``torch._dynamo.config.recompile_limit`` (8); from then on the
code would run uncompiled. So each kind of call gets a code object of its own, in which at most lengths become dynamic
(two or three compilations for any number of lengths), and reaching the limit raises.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import count
from threading import Lock, RLock
from types import FunctionType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from attn_core.errors import BackendNotUsable
from attn_native.flex_forms import attend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from attn_native.flex_forms import Form, Operands

COMPILER = "inductor"
KINDS_KEPT = 256
_SHAPES_KEPT = 4096

# A length is fixed in the code until a second one comes. Code around us that was compiled with dynamic=True or False sets
# this for all that it calls.
_LENGTHS = {"assume_static_by_default": True, "automatic_dynamic_shapes": True}

_numbers = count()
_lookup = Lock()
_compiling = RLock()  # Dynamo would compile once for each thread that waits, and count each towards the limit.


class Compiled:
    """flex_attention compiled for one form, and the shapes that it has run with."""

    def __init__(self, form: Form) -> None:
        self.run: Callable[..., Any] = torch.compile(_own_code(form), fullgraph=True, backend=COMPILER)
        self.shapes: set[Any] = set()

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, operands: Operands) -> Any:
        shape = (query.shape, key.shape, value.shape, query.stride(), key.stride(), value.stride())
        try:
            if shape in self.shapes:
                return self.run(query, key, value, operands)
            with _compiling, torch._dynamo.config.patch(_LENGTHS):
                result = self.run(query, key, value, operands)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            _refuse(error)
        if len(self.shapes) >= _SHAPES_KEPT:
            self.shapes.clear()
        self.shapes.add(shape)
        return result


@lru_cache(maxsize=KINDS_KEPT)
def _compiled(form: Form, kind: Any) -> Compiled:  # noqa: ARG001 (the kind tells instances apart)
    return Compiled(form)


def compiled(form: Form, kind: Any) -> Compiled:
    """What is compiled for a form and a kind: whatever else Dynamo would compile anew for. Bounded, oldest use first out."""
    with _lookup:
        return _compiled(form, kind)


def _own_code(form: Form) -> Callable[..., Any]:
    """A function with a code object of its own, since that is what Dynamo counts by, and a name, by which it remembers sizes."""

    def flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, operands: Operands) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            msg = (
                "flex: torch.compile is switched off (TORCH_COMPILE_DISABLE, TORCHDYNAMO_DISABLE or torch.compiler.set_stance), and "
                "uncompiled flex_attention is refused: it is slow and holds all scores in memory. Switch it on, or use backend 'native'"
            )
            raise BackendNotUsable(msg)
        return attend(form, query, key, value, operands)

    code = flex.__code__
    name = f"flex_{next(_numbers)}"
    return FunctionType(code.replace(co_name=name), flex.__globals__, name, None, flex.__closure__)


def _refuse(error: Exception) -> NoReturn:
    text = "\n".join(f"{type(item).__name__}: {item}" for item in _chain(error))
    raise BackendNotUsable(f"flex: {_advice(error, text)}") from error


def _advice(error: Exception, text: str) -> str:
    if isinstance(error, FailOnRecompileLimitHit):
        return (
            f"one kind of call was compiled {torch._dynamo.config.recompile_limit} times, the limit of "
            "torch._dynamo.config.recompile_limit, and flex never runs uncompiled. TORCH_LOGS=recompiles says why. "
            "Pad the lengths to a few sizes, raise the limit, or use backend 'native'"
        )
    if "InvalidCxxCompiler" in text:
        return (
            "torch.compile found no C++ compiler, which flex needs on CPU. Install one (apt install g++, dnf install gcc-c++, "
            "conda install cxx-compiler) or set CXX to it, or use backend 'native'"
        )
    if "TritonMissing" in text:
        return "torch.compile found no Triton, which flex needs on this device: pip install triton, or use backend 'native'"
    if "Python.h" in text:
        return "torch.compile found no Python headers (apt install python3-dev, dnf install python3-devel), or use backend 'native'"
    if "not supported for CPU" in text:
        return "torch has no compiled flex_attention for this CPU (x86 with AVX2, not macOS). Use backend 'native'"
    first = str(error).strip().partition("\n")[0]
    return f"torch {torch.__version__} could not compile this call: {first}. Use backend 'native', and report the call"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = getattr(error, "inner_exception", None) or error.__cause__
