"""Context parallel in code under torch.compile, on the ranks of a pool of processes, against the reference on one."""

from __future__ import annotations

import re

import pytest
import torch
from old_torch import follows_scopes, told
from parallel_work import Case

from attn_core import KeyPadding, Packed

EXACT = 1e-10
CAUSAL = (("causal", True),)


def agrees(ranks, cases, backend="aot_eager", dynamic=False, graphs=1, tolerance=EXACT):
    shape = cases[0].shape
    found = ranks.run("parallel_compiled.compiled", cases, backend, dynamic, graphs, on=shape[0] * shape[1])
    for case, differences in zip(cases, found[0], strict=True):
        assert max(differences.values()) <= tolerance, f"{case}: {differences}"


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("mask", ["none", "key_padding", "packed", "bool"])
def test_is_what_one_device_computes(ranks, shape, mask):
    agrees(ranks, [Case(shape=shape, queries=17, mask=mask, options=CAUSAL)])


@pytest.mark.parametrize(
    "case",
    [
        Case(shape=(3, 1), queries=19, keys=23, mask="float", options=(("softcap", 1.5), ("window_size", (3, 2)))),
        Case(shape=(1, 3), queries=19, keys=7, heads=(6, 1), mask="bool", options=(("scale", -0.7),)),
        Case(shape=(1, 4), queries=17, heads=(3, 3), options=CAUSAL),
        Case(shape=(2, 1), queries=17, whole="query", mask="bool", options=CAUSAL),
        Case(shape=(2, 1), queries=9, keys=17, whole="key", mask="key_padding", options=CAUSAL),
        Case(shape=(2, 2), queries=17, whole="key", options=CAUSAL),
        Case(shape=(2, 2), queries=17, whole="query", options=CAUSAL),
        Case(shape=(3, 1), queries=14, lengths=(1, 9, 4), mask="bool_rows", options=CAUSAL),
        Case(shape=(1, 3), queries=9, lengths=(6, 0, 3), options=CAUSAL),
    ],
    ids=str,
)
def test_is_what_one_device_computes_in_rarer_cases(ranks, case):
    agrees(ranks, [case])


def test_a_ring_is_compiled_once_for_all_lengths(ranks):
    cases = [Case(shape=(2, 1), queries=n, options=CAUSAL) for n in (18, 26, 33, 51, 18)]
    agrees(ranks, cases, dynamic=True)
    cases = [
        Case(shape=(2, 1), queries=n, keys=n + 7, mask="key_padding", batch=b) for n, b in ((18, 3), (26, 5), (33, 6))
    ]
    agrees(ranks, cases, dynamic=True)


@pytest.mark.parametrize("shape", [(1, 2), (2, 2)])
def test_an_exchange_of_heads_is_compiled_for_each_length(ranks, shape):
    agrees(ranks, [Case(shape=shape, queries=n, options=CAUSAL) for n in (52, 60)], dynamic=True, graphs=2)


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
def test_options_that_vary_are_never_those_of_another_call(ranks, shape):
    options = [{"scale": 0.5}, {"scale": -0.7}, {"scale": 0.25, "softcap": 1.5}, {"scale": 0.5}, {"scale": -0.7}]
    agrees(ranks, [Case(shape=shape, options=tuple(pairs.items())) for pairs in options], dynamic=True, graphs=3)


@pytest.mark.parametrize(("shape", "heads"), [((2, 1), (4, 2)), ((2, 2), (4, 2)), ((1, 2), (1, 1))])
def test_inductor_compiles_it_too(ranks, shape, heads):
    case = Case(shape=shape, queries=17, heads=heads, dtype="float32", backend="native_flash", options=CAUSAL)
    agrees(ranks, [case], backend="inductor", tolerance=2e-5)


@pytest.mark.parametrize(
    "case",
    [
        Case(shape=(1, 2), queries=5),
        Case(shape=(1, 3), queries=8, heads=(2, 2), dtype="float32", mask="bool_rows"),
        Case(shape=(1, 2), queries=9, whole="query", mask="float"),
        Case(shape=(2, 2), queries=9, whole="query"),
        Case(shape=(2, 1), queries=9, whole="query"),
    ],
    ids=str,
)
def test_exchanges_come_in_one_order_whatever_order_a_graph_is_put_in(ranks, case):
    agrees(ranks, [case], backend="reordering", tolerance=EXACT if case.dtype == "float64" else 2e-5)


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("whole", [None, "query"])
def test_a_batch_of_none_is_computed_where_it_is_so_on_every_rank(ranks, shape, whole):
    agrees(ranks, [Case(shape=shape, batch=0, whole=whole)])


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (2, 2)])
def test_a_batch_of_none_on_one_rank_is_refused_on_all(ranks, shape):
    for kind, message in ranks.run("parallel_compiled.none_on_one_rank", shape, on=shape[0] * shape[1]):
        assert kind == "RanksDisagree"
        assert "batch: 2 on rank 0, 0 on rank 1" in message


