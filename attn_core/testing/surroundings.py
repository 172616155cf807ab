"""What a process has that outlives a call: settings, random numbers. Looked at, and set to unusual values and back."""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import sys
import warnings
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attn_core.guard import Raised, attempt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

USUAL, ONE_HALF, OTHER_HALF = 0, 1, 2
"""Which settings have unusual values: none, or one half of them, or the other. Some can't be unusual together."""


@dataclass(frozen=True)
class Setting:
    """Something of the process that code can read, and mostly set.

    Attributes:
        name: for messages.
        read: gives its value, which can be compared.
        write: sets it to a value that was read; None where it is only looked at.
        other: a value other than the one it is given.
        halves: when it is set to the other value.
        guarded: whether compiled code is compiled again where it changes.
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], Any] | None = None
    other: Callable[[Any], Any] | None = None
    halves: Sequence[int] = (ONE_HALF, OTHER_HALF)
    guarded: bool = False


def left_by(steps: Sequence[Callable[[], Any]], device: torch.device, half: int, *, guarded: bool = True) -> list[str]:
    """Run these steps, and say what is other after one of them than before, as "the default dtype from ... to ...".

    Afterwards everything is as it was. An error that a step raises ends the steps and is not told: what it leaves behind is
    asked here, and other checks hold the results.

    Args:
        steps: such as a forward and its backward.
        device: whose random numbers count, beside the CPU's.
        half: which settings have unusual values meanwhile.
        guarded: whether those may be among them for which compiled code is compiled again.

    Example:
        >>> left_by([lambda: torch.set_num_threads(torch.get_num_threads() + 1)], torch.device("cpu"), USUAL)[0][:25]
        'the number of threads fro'
    """
    with unusual(device, half, guarded=guarded) as settings:
        before, found = look(settings), []
        for step in steps:
            outcome = attempt(step)
            found = changes(before, look(settings))
            if found or isinstance(outcome, Raised):
                break
    return found


def look(settings: Sequence[Setting]) -> dict[str, Any]:
    """What they are now; those that this torch, or this machine, does not have are left out."""
    found = {setting.name: attempt(setting.read) for setting in settings}
    return {name: value.value for name, value in found.items() if not isinstance(value, Raised)}


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is other than before, in words."""
    return [
        f"{name}{_told(value, after[name])}"
        for name, value in before.items()
        if name in after and not _equal(value, after[name])
    ]


def _equal(one: Any, other: Any) -> bool:
    return bool(one == other)


def _told(before: Any, after: Any) -> str:
    if isinstance(before, dict) and isinstance(after, dict):
        names = sorted(str(name) for name in {*before, *after} if before.get(name) != after.get(name))
        return f" ({', '.join(names)})"
    shown = f" from {before} to {after}"
    return shown if len(shown) < 80 else ""


@contextmanager
def unusual(device: torch.device, half: int, *, guarded: bool = True) -> Iterator[list[Setting]]:
    """Set one half of the settings to unusual values; afterwards, all of them are what they were."""
    settings = [*_of_torch(device), *_of_python()]
    usual = look(settings)
    with nullcontext() if half == USUAL else warnings.catch_warnings():
        if half != USUAL:  # torch warns of what is set below
            warnings.simplefilter("ignore")
        try:
            for setting in settings:
                asked = half in setting.halves and (guarded or not setting.guarded)
                if asked and setting.write is not None and setting.other is not None and setting.name in usual:
                    attempt(partial(setting.write, setting.other(usual[setting.name])))
            yield settings
        finally:
            for setting in reversed(settings):
                if setting.write is not None and setting.name in usual:
                    attempt(partial(setting.write, usual[setting.name]))


def _recursion() -> int:
    """The limit, below what torch's compiler raises it to once and for good: that much is not the backend's doing."""
    return max(sys.getrecursionlimit(), 2000)


def _flipped(value: Any) -> bool:
    return not value


# --- torch ------------------------------------------------------------------------------------------------------------


