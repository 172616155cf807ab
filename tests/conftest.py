"""Fixtures: backends of a test's own, installed as a distribution on disk like anybody's wheel."""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import dedent

import pytest

DECLARATION = """
    from attn_core.plugin import BackendSpec, Constraints, hookimpl

    EVERYTHING = Constraints(
        platforms={"cpu", "cuda"}, dtypes={"float16", "bfloat16", "float32", "float64"},
        masks={"none", "bool", "float", "key_padding", "packed"}, causal=True, gqa=True, cross_lengths=True,
        value_head_dim=True, window_size=True, softcap=True, dropout=True, lse=True, deterministic=True,
        mask_gradient=True, vmap=True, forward_mode=True, backward=True)

    def backend(name, **changes):
        return BackendSpec(**{**dict(
            api=1, name=name, summary=f"fills the result with a number of its own ({name})",
            forward=f"stub_kernels:{name}", constraints=EVERYTHING, compile=True), **changes})

    @hookimpl
    def attn_backends():
        yield backend("alpha", aliases={"first"})
        yield backend("beta")
        yield backend("gamma", constraints=Constraints(platforms={"cpu"}, dtypes={"float32"}, masks={"none"}))
        yield backend("spy")
"""

KERNELS = """
    import torch

    calls = []

    def fill(number, query, value, return_lse):
        out = query.sum(-1, keepdim=True) * 0 + value.sum() * 0 + torch.full(
            (*query.shape[:3], value.shape[3]), number, dtype=query.dtype, device=query.device)
        if not return_lse:
            return out
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        return out, torch.zeros(query.shape[0], query.shape[2], query.shape[1], dtype=dtype, device=query.device)

    def alpha(query, key, value, *, return_lse=False, **options):
        return fill(1.0, query, value, return_lse)

    def beta(query, key, value, *, return_lse=False, **options):
        return fill(2.0, query, value, return_lse)

    def gamma(query, key, value, *, scale):
        return fill(3.0, query, value, False)

    def spy(query, key, value, *, return_lse=False, **options):
        calls.append(options)
        return fill(4.0, query, value, return_lse)
"""


def write_distribution(
    folder: Path, distribution: str, version: str, modules: dict[str, str], declaration: str
) -> None:
    """Write what an installed wheel leaves behind: its modules, and metadata with an entry point."""
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(dedent(text))
    metadata = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (metadata / "entry_points.txt").write_text(f"[attn.backends]\n{distribution} = {declaration}\n")


@pytest.fixture(scope="session")
def stubs(tmp_path_factory):
    """Four backends: alpha fills the result with 1, beta with 2, gamma (no option) with 3, spy with 4 and keeps its options."""
    from attn_core import call, registry

    folder = tmp_path_factory.mktemp("stubs")
    write_distribution(
        folder, "attn-stub", "1.0", {"stub_declaration": DECLARATION, "stub_kernels": KERNELS}, "stub_declaration"
    )
    sys.path.insert(0, str(folder))
    registry.refresh()
    call.forget()
    yield folder
    sys.path.remove(str(folder))
    registry.refresh()
    call.forget()


@pytest.fixture(scope="session")
def ranks():
    """A pool of 8 processes, one for the whole session, with a mesh of each shape."""
    from ranks import SHAPES, Ranks

    pool = Ranks()
    pool.run("make_meshes", SHAPES)
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def no_choice_left_behind(monkeypatch):
    """No test sees another's choice of backend, and none leaves one."""
    monkeypatch.delenv("ATTN_BACKEND", raising=False)
    yield
    selection = sys.modules.get("attn_core.selection")
    if selection is not None and "attn_core.call" in sys.modules:
        selection._default = None
        selection._used.clear()
        selection.varied = False
        sys.modules["attn_core.call"].forget()
        assert all(scope.closed for scope in selection.scopes()), "a scope outlived its test"
