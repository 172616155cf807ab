"""Checks several backends at once, each in a process of its own, which one that crashes ends alone."""

from __future__ import annotations

from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from attn_core.errors import AttnError
from attn_core.testing.kit import FAILED, Outcome, check_backend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from multiprocessing.context import SpawnProcess


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
    context = get_context("spawn")  # what a fork inherits, CUDA does not survive
    waiting = list(names)
    running: dict[Any, tuple[str, SpawnProcess]] = {}
    last: dict[str, str] = {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                name = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_check, args=(theirs, name, threads, {"only": only, **options}))
                process.start()
                theirs.close()
                running[ours] = (name, process)
            for connection in wait(list(running)):
                name, process = running[connection]
                heard = _heard(connection)
                if isinstance(heard, AttnError):
                    raise heard
                if heard is not None:
                    last[name] = heard.check
                    yield heard
                    continue
                del running[connection]
                process.join()
                if process.exitcode:
                    yield _ended(name, process.exitcode, last.get(name))
    finally:
        for _, process in running.values():
            process.terminate()


def _check(connection: Connection, name: str, threads: int, options: dict[str, Any]) -> None:
    """What a process does."""
    import torch

    torch.set_num_threads(threads)
    try:
        for outcome in check_backend(name, **options):
            connection.send(outcome)
    except AttnError as error:
        connection.send(error)
    connection.close()


def _heard(connection: Any) -> Outcome | AttnError | None:
    """What a process says next; None at its end."""
    try:
        heard: Outcome | AttnError = connection.recv()
    except EOFError:
        return None
    return heard


def _ended(name: str, code: int, last: str | None) -> Outcome:
    how = f"signal {-code}" if code < 0 else f"exit status {code}"
    after = "before its first check was done" if last is None else f"in the check after {last}"
    detail = f"its process ended ({how}) {after}; further checks were not run"
    return Outcome(backend=name.rpartition(":")[2], check="process", status=FAILED, detail=detail)
