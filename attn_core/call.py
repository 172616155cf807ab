"""The call, and the plan for many calls of a kind."""

from __future__ import annotations

from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, overload

import torch

from attn_core import selection, warming
from attn_core.admission import admit
from attn_core.errors import BackendNotUsable, CallRefused
from attn_core.masks import Description, KeyPadding
from attn_core.options import dropout_of, scale_of, softcap_of, window_of
from attn_core.parallel import scope
from attn_core.reading import autocast_dtype, check_mask, check_raised, check_tensors, default_scale, has_tangent, read
from attn_core.running import KERNELS_RAISE, check_result, raise_failure, runner
from attn_core.traced import traced_attention

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from attn_core.admission import Admitted
    from attn_core.facts import Facts
    from attn_core.parallel.context import ContextParallel
    from attn_core.reading import Call
    from attn_core.selection import Choice

KINDS_REMEMBERED = 4096
"""How many kinds of call are remembered before the memory starts over."""

_BROUGHT = ("softcap", "dropout_p", "attn_mask")
"""Options whose value is not among the facts: each call brings its own. So does scale, which is always passed."""
_MASK_ALONE = ("attn_mask",)
_NONE_DROPPED = 0.0

# What has been admitted before: the facts of a call -> (what runs it, scale where none is given, options brought or None).
_memory: dict[tuple[Any, ...], tuple[Callable[..., Any], float, tuple[str, ...] | None]] = {}
_names: dict[tuple[Any, ...], str] = {}
"""The backend of each, for messages."""

# Bound once: a look-up through two modules on each call would cost a tenth of the whole.
_is_traced = torch.compiler.is_dynamo_compiling
_environment = selection.read_environment
_VARIABLE = selection.VARIABLE_KEY
_grad_enabled = torch._C.is_grad_enabled
_autocast_enabled = torch._C._is_any_autocast_enabled
_transforms_active = torch._C._are_functorch_transforms_active
_forward_ad = torch.autograd.forward_ad
_traced_scopes = selection.traced_scopes
_remembered: Any = _memory.get


@overload
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    attn_mask: torch.Tensor | Description | None = ...,
    causal: bool = ...,
    scale: float | None = ...,
    window_size: tuple[int, int] | None = ...,
    softcap: float | None = ...,
    dropout_p: float = ...,
    deterministic: bool = ...,
    return_lse: Literal[False] = ...,
    backend: str | Sequence[str] | None = ...,
    parallel: ContextParallel | None = ...,
) -> torch.Tensor: ...


@overload
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    attn_mask: torch.Tensor | Description | None = ...,
    causal: bool = ...,
    scale: float | None = ...,
    window_size: tuple[int, int] | None = ...,
    softcap: float | None = ...,
    dropout_p: float = ...,
    deterministic: bool = ...,
    return_lse: Literal[True],
    backend: str | Sequence[str] | None = ...,
    parallel: ContextParallel | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


@overload
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    attn_mask: torch.Tensor | Description | None = ...,
    causal: bool = ...,
    scale: float | None = ...,
    window_size: tuple[int, int] | None = ...,
    softcap: float | None = ...,
    dropout_p: float = ...,
    deterministic: bool = ...,
    return_lse: bool,
    backend: str | Sequence[str] | None = ...,
    parallel: ContextParallel | None = ...,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...


