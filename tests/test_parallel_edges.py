"""Context parallel at the edges of what a call may be, on the ranks of a pool of processes."""

from __future__ import annotations

import pytest
from parallel_work import Case
from test_parallel import EXACT, agrees, world

CAUSAL = (("causal", True),)
MODES = [(3, 1), (1, 3), (2, 2)]


@pytest.mark.parametrize("shape", [*MODES, (1, 8)])
@pytest.mark.parametrize("backend", ["native_math", "native_flash", "chunked"])
@pytest.mark.parametrize("names", [("q",), ("k",), ("v",), ("qv",), ("q", "k"), ("v", "qk", "k")])
def test_gradients_may_be_wanted_of_some(ranks, shape, backend, names):
    case = Case(shape=shape, queries=19, heads=(4, 2), options=CAUSAL, backend=backend)
    assert max(ranks.run("parallel_edges.some_gradients", case, names, on=world(case))) <= EXACT


@pytest.mark.parametrize("shape", MODES)
@pytest.mark.parametrize("backend", ["native_math", "native_flash", "chunked"])
def test_takes_a_gradient_of_any_strides_and_a_graph_twice(ranks, shape, backend):
    case = Case(shape=shape, queries=19, options=CAUSAL, backend=backend)
    assert max(ranks.run("parallel_edges.summed", case, on=world(case))) <= EXACT


@pytest.mark.parametrize("shape", MODES)
@pytest.mark.parametrize("backend", ["native_flash", "chunked"])
def test_refuses_a_gradient_of_a_gradient(ranks, shape, backend):
    case = Case(shape=shape, queries=19, backend=backend)
    for kind, message in ranks.run("parallel_edges.gradient_of_a_gradient", case, on=world(case)):
        if 1 in shape[:1]:
            assert kind in ("RuntimeError", "CallRefused")  # of the kernel's own graph, which torch makes
            assert "backward" in message or "derivative" in message
        else:
            assert kind == "CallRefused"
            assert "gradient of the gradient" in message
    agrees(ranks, case)


@pytest.mark.parametrize("shape", MODES)
@pytest.mark.parametrize("how", ["no_grad", "inference"])
def test_is_computed_without_gradients(ranks, shape, how):
    case = Case(shape=shape, queries=19, options=CAUSAL)
    for found, has_graph in ranks.run("parallel_edges.without_gradients", case, how, on=world(case)):
        assert found <= EXACT
        assert not has_graph


@pytest.mark.parametrize("shape", MODES)
def test_refuses_transforms(ranks, shape):
    for said in ranks.run("parallel_edges.transformed", Case(shape=shape, queries=18), on=world(Case(shape=shape))):
        assert all("transforms of torch.func and forward mode" in text for text in said), said


@pytest.mark.parametrize(
    "shapes",
    [
        [((4, 1), "zigzag")],
        [((1, 4), "zigzag")],
        [((2, 2), "contiguous")],
        [((4, 1), "zigzag"), ((1, 4), "zigzag"), ((2, 2), "zigzag"), ((4, 1), "contiguous")],
    ],
)
def test_a_stack_of_calls_of_several_kinds_on_several_meshes(ranks, shapes):
    assert max(ranks.run("parallel_edges.layers", Case(queries=21, heads=(4, 4)), shapes, on=4)) <= EXACT


@pytest.mark.parametrize("shape", MODES)
def test_scopes_are_of_a_thread_and_leave_nothing(ranks, shape):
    for found in ranks.run("parallel_edges.scopes", shape, on=shape[0] * shape[1]):
        assert len(found) == 3
        assert max(found) <= EXACT


@pytest.mark.parametrize("mask", [False, True])
def test_a_plan_is_refused_where_ranks_are_in_force(ranks, mask):
    for off_by, said in ranks.run("parallel_edges.planned", (2, 1), mask, on=2):
        assert max(off_by) == 0.0
        assert len(off_by) == 4 * len(said)
        assert all("plan: called inside use_parallel" in text for text in said), said


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (4, 2)])
@pytest.mark.parametrize("shape", MODES)
def test_a_call_is_recomputed_alike_on_places_with_few_heads_and_none(ranks, shape, heads):
    case = Case(shape=shape, heads=heads, backend="native_math", dtype="float64", options=CAUSAL)
    assert max(ranks.run("parallel_edges.recomputed", case, on=shape[0] * shape[1])) < 1e-10


@pytest.mark.parametrize("shape", MODES)
def test_explain_refuses_what_attention_refuses(ranks, shape):
    for found in ranks.run("parallel_edges.explained_as_made", shape, on=shape[0] * shape[1]):
        assert [(name, said) for name, _, said in found] == [(name, said) for name, said, _ in found]
        assert sum(said is None for _, said, _ in found) == 5


