"""Attention spread over the ranks of a pool of processes, against the reference on one."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from parallel_work import Case
from ranks import SHAPES, Ranks

from attn_core import list_backends
from attn_core.record import AVAILABLE

EXACT = 1e-10


def world(case):
    return case.shape[0] * case.shape[1]


def largest(ranks, case, job="errors", *first):
    return ranks.run(job, *first, case, on=world(case))[0]


def agrees(ranks, case, tolerance=EXACT):
    found = largest(ranks, case)
    assert max(found.values()) <= tolerance, f"{case}: {found}"


# --- the covering set -----------------------------------------------------------------------------------------------------

SIGHTS = [
    {}, {"causal": True}, {"causal": True, "window_size": (3, 0)}, {"window_size": (2, 4)}, {"window_size": (-1, 2)},
    {"window_size": (3, -1)}, {"causal": True, "softcap": 1.5}, {"scale": -0.7}, {"causal": True, "scale": 0.0},
    {"window_size": (0, 0)}, {"causal": True, "window_size": (60, 1)}, {"window_size": (0, 7), "softcap": 0.5},
]  # fmt: skip
MASKS = ["none", "key_padding", "packed", "bool", "float", "bool_rows", "bool_keys"]
LENGTHS = [(16, None), (17, None), (19, 23), (23, 17), (5, 3), (2, 9), (40, 1)]
HEADS = [(4, 2), (4, 4), (6, 1), (6, 3), (3, 3), (2, 2), (10, 5)]
BACKENDS = ["native_math", "chunked", "native_flash", "native"]


def refusable(case):
    options = dict(case.options)
    if case.backend == "native":
        return "softcap" in options
    return case.backend == "native_flash" and (
        "window_size" in options or "softcap" in options or case.mask == "packed"
    )


def uneven(chance, pick):
    """Lengths on each rank, of queries and of keys, of which some may be none."""
    (queries, keys), size = pick["lengths"], pick["shape"][0] * pick["shape"][1]

    def shares(total):
        ends = sorted(chance.randint(0, total) for _ in range(size - 1))
        return tuple(stop - start for start, stop in itertools.pairwise((0, *ends, total)))

    found = {"lengths": shares(queries)}
    return found if keys is None else {**found, "key_lengths": shares(keys)}


def drawn(count, seed):
    """Cases in which every pair of values of two dimensions is likely, each value sure."""
    chance = random.Random(seed)
    pools = {
        "shape": SHAPES, "order": ["zigzag", "contiguous"], "sight": SIGHTS, "mask": MASKS, "lengths": LENGTHS,
        "heads": HEADS, "backend": BACKENDS, "dims": [(8, 8), (8, 4), (4, 8)], "uneven": [False, False, True],
    }  # fmt: skip
    turns = {name: itertools.cycle(chance.sample(values, len(values))) for name, values in pools.items()}
    found = []
    for number in range(count):
        pick = {
            name: next(turn) if chance.random() < 0.7 else chance.choice(pools[name]) for name, turn in turns.items()
        }
        case = Case(
            shape=pick["shape"], order=pick["order"], queries=pick["lengths"][0], keys=pick["lengths"][1],
            heads=pick["heads"], dims=pick["dims"], mask=pick["mask"], options=tuple(sorted(pick["sight"].items())),
            backend=pick["backend"], seed=number, strided=number % 3 == 0,
            **(uneven(chance, pick) if pick["uneven"] else {}),
        )  # fmt: skip
        found.append(Case(**{**case.__dict__, "backend": "native_math"}) if refusable(case) else case)
    return found


@pytest.mark.parametrize("case", drawn(70, seed=1), ids=str)
def test_is_what_one_device_computes(ranks, case):
    agrees(ranks, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", drawn(600, seed=2), ids=str)
def test_is_what_one_device_computes_exhaustively(ranks, case):
    agrees(ranks, case)


@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
@pytest.mark.parametrize(
    ("shape", "lengths"),
    [((3, 1), (1, 9, 4)), ((3, 1), (0, 5, 8)), ((1, 3), (6, 0, 3)), ((2, 2), (1, 4, 0, 7)), ((2, 1), (8, 0))],
)
def test_takes_different_lengths_on_each_rank(ranks, shape, lengths, order):
    total = sum(lengths)
    for options in ((), (("causal", True),), (("causal", True), ("window_size", (3, 0)))):
        agrees(ranks, Case(shape=shape, order=order, queries=total, lengths=lengths, options=options))
    keys = tuple(reversed(lengths))
    agrees(
        ranks,
        Case(
            shape=shape,
            order=order,
            queries=total,
            keys=total,
            lengths=lengths,
            key_lengths=keys,
            options=(("causal", True),),
        ),
    )


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window_size": (3, 0)}])
@pytest.mark.parametrize("mask", ["far", "far_keys"])
@pytest.mark.parametrize("backend", ["native_math", "chunked", "native_flash"])
def test_rows_of_large_negative_numbers_are_put_together_by_how_many_keys_there_are(ranks, backend, mask, options):
    case = Case(shape=(3, 1), mask=mask, options=tuple(options.items()), backend=backend)
    if not refusable(case):
        agrees(ranks, case)


@pytest.mark.parametrize("whole", ["query", "key"])
@pytest.mark.parametrize("shape", [(3, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("mask", ["none", "key_padding", "bool", "packed"])
def test_takes_one_side_whole(ranks, shape, whole, mask):
    for causal in (False, True):
        agrees(ranks, Case(shape=shape, queries=13, keys=9, whole=whole, mask=mask, options=(("causal", causal),)))


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (2, 2)])
def test_is_a_scope_too(ranks, shape):
    agrees(ranks, Case(shape=shape, queries=17, options=(("causal", True),), scope=True))
    agrees(ranks, Case(shape=shape, queries=17, mask="packed", scope=True))


@pytest.mark.parametrize("shape", [(8, 1), (1, 8), (4, 2)])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 0.06)])
def test_adds_up_in_float32(ranks, shape, dtype, tolerance):
    agrees(ranks, Case(shape=shape, queries=64, heads=(8, 8), dtype=dtype, options=(("causal", True),)), tolerance)


@pytest.mark.parametrize("shape", [(8, 1), (1, 8), (4, 2)])
@pytest.mark.parametrize("causal", [False, True])
def test_rounds_no_more_than_the_kernel_alone(ranks, shape, causal):
    """The root mean square over a quarter of a million numbers: it differs by a hundredth from one draw to the next."""
    for seed in range(2):
        case = Case(
            shape=shape, queries=512, heads=(8, 8), dims=(32, 32), dtype="bfloat16", backend="native_flash",
            options=(("causal", causal),), seed=seed,
        )  # fmt: skip
        for name, (together, alone) in largest(ranks, case, "rounding").items():
            assert together[0] <= 1.5 * alone[0], (name, together, alone)
            assert alone[0] > 0


@pytest.mark.parametrize("shape", [(3, 1), (8, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("options", [(), (("causal", True),), (("window_size", (4, 0)),)])
def test_infinity_and_nan_reach_those_who_see_them(ranks, shape, options):
    case = Case(shape=shape, queries=33, options=options)
    assert all(ranks.run("not_finite", case, on=world(case)))


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (2, 2)])
def test_takes_a_batch_of_none(ranks, shape):
    agrees(ranks, Case(shape=shape, batch=0))


# --- defects that have to be seen ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("defect", "case"),
    [
        ("merge", Case(shape=(3, 1), queries=17)),
        ("zigzag", Case(shape=(3, 1), queries=17, options=(("causal", True),))),
        ("diagonal", Case(shape=(3, 1), queries=17, options=(("causal", True),))),
        ("hop", Case(shape=(3, 1), queries=17, options=(("causal", True),))),
        ("heads", Case(shape=(1, 3), heads=(6, 3), queries=17)),
        ("mask", Case(shape=(3, 1), queries=17, mask="bool")),
    ],
)
def test_a_defect_is_seen(ranks, defect, case):
    assert max(largest(ranks, case, "errors_with", defect).values()) > 1e-3
    agrees(ranks, case)


# --- layout ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 1), (3, 1), (1, 3), (2, 2), (4, 2)])
@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
@pytest.mark.parametrize("total", [0, 1, 7, 24])
def test_shards_and_puts_together(ranks, shape, order, total):
    size = shape[0] * shape[1]
    parts = ranks.run("sharding", shape, order, total, on=size)
    assert sorted(itertools.chain(*parts)) == list(range(total))


@pytest.mark.parametrize("shape", [(3, 1), (1, 3), (2, 2)])
def test_takes_tensors_of_any_dtype_apart_and_together(ranks, shape):
    dtypes = ["bool", "int8", "uint8", "int16", "uint16", "int32", "int64", "float16", "bfloat16", "complex64"]
    for found in ranks.run("unsharded", shape, dtypes, on=world(Case(shape=shape))):
        assert found == dtypes


def test_zigzag_gives_each_place_both_ends(ranks):
    assert ranks.run("sharding", (2, 1), "zigzag", 8, on=2) == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert ranks.run("sharding", (2, 1), "contiguous", 8, on=2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert ranks.run("sharding", (3, 1), "zigzag", 9, [1, 6, 2], on=3) == [[0], [1, 2, 3, 6, 7, 8], [4, 5]]


# --- agreement and refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 1), (1, 3)])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"causal": True}, "causal: False on rank 0, True on rank 1"),
        ({"backend": "chunked"}, "backend"),
        ({"scale": 2.0}, "scale"),
        ({"softcap": 2.0}, "softcap"),
        ({"float32": True}, "dtype: 'float64' on rank 0, 'float32' on rank 1"),
        ({"no_gradient": True}, "gradient"),
        ({"no_batch": True}, "batch: 2 on rank 0, 0 on rank 1"),
        ({"return_lse": True}, "return_lse"),
    ],
)
def test_ranks_that_disagree_are_told_so_on_each(ranks, shape, change, said):
    for kind, message, sent in ranks.run("refused", Case(shape=shape, queries=15), {1: change}, on=3):
        assert kind == "RanksDisagree"
        assert said in message
        assert sent == 0
    agrees(ranks, Case(shape=shape, queries=15))


@pytest.mark.parametrize("shape", [(1, 3), (2, 2)])
def test_ranks_that_would_not_all_exchange_a_gradient_of_queries_are_told_so(ranks, shape):
    case = Case(shape=shape, queries=15, whole="key")
    for kind, message, _ in ranks.run("refused", case, {1: {"no_query_gradient": True}}, on=world(case)):
        assert kind == "RanksDisagree"
        assert "query_gradient: True on rank 0, False on rank 1" in message
    agrees(ranks, case)


@pytest.mark.parametrize("shape", [(3, 1), (2, 2)])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((("dropout_p", 0.5),), "dropout_p: not supported in context parallel"),
        ((("backend", "native_flash"), ("softcap", 2.0)), "softcap: not supported"),
        ((("backend", "nobody"),), "nobody"),
    ],
)
def test_refuses_on_every_rank_before_anything_is_sent(ranks, shape, options, said):
    case = Case(shape=shape, options=options)
    for kind, message, sent in ranks.run("refused", case, on=world(case)):
        assert kind in ("CallRefused", "BackendNotUsable")
        assert said in message
        assert sent == 0


def test_a_refusal_on_one_rank_is_known_on_all(ranks):
    answers = ranks.run("refused", Case(shape=(3, 1), queries=15), {1: {"dropout_p": 0.5}}, on=3)
    assert answers[1][0] == "CallRefused"
    for kind, message, sent in (answers[0], answers[2]):
        assert kind == "RankFailed"
        assert "rank 1 failed: CallRefused: dropout_p" in message
        assert sent == 0
    agrees(ranks, Case(shape=(3, 1), queries=15))


def test_a_whole_sequence_is_taken_for_no_part(ranks):
    for kind, message, _ in ranks.run("refused", Case(shape=(3, 1), queries=31), {}, on=3):
        assert kind is None, message
    changes = {rank: {"unsharded": True} for rank in range(3)}
    for kind, message, sent in ranks.run("refused", Case(shape=(3, 1), queries=31), changes, on=3):
        assert kind == "CallRefused"
        assert "found 31 positions" in message
        assert sent == 0


def test_ranks_speak_once_for_each_kind_of_call(ranks):
    case = Case(shape=(4, 1), queries=401, heads=(2, 1))  # no part is as long as one of another test
    assert ranks.run("steady", case, on=4) == [1] * 4
    assert ranks.run("steady", case, on=4) == [0] * 4


@pytest.mark.parametrize("shape", [(3, 1), (1, 3)])
def test_calls_that_all_have_agreed_on_are_not_mixed_up(shape):
    pool = Ranks(3, timeout=4)
    try:
        pool.run("make_meshes", [shape])
        for kind, message in pool.run("mixed_up", Case(shape=shape, queries=30)):
            assert kind == "RankFailed", message
            assert "causal: False on rank 0, True on rank 1, False on rank 2" in message
    finally:
        pool.close()


def test_parts_nobody_was_told_of_are_computed_right(ranks):
    assert max(ranks.run("unannounced", (3, 1), (50, 61, 72), on=3)) <= EXACT
    assert max(ranks.run("unannounced", (3, 1), (50, 63, 72), on=3)) <= EXACT


# --- what is sent ---------------------------------------------------------------------------------------------------------


def test_a_ring_sends_key_heads_alone_and_gradients_in_float32(ranks):
    case = Case(shape=(4, 1), queries=32, heads=(8, 2), dims=(8, 4), dtype="float32", batch=1)
    chunk = 8 * 2 * (8 + 4) * 4
    for forward, both in ranks.run("traffic", case, on=4):
        assert forward == {"keys": 3 * chunk}
        assert both == {"keys": 6 * chunk, "gradients": 4 * chunk}


def test_ulysses_sends_each_head_once(ranks):
    case = Case(shape=(1, 4), queries=32, heads=(8, 4), dims=(8, 4), dtype="float32", batch=1)
    rows = 8 * 3 * 4  # positions of this rank, to three others, in bytes
    to_heads, back = rows * (2 * 8 + 1 * 8 + 1 * 4), rows * 2 * 4
    for forward, both in ranks.run("traffic", case, on=4):
        assert forward == {"heads": to_heads + back}
        assert both == {"heads": 2 * (to_heads + back)}


@pytest.mark.parametrize(
    "case", [case for case in drawn(160, seed=3) if case.mask != "none" or case.options][::4], ids=str
)
def test_sends_as_many_bytes_as_the_formula_says(ranks, case):
    for (forward, both), (said_forward, said_both) in ranks.run("traffic_and_formula", case, on=world(case)):
        assert forward == said_forward
        assert both == said_both


def test_a_window_ends_the_course_of_chunks_early(ranks):
    case = Case(
        shape=(4, 1), order="contiguous", queries=32, heads=(2, 2), dtype="float32", batch=1,
        options=(("causal", True), ("window_size", (8, 0))),
    )  # fmt: skip
    chunk = 8 * 2 * 16 * 4
    sent = [forward.get("keys", 0) for forward, _ in ranks.run("traffic", case, on=4)]
    assert sent == [chunk, chunk, chunk, 0]


# --- the rest of torch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("reentrant", [False, True])
def test_is_recomputed_in_a_checkpoint(ranks, shape, reentrant):
    case = Case(shape=shape, queries=18, options=(("causal", True),))
    assert max(ranks.run("checkpointed", case, reentrant, on=world(case))) <= EXACT


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_what_a_checkpoint_recomputes_is_spread_as_its_forward_was(ranks, shape, forward, backward):
    case = Case(shape=shape, queries=18, options=(("causal", True),))
    for found in ranks.run("checkpointed_in_a_scope", case, False, forward, backward, on=2):
        assert found <= EXACT, found
    for found in ranks.run("checkpointed_in_a_scope", case, True, forward, backward, on=2):
        assert "this process has made calls of both sorts" in found


def test_autocast_casts_before_sending(ranks):
    for dtype, sent, allowed in ranks.run("autocast", Case(shape=(2, 1), dtype="float32"), on=2):
        assert dtype == "torch.bfloat16"
        assert sent == allowed


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
@pytest.mark.parametrize(("shape", "backend"), [((2, 1), "native_math"), ((2, 2), "native_math"), ((1, 2), "chunked")])
def test_autocast_changes_nothing_after_the_cast(ranks, shape, backend, compiler):
    case = Case(shape=shape, queries=18, dtype="float32", options=(("causal", True),), backend=backend)
    for found in ranks.run("backward_in_autocast", case, compiler, on=world(case)):
        assert max(found) <= 1e-5, found


@pytest.mark.parametrize("shape", [(3, 1), (1, 3), (2, 2)])
def test_repeats_its_bits_and_gives_memory_of_its_own(ranks, shape):
    case = Case(shape=shape, queries=17, dtype="float32", options=(("causal", True), ("deterministic", True)))
    assert all(ranks.run("repeated", case, on=world(case)))


@pytest.mark.parametrize(
    ("how", "said"),
    [("raises", "rank 1 failed: ValueError: the kernel of this rank broke"), ("dies", "rank 1 does not answer")],
)
@pytest.mark.parametrize("shape", [(3, 1), pytest.param((1, 3), marks=pytest.mark.slow)])
def test_a_rank_that_fails_ends_the_others(shape, how, said):
    pool = Ranks(3, timeout=5)
    try:
        pool.run("make_meshes", [shape])
        answers = pool.answers("failing", Case(shape=shape, queries=30), 1, how)
        for fine, text in (answers[0], answers[2]):
            assert not fine
            assert "RankFailed" in text
            assert said in text
        assert answers[1][1] == "died" if how == "dies" else "ValueError" in answers[1][1]
    finally:
        pool.close()
    assert not any(process.is_alive() for process in pool.processes)


# --- on one GPU, shared by several processes ----------------------------------------------------------------------------

GPU_SHAPES = [(2, 1), (1, 2), (4, 1), (1, 4), (2, 2)]
INSTALLED = {row.name for row in list_backends() if row.status == AVAILABLE}
KERNELS = [
    *("native_flash", "native_cudnn", "native_efficient", "native_math"),
    *(
        pytest.param(name, marks=pytest.mark.skipif(name not in INSTALLED, reason=f"{name} is not available here"))
        for name in ("flash", "flash_4", "xformers", "xformers_flash", "xformers_cutlass")
    ),
]
HIDING = [
    ("native_flash", {"options": (("causal", True), ("window_size", (70, 0))), "order": "contiguous"}),
    ("native_flash", {"options": (("causal", True),), "mask": "packed"}),
    ("native_efficient", {"options": (("causal", True),), "mask": "key_padding"}),
    ("native_efficient", {"mask": "bool"}),
    ("native_math", {"options": (("causal", True), ("window_size", (70, 0)), ("softcap", 20.0))}),
    ("native_math", {"options": (("causal", True),), "mask": "packed"}),
]


@pytest.fixture(scope="module")
def gpu_ranks():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    pool = Ranks(4, timeout=60)
    pool.run("make_meshes", GPU_SHAPES)
    yield pool
    pool.close()


def on_gpu(shape, backend, **fields):
    return Case(shape=shape, backend=backend, device="cuda", dtype="bfloat16", dims=(64, 64), heads=(8, 2), **fields)


@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_cuda_kernels_are_right_among_ranks(gpu_ranks, shape, backend):
    for order, causal, queries in itertools.product(("zigzag", "contiguous"), (False, True), (256, 301)):
        case = on_gpu(shape, backend, order=order, queries=queries, options=(("causal", causal),))
        assert all(gpu_ranks.run("agrees", case, on=world(case)))


@pytest.mark.parametrize("shape", [(4, 1), (1, 4), (2, 2)], ids=str)
@pytest.mark.parametrize(("backend", "fields"), HIDING, ids=str)
def test_cuda_kernels_have_their_part_of_what_hides_keys(gpu_ranks, shape, backend, fields):
    case = on_gpu(shape, backend, queries=301, **fields)
    assert all(gpu_ranks.run("agrees", case, on=world(case)))


@pytest.mark.parametrize("shape", [(2, 1), (4, 1), (1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_ranks_wait_for_the_current_stream(gpu_ranks, shape, backend):
    case = on_gpu(shape, backend, queries=320, options=(("causal", True),))
    for _ in range(3):
        assert all(gpu_ranks.run("streams", case, on=world(case)))
