"""A pool of processes that are the ranks of one group, started once; a job is a function by name.

``parallel_work`` is where jobs are; of another module beside it, the name has the module's before a dot.
"""

from __future__ import annotations

import datetime as dt
import importlib
import multiprocessing
import os
import socket
import sys
import traceback
from pathlib import Path

SHAPES = [(2, 1), (1, 2), (3, 1), (1, 3), (4, 1), (1, 4), (2, 2), (8, 1), (1, 8), (4, 2), (2, 4)]


class JobFailed(AssertionError):  # noqa: N818 - it reads as what happened
    """What a rank raised, as text."""


class Ranks:
    """Processes 0 to world - 1 in a gloo group.

    Args:
        world: how many.
        timeout: of the group, in seconds.
    """

    def __init__(self, world: int = 8, timeout: float = 60.0) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ["OMP_NUM_THREADS"] = "1"
        self.world = world
        self.pipes, self.processes = [], []
        for rank in range(world):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, world, port, timeout), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)
        for (
            pipe
        ) in self.pipes:  # importing takes as long as the machine likes; the group's timeout begins when all have
            pipe.recv()
        for pipe in self.pipes:
            pipe.send("begin")

    def run(self, job: str, *arguments: object, on: int | None = None) -> list[object]:
        """The results of ``job(*arguments)`` on ranks 0 to ``on`` - 1; raises what a rank raised."""
        answers = self.answers(job, *arguments, on=on)
        failed = [f"rank {rank}: {text}" for rank, (fine, text) in enumerate(answers) if not fine]
        if failed:
            raise JobFailed("\n".join(failed))
        return [answer for _, answer in answers]

    def answers(self, job: str, *arguments: object, on: int | None = None) -> list[tuple[bool, object]]:
        """(True, result) or (False, error as text) of each rank; (False, "died") where its process ended."""
        pipes = self.pipes[: on or self.world]
        for pipe in pipes:
            pipe.send((job, arguments))
        return [_answer(pipe) for pipe in pipes]

    def close(self) -> None:
        """End all."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()


def _answer(pipe: object) -> tuple[bool, object]:
    try:
        return pipe.recv() if pipe.poll(120) else (False, "no answer")
    except (EOFError, ConnectionResetError):
        return False, "died"


def _serve(pipe: object, rank: int, world: int, port: int, timeout: float) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.distributed_c10d.default_pg_timeout = dt.timedelta(seconds=timeout)  # which a mesh's groups take
    importlib.import_module("parallel_work")
    pipe.send("ready")
    pipe.recv()
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=dt.timedelta(seconds=timeout))
    while True:
        try:
            job, arguments = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            os._exit(0)  # the others are ended too; nothing is to be said to them
        try:
            module, _, name = job.rpartition(".")
            answer = (True, getattr(importlib.import_module(module or "parallel_work"), name)(*arguments))
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test is told
            answer = (False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        pipe.send(answer)