def _of_torch(device: torch.device) -> Iterator[Setting]:
    both, dtypes = (ONE_HALF, OTHER_HALF), (torch.float32, torch.bfloat16)
    yield Setting(
        "the default dtype", torch.get_default_dtype, torch.set_default_dtype,
        lambda now: dtypes[now == dtypes[0]], both, guarded=True,
    )  # fmt: skip
    yield Setting(
        "the precision of float32 products", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision,
        lambda now: "high" if now == "highest" else "highest", both, guarded=True,
    )  # fmt: skip
    yield Setting(
        "whether algorithms are deterministic", _deterministic, lambda on: _set_deterministic(*on),
        lambda now: (not now[0], not now[0]), both, guarded=True,
    )  # fmt: skip
    threads = torch.get_num_threads, torch.set_num_threads
    yield Setting("the number of threads", *threads, lambda now: now + 1, both, guarded=True)
    yield Setting("whether denormal numbers are flushed", _flushes, torch.set_flush_denormal, _flipped)
    # Without a graph there is no backward, so that one half has the one, and the other the other.
    yield Setting("the grad mode", torch.is_grad_enabled, torch.set_grad_enabled, _flipped, (OTHER_HALF,), guarded=True)
    yield Setting("the inference mode", torch.is_inference_mode_enabled)
    yield Setting("whether anomalies are detected", torch.is_anomaly_enabled)
    yield Setting("the state of torch's random numbers", _drawn_on(device), partial(_draw_on, device), _reseeded)
    yield from _autocast({"cpu", device.type})
    yield from _switches()
    yield from _gpu(device)
    suppressed = "suppress_errors"
    yield Setting(
        "Dynamo's configuration",
        _dynamo,
        _set_dynamo,
        lambda now: {**now, suppressed: not now[suppressed]},
        both,
        guarded=True,
    )
    yield Setting("the modes that are on", _modes)
    # Last, so that nothing above is made on the meta device; what a call makes for itself names its device.
    yield Setting(
        "the default device", torch.get_default_device,
        lambda to: torch.set_default_device(None if to == torch.device("cpu") else to),
        lambda now: torch.device("meta" if now.type != "meta" else "cpu"), both, guarded=True,
    )  # fmt: skip


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _set_deterministic(on: bool, warn_only: bool) -> None:
    torch.use_deterministic_algorithms(on, warn_only=warn_only)


def _flushes() -> bool:
    """Seen by making a denormal number, since torch does not say."""
    return not bool(torch.full((1,), 1e-310, dtype=torch.float64, device="cpu").mul(0.5).ne(0).item())


def _drawn_on(device: torch.device) -> Callable[[], list[bytes]]:
    def read() -> list[bytes]:
        on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
        return [bytes(state.numpy()) for state in (torch.get_rng_state(), *on_device)]

    return read


def _draw_on(device: torch.device, states: list[bytes]) -> None:
    host, *others = (torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in states)
    torch.set_rng_state(host)
    for state in others:
        torch.cuda.set_rng_state(state, device)


def _reseeded(states: list[bytes]) -> list[bytes]:
    """States that no seed that people write gives."""
    seed = random.Random(len(states)).getrandbits(48)  # noqa: S311 (no secret)
    host = torch.Generator().manual_seed(seed).get_state()
    return [bytes(host.numpy()), *(_seeded_on_gpu(seed) for _ in states[1:])]


def _seeded_on_gpu(seed: int) -> bytes:
    return bytes(torch.Generator("cuda").manual_seed(seed).get_state().numpy())


def _autocast(devices: set[str]) -> Iterator[Setting]:
    half = torch.bfloat16, torch.float16
    for name in sorted(devices):
        enabled = partial(torch.is_autocast_enabled, name), partial(torch.set_autocast_enabled, name)
        yield Setting(f"whether autocast is on for {name}", *enabled)
        dtype = partial(torch.get_autocast_dtype, name), partial(torch.set_autocast_dtype, name)
        yield Setting(f"autocast's dtype for {name}", *dtype, lambda now: half[now == half[0]], guarded=True)
    cache = torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled
    yield Setting("whether autocast has a cache", *cache, _flipped, guarded=True)


