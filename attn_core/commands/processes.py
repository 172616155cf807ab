"""Checks several backends at once, each in a process of its own, which one that crashes ends alone.

A process is started by a command of its own and not by ``multiprocessing``, which would run the user's script again in each.
Where a process can be copied before torch has used anything, it imports torch once and is copied for each backend.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import traceback
from contextlib import suppress
from importlib import import_module
from queue import SimpleQueue
from threading import Thread
from typing import IO, TYPE_CHECKING, Any, NoReturn

from attn_core.commands import need_no_numpy
from attn_core.errors import AttnError
from attn_core.outcomes import FAILED, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_START = """
import os, pickle, sys
answers = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)
sys.path[:] = pickle.load(sys.stdin.buffer)
from attn_core.commands.processes import work
work(answers)
"""
"""What a kernel prints goes to stderr; the standard output is for outcomes alone."""

_COPIES = sys.platform == "linux"
"""Whether a process is copied for each backend; elsewhere system libraries don't bear it, or there is no such call."""

_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"

Heard = SimpleQueue[tuple["_Worker", "Outcome | AttnError | int | None"]]


class _Worker:
    """A process that checks one backend after the other.

    What it says is put into ``heard``: outcomes; then the status that a backend's own process ended with; None at its end.
    """

    def __init__(self, heard: Heard) -> None:
        self.process = subprocess.Popen(  # noqa: S603 (our own words)
            [sys.executable, "-c", _START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self.backend = ""
        self.last: str | None = None
        self._tell(sys.path)
        Thread(target=self._hear, args=(heard,), daemon=True).start()

    def check(self, backend: str, threads: int, options: dict[str, Any]) -> None:
        """Begin with a backend."""
        self.backend, self.last = backend, None
        self._tell((backend, threads, options))

    def ended(self) -> int:
        """The status that it ended with."""
        with suppress(subprocess.TimeoutExpired):  # it lives on, and what it says can't be read any more
            return self.process.wait(timeout=30)
        return self.end()

    def end(self) -> int:
        """End it and what it has started."""
        with suppress(OSError):  # it has ended by itself
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)  # it was not waited for, so that the number is its own
        self.process.kill()
        return self.process.wait()

    def _tell(self, what: Any) -> None:
        given: Any = self.process.stdin
        with suppress(BrokenPipeError):  # it ended at once, which is heard
            given.write(pickle.dumps(what))
            given.flush()  # and left open: its end tells the process that this one is gone

    def _hear(self, heard: Heard) -> None:
        answers: Any = self.process.stdout
        while True:
            try:
                heard.put((self, pickle.load(answers)))  # noqa: S301 (of our own process)
            except (EOFError, pickle.UnpicklingError):  # ended, perhaps in the middle of a word
                break
        heard.put((self, None))


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
    heard: Heard = SimpleQueue()
    workers: list[_Worker] = []  # those that were not waited for
    idle: list[_Worker] = []
    busy: list[_Worker] = []
    try:
        while waiting or busy:
            while waiting and len(busy) < processes:
                if not idle:
                    workers.append(_Worker(heard))
                    idle.append(workers[-1])
                busy.append(idle.pop())
                busy[-1].check(waiting.pop(0), threads, {"only": only, **options})
            worker, said = heard.get()
            if isinstance(said, AttnError):
                raise said
            if isinstance(said, Outcome):
                worker.last = said.check
                yield said
                continue
            if said is None:
                workers.remove(worker)
                said = worker.ended()
                if worker in idle:  # it ended after what it was asked for
                    idle.remove(worker)
                    continue
            else:
                idle.append(worker)
            busy.remove(worker)
            if said:
                yield _ended(worker, said)
    finally:
        for worker in workers:
            worker.end()


def work(answers: IO[bytes]) -> None:
    """What a process does."""
    found = _CHECK in os.environ
    # so that torch, being imported, asks the driver in a way that a copy of this process can still begin with
    os.environ.setdefault(_CHECK, "1")
    need_no_numpy()
    from attn_core.testing.checking import definitions

    definitions()  # and no wheel's code, which might begin something here that a copy can't go on with
    import_module("torch._decomp.decompositions_for_jvp")  # takes half a second, and most backends' checks come to it
    if not found:
        del os.environ[_CHECK]
    while True:
        try:
            asked = pickle.load(sys.stdin.buffer)  # noqa: S301 (of who started it)
        except EOFError:
            return
        if not _COPIES:
            _check(answers, *asked)
            return
        copy = os.fork()
        if not copy:
            _copied(answers, *asked)
        _, status = os.waitpid(copy, 0)
        _say(answers, os.waitstatus_to_exitcode(status))


def _copied(answers: IO[bytes], *given: Any) -> NoReturn:
    """Check, and end at once: what runs at a usual end belongs to the process that this is a copy of."""
    code = 1
    try:
        _check(answers, *given)
        code = 0
    except BaseException:  # noqa: BLE001 (it ends the process, as it would without this)
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _check(answers: IO[bytes], backend: str, threads: int, options: dict[str, Any]) -> None:
    import torch

    from attn_core.testing.kit import check_backend

    Thread(target=_end_with_its_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        for outcome in check_backend(backend, **options):
            _say(answers, outcome)
    except AttnError as error:
        _say(answers, error)


def _say(answers: IO[bytes], what: Outcome | AttnError | int) -> None:
    pickle.dump(what, answers)
    answers.flush()


def _end_with_its_parent() -> None:
    """End this process, and what it has started, when the one that started it is gone, however that went."""
    os.read(0, 1)
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _ended(worker: _Worker, code: int) -> Outcome:
    how = f"signal {-code}" if code < 0 else f"exit status {code}"
    after = "before its first check was done" if worker.last is None else f"in the check after {worker.last}"
    detail = f"its process ended ({how}) {after}; further checks were not run"
    return Outcome(backend=worker.backend.rpartition(":")[2], check="process", status=FAILED, detail=detail)
