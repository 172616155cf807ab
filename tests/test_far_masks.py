"""Rows of a float mask that are large negative numbers throughout, as models write padding: they hide nothing."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attn_core import attention
from attn_core.offset import without_offset
from attn_core.testing import assert_close, bounds, reference

BACKENDS = ["native", "native_flash", "native_math", "chunked"]
FAR = [torch.finfo(torch.float32).min, -1e9, -1e6, 1e9]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def inputs(queries, keys, dtype, amplitude=1e-3):
    """Scores are so small that nothing is lost beside any number."""
    torch.manual_seed(0)
    shapes = [(2, queries, 2, 8), (2, keys, 1, 8), (2, keys, 1, 8)]
    return [(amplitude * torch.randn(shape)).to(dtype).requires_grad_() for shape in shapes]


def mask_of(form, queries, keys, far):
    mask = torch.randn(2, 1, queries, keys)
    mask[:, :, 1] = far
    mask[0, :, :, :3] = far  # with causal: whatever the first queries see
    forms = {"whole": mask, "keys": mask[:, :, -1:], "one": mask[:1, :, 1:2, :1]}
    return forms[form]


def check(found, tensors, **options):
    dtype = tensors[0].dtype
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    out, lse = reference(*exact, **options)
    grad_out = torch.ones_like(found[0])
    allowed = bounds(*exact, grad_out=grad_out, dtype=dtype, **options)
    assert_close(found[0], out, dtype, "out", bound=allowed.out)
    assert_close(found[1], lse, dtype, "lse", bound=allowed.lse)
    gradients = torch.autograd.grad(found[0], tensors, grad_out)
    wanted = torch.autograd.grad(out, exact, grad_out.double())
    for name, gradient, right in zip(("query", "key", "value"), gradients, wanted, strict=True):
        assert_close(gradient, right, dtype, name, bound=getattr(allowed, name) + 1e-30)


@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (3, 20), (20, 20), (2, 6)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", ["whole", "keys", "one"])
@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize("backend", BACKENDS)
def test_results_and_gradients_are_right(backend, far, form, causal, queries, keys):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        tensors = inputs(queries, keys, dtype)
        options = {"attn_mask": mask_of(form, queries, keys, far), "causal": causal}
        check(attention(*tensors, return_lse=True, backend=backend, **options), tensors, **options)
        out = attention(*tensors, backend=backend, **options)
        check(
            (out, reference(*tensors, **options)[1].to(torch.promote_types(dtype, torch.float32))), tensors, **options
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_are_not_lost_beside_a_large_number(backend):
    tensors = inputs(6, 20, torch.float32, amplitude=1.0)
    mask = torch.full((1, 1, 1, 20), -1e9)
    with_graph = attention(*tensors, attn_mask=mask, backend=backend)
    assert_close(with_graph, reference(*tensors)[0], torch.float32, "out")
    for found, right in zip(
        torch.autograd.grad(with_graph.sum(), tensors),
        torch.autograd.grad(reference(*tensors)[0].sum(), tensors),
        strict=True,
    ):
        assert_close(found, right, torch.float32, "gradient")


@pytest.mark.parametrize("backend", ["native", "native_math"])
def test_a_mask_that_wants_its_gradient_gets_it(backend):
    tensors = inputs(6, 6, torch.float32)
    mask = mask_of("whole", 6, 6, -1e9).requires_grad_()
    found = torch.autograd.grad(attention(*tensors, attn_mask=mask, backend=backend).sum(), mask)[0]
    exact = mask.detach().double().requires_grad_()
    wanted = torch.autograd.grad(reference(*tensors, attn_mask=exact)[0].sum(), exact)[0]
    torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_code_is_as_right(backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *tensors, attn_mask: attention(
            *tensors, attn_mask=attn_mask, backend=backend, return_lse=True, causal=True
        ),  # not partial, which torch 2.6 can't trace
        fullgraph=True, dynamic=dynamic, backend="aot_eager",
    )  # fmt: skip
    for lengths in ((3, 20), (20, 20)):
        tensors = inputs(*lengths, torch.float32)
        mask = mask_of("whole", *lengths, -1e9)
        check(compiled(*tensors, attn_mask=mask), tensors, attn_mask=mask, causal=True)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("backend", ["native_flash", "native_math"])
def test_what_is_no_number_in_a_row_is_neither_hidden_nor_taken_away(backend, number):
    tensors = [tensor.detach() for tensor in inputs(6, 6, torch.float32)]
    mask = mask_of("whole", 6, 6, -1e9)
    mask[:, :, 1, 2] = number
    mask[:, :, 3] = number
    found, wanted = attention(*tensors, attn_mask=mask, backend=backend), reference(*tensors, attn_mask=mask)[0]
    assert torch.equal(found.isnan(), wanted.isnan())


def test_a_mask_of_small_numbers_is_taken_as_it_is():
    for mask in (
        torch.zeros(1, 1, 4, 4),
        torch.randn(1, 1, 4, 4).masked_fill(torch.eye(4, dtype=torch.bool), -torch.inf),
    ):
        assert without_offset(mask, 4, 4) == (mask, None)
        assert without_offset(mask, 4, 4, causal=True)[1] is None or mask.isinf().any()
    hidden = torch.zeros(1, 1, 4, 4).index_fill(2, torch.tensor([2]), -torch.inf)
    assert without_offset(hidden, 4, 4)[1] is None


def test_a_mask_that_all_rows_share_is_shared_still():
    near, offset = without_offset(torch.full((1, 1, 1, 4), -1e9), 300, 4)
    assert (near.shape, offset.shape) == ((1, 1, 1, 4), (1, 1, 1))
    assert not near.any()


def test_a_mask_is_not_copied_a_second_time():
    with FakeTensorMode():  # nobody can look at its numbers, as nobody does on a GPU
        near, offset = without_offset(torch.full((1, 1, 3, 5), -1e9), 3, 5)
        again, nothing = without_offset(near, 3, 5)
    assert offset is not None
    assert again is near
    assert nothing is None


@pytest.mark.skipif(torch.__version__ < (2, 9), reason="flex needs torch 2.9 on a CPU")
def test_flex_has_the_scores_of_a_row_that_a_large_number_has_throughout():
    query, key, value = (tensor.detach() for tensor in inputs(16, 20, torch.float32, amplitude=1.0))
    mask = mask_of("whole", 16, 20, -1e9)
    expected, _ = reference(query, key, value, attn_mask=mask)
    bound = bounds(query, key, value, dtype=torch.float32, attn_mask=mask).out
    run = partial(attention, attn_mask=mask, backend="flex")
    for found in (run(query, key, value), torch.compile(run, fullgraph=True)(query, key, value)):
        assert_close(found, expected, torch.float32, "out", bound=bound)
