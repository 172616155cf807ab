"""Reads the facts of a call from its tensors and options, and refuses what makes no sense whoever computes it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch

from attn_core.errors import CallRefused
from attn_core.facts import Facts
from attn_core.masks import Description, KeyPadding, Packed
from attn_core.options import dropout_of, scale_of, softcap_of, switch, window_of

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


@dataclass(frozen=True)
class Call:
    """One call, read and checked: its facts, its options as adapters get them, and what the core itself answers.

    Attributes:
        facts: what constraints see.
        options: keyword options that differ from their defaults; ``scale`` always, ``attn_mask`` included.
        autocast: the dtype that autocast casts to first, or None.
        empty: whether B, Sq or Skv is 0, which the core answers.
    """

    facts: Facts
    options: dict[str, Any]
    autocast: torch.dtype | None
    empty: bool


def read(query: Any, key: Any, value: Any, options: dict[str, Any]) -> Call:
    """Read a call.

    Args:
        query: (B, Sq, Hq, D).
        key: (B, Skv, Hkv, D).
        value: (B, Skv, Hkv, Dv).
        options: every option of ``attention`` by name, ``backend`` and ``parallel`` excepted.

    Raises:
        CallRefused: with the value found and the values accepted.
    """
    if options.get("parallel") is not None:
        msg = (
            f"parallel: found {options['parallel']!r}; accepted: None, since a plan is of this rank alone and asks no other. "
            "Next: call attention(..., parallel=), outside of use_parallel or inside"
        )
        raise CallRefused(msg)
    check_tensors(query, key, value)
    checked = checked_options(options)
    attn_mask = options["attn_mask"]
    check_mask(attn_mask, query, key)
    autocast = autocast_dtype(query.device.type)
    dtypes = tuple(_after_autocast(tensor.dtype, autocast) for tensor in (query, key, value))
    mask = mask_facts(attn_mask, autocast)
    check_dtypes(dtypes, mask, autocast)
    facts = Facts(
        **_size_facts(query, key, value),
        **device_facts(query.device),
        **mask,
        dtype=dtype_name(dtypes[0]),
        causal=checked["causal"],
        window_size=checked["window_size"],
        softcap=checked["softcap"] is not None,
        dropout=checked["dropout_p"] > 0,
        deterministic=checked["deterministic"],
        return_lse=checked["return_lse"],
        backward=needs_graph(query, key, value, attn_mask),
        vmap=torch._C._are_functorch_transforms_active(),
        forward_mode=has_tangent(query, key, value, attn_mask),
    )
    empty = not (query.shape[0] and query.shape[1] and key.shape[1])
    return Call(facts, passed_options(checked, attn_mask, query.shape[-1]), autocast, empty)


_DEFAULTS: dict[str, Any] = {
    "causal": False,
    "window_size": None,
    "softcap": None,
    "dropout_p": 0.0,
    "deterministic": False,
    "return_lse": False,
}


def checked_options(options: dict[str, Any]) -> dict[str, Any]:
    """Every option as Python has it, or a refusal."""
    causal = switch("causal", options["causal"])
    scale, window, softcap = options["scale"], options["window_size"], options["softcap"]
    return {
        "causal": causal,
        "scale": None if scale is None else scale_of(scale),
        "window_size": None if window is None else window_of(window, causal=causal),
        "softcap": None if softcap is None else softcap_of(softcap),
        "dropout_p": dropout_of(options["dropout_p"]),
        "deterministic": switch("deterministic", options["deterministic"]),
        "return_lse": switch("return_lse", options["return_lse"]),
    }


def passed_options(checked: dict[str, Any], attn_mask: Any, head_dim: int) -> dict[str, Any]:
    """The options as adapters get them: scale always, the rest where it differs from its default."""
    passed = {name: checked[name] for name, default in _DEFAULTS.items() if checked[name] != default}
    passed["scale"] = default_scale(head_dim) if checked["scale"] is None else checked["scale"]
    if attn_mask is not None:
        passed["attn_mask"] = attn_mask
    return passed


def default_scale(head_dim: int) -> float:
    """1/sqrt(D)."""
    return 1 / sqrt(head_dim)


# --- tensors ----------------------------------------------------------------------------------------------------------


def check_tensors(query: Any, key: Any, value: Any) -> None:
    """Refuse what is not three dense 4-D floating tensors of matching sizes on one device."""
    named = (("query", query), ("key", key), ("value", value))
    for label, tensor in named:
        if not isinstance(tensor, torch.Tensor):
            msg = (
                f"{label}: found {type(tensor).__name__}; accepted: a tensor of shape (batch, length, heads, head_dim)"
            )
            raise CallRefused(msg)
        if tensor.layout != torch.strided or getattr(tensor, "is_nested", False):
            layout = "nested" if getattr(tensor, "is_nested", False) else str(tensor.layout)
            msg = f"{label}: found a {layout} tensor; accepted: dense tensors; sequences of several lengths go into Packed"
            raise CallRefused(msg)
        if tensor.ndim != 4:
            msg = (
                f"{label}: found shape {tuple(tensor.shape)}, of {tensor.ndim} dimensions; "
                "accepted: (batch, length, heads, head_dim)"
            )
            raise CallRefused(msg)
        if not tensor.is_floating_point():
            msg = f"{label}: found dtype {dtype_name(tensor.dtype)}; accepted: a floating-point dtype"
            raise CallRefused(msg)
    _check_devices(query, key, value)
    _check_sizes(query.shape, key.shape, value.shape)


def check_dtypes(dtypes: tuple[torch.dtype, ...], mask: dict[str, Any], autocast: torch.dtype | None = None) -> None:
    """Refuse dtypes that differ between query, key and value, and a float mask of a dtype that is neither."""
    after = "" if autocast is None else " after autocast"
    names = [dtype_name(dtype) for dtype in dtypes]
    if len(set(names)) > 1:
        msg = f"dtype: query, key and value have {', '.join(names)}{after}; accepted: the same for all three"
        raise CallRefused(msg)
    if mask.get("mask_dtype", names[0]) not in (names[0], "float32"):
        accepted = "float32" if names[0] == "float32" else f"{names[0]} as query, or float32"
        msg = f"attn_mask: found dtype {mask['mask_dtype']}{after}; accepted: bool, {accepted}"
        raise CallRefused(msg)


def _check_devices(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    if query.device == key.device == value.device:
        return
    msg = f"device: query, key and value are on {query.device}, {key.device}, {value.device}; accepted: one device for all"
    raise CallRefused(msg)


def _check_sizes(query: torch.Size, key: torch.Size, value: torch.Size) -> None:
    shapes = f"query {tuple(query)}, key {tuple(key)}, value {tuple(value)}"
    if not query[0] == key[0] == value[0]:
        msg = f"batch: found {query[0]}, {key[0]} and {value[0]} in {shapes}; accepted: the same for all three"
        raise CallRefused(msg)
    if key[1] != value[1]:
        msg = f"key length: key has {key[1]} and value {value[1]} in {shapes}; accepted: a value for each key"
        raise CallRefused(msg)
    if key[2] != value[2] or key[2] < 1 or query[2] < 1 or query[2] % key[2]:
        msg = (
            f"heads: found {query[2]}, {key[2]} and {value[2]} in {shapes}; "
            "accepted: as many for key as for value, and a multiple of that for query"
        )
        hint = _transposed_hint(query, key)
        raise CallRefused(msg + hint)
    if query[3] != key[3] or query[3] < 1 or value[3] < 1:
        msg = (
            f"head_dim: found {query[3]}, {key[3]} and {value[3]} in {shapes}; "
            "accepted: the same for query and key, at least 1 each"
        )
        raise CallRefused(msg)


def _transposed_hint(query: torch.Size, key: torch.Size) -> str:
    if query[1] == key[1] < key[2]:
        return ". The layout is (batch, length, heads, head_dim); what is (batch, heads, length, head_dim) needs .transpose(1, 2)"
    return ""


def _size_facts(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> dict[str, Any]:
    return {
        "heads": int(query.shape[2]),
        "key_heads": int(key.shape[2]),
        "head_dim": int(query.shape[3]),
        "value_head_dim": int(value.shape[3]),
        "lengths": lengths_relation(query.shape[1], key.shape[1]),
    }


def lengths_relation(query_length: int, key_length: int) -> str:
    """How Sq and Skv relate, as ``Facts.lengths`` has it."""
    if query_length == key_length:
        return "equal"
    return "fewer queries" if query_length < key_length else "more queries"


def device_facts(device: torch.device) -> dict[str, Any]:
    """The platform of a device, and its compute capability where it has one."""
    if device.type != "cuda":
        return {"platform": device.type, "compute_capability": None}
    platform = "rocm" if torch.version.hip else "cuda"
    return {"platform": platform, "compute_capability": torch.cuda.get_device_capability(device)}


def needs_graph(*tensors: Any) -> bool:
    """Whether a gradient may be asked for with respect to any of these."""
    return torch.is_grad_enabled() and any(isinstance(item, torch.Tensor) and item.requires_grad for item in tensors)


_NO_KERNEL_LEFT = ("No viable backend for scaled_dot_product_attention", "No available kernel.")


def check_raised(error: Exception, query: Any, key: Any, value: Any, attn_mask: Any) -> None:
    """Refuse, where torch has raised for it, what it does not let a call have.

    That is its kernels, where the user has switched them off, and tensors of inference mode that the call would have kept
    for its backward.
    """
    if any(words in str(error) for words in _NO_KERNEL_LEFT):
        msg = (
            "torch's scaled_dot_product_attention: found no kernel of it that is switched on and takes this call; accepted: one "
            "that does. Next: make the call outside of torch.nn.attention.sdpa_kernel(...), which leaves only some of them (as "
            "torch.backends.cuda.enable_math_sdp(False) does), or choose another backend"
        )
        raise CallRefused(msg) from error
    if "nference tensor" not in str(error):
        return
    given = {"query": query, "key": key, "value": value, "attn_mask": attn_mask}
    found = [name for name, item in given.items() if isinstance(item, torch.Tensor) and item.is_inference()]
    names = " and ".join(found) or "a tensor of this call"
    msg = (
        f"{names}: found made under torch.inference_mode(), which autograd can't keep for the backward of this call; accepted: "
        "tensors made outside. Next: give a clone() made outside inference mode, or make the call under torch.no_grad()"
    )
    raise CallRefused(msg)


def has_tangent(*tensors: Any) -> bool:
    """Whether forward-mode differentiation reaches any of these."""
    if torch.autograd.forward_ad._current_level < 0:
        return False
    if torch.compiler.is_dynamo_compiling():  # it goes on into eager calls after a graph break, and shows no tangents
        return True
    unpack: Any = torch.autograd.forward_ad.unpack_dual
    return any(isinstance(item, torch.Tensor) and unpack(item).tangent is not None for item in tensors)


# --- autocast ---------------------------------------------------------------------------------------------------------


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast casts to on this kind of device, or None where it is off."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """No autocast inside, on this kind of device: for a backward, which is that of a forward of tensors that were cast.

    Compiled code may run inside one that was not open where it was traced, and leaves it in any case.
    """
    if torch.compiler.is_dynamo_compiling():
        off = device_type == "meta"
    else:
        off = not torch._C._is_any_autocast_enabled() or autocast_dtype(device_type) is None
    return _AS_IT_IS if off else torch.autocast(device_type, enabled=False)


_AS_IT_IS = nullcontext()


def _after_autocast(dtype: torch.dtype, autocast: torch.dtype | None) -> torch.dtype:
    return dtype if autocast is None or dtype == torch.float64 else autocast


def cast(tensor: Any, autocast: torch.dtype) -> Any:
    """What autocast makes of an argument: floating tensors cast, float64 and everything else untouched."""
    if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64:
        return tensor.to(autocast)
    return tensor


# --- masks ------------------------------------------------------------------------------------------------------------


def check_mask(attn_mask: Any, query: torch.Tensor, key: torch.Tensor) -> None:
    """Refuse a mask whose kind, shape or device does not fit the call."""
    if attn_mask is None:
        return
    if isinstance(attn_mask, KeyPadding):
        _check_key_padding(attn_mask, query, key)
    elif isinstance(attn_mask, Packed):
        _check_packed(attn_mask, query, key)
    elif isinstance(attn_mask, torch.Tensor):
        check_dense_mask(attn_mask, query, key)
    else:
        msg = (
            f"attn_mask: found {type(attn_mask).__name__}; accepted: None, a bool tensor (True may attend), "
            "a float tensor added to the scores, KeyPadding or Packed"
        )
        raise CallRefused(msg)


def check_dense_mask(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> None:
    """Refuse a mask tensor that is not 4-D, broadcastable to (B, Hq, Sq, Skv), bool or float, on the call's device."""
    if mask.layout != torch.strided or mask.is_nested:
        msg = f"attn_mask: found a {'nested' if mask.is_nested else mask.layout} tensor; accepted: dense tensors"
        raise CallRefused(msg)
    full = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    if mask.ndim != 4 or not all(found in (1, wanted) for found, wanted in zip(mask.shape, full, strict=True)):
        hint = ""
        if mask.ndim == 2:
            hint = ". For padding of keys (B, Skv) use KeyPadding(mask.bool()); for one (Sq, Skv) mask use mask[None, None]"
        found, accepted = tuple(mask.shape), f"4 dimensions, broadcastable to (B, Hq, Sq, Skv) = {full}"
        msg = f"attn_mask: found shape {found}; accepted: {accepted}{hint}"
        raise CallRefused(msg)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        msg = (
            f"attn_mask: found dtype {dtype_name(mask.dtype)}; accepted: bool (True may attend), or float added to the scores. "
            "A mask of 0 and 1 becomes a bool one with mask.bool()"
        )
        raise CallRefused(msg)
    _check_mask_device(mask.device, query.device)


