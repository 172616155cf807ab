"""Models of transformers spread over the ranks of a pool of processes, against one rank."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="the transformers integration needs transformers")

SHAPES = [(4, 1), (1, 4), (2, 2)]
EXACT = 1e-9


def agrees(ranks, *arguments):
    shape = arguments[1]
    for found in ranks.run("parallel_models.forward", *arguments, on=shape[0] * shape[1]):
        assert found[0] <= EXACT, found
        assert found[1] <= (1e-5 if arguments[0] == "gemma2" else EXACT), found  # its norms are computed in float32


@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_llama_trains_on_ranks_as_on_one(ranks, shape, order):
    for losses, difference in ranks.run("parallel_models.trained", shape, order, 4, on=4):
        for found, wanted in losses:
            assert found == pytest.approx(wanted, rel=1e-5)  # transformers computes losses in float32
        assert difference <= EXACT


@pytest.mark.parametrize("padded", [None, "left", "right", "both", "dense"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen2", "bert"])
def test_a_model_gives_what_it_gives_on_one_rank(ranks, kind, padded):
    for shape, order in (((2, 2), "zigzag"), ((4, 1), "contiguous")):
        agrees(ranks, kind, shape, order, padded, None)


def test_a_layer_is_recomputed_with_the_ranks_of_its_forward(ranks):
    for shape in SHAPES:
        agrees(ranks, "qwen2", shape, "zigzag", "left", None, True)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
def test_a_layer_without_a_mask_of_its_model_is_recomputed_with_these_too_or_refused(ranks, shape, mask):
    for found in ranks.run("parallel_models.recomputed", shape, False, mask, on=2):
        assert found <= EXACT, found
    for found in ranks.run("parallel_models.recomputed", shape, True, mask, on=2):
        assert "Use checkpoint(..., use_reentrant=False)" in str(found)


@pytest.mark.parametrize("starts", [(9, 13), (1, 5, 0, 16), (6, 7, 4, 5)])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_documents_told_by_positions_stay_apart(ranks, kind, starts):
    for shape in ((2, 2), (4, 1)):
        agrees(ranks, kind, shape, "zigzag", None, starts)


@pytest.mark.parametrize("starts", [(9, 13), (6, 6, 5, 5), (11, 11)])
@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
def test_documents_told_by_offsets_stay_apart(ranks, starts, order):
    for shape in SHAPES:
        agrees(ranks, "mistral", shape, order, None, starts, False, True)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("a document each", "as the model counts the tokens"),
        ("no positions", "as the model counts the tokens"),
        ("packed batch", "in a batch of 2"),
        ("packed in a cache", "use_cache=False"),
        ("whole padding", "sharded as input_ids are"),
        ("local mask", "the columns of all keys"),
        ("padding and documents", "padding together with sequences"),
        ("offsets of a part", "those of the whole sequence on every rank"),
        ("offsets and no positions", "start again within a sequence"),
        ("static cache", "past_key_values"),
        ("generate", ""),
        ("different batches", "1 on rank 0, 2 on rank 1"),
    ],
)
@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
def test_refuses_on_every_rank_what_is_no_forward_of_a_whole_sequence(ranks, how, said, order):
    for kind, message in ranks.run("parallel_models.refused", "llama", (2, 1), order, how, on=2):
        assert kind in ("CallRefused", "RanksDisagree"), message
        assert said in message
    agrees(ranks, "llama", (2, 1), order, None, None)


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("shape", [(2, 1), pytest.param((1, 2), marks=pytest.mark.slow)])
def test_a_compiled_model_is_right_or_refused_inside_a_scope(ranks, shape, fullgraph):
    for found in ranks.run("parallel_models.compiled", shape, fullgraph, on=2):
        for one in found:
            right = isinstance(one, float) and one <= EXACT
            # in one environment torch itself refuses to trace the scope
            refused = isinstance(one, str) and (
                "found a scope that is open around a compiled model" in one or "OpaqueObject" in one
            )
            assert right or refused