def attention(  # noqa: C901, PLR0912, PLR0915 - on the way of every call, where each further function costs a twentieth of it
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    attn_mask: torch.Tensor | Description | None = None,
    causal: bool = False,
    scale: float | None = None,
    window_size: tuple[int, int] | None = None,
    softcap: float | None = None,
    dropout_p: float = _NONE_DROPPED,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: str | Sequence[str] | None = None,
    parallel: ContextParallel | None = None,
) -> Any:
    """Attention: ``softmax(scale * query @ key^T + mask) @ value``, on the kernel in force, or a refusal that says why.

    Args:
        query: (B, Sq, Hq, D).
        key: (B, Skv, Hkv, D); Hq is a multiple of Hkv, and query head h reads key head h // (Hq / Hkv).
        value: (B, Skv, Hkv, Dv).
        attn_mask: None; a 4-D tensor broadcastable to (B, Hq, Sq, Skv), bool (True may attend) or float (query's dtype or
            float32, added to the scaled scores); ``KeyPadding`` or ``Packed``.
        causal: aligned bottom-right: query i sees key j where j <= i + Skv - Sq.
        scale: None is 1/sqrt(D).
        window_size: (left, right) in keys around the same diagonal, -1 unlimited.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before masking.
        dropout_p: probability to drop, in [0, 1); kept probabilities are scaled by 1/(1 - dropout_p).
        deterministic: the same bits twice, forward and backward, or a refusal.
        return_lse: also return the log-sum-exp.
        backend: a name, or several in order of preference, for this call alone.
        parallel: the ranks over which the sequence lies, a ``ContextParallel`` of ``attn_core.parallel``; the tensors are
            then this rank's parts, masks those of the whole. None follows the scope of ``use_parallel``.

    Returns:
        (B, Sq, Hq, Dv) in query's dtype (autocast's, under autocast). With return_lse also the natural log-sum-exp of the
        scaled, capped, masked scores: (B, Hq, Sq), float32 (float64 for float64), detached. A query that sees nothing
        has result 0 and lse -inf.

    Raises:
        CallRefused: the call makes no sense, or the backends it allows refuse it; the message has the reasons.
        BackendNotUsable: a backend it names is unknown or can't be used here.

    Example:
        >>> import torch
        >>> q = torch.randn(2, 128, 8, 64)
        >>> attention(q, q, q, causal=True).shape
        torch.Size([2, 128, 8, 64])
    """
    if _is_traced():
        return traced_attention(
            query, key, value,
            attn_mask=attn_mask, causal=causal, scale=scale, window_size=window_size, softcap=softcap,
            dropout_p=dropout_p, deterministic=deterministic, return_lse=return_lse, backend=backend, parallel=parallel,
        )  # fmt: skip
    if parallel is not None:
        options = {
            "attn_mask": attn_mask, "causal": causal, "scale": scale, "window_size": window_size, "softcap": softcap,
            "dropout_p": dropout_p, "deterministic": deterministic, "return_lse": return_lse, "parallel": parallel,
        }  # fmt: skip
        return _first_call(None, query, key, value, options, backend)
    # The rest of this function is on the way of every call and is written for speed: facts into a key, one look-up.
    try:
        shape, dtype = query.shape, query.dtype
        batch, query_length, heads, head_dim = shape
        if type(query_length) is not int:
            raise TypeError  # noqa: TRY301 - a length of a nested or an exported tensor, to be read with care
        key_shape, value_shape = key.shape, value.shape
        sizes: Any = heads
        if key_shape != shape or value_shape != shape or not batch or not query_length:
            sizes = _sizes_key(shape, key_shape, value_shape)
        dtypes: Any = dtype
        if key.dtype is not dtype or value.dtype is not dtype:  # autocast may make them one
            dtypes = (dtype, key.dtype, value.dtype)
        device: Any = "cpu"  # a device costs more to read, to hash and to compare, and more than its number
        if query.is_cpu:
            if not (key.is_cpu and value.is_cpu):
                raise ValueError  # noqa: TRY301 - refused with care below
        elif query.is_cuda:
            device = query.get_device()
            if key.get_device() != device or value.get_device() != device:
                raise ValueError  # noqa: TRY301 - refused with care below
        else:
            device = query.device
            if key.device != device or value.device != device:
                raise ValueError  # noqa: TRY301 - refused with care below
        if backend is not None:
            choice: Any = backend
        elif selection.varied or _traced_scopes:
            choice = _varied_choice()
        else:  # no scope was ever open
            choice = selection._default
            if choice is None:
                choice = _environment(_VARIABLE)
        if scale is not None and not (type(scale) is float and -inf < scale < inf):
            scale = scale_of(scale)
        rarer: Any = None
        if dropout_p is not _NONE_DROPPED and not (type(dropout_p) is float and 0.0 <= dropout_p < 1.0):
            dropout_p = dropout_of(dropout_p)
        if (
            dropout_p
            or window_size is not None
            or softcap is not None
            or deterministic is not False
            or return_lse is not False
        ):
            if softcap is not None and not (type(softcap) is float and 0.0 < softcap < inf):
                softcap = softcap_of(softcap)
            if window_size is not None:
                left, right = window_size
                if type(left) is not int or type(right) is not int:  # True is as good a key as 1
                    window_size = window_of(window_size, causal=False)
            rarer = (window_size, softcap is None, dropout_p == 0.0, deterministic, return_lse)
        kind: Any = (
            choice, dtypes, device, sizes, head_dim, causal, rarer,
            None if attn_mask is None else _mask_key(attn_mask, query, key, shape, key_shape[1]),
            _grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad),
            _surroundings(query, key, value, attn_mask)
            if _autocast_enabled() or _transforms_active() or _forward_ad._current_level >= 0
            else None,
        )  # fmt: skip
        found = _remembered(kind)
    except (
        AttributeError,
        BytesWarning,  # under python -bb: the environment's raw word compared with a name of equal hash
        CallRefused,
        RuntimeError,
        TypeError,
        ValueError,
    ):  # not what it should be, or not hashable: read with care below
        kind = found = None
    if found is None:
        options = {
            "attn_mask": attn_mask, "causal": causal, "scale": scale, "window_size": window_size, "softcap": softcap,
            "dropout_p": dropout_p, "deterministic": deterministic, "return_lse": return_lse, "parallel": None,
        }  # fmt: skip
        return _first_call(kind, query, key, value, options, backend)
    run, usual_scale, brought = found
    if scale is None:
        scale = usual_scale
    try:
        if brought is None:
            return run(query, key, value, scale=scale)
        if brought is _MASK_ALONE:
            return run(query, key, value, scale=scale, attn_mask=attn_mask)
        given = {"softcap": softcap, "dropout_p": dropout_p, "attn_mask": attn_mask}
        return run(query, key, value, scale=scale, **{name: given[name] for name in brought})
    except KERNELS_RAISE as error:
        check_tensors(query, key, value)  # what no kernel takes and no fact tells, as sparse tensors
        check_mask(attn_mask, query, key)
        check_raised(error, query, key, value, attn_mask)
        raise_failure(_names.get(kind, "the backend"), error, query, key, value)