def _check_key_padding(mask: KeyPadding, query: torch.Tensor, key: torch.Tensor) -> None:
    wanted = (key.shape[0], key.shape[1])
    if tuple(mask.keep.shape) != wanted:
        msg = f"attn_mask: KeyPadding of shape {tuple(mask.keep.shape)}; accepted: (B, Skv) = {wanted}"
        raise CallRefused(msg)
    _check_mask_device(mask.keep.device, query.device)


def _check_packed(mask: Packed, query: torch.Tensor, key: torch.Tensor) -> None:
    if query.shape[0] != 1:
        msg = f"attn_mask: Packed with a batch of {query.shape[0]}; accepted: sequences laid end to end in a batch of 1"
        raise CallRefused(msg)
    _check_mask_device(mask.cu_seqlens_q.device, query.device)
    totals = mask.totals
    if totals is None:  # made in traced code, which reads no values
        return
    for label, total, length in (("q", totals[0], query.shape[1]), ("k", totals[1], key.shape[1])):
        if total != length:
            found, accepted = len(range(total)), len(range(length))  # plain numbers: Dynamo writes no symbolic ones
            msg = f"attn_mask: Packed.cu_seqlens_{label} ends with {found}; accepted: the length of the tensor, {accepted}"
            raise CallRefused(msg)


def _check_mask_device(found: torch.device, wanted: torch.device) -> None:
    if found != wanted:
        msg = f"attn_mask: found on {found}; accepted: the device of query, {wanted}"
        raise CallRefused(msg)


def mask_facts(mask: Any, autocast: torch.dtype | None) -> dict[str, Any]:
    """The facts of a mask."""
    if mask is None:
        return {}
    if isinstance(mask, Description):
        return {"mask": mask.kind}
    # asked with an if: comparing a symbolic size alone gives a symbolic bool, which Dynamo makes no constant of
    broadcast = tuple(True if size == 1 else False for size in mask.shape)  # noqa: SIM210
    if mask.dtype == torch.bool:
        return {"mask": "bool", "mask_broadcast": broadcast}
    return {
        "mask": "float",
        "mask_broadcast": broadcast,
        "mask_dtype": dtype_name(_after_autocast(mask.dtype, autocast)),
        "mask_gradient": needs_graph(mask),
    }


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as declarations have it."""
    return str(dtype).removeprefix("torch.")