@pytest.mark.skipif(torch.__version__ < (2, 7), reason="Dynamo of torch 2.6 can't trace cp.unshard")
@pytest.mark.parametrize(("shape", "heads"), [((2, 1), (2, 2)), ((1, 2), (3, 3))])
def test_a_later_launch_takes_what_this_rank_compiled(ranks, tmp_path, shape, heads):
    """torch keeps graphs on disk by their text: that of another rank cuts, and spreads heads, as that rank does."""
    case = Case(shape=shape, queries=16, heads=heads, dtype="float32", backend="native_flash")
    for differences, hits in ranks.run("parallel_compiled.launched", case, str(tmp_path), on=2):
        assert max(differences) <= 2e-5
        assert hits


@follows_scopes
@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (2, 2)])
def test_compiled_code_follows_the_scope_around_it(ranks, shape):
    for calls in ranks.run("parallel_compiled.followed", shape, on=shape[0] * shape[1]):
        assert max(calls) <= EXACT, calls


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
def test_a_scope_that_can_not_be_followed_is_refused(ranks, shape):
    """What torch before 2.11 gets: never a part of the sequence taken for the whole."""
    for before, message, after in ranks.run("parallel_compiled.not_followed", shape, on=2):
        assert max(before, after) <= EXACT
        assert re.search(told("before torch 2.11 it can't follow one that is open around it"), message), message


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((("dropout_p", 0.5),), "dropout_p: not supported in context parallel"),
        ((("backend", "native_flash"), ("softcap", 2.0)), "softcap: not supported"),
        ((("backend", "nobody"),), "nobody"),
    ],
)
def test_refuses_on_every_rank_before_anything_is_sent(ranks, shape, options, said):
    for answers in ranks.run("parallel_compiled.refused", Case(shape=shape, options=options), on=shape[0] * shape[1]):
        for kind, message, sent in answers:
            assert kind is not None
            assert re.search(told(said), message), message
            assert sent == 0
    agrees(ranks, [Case(shape=shape, queries=17)])


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
def test_compiled_ranks_and_others_make_one_call(ranks, shape):
    for found in ranks.run("parallel_compiled.mixed", Case(shape=shape, queries=81, options=CAUSAL), on=2)[0]:
        assert max(found.values()) <= EXACT


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ((2, 1), ["attn_core::ring", "attn_core::ring_backward"]),
        ((2, 2), ["attn_core::ring", "attn_core::ring_backward", "attn_core::to_heads", "attn_core::to_positions"]),
    ],
)
def test_operators_are_as_torch_wants_them(ranks, shape, names):
    for found in ranks.run("parallel_compiled.checked", Case(shape=shape, queries=17), on=shape[0] * shape[1]):
        assert found == names


@pytest.mark.parametrize("shape", [(1, 2), (2, 2)])
def test_parts_of_one_length_of_two_sequences_are_told_apart(ranks, shape):
    """On some rank: the guards on what was sharded last are what tells."""
    agrees(ranks, [Case(shape=shape, queries=n, options=CAUSAL) for n in (65, 66, 65, 66, 65)], graphs=3)


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (KeyPadding(torch.ones(2, 8, dtype=torch.bool)), r"accepted: \(2, 16\)"),
        (Packed(torch.tensor([0, 3, 8], dtype=torch.int32)), "Packed with a batch of 2|accepted: "),
        (torch.ones(1, 1, 8, 8, dtype=torch.bool), "the columns of all keys"),
    ],
)
def test_a_mask_of_a_part_is_refused_on_every_rank(ranks, shape, mask, said):
    for answers in ranks.run("parallel_compiled.refused", Case(shape=shape), mask, on=shape[0] * shape[1]):
        for kind, message, sent in answers:
            assert kind is not None
            assert re.search(told(said), message), message
            assert sent == 0


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (2, 2)])
def test_compiled_code_follows_the_ranks_that_it_is_given(ranks, shape):
    for calls in ranks.run("parallel_compiled.given", shape, on=shape[0] * shape[1]):
        assert max(calls) <= EXACT, calls
