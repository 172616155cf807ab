"""What ranks are told where something goes wrong between them, on a pool of processes whose groups wait for a few seconds."""

from __future__ import annotations

import itertools

import pytest
from ranks import Ranks


@pytest.fixture(scope="module")
def pool():
    ranks = Ranks(4, timeout=TIMEOUT)
    yield ranks
    ranks.close()


TIMEOUT = 4
labels = itertools.count()


def run(pool, job, shape, *arguments):
    pool.run(
        "make_meshes", [shape]
    )  # of groups that no test before has broken; one of all ranks would not be made anew
    on = shape[0] * shape[1]
    return pool.run(f"parallel_faults.{job}", next(labels), shape, *arguments, on=on)


@pytest.mark.parametrize("shape", [(3, 1), (1, 3)])
def test_a_call_while_another_thread_is_in_one_is_refused(pool, shape):
    for forward, backward, after in run(pool, "two_threads", shape):
        for kind, said in (forward, backward):
            assert kind == "CallRefused"
            assert "another thread of rank" in said
        assert after == (None, "")


@pytest.mark.parametrize(
    ("shape", "change", "said"),
    [
        ((3, 1), {"causal": True}, "causal: False on rank 0, True on rank 1, False on rank 2"),
        ((1, 3), "no_gradient", "gradient: True on rank 0, False on rank 1, True on rank 2"),
        ((1, 3), "untold", "rank 1 asks the others how long its parts are"),
    ],
)
def test_a_new_kind_on_one_rank_alone_is_named_on_each(pool, shape, change, said):
    for kind, message, seconds in run(pool, "late", shape, change):
        assert kind == "RankFailed"
        assert said in message
        assert seconds < TIMEOUT + 4


@pytest.mark.parametrize("shape", [(3, 1), (1, 3)])
def test_a_rank_that_makes_no_call_is_named(pool, shape):
    for kind, message, seconds in run(pool, "absent", shape, "waits")[::2]:
        assert kind == "RankFailed"
        assert "rank 1 does not answer" in message
        assert seconds < TIMEOUT + 4


def test_a_recomputation_that_ends_early_is_no_failure(pool):
    for kind, message, _ in run(pool, "after_a_checkpoint", (1, 3))[::2]:
        assert kind == "RankFailed"
        assert "rank 1 does not answer" in message


@pytest.mark.parametrize("shape", [(3, 1), (1, 3)])
def test_a_kernel_that_raises_in_the_backward_is_told_of(pool, shape):
    answers = run(pool, "breaks_in_the_backward", shape)
    assert answers[1][0] in {"ValueError", "KernelFailed"}  # which names the backend where the core calls it
    for kind, message, seconds in answers[::2]:
        assert kind == "RankFailed"
        assert "rank 1 failed: ValueError: the kernel of this rank broke" in message
        assert seconds < TIMEOUT + 4


@pytest.mark.parametrize("shape", [(3, 1)])
def test_a_process_that_ends_with_an_error_is_told_of(shape):
    ranks = Ranks(3, timeout=TIMEOUT)
    try:
        ranks.run("make_meshes", [shape])
        answers = ranks.answers("parallel_faults.ends_with_an_error", next(labels), shape)
    finally:
        ranks.close()
    for fine, found in answers[::2]:
        assert fine
        assert "rank 1 failed: ValueError: the program of this rank broke" in found[1]


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
def test_a_backward_is_not_taken_for_the_next_call(pool, shape):
    for kind, message, _ in run(pool, "skips_a_backward", shape):
        assert kind == "RankFailed", message
        assert "call: 1 on rank 0, 2 on rank 1" in message
