"""A gradient of the gradient is had where it is declared, and refused where Python would compute another one."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import write_distribution

from attn_core import attention, call, registry
from attn_core.errors import CallRefused

DECLARATION = """
    from attn_core.plugin import BackendSpec, Constraints, No, hookimpl

    ONCE = dict(platforms={"cpu"}, dtypes={"float32", "float64"}, masks={"none", "float"}, lse=True, mask_gradient=True,
                backward=True)

    @hookimpl
    def attn_backends():
        for name, ability in (("python_once", No("its backward keeps the lse")), ("twice", True)):
            yield BackendSpec(api=1, name=name, summary="attention whose graph Python makes", forward=f"own_graphs:{name}",
                              autograd="own", constraints=Constraints(**ONCE, double_backward=ability))
"""

KERNELS = """
    import torch

    class FromLse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, key, value, scale):
            scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
            lse = scores.logsumexp(-1)
            out = torch.einsum("bhqk,bkhd->bqhd", (scores - lse[..., None]).exp(), value)
            ctx.save_for_backward(query, key, value, out, lse)
            ctx.scale = scale
            ctx.mark_non_differentiable(lse)
            return out, lse

        @staticmethod
        def backward(ctx, grad, _):
            query, key, value, out, lse = ctx.saved_tensors
            weights = (torch.einsum("bqhd,bkhd->bhqk", query, key) * ctx.scale - lse[..., None]).exp()
            inner = (grad * out).sum(-1).transpose(1, 2)[..., None]
            scores = weights * (torch.einsum("bqhd,bkhd->bhqk", grad, value) - inner) * ctx.scale
            return (torch.einsum("bhqk,bkhd->bqhd", scores, key), torch.einsum("bhqk,bqhd->bkhd", scores, query),
                    torch.einsum("bhqk,bqhd->bkhd", weights, grad), None)

    def python_once(query, key, value, *, scale, attn_mask=None, return_lse=False):
        if query.shape[1] < 5:
            return twice(query, key, value, scale=scale, attn_mask=attn_mask, return_lse=return_lse)
        out, lse = FromLse.apply(query, key, value, scale)
        out = out.contiguous() if attn_mask is None else out + attn_mask.sum() * 0
        return (out, lse) if return_lse else out

    def twice(query, key, value, *, scale, attn_mask=None, return_lse=False):
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)
        return (out, scores.logsumexp(-1)) if return_lse else out
"""


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own_graphs")
    modules = {"own_graphs_declaration": DECLARATION, "own_graphs": KERNELS}
    write_distribution(folder, "own-graphs", "1.0", modules, "own_graphs_declaration")
    sys.path.insert(0, str(folder))
    registry.refresh()
    call.forget()
    yield
    sys.path.remove(str(folder))
    registry.refresh()
    call.forget()


def leaves(length=5):
    return [torch.randn(1, length, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def first(tensors, backend, *, create_graph=True, **options):
    found = attention(*tensors, backend=backend, **options)
    out = found[0] if options.get("return_lse") else found
    return torch.autograd.grad(out.sin().sum(), tensors[0], create_graph=create_graph)[0]


@pytest.mark.parametrize("options", [{}, {"return_lse": True}, {"attn_mask": torch.zeros(1, 1, 5, 5).double()}])
def test_is_refused_where_python_makes_the_graph_and_none_is_declared(options):
    if not options:  # of other lengths this adapter has a graph of torch's own
        first(leaves(length=4), "python_once")
    tensors = leaves()
    for _ in range(2):  # the first call of a kind, and the next
        with pytest.raises(CallRefused, match=r"python_once refused.*keeps the lse.*native_math"):
            first(tensors, "python_once", **options)
    once = first(tensors, "python_once", create_graph=False, **options)
    torch.testing.assert_close(once, first(tensors, "twice", create_graph=False, **options))


def test_is_had_where_it_is_declared():
    tensors = leaves()
    gradient = first(tensors, "twice")
    torch.autograd.grad(gradient.square().sum(), tensors[0])


def test_python_before_the_call_or_after_it_is_nobodys_business():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # noqa: ARG004
            return x * 2

        @staticmethod
        def backward(ctx, grad):  # noqa: ARG004
            return grad * 2

    leaf, mask = (torch.randn(shape, requires_grad=True) for shape in ((1, 5, 2, 8), (1, 1, 5, 5)))
    out = attention(*(Twice.apply(leaf) for _ in range(3)), attn_mask=Twice.apply(mask), backend="native")
    torch.autograd.grad(Twice.apply(out).sum(), leaf, create_graph=True)
