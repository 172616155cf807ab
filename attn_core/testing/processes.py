"""Checks several backends at once, each in a process of its own, which one that crashes ends alone.

A process is started by a command of its own and not by ``multiprocessing``, which would run the user's script again in each.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import IO, TYPE_CHECKING, Any

from attn_core.errors import AttnError
from attn_core.testing.kit import FAILED, Outcome, check_backend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_START = """
import os, pickle, sys
answers = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)
sys.path[:] = pickle.load(sys.stdin.buffer)
from attn_core.testing.processes import work
work(answers)
"""
"""What a kernel prints goes to stderr; the standard output is for outcomes alone."""

Heard = SimpleQueue[tuple[str, "Outcome | AttnError | None"]]


def check_backends(
    names: Sequence[str], *, processes: int, threads: int, only: Callable[[str], bool] | None = None, **options: Any
) -> Iterator[Outcome]:
    """Hold backends to what they declare; outcomes come as they are had, those of different backends mixed.

    Args:
        names: of the backends.
        processes: how many at once.
        threads: how many torch may use in each.
        only: which identifiers to run; it has to be picklable.
        **options: further ones of ``check_backend``.

    Raises:
        AttnError: what ``check_backend`` raises.
    """
    waiting = list(names)
    running: dict[str, subprocess.Popen[bytes]] = {}
    last: dict[str, str] = {}
    heard: Heard = SimpleQueue()
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                name = waiting.pop(0)
                running[name] = _started(name, threads, {"only": only, **options}, heard)
            name, said = heard.get()
            if isinstance(said, AttnError):
                raise said
            if said is not None:
                last[name] = said.check
                yield said
                continue
            code = running.pop(name).wait()
            if code:
                yield _ended(name, code, last.get(name))
    finally:
        for process in running.values():
            _end(process)


def _started(name: str, threads: int, options: dict[str, Any], heard: Heard) -> subprocess.Popen[bytes]:
    """A process that checks a backend, whose outcomes are put into ``heard``, and None at its end."""
    process = subprocess.Popen(  # noqa: S603 (our own words)
        [sys.executable, "-c", _START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    with suppress(BrokenPipeError):  # it ended at once, which is heard
        given: Any = process.stdin
        given.write(pickle.dumps(sys.path) + pickle.dumps((name, threads, options)))
        given.flush()  # and left open: its end tells the process that this one is gone
    Thread(target=_hear, args=(name, process.stdout, heard), daemon=True).start()
    return process


def _hear(name: str, answers: Any, heard: Heard) -> None:
    while True:
        try:
            heard.put((name, pickle.load(answers)))  # noqa: S301 (of our own process)
        except (EOFError, pickle.UnpicklingError):  # ended, perhaps in the middle of a word
            break
    heard.put((name, None))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it has started."""
    with suppress(OSError):  # it has ended by itself
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)  # it was not waited for, so that the number is its own
    process.kill()
    process.wait()


def work(answers: IO[bytes]) -> None:
    """What a process does."""
    import torch

    name, threads, options = pickle.load(sys.stdin.buffer)  # noqa: S301 (of who started it)
    Thread(target=_end_with_its_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        for outcome in check_backend(name, **options):
            _say(answers, outcome)
    except AttnError as error:
        _say(answers, error)


def _say(answers: IO[bytes], what: Outcome | AttnError) -> None:
    pickle.dump(what, answers)
    answers.flush()


def _end_with_its_parent() -> None:
    """End this process, and what it has started, when the one that started it is gone, however that went."""
    os.read(0, 1)
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _ended(name: str, code: int, last: str | None) -> Outcome:
    how = f"signal {-code}" if code < 0 else f"exit status {code}"
    after = "before its first check was done" if last is None else f"in the check after {last}"
    detail = f"its process ended ({how}) {after}; further checks were not run"
    return Outcome(backend=name.rpartition(":")[2], check="process", status=FAILED, detail=detail)