# --- parts of the key -------------------------------------------------------------------------------------------------


def _sizes_key(shape: torch.Size, key_shape: torch.Size, value_shape: torch.Size) -> Any:
    """What is remembered of sizes that differ, or of an empty call: heads, head dims, and how the lengths relate."""
    batch, query_length, heads, _ = shape
    key_batch, key_length, key_heads, key_dim = key_shape
    return (
        heads, key_heads, key_dim, batch == key_batch,
        key_shape == value_shape or (key_shape[:3] == value_shape[:3] and value_shape[3:]),
        query_length == key_length or (-1 if query_length < key_length else 2),
        batch and query_length and key_length and True,
    )  # fmt: skip


def _varied_choice() -> Choice | None:
    """The choice in force where scopes have been opened or the default has changed."""
    if selection.traced_scopes:
        raise BackendNotUsable(selection.SUSPENDED)
    choice: Any = selection._default
    scopes = selection.scopes()
    if scopes:
        choice = selection.in_force() if scopes[-1].closed else scopes[-1].names
    elif choice is None:
        choice = _environment(_VARIABLE)
    return selection.consistent_choice(selection.in_force()) if selection.checkpointing() else choice


def _mask_key(mask: Any, query: Any, key: Any, shape: Any, key_length: int) -> Any:
    """What of a mask is remembered; its lengths are checked on each call, a mismatch leads to the careful reading."""
    batch, query_length, heads, _ = shape
    if type(mask) is KeyPadding:
        keep = mask.tensors[0]
        if keep.shape != (batch, key_length) or keep.device != query.device:
            raise ValueError
        return mask.kind
    if isinstance(mask, Description):
        check_mask(mask, query, key)
        return mask.kind
    mask_batch, mask_heads, mask_queries, mask_keys = mask.shape
    if mask.device != query.device or not (
        (mask_batch == batch or mask_batch == 1)
        and (mask_heads == heads or mask_heads == 1)
        and (mask_queries == query_length or mask_queries == 1)
        and (mask_keys == key_length or mask_keys == 1)
    ):
        raise ValueError
    return (
        mask.dtype, mask.layout, mask.requires_grad and _grad_enabled(),
        mask_batch == 1, mask_heads == 1, mask_queries == 1, mask_keys == 1,
    )  # fmt: skip