def _switches() -> Iterator[Setting]:
    """The attributes and pairs of functions of ``torch.backends``."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    for name, halves in (
        # one of SDPA's kernels has to stay on
        *(("flash_sdp", (ONE_HALF,)), ("mem_efficient_sdp", (ONE_HALF,)), ("cudnn_sdp", (ONE_HALF,))),
        ("math_sdp", (OTHER_HALF,)),
    ):
        both = getattr(cuda, f"{name}_enabled", None), getattr(cuda, f"enable_{name}", None)
        if both[0] is not None:
            yield Setting(f"torch.backends.cuda.{name}_enabled", both[0], both[1], _flipped, halves)
    reduced = "allow_fp16_bf16_reduction_math_sdp"
    if hasattr(cuda, reduced):
        yield Setting(
            f"torch.backends.cuda.{reduced}",
            cuda.fp16_bf16_reduction_math_sdp_allowed,
            getattr(cuda, reduced),
            _flipped,
        )
    sdp_order = getattr(torch._C, "_get_sdp_priority_order", None)  # noqa: SLF001 (no public name)
    if sdp_order is not None:
        yield Setting("the order of SDPA's kernels", sdp_order)
    reduced_sums = "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"
    for owner, label, attributes in (
        (cudnn, "cudnn", ("enabled", "benchmark", "deterministic", "allow_tf32")),
        (cuda.matmul, "cuda.matmul", ("allow_tf32", *reduced_sums)),
        (torch.backends.mkldnn, "mkldnn", ("enabled", "deterministic", "allow_tf32")),
    ):  # fmt: skip
        for name in attributes:
            # allow_tf32 is one with the precision of products, which is set above
            other = None if (label, name) == ("cuda.matmul", "allow_tf32") else _flipped
            yield Setting(
                f"torch.backends.{label}.{name}", partial(getattr, owner, name), partial(setattr, owner, name), other
            )


def _gpu(device: torch.device) -> Iterator[Setting]:
    if device.type == "cuda":
        yield Setting("the current GPU", torch.cuda.current_device, torch.cuda.set_device)
        yield Setting("the current stream", torch.cuda.current_stream)


def _dynamo() -> dict[str, Any]:
    """As far as it was imported: that is not asked about."""
    config: Any = sys.modules["torch._dynamo.config"]
    return {
        name: value
        for name, value in config.get_config_copy().items()
        if isinstance(value, (bool, int, float, str)) and not name.startswith("_")
    }


def _set_dynamo(values: dict[str, Any]) -> None:
    config: Any = sys.modules["torch._dynamo.config"]
    now = _dynamo()
    for name in values.keys() & now.keys():
        if now[name] != values[name]:
            setattr(config, name, values[name])


def _modes() -> list[str]:
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    stacks = (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack())
    return [type(mode).__name__ for mode in stacks if type(mode).__name__ != "DeviceContext"]


# --- Python -----------------------------------------------------------------------------------------------------------

OF_TOOLS = ("TORCHINDUCTOR_", "_TORCHINDUCTOR_", "TRITON_", "CUDA_", "PYTORCH_", "PYTEST_", "KMP_", "OMP_")
"""How environment variables begin that compilers and torch set for themselves when they are first used."""


def _of_python() -> Iterator[Setting]:
    yield Setting("the environment", _environment)
    yield Setting(
        "the filters of warnings", _filters, _set_filters, lambda now: [("ignore", None, BytesWarning, None, 7), *now]
    )
    yield Setting("which warnings are ignored", _ignored)
    yield Setting("how signals are handled", _handlers, _handle, lambda now: {**now, "SIGINT": _interrupted})
    unlikely = random.Random("a seed that nobody sets").getstate()  # noqa: S311 (no secret)
    yield Setting("the state of random", random.getstate, random.setstate, lambda _: unlikely)
    yield Setting("the state of numpy's random numbers", _numpy_random, _set_numpy_random, _numpy_reseeded)
    yield Setting("how numpy handles errors", _numpy_errors)
    yield Setting("the limit of recursion", _recursion, sys.setrecursionlimit, lambda now: now + 7)
    yield Setting("how often threads change", sys.getswitchinterval, sys.setswitchinterval, lambda now: now / 2)
    yield Setting(
        "whether garbage is collected", gc.isenabled, lambda on: gc.enable() if on else gc.disable(), _flipped
    )
    yield Setting(
        "when garbage is collected",
        gc.get_threshold,
        lambda now: gc.set_threshold(*now),
        lambda now: (now[0] + 7, *now[1:]),
    )
    root = logging.getLogger()
    yield Setting("the level of the root logger", lambda: root.level, root.setLevel, lambda now: now + 1)
    yield Setting("the handlers of the root logger", lambda: [*root.handlers])
    yield Setting("which levels are logged at all", lambda: root.manager.disable, logging.disable)
    yield Setting("what shows errors", lambda: sys.excepthook)
    yield Setting("the working directory", Path.cwd, os.chdir)


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(OF_TOOLS)}


def _filters() -> list[Any]:
    return [*warnings.filters]


def _ignored() -> list[str]:
    """The kinds of which all are, whatever they say and whoever warns."""
    every = (item for item in warnings.filters if item[0] == "ignore" and item[1] is None and item[3] is None)
    return sorted({str(item[2]) for item in every})


def _set_filters(filters: list[Any]) -> None:
    warnings.filters[:] = filters  # type: ignore[index]
    with suppress(AttributeError):
        warnings._filters_mutated()  # type: ignore[attr-defined]  # noqa: SLF001 (what simplefilter does)


def _handlers() -> dict[str, Any]:
    return {item.name: signal.getsignal(item) for item in signal.valid_signals() if isinstance(item, signal.Signals)}


def _interrupted(*received: Any) -> None:
    signal.default_int_handler(*received)


def _handle(handlers: dict[str, Any]) -> None:
    for name, handler in handlers.items():
        if signal.getsignal(signal.Signals[name]) != handler:
            signal.signal(signal.Signals[name], handler)


def _numpy_errors() -> dict[str, str]:
    found: dict[str, str] = sys.modules["numpy"].geterr()
    return found


def _numpy_random() -> tuple[Any, ...]:
    name, keys, *others = sys.modules["numpy"].random.get_state()
    return (name, keys.tobytes(), *others)


def _set_numpy_random(state: tuple[Any, ...]) -> None:
    numpy = sys.modules["numpy"]
    numpy.random.set_state((state[0], numpy.frombuffer(state[1], dtype=numpy.uint32), *state[2:]))


def _numpy_reseeded(state: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*state[:2], 1 + state[2] % 600, *state[3:])