@pytest.mark.parametrize("shape", MODES)
@pytest.mark.parametrize("options", [(), CAUSAL, (("causal", True), ("window_size", (3, 0)))])
def test_both_sides_may_be_whole(ranks, shape, options):
    for keys in (17, 9):
        case = Case(shape=shape, queries=17, keys=keys, options=options)
        assert max(ranks.run("parallel_edges.both_whole", case, on=world(case))) <= EXACT


def test_meshes_of_the_same_ranks_are_not_taken_for_one_another(ranks):
    answers = ranks.run("parallel_edges.named_alike")
    for found, names in answers:
        assert max(found) <= EXACT
        assert names == 4


@pytest.mark.parametrize("mode", ["ring", "ulysses"])
def test_groups_of_the_same_ranks_are_not_taken_for_one_another(ranks, mode):
    assert ranks.run("parallel_edges.groups_used", mode) == [[0, 1, 0]] * ranks.world


@pytest.mark.parametrize("shape", [*MODES, (2, 4)])
@pytest.mark.parametrize("lengths", [(0, 7), (7, 0), (1, 1), (1, 30), (30, 1)])
@pytest.mark.parametrize("options", [(), CAUSAL, (("window_size", (0, 0)),)])
def test_takes_next_to_nothing(ranks, shape, lengths, options):
    agrees(ranks, Case(shape=shape, queries=lengths[0], keys=lengths[1], options=options))


@pytest.mark.parametrize("shape", MODES)
@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
@pytest.mark.parametrize("window", [(0, 0), (-1, -1), (0, -1), (-1, 0), (60, 60), (2, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_windows_of_all_sizes(ranks, shape, order, window, causal):
    options = (("causal", causal), ("window_size", window))
    for lengths in ((19, 19), (12, 25), (25, 12)):
        agrees(ranks, Case(shape=shape, order=order, queries=lengths[0], keys=lengths[1], options=options))


@pytest.mark.parametrize("shape", MODES)
@pytest.mark.parametrize("mask", ["float", "bool", "key_padding"])
def test_masks_meet_windows_and_documents_of_unequal_parts(ranks, shape, mask):
    size = shape[0] * shape[1]
    lengths = [(1, 9, 4), (2, 1, 0, 14)][size == 4]
    for options in (CAUSAL, (("causal", True), ("window_size", (3, 0))), (("softcap", 1.5), ("window_size", (2, 3)))):
        for order in ("zigzag", "contiguous"):
            case = Case(shape=shape, order=order, queries=sum(lengths), lengths=lengths, mask=mask, options=options)
            agrees(ranks, case)


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (2, 2), (4, 2)])
def test_documents_that_are_empty_or_end_with_a_rank(ranks, shape):
    for seed in range(6):
        for options in ((), CAUSAL, (("causal", True), ("window_size", (2, 0)))):
            agrees(ranks, Case(shape=shape, queries=24, mask="packed", options=options, seed=seed, order="contiguous"))
            agrees(ranks, Case(shape=shape, queries=24, keys=17, mask="packed", options=options, seed=seed))


@pytest.mark.parametrize(
    ("names", "sizes", "mode", "grids"),
    [
        (("data", "ring"), (2, 2), "ring", {((0,), (1,)), ((2,), (3,))}),
        (("ulysses", "data"), (2, 2), "ulysses", {((0, 2),), ((1, 3),)}),
        (("ulysses", "ring"), (2, 2), "hybrid", {((0, 2), (1, 3))}),
    ],
)
def test_takes_its_dimensions_of_a_larger_mesh_in_any_order(ranks, names, sizes, mode, grids):
    answers = ranks.run("parallel_edges.in_a_larger_mesh", names, sizes)[:4]
    assert max(difference for difference, _, _ in answers) <= 1e-9
    assert {found for _, found, _ in answers} == {mode}
    assert {grid for _, _, grid in answers} == grids


@pytest.mark.parametrize("shape", [(3, 1), (2, 2)])
def test_remembers_some_of_many_lengths(ranks, shape):
    for remembered, asked, difference in ranks.run("parallel_edges.forgetful", shape, on=world(Case(shape=shape))):
        assert remembered <= 64
        assert asked >= 1
        assert difference <= EXACT


def test_a_part_as_long_as_a_whole_is_taken_for_one_that_was_told_of(ranks):
    for refused, difference in ranks.run("parallel_edges.as_long_as_a_whole", (2, 1), on=2):
        assert "cp.layout(lengths=[...])" in refused
        assert difference <= EXACT


def test_a_layout_that_one_rank_alone_was_told_of_is_named_as_that(ranks):
    for kind, message in ranks.run("parallel_edges.told_alone", (3, 1), on=3):
        assert kind == "RanksDisagree"
        assert "rank 0 knows how long they all are, rank 1 asks the others how long its parts are" in message
        assert len(message) < 500


def test_refuses_distributed_tensors(ranks):
    for kind, message in ranks.run("parallel_edges.distributed", (2, 1), on=2):
        assert kind == "CallRefused"
        assert "query: found a DTensor; accepted: this rank's part" in message