def _surroundings(query: Any, *others: Any) -> tuple[Any, ...]:
    """Which of autocast, the transforms of ``torch.func`` and forward-mode differentiation reach a call."""
    return autocast_dtype(query.device.type), _transforms_active(), has_tangent(query, *others)


def look_for_scopes() -> bool:
    """Have calls look for a scope of ``use_parallel`` from now on; until then nothing is paid. Whether there were calls."""
    global _remembered  # noqa: PLW0603 - what the call looks up by
    _remembered = _remembered_outside_scopes
    return bool(_memory)


def _remembered_outside_scopes(kind: Any) -> Any:
    return None if scope.of_call() is not None else _memory.get(kind)


# --- the first call of a kind -----------------------------------------------------------------------------------------


def _first_call(kind: Any, query: Any, key: Any, value: Any, options: dict[str, Any], backend: Any) -> Any:
    """Read a call with care, admit it or refuse it, run it, check what came out, and remember the outcome."""
    parallel = options["parallel"]
    if parallel is None and scope.ever_open:
        parallel = scope.of_call()
    if parallel is not None:
        from attn_core.parallel.attending import parallel_attention

        return parallel_attention(parallel, query, key, value, options, backend)
    admitted, call = resolve(query, key, value, options, backend)
    brought = {name: option for name, option in call.options.items() if name in _BROUGHT}
    fixed = {name: option for name, option in call.options.items() if name not in _BROUGHT and name != "scale"}
    compiled = _compiled_kind(admitted, call, query)
    run = _runner(admitted, call, compiled)
    run = partial(run, **fixed) if brought else _with_fixed(run, fixed)
    if compiled is not None:
        warming.before(compiled, warming.FORWARD, query)
    try:
        result = run(query, key, value, scale=call.options["scale"], **brought)
    except KERNELS_RAISE as error:
        check_raised(error, query, key, value, options["attn_mask"])
        raise_failure(admitted.row.name, error, query, key, value)
    if compiled is not None:
        warming.note(compiled, warming.FORWARD)
    check_result(admitted.row.name, result, query, value, call)
    if kind is not None:
        if len(_memory) >= KINDS_REMEMBERED:
            _memory.clear()
            _names.clear()
        names = tuple(brought) or None
        names = _MASK_ALONE if names == _MASK_ALONE else names  # the same object, which the call compares
        _names[kind] = admitted.row.name
        _memory[kind] = (run, default_scale(call.facts.head_dim), names)
    return result


def _compiled_kind(admitted: Admitted, call: Call, query: torch.Tensor) -> warming.Kind | None:
    """What the backend compiles for at the first such call, if it does."""
    if not admitted.spec.first_call_compiles or call.empty:
        return None
    return warming.Kind(admitted.row.name, query.device, call.facts)


def _runner(admitted: Admitted, call: Call, compiled: warming.Kind | None) -> Callable[..., Any]:
    adapter = admitted.adapter if compiled is None else warming.watched(admitted.adapter, compiled)
    once = admitted.spec.no_double_backward(call.facts) if admitted.own_graph else None
    return runner(admitted.row.name, adapter, call, own_graph=admitted.own_graph, once=once)


def resolve(query: Any, key: Any, value: Any, options: dict[str, Any], backend: Any) -> tuple[Admitted, Call]:
    """Read a call and find the backend that runs it."""
    call = read(query, key, value, options)
    if backend is not None:
        return admit(selection.normalized(backend), call.facts, "backend="), call
    if selection.traced_scopes:
        raise BackendNotUsable(selection.SUSPENDED)
    choice = selection.in_force()
    if selection.checkpointing():
        choice = selection.consistent_choice(choice)
    admitted = admit(choice, call.facts, selection.origin())
    selection.note_used(choice)
    return admitted, call


def _with_fixed(run: Callable[..., Any], fixed: dict[str, Any]) -> Callable[..., Any]:
    """``partial(run, **fixed)``, at half its cost for a call that is causal and nothing else."""
    if fixed == {"causal": True}:
        return lambda query, key, value, *, scale: run(query, key, value, scale=scale, causal=True)
    return partial(run, **fixed) if fixed else run


def forget() -> None:
    """Forget every remembered kind of call, as when backends are discovered again."""
    _memory.clear()
    _names.clear()
    warming.forget()


