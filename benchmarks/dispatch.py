"""What one call costs on top of its kernel: attn beside the attention dispatcher of diffusers, in one run.

Usage: python benchmarks/dispatch.py
"""

from __future__ import annotations

import os
import sys
import tempfile
import timeit
from pathlib import Path
from textwrap import dedent

import torch

ROUNDS, CALLS = 600, 500
SEED_OFF, SEED_ON, NO_GRADIENTS = "the seed, checks off", "the seed, checks on", "attention(), under no_grad"

DECLARATION = """
    from attn_core.plugin import BackendSpec, Constraints, hookimpl

    @hookimpl
    def attn_backends():
        yield BackendSpec(
            api=1, name="stub", summary="returns its query", forward="stub_kernel:forward",
            constraints=Constraints(
                platforms={"cpu"}, dtypes={"float32", "bfloat16"}, masks={"none", "bool", "key_padding"},
                causal=True, gqa=True, cross_lengths=True, dropout=True))
"""

KERNEL = """
    def forward(query, key, value, *, scale, attn_mask=None, causal=False, dropout_p=0.0):
        return query
"""


def install_stub() -> None:
    """Make a wheel on disk whose kernel does nothing, so that what is left is dispatch."""
    folder = Path(tempfile.mkdtemp())
    (folder / "stub_declaration.py").write_text(dedent(DECLARATION))
    (folder / "stub_kernel.py").write_text(dedent(KERNEL))
    metadata = folder / "stub-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: stub\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[attn.backends]\nstub = stub_declaration\n")
    sys.path.insert(0, str(folder))


def seed_over_stub():
    """The dispatcher of diffusers over a stub, with the checks that its flash backend has."""
    from diffusers.models import attention_dispatch as seed

    registry, name = seed._AttentionBackendRegistry, seed.AttentionBackendName.FLASH

    def stub(
        query,
        key,
        value,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        scale=None,
        enable_gqa=False,
        _parallel_config=None,
    ):
        return query

    registry._backends[name] = stub
    registry._supported_arg_names[name] = set(stub.__code__.co_varnames)
    registry._constraints[name] = [seed._check_device, seed._check_qkv_dtype_bf16_or_fp16, seed._check_shape]
    registry._active_backend = name
    return seed.dispatch_attention_fn


def check_seed(checks: bool) -> None:
    """Switch the checks of that dispatcher on or off."""
    from diffusers.models import attention_dispatch as seed

    seed._AttentionBackendRegistry._checks_enabled = checks


def seed_native():
    """The dispatcher of diffusers over SDPA."""
    from diffusers.models import attention_dispatch as seed

    seed._AttentionBackendRegistry._checks_enabled = False
    seed._AttentionBackendRegistry._active_backend = seed.AttentionBackendName.NATIVE
    return seed.dispatch_attention_fn


def microseconds(functions, before=None) -> dict[str, float]:
    """The smallest time per call of each, the functions taking short turns; ``before`` is called with the name at each."""
    timers = {name: timeit.Timer(function) for name, function in functions.items()}
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            if before is not None:
                before(name)
            best[name] = min(best[name], timer.timeit(CALLS) / CALLS * 1e6)
    return best


def before(name: str) -> None:
    """Bring about what the name of a row says."""
    check_seed(name == SEED_ON)
    torch.set_grad_enabled(name != NO_GRADIENTS)


def main() -> None:
    install_stub()
    import stub_kernel

    from attn_core import KeyPadding, attention, plan, set_backend

    torch.set_num_threads(1)
    q, k, v = (torch.randn(1, 8, 2, 16, dtype=torch.bfloat16) for _ in range(3))
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    keep = KeyPadding(torch.ones(1, 8, dtype=torch.bool))
    kernel, scale = stub_kernel.forward, 0.25
    set_backend("stub")
    planned, dispatch = plan(q, k, v), seed_over_stub()
    rows = microseconds(
        {
            "adapter alone": lambda: kernel(q, k, v, scale=scale),
            SEED_OFF: lambda: dispatch(q, k, v),
            SEED_ON: lambda: dispatch(q, k, v),
            "attention()": lambda: attention(q, k, v),
            "attention(), one tensor three times": lambda: attention(q, q, q),
            NO_GRADIENTS: lambda: attention(q, k, v),
            "attention(causal=True)": lambda: attention(q, k, v, causal=True),
            "attention(scale=..., dropout_p=0.0)": lambda: attention(q, k, v, scale=0.5, dropout_p=0.0),
            "attention(attn_mask=bool)": lambda: attention(q, k, v, attn_mask=mask),
            "attention(attn_mask=KeyPadding)": lambda: attention(q, k, v, attn_mask=keep),
            "a plan()": lambda: planned(q, k, v),
        },
        before,
    )
    alone = rows.pop("adapter alone")
    off, on = rows[SEED_OFF] - alone, rows[SEED_ON] - alone
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, {os.uname().machine}; microseconds per call\n")
    print("Over a stub adapter (what is added to the adapter alone)")
    for name, time in rows.items():
        added = time - alone
        print(f"  {name:<40}{added:8.2f}   {added / off:5.2f} x checks off   {added / on:5.2f} x checks on")

    set_backend("native")
    tiny = torch.randn(1, 16, 2, 16)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    planned = plan(tiny, tiny, tiny)
    dispatch = seed_native()
    rows = microseconds(
        {
            "SDPA, transposes included": lambda: sdpa(
                tiny.transpose(1, 2), tiny.transpose(1, 2), tiny.transpose(1, 2)
            ).transpose(1, 2),
            "the seed": lambda: dispatch(tiny, tiny, tiny),
            "attention()": lambda: attention(tiny, tiny, tiny),
            "a plan()": lambda: planned(tiny, tiny, tiny),
        }
    )
    direct = rows["SDPA, transposes included"]
    print("\nOver native on tiny CPU tensors")
    for name, time in rows.items():
        print(f"  {name:<40}{time:8.2f}   {time / direct:5.2f} x SDPA   {time / rows['the seed']:5.2f} x the seed")


if __name__ == "__main__":
    main()
