"""What ranks are told where something goes wrong between them, on a pool of processes whose groups wait for a few seconds."""

from __future__ import annotations

import itertools

import pytest
from ranks import Ranks


@pytest.fixture(scope="module")
def three():
    pool = Ranks(3, timeout=4)
    yield pool
    pool.close()


labels = itertools.count()


def run(pool, job, shape, *arguments, on=3):
    return pool.run(f"parallel_faults.{job}", next(labels), shape, *arguments, on=on)


@pytest.mark.parametrize("shape", [(3, 1), (1, 3)])
def test_a_call_while_another_thread_is_in_one_is_refused(three, shape):
    for forward, backward, after in run(three, "two_threads", shape):
        for kind, said in (forward, backward):
            assert kind == "CallRefused"
            assert "another thread of rank" in said
        assert after == (None, "")