class Plan(Protocol):
    """A call that is resolved: a function of further tensors of the same kind.

    Attributes:
        backend: the backend that runs it.
        facts: the facts it was made for.
    """

    backend: str
    facts: Facts

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> Any:
        """Compute. ``attn_mask=`` replaces the mask of the plan by another of the same kind."""


def _planned(name: str, run: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """Run with these options and no others; the commonest kinds of call without the cost of unpacking them."""
    if options.keys() == {"scale"}:
        scale = options["scale"]

        def plan_without_mask(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
            if scope.is_open:
                _refuse_in_scope()
            try:
                return run(query, key, value, scale=scale)
            except KERNELS_RAISE as error:
                raise_failure(name, error, query, key, value)

        return _named(plan_without_mask)
    if "attn_mask" not in options:

        def plan_without_mask(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
            if scope.is_open:
                _refuse_in_scope()
            try:
                return run(query, key, value, **options)
            except KERNELS_RAISE as error:
                raise_failure(name, error, query, key, value)

        return _named(plan_without_mask)
    return _planned_with_mask(name, run, options)


def _planned_with_mask(name: str, run: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    others = {name: option for name, option in options.items() if name != "attn_mask"}
    mask = options["attn_mask"]

    def plan_with_mask(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, attn_mask: Any = mask) -> Any:
        if scope.is_open:
            _refuse_in_scope()
        try:
            return run(query, key, value, attn_mask=attn_mask, **others)
        except KERNELS_RAISE as error:
            raise_failure(name, error, query, key, value)

    return _named(plan_with_mask)


def _refuse_in_scope() -> None:
    """Refuse a plan where the attention of this thread is spread over ranks; a scope is open, maybe in another thread."""
    found = scope.traced_identity() if _is_traced() else scope.of_call()
    if found is not None:
        msg = (
            "plan: called inside use_parallel; accepted: outside of it, since a plan is of this rank alone and asks no other. "
            "Next: call attention(...), or open use_parallel(None) around the plan for what is not spread"
        )
        raise CallRefused(msg)


def _named(planned: Callable[..., Any]) -> Callable[..., Any]:
    """The same, with the name that Python gives where it is called with what it does not take."""
    planned.__qualname__ = planned.__name__
    return planned


def plan(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    attn_mask: torch.Tensor | Description | None = None,
    causal: bool = False,
    scale: float | None = None,
    window_size: tuple[int, int] | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: str | Sequence[str] | None = None,
    parallel: None = None,
) -> Plan:
    """Resolve a call once, for further tensors of the same kind.

    The same arguments as ``attention``. Nothing is computed, unless the backend compiles at the first call of a kind: then
    that call is made here, with its backward where a gradient is needed, and the plan neither waits nor is refused while a
    CUDA graph is captured. The plan keeps the backend and the options, the mask included, and checks nothing: that further
    tensors have the same dtype, device, heads, head dims, the same relation of Sq to Skv, need for gradients and autocast
    is the caller's promise.

    Returns:
        A function of (query, key, value), and of ``attn_mask=`` where the plan has a mask. Inside ``use_parallel`` it is refused.

    Raises:
        CallRefused: as ``attention``; and inside ``use_parallel``, since a plan is of this rank alone.
        BackendNotUsable: as ``attention``.

    Example:
        >>> import torch
        >>> q = torch.randn(2, 16, 4, 8)
        >>> planned = plan(q, q, q, causal=True)
        >>> torch.equal(planned(q, q, q), attention(q, q, q, causal=True))
        True
    """
    options = {
        "attn_mask": attn_mask, "causal": causal, "scale": scale, "window_size": window_size, "softcap": softcap,
        "dropout_p": dropout_p, "deterministic": deterministic, "return_lse": return_lse,
        "parallel": scope.in_force() if parallel is None else parallel,
    }  # fmt: skip
    admitted, call = resolve(query, key, value, options, backend)
    compiled = _compiled_kind(admitted, call, query)
    planned: Any = _planned(admitted.row.name, _runner(admitted, call, compiled), call.options)
    if compiled is not None and not (call.facts.vmap or call.facts.forward_mode):
        result = warming.warm_up(planned, compiled, query, key, value, call.options.get("attn_mask"))
        if result is not None:
            check_result(compiled.name, result, query, value, call)
    planned.backend, planned.facts = (
        admitted.row.name,
        call.facts,
    )  # attributes of the function: a class costs more to call
    return cast("Plan", planned)
