"""Packing and hiding: attention on what they make of a padded batch is attention on the batch, at every layout of padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_core import CallRefused, KeyPadding, Packed, masks, packing
from attn_core.testing.reference import reference

KEPT = {
    "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
    "right": [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],
    "holes": [[0, 1, 0, 1, 0], [1, 0, 0, 0, 1], [0, 0, 1, 0, 0]],
    "nothing": [[0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]],
}


def padding_of(name):
    return KeyPadding(torch.tensor(KEPT[name], dtype=torch.bool))


def inputs(queries=4, keys=5, *, batch=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, queries, 4, 8), (batch, keys, 2, 8), (batch, keys, 2, 8))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def expected(query, key, value, **options):
    return reference(query, key, value, **options)


def through_packing(query, key, value, padding, *, gaps=False, **options):
    made = packing.pack(padding, query.shape[1], gaps=gaps)
    mask = Packed(made.cu_seqlens_q, made.cu_seqlens_k)
    packed = [made.queries(query), made.keys(key), made.keys(value)]
    used = int(made.cu_seqlens_k[-1])  # a kernel reads no further than the last sequence
    packed[1:] = [item[:used] for item in packed[1:]]
    out, lse = expected(*(item[None] for item in packed), attn_mask=mask, **options)
    return made.unpack(out[0]), made.unpack_lse(lse[0])


def assert_same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("name", KEPT)
def test_packed_is_padded(name, readable, monkeypatch):
    monkeypatch.setattr(packing, "_readable", lambda _: readable)
    query, key, value = inputs()
    padding = padding_of(name)
    made = packing.pack(padding, 4)
    assert made.exact is readable
    assert made.max_seqlen_k == (int(padding.keep.sum(1).max()) if readable else 5)
    assert made.rows.numel() == (int(padding.keep.sum()) if readable else padding.keep.numel())
    assert_same(through_packing(query, key, value, padding), expected(query, key, value, attn_mask=padding_of(name)))
    grad = torch.full_like(made.keys(key), torch.nan)  # what lies beyond the sequences, no kernel writes
    grad[: int(padding.keep.sum())] = made.keys(key)[: int(padding.keep.sum())]
    back = made.unpack_keys(grad)
    assert torch.equal(back, key * padding.keep[:, :, None, None])
    key.requires_grad_()
    made.keys(key).backward(grad)
    assert torch.equal(key.grad, back)


RUNS = {
    "left": KEPT["left"],
    "right": KEPT["right"],
    "both": [[0, 1, 1, 1, 0], [0, 0, 1, 0, 0], [1, 1, 1, 1, 1]],
    "nothing": KEPT["nothing"],
    "nothing at all": [[0] * 5] * 3,
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_of_keys_stay_in_their_places(name, monkeypatch):
    monkeypatch.setattr(packing, "_LEAST_KEYS", 5)
    query, key, value = (item.requires_grad_() for item in inputs())
    keep = torch.tensor(RUNS[name], dtype=torch.bool)
    key.data[~keep] = torch.nan
    padding = KeyPadding(keep)
    made = packing.pack(padding, 4, gaps=True)
    assert made.keys(key).data_ptr() == key.data_ptr()
    assert made.cu_seqlens_q.shape == made.cu_seqlens_k.shape == (8,)
    assert made.cu_seqlens_k.dtype == made.cu_seqlens_q.dtype == torch.int32
    assert made.cu_seqlens_k[-1] == keep.numel()  # so that a backward writes the gradient of each key
    assert made.max_seqlen_k == int(made.cu_seqlens_k.diff().max())
    assert int(made.cu_seqlens_k.diff()[::2].sum()) == int((~keep).sum())
    assert not made.cu_seqlens_q.diff()[::2].any()
    found = through_packing(query, key.nan_to_num(), value, padding, gaps=True)
    assert_same(found, expected(query, key.nan_to_num(), value, attn_mask=padding))
    grad = torch.randn(15, 2, 8)
    assert made.unpack_keys(grad).data_ptr() == grad.data_ptr()


def test_what_is_no_run_or_too_much_or_short_is_packed(monkeypatch):
    assert packing.pack(padding_of("right"), 4, gaps=True).rows is not None
    monkeypatch.setattr(packing, "_LEAST_KEYS", 5)
    assert packing.pack(padding_of("right"), 4, gaps=True).rows is None
    assert packing.pack(padding_of("holes"), 4, gaps=True).rows is not None
    monkeypatch.setattr(packing, "_MOST_SEQUENCES", 6)
    assert packing.pack(padding_of("left"), 4, gaps=True).rows is not None


@pytest.mark.parametrize("name", RUNS)
def test_in_traced_code_nothing_stays(name):
    made = torch.compile(lambda keep: packing.pack(KeyPadding(keep), 4, gaps=True).keys(key), backend="eager")
    key = inputs()[1]
    assert made(torch.tensor(RUNS[name], dtype=torch.bool)).shape == (15, 2, 8)


def test_lse_goes_there_and_back():
    made = packing.pack(padding_of("holes"), 4)
    lse = torch.randn(3, 2, 4)
    assert torch.equal(made.unpack_lse(made.query_lse(lse)), lse)
    assert made.query_lse(lse)[1, 4].item() == lse[1, 1, 0].item()


@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (1, 0)}, {"window_size": (0, 2)}])
@pytest.mark.parametrize("queries", [2, 5, 7])
def test_left_padding_keeps_diagonals(queries, options):
    query, key, value = inputs(queries)
    padding = padding_of("left")
    assert packing.keeps_diagonals(padding)
    found = through_packing(query, key, value, padding, **options)
    assert_same(found, expected(query, key, value, attn_mask=padding, **options))


def test_other_padding_does_not():
    assert not packing.keeps_diagonals(padding_of("right"))
    assert not packing.keeps_diagonals(padding_of("holes"))
    assert packing.keeps_diagonals(padding_of("nothing"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-6, 0.3, 50.0])
@pytest.mark.parametrize("name", ["right", "holes", "nothing"])
def test_hidden_is_padded(name, dtype, scale):
    query, key, value = inputs(dtype=dtype)
    padding = padding_of(name)
    wide_query, wide_key = packing.hide(query, key, padding, scale)
    assert wide_query.dtype == wide_key.dtype == dtype
    assert wide_query.isfinite().all()
    scores = torch.einsum("bihd,bjhd->bhij", wide_query.double()[:, :, ::2], wide_key.double()) * scale
    hidden = scores.permute(0, 3, 1, 2)[~padding.keep].abs()
    assert hidden.min() > 1e4
    assert hidden.max() < 1.2e7, "float32 would tell scores that low apart by more than exp can bear"
    out, _ = expected(wide_query, wide_key, value, scale=scale, causal=True)
    wanted, lse = expected(query, key, value, scale=scale, causal=True, attn_mask=padding)
    blind = packing.blind_queries(padding, 4, causal=True)
    assert torch.equal(blind, (lse == -torch.inf).all(1))
    assert_same((out.masked_fill(blind[:, :, None, None], 0),), (wanted,))


def test_a_scale_too_small_to_hide_is_refused():
    query, key, _ = inputs(dtype=torch.float16)
    with pytest.raises(CallRefused, match="a scale of 1e-12 with key padding and a diagonal"):
        packing.hide(query, key, padding_of("right"), 1e-12)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_blind_queries_are_those_that_see_nothing(data):
    queries, keys = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    sides = st.one_of(st.just(-1), st.integers(0, 12))
    window = data.draw(st.one_of(st.none(), st.tuples(sides, sides)))
    causal = data.draw(st.booleans())
    keep = torch.tensor(
        data.draw(st.lists(st.lists(st.booleans(), min_size=keys, max_size=keys), min_size=1, max_size=3))
    )
    query, key, value = inputs(queries, keys, batch=len(keep))
    padding = KeyPadding(keep)
    _, lse = expected(query, key, value, attn_mask=padding, causal=causal, window_size=window)
    assert torch.equal(
        packing.blind_queries(padding, queries, causal=causal, window_size=window), (lse == -torch.inf).all(1)
    )


def test_it_is_prepared_once_and_anew_when_the_mask_changes():
    padding = padding_of("left")
    assert packing.pack(padding, 4) is packing.pack(padding, 4)
    assert packing.pack(padding, 4) is not packing.pack(padding, 3)
    padding.keep[0, 0] = True
    assert not packing.keeps_diagonals(padding)
    assert packing.pack(padding, 4).cu_seqlens_k.tolist() == [0, 4, 9, 10]


def test_a_captured_graph_uses_what_is_kept_and_keeps_nothing(monkeypatch):
    now = [False]
    for module in (masks, packing):
        monkeypatch.setattr(module, "capturing", lambda *_: now[0])
    warm, cold = padding_of("left"), padding_of("left")
    made = packing.pack(warm, 4)
    assert packing.keeps_diagonals(warm)
    now[0] = True
    assert packing.pack(warm, 4) is made
    assert packing.keeps_diagonals(warm)
    assert not packing.pack(cold, 4).exact
    assert packing.blind_queries(cold, 4) is not packing.blind_queries(cold, 4)
    assert not packing.keeps_diagonals(cold)
    now[0] = False
    assert packing.pack(cold, 4).exact
    assert packing.keeps_diagonals(cold)


def test_traced_code_reads_no_value():
    def packed(query, key, keep):
        padding = KeyPadding(keep)
        made = packing.pack(padding, query.shape[1])
        blind = packing.blind_queries(padding, query.shape[1], causal=True)
        wide = packing.hide(query, key, padding, 0.5)
        assert not packing.keeps_diagonals(padding)
        return made.keys(key), made.unpack_keys(made.keys(key)), made.cu_seqlens_k, blind, *wide

    query, key, _ = inputs(dtype=torch.bfloat16)
    keep = padding_of("holes").keep
    keys, back, starts, blind, wide_query, wide_key = torch.compile(
        packed, fullgraph=True, backend="eager", dynamic=True
    )(query, key, keep)
    assert torch.equal(keys[:5], key[keep])
    assert not keys[5:].any()
    assert torch.equal(back, key * keep[:, :, None, None])
    assert starts.tolist() == [0, 2, 4, 5]
    assert torch.equal(blind, packing.blind_queries(KeyPadding(keep), 4, causal=True))
    assert torch.equal(wide_key, packing.hide(query, key, KeyPadding(keep), 0.5)[1])
    assert wide_query.shape[3] == 8 + packing.COLUMNS


@pytest.mark.parametrize("room", [0, 1, 9])
@pytest.mark.parametrize("readable", [True, False])
def test_keys_move_to_the_front_of_their_sequence_and_their_gradients_back(readable, room, monkeypatch):
    if not readable:
        monkeypatch.setattr(packing, "_readable", lambda _: False)
    keep = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    moved = packing.front(KeyPadding(keep), room=room)
    tensor = torch.arange(1.0, 16).view(3, 5, 1, 1).masked_fill(~keep[:, :, None, None], torch.nan)
    expected = [[*row, *[0] * (room if readable else room + 2)] for row in ([2, 3, 5], [0, 0, 0], [15, 0, 0])]
    assert moved.keys(tensor).squeeze().tolist() == expected
    assert moved.lengths.tolist() == [3, 0, 1]
    grad = moved.keys(tensor)
    grad[1], grad[2, 1:] = torch.nan, torch.nan  # which kernels leave unwritten
    assert torch.equal(moved.unpack_keys(grad), tensor.nan_to_num(0))
