"""What the ranks of the pool do where something goes wrong between them."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time

import torch
import torch.distributed as dist
from parallel_work import Case, context, inputs
from torch.distributed import distributed_c10d
from torch.utils.checkpoint import checkpoint

from attn_core import attention
from attn_core.parallel.context import contexts


def fresh(label, shape, order="zigzag"):
    """A ``ContextParallel`` that remembers nothing."""
    cp = context(shape, order)
    cp.name += f":{label}"
    cp.shared = type(cp.shared)()
    cp.handle += f":{label}"
    contexts[cp.handle] = cp
    return cp


def store():
    return distributed_c10d._get_default_store()


def met(label, world):
    """Wait for the others at the end of a job that broke messages, or a group would be gone while some still wait."""
    store().add(label, 1)
    end = time.monotonic() + 30
    while store().add(label, 0) < world and time.monotonic() < end:
        time.sleep(0.01)


def raised(call):
    """The name and the text of what is raised, and how long it took."""
    begun = time.monotonic()
    try:
        call()
    except Exception as error:  # noqa: BLE001 - it is what the test asks for
        return type(error).__name__, str(error), time.monotonic() - begun
    return None, "", time.monotonic() - begun


def two_threads(label, shape):
    """What a call raises that begins while another thread is in one, forward and backward; and one after it."""
    cp = fresh(label, shape)
    q, k, v, g, _ = (cp.shard(x) if isinstance(x, torch.Tensor) else x for x in inputs(Case(queries=18)))
    q.requires_grad_()

    def call():
        return attention(q, k, v, backend="native_math", parallel=cp)

    out, found = call(), []
    with_turn, may_end = threading.Event(), threading.Event()

    def other():
        with cp.turn:  # as a call of its own holds it
            with_turn.set()
            may_end.wait()

    thread = threading.Thread(target=other)
    thread.start()
    with_turn.wait()
    found.append(raised(call)[:2])
    found.append(raised(lambda: out.backward(g, retain_graph=True))[:2])
    may_end.set()
    thread.join()
    found.append(raised(lambda: call().backward(g))[:2])
    return found


def _parts(cp, case):
    parts = [cp.shard(x) for x in inputs(case)[:3]]
    return [part.requires_grad_() for part in parts]


def late(label, shape, change):
    """What is raised where rank 1 makes a call of a new kind, the others one on which all have agreed."""
    cp = fresh(label, shape)
    parts = _parts(cp, Case(queries=18))
    options = {"backend": "native_math", "parallel": cp}
    attention(*parts, **options)
    if dist.get_rank() == 1:
        if change == "no_gradient":
            parts = [part.detach() for part in parts]
        elif change == "untold":
            parts = [part[:, :5] for part in parts]
        else:
            options |= change
    found = raised(lambda: attention(*parts, **options))
    met(f"late/{label}", 3)
    return found


def absent(label, shape, how):
    """What the others raise where rank 1 does not make a call of a kind on which all have agreed."""
    cp = fresh(label, shape)
    parts = _parts(cp, Case(queries=18))
    attention(*parts, backend="native_math", parallel=cp)
    if dist.get_rank() == 1:
        if how == "dies":
            os._exit(3)
        met(f"absent/{label}", 3)
        return None, "", 0.0
    found = raised(lambda: attention(*parts, backend="native_math", parallel=cp))
    if how != "dies":
        met(f"absent/{label}", 3)
    return found


def after_a_checkpoint(label, shape):
    """What the others raise where rank 1 makes no further call after all have recomputed one."""
    cp = fresh(label, shape)
    parts = _parts(cp, Case(queries=18, heads=(6, 6), dtype="float32"))

    def call(*parts):
        return attention(*parts, backend="native_flash", parallel=cp)

    checkpoint(call, *parts, use_reentrant=False).sum().backward()
    found = (None, "", 0.0) if dist.get_rank() == 1 else raised(lambda: call(*parts))
    met(f"checkpoint/{label}", 3)
    return found


def breaks_in_the_backward(label, shape):
    """What is raised where the kernel of rank 1 raises in the backward."""
    cp = fresh(label, shape)
    parts = _parts(cp, Case(queries=18))
    attention(*parts, backend="chunked", parallel=cp)
    adapter = cp.shared.current.adapter
    right = adapter.backward

    def broken(*_, **__):
        raise ValueError("the kernel of this rank broke")

    if dist.get_rank() == 1:
        object.__setattr__(adapter, "backward", broken)
    out = attention(*parts, backend="chunked", parallel=cp)
    found = raised(lambda: out.sum().backward())
    object.__setattr__(adapter, "backward", right)
    met(f"broken/{label}", 3)
    return found


def ends_with_an_error(label, shape):
    """What the others raise in the backward where rank 1 raises between, and its process ends with it."""
    cp = fresh(label, shape)
    out = attention(*_parts(cp, Case(queries=18)), backend="native_math", parallel=cp)
    met(f"made/{label}", 3)
    if dist.get_rank() == 1:
        sys.last_value = ValueError("the program of this rank broke")  # as Python does before it ends
        atexit._run_exitfuncs()
        os._exit(1)
    return raised(lambda: out.sum().backward())


def skips_a_backward(label, shape):
    """What is raised where rank 1 goes on to the next call while the others are in the backward of the one before."""
    cp = fresh(label, shape)
    parts = _parts(cp, Case(queries=18))
    out = attention(*parts, backend="native_math", parallel=cp)
    if dist.get_rank() == 1:
        found = raised(lambda: attention(*parts, backend="native_math", parallel=cp))
    else:
        found = raised(lambda: out.sum().backward())
    met(f"skips/{label}", 2)
    return found
