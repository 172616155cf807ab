"""Compiled flex_attention for eager callers: code of its own for each kind of call, and errors instead of eager code.

Dynamo keeps what it compiles with a code object and stops at ``torch._dynamo.config.recompile_limit`` (8); from then on the
code would run uncompiled. So each kind of call gets a code object of its own, in which at most lengths are dynamic (one
compilation on CPU and two or three elsewhere for any number of lengths), and reaching the limit raises.
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
from attn_native.flex_forms import BLOCK, INDEXED, Blocks, attend, roomy
from attn_native.flex_operands import prepare

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from attn_native.flex_forms import Form, Operands
    from attn_native.flex_operands import Mask

COMPILER = "inductor"
KINDS_KEPT = 256
_SHAPES_KEPT = 4096

# A length is fixed in the code until a second one comes, but on CPU, where that gains nothing. Code around us that was
# compiled with dynamic=True or False sets this for all that it calls.
_LENGTHS = {"assume_static_by_default": True, "automatic_dynamic_shapes": True}

_entries = torch._C._dynamo.eval_frame._debug_get_cache_entry_list
"""What is compiled of a code object: nothing any more once ``torch.compiler.reset()`` was called."""

_numbers = count()
_lookup = Lock()
_compiling = RLock()  # Dynamo would compile once for each thread that waits, and count each towards the limit.


def eager(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Mask,
    scale: float, left: int, right: int, softcap: float | None, *, lse: bool,
) -> Any:  # fmt: skip
    """Compute for a caller whose code is not being traced; arguments as those of ``flex_operands.prepare``.

    Raises:
        BackendNotUsable: torch.compile has no compiler, is switched off, gives up, or reached its limit.
    """
    form, operands = prepare(query, key, attn_mask, scale, left, right, softcap, lse=lse)
    if query.device.type == "cpu":
        operands = operands._replace(**{name: roomy(getattr(operands, name)) for name in INDEXED})  # type: ignore[arg-type]
    layouts, (query, key, value) = zip(*(_settled(tensor) for tensor in (query, key, value)), strict=True)
    if key is query:  # Dynamo compiles anew for arguments that are one tensor
        key = key.view_as(key)
    if value is query or value is key:
        value = value.view_as(value)
    batch, query_length, key_length = query.shape[0], query.shape[1], key.shape[1]
    kind = (
        query.device, query.dtype, query.shape[2:], key.shape[2:], value.shape[3], layouts,
        batch == 1, query_length == 1, key_length == 1, query_length == key_length,
        operands.blocks is None or (query_length <= BLOCK, key_length <= BLOCK),
        torch.is_grad_enabled() and (query.requires_grad, key.requires_grad, value.requires_grad),
        operands.dense is not None and (operands.dense.dtype, operands.dense.requires_grad),
        query.device.type == "cpu" and tuple(_shape(getattr(operands, name)) for name in INDEXED),
        query.is_inference(),
    )  # fmt: skip
    return compiled(form, kind)(query, key, value, operands)


def _shape(tensor: torch.Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


def _settled(tensor: torch.Tensor) -> tuple[int, torch.Tensor]:
    """A tensor in one of three layouts, and which: every other one would be code of its own."""
    if tensor.is_contiguous():
        return 0, tensor
    if tensor.transpose(1, 2).is_contiguous():
        return 1, tensor
    strides = tensor.stride()
    if strides[3] == 1 and strides[0] >= strides[1] >= strides[2] >= tensor.shape[3]:  # a slice of (B, S, H, D)
        return 2, tensor
    return 0, tensor.contiguous()


class Compiled:
    """flex_attention compiled for one form, and the shapes that it has run with."""

    def __init__(self, form: Form) -> None:
        function = _own_code(form)
        self.code = function.__code__
        self.run: Callable[..., Any] = torch.compile(function, fullgraph=True, backend=COMPILER)
        self.shapes: set[Any] = set()

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, operands: Operands) -> Any:
        """Compute; one thread at a time while the shapes are new, since that may compile."""
        shape = (query.shape, key.shape, value.shape, query.stride(), key.stride(), value.stride())
        try:
            if not _entries(self.code):
                self.shapes.clear()
            if shape in self.shapes:
                return self.run(query, key, value, operands)
            with _compiling, torch._dynamo.config.patch(_LENGTHS):
                if query.device.type == "cpu":
                    query, key, value, operands = _of_any_size(query, key, value, operands)
                result = self.run(query, key, value, operands)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            _refuse(error)
        if len(self.shapes) >= _SHAPES_KEPT:
            self.shapes.clear()
        self.shapes.add(shape)
        return result


def _of_any_size(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, operands: Operands) -> Any:
    """The same, marked so that one code is for all lengths and batches of a kind: C++ compilers take many seconds for each."""
    blocks = operands.blocks and Blocks(*(_open(tensor, *range(tensor.ndim)) for tensor in operands.blocks))
    return *(_open(tensor, 0, 1) for tensor in (query, key, value)), operands._replace(blocks=blocks)


def _open(tensor: torch.Tensor, *dims: int) -> torch.Tensor:
    marked = tensor.view_as(tensor)  # the mark is on the object, which may be the caller's
    torch._dynamo.maybe_mark_dynamic(marked, [dim for dim in dims if tensor.shape[dim] > 1])
    return marked


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
                "flex: torch.compile is switched off (TORCH_COMPILE_DISABLE, TORCHDYNAMO_DISABLE or torch.compiler.set_stance), "
                "and uncompiled flex_attention is refused: it is slow and holds all scores in memory. Switch it on, or use "
                "backend 'native'"
            )
            raise BackendNotUsable(msg)
        return attend(form, query, key, value, operands)

    code = flex.__code__
    name = f"flex_{next(_numbers)}"
    return FunctionType(code.replace(co_name=name), flex.__globals__, name, None, flex.__closure__)


def _refuse(error: Exception) -> NoReturn:
    text = "\n".join(f"{type(item).__name__}: {item}" for item in _chain(error))
    msg = f"flex: {_advice(error, text)}"
    raise BackendNotUsable(msg) from error


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
    if "Python.h: No such file" in text or "'Python.h' file not found" in text:
        return (
            "torch.compile found no Python headers. Install them (apt install python3-dev, dnf install python3-devel), "
            "or use backend 'native'"
        )
    if "not supported for CPU" in text:
        return "torch has no compiled flex_attention for this CPU (x86 with AVX2, not macOS). Use backend 'native'"
    first = str(error).strip().partition("\n")[0]
    return f"torch {torch.__version__} could not compile this call: {first}. Use backend 'native', and report the call"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = getattr(error, "inner_exception", None) or error.__cause__
