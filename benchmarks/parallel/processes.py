"""Processes that are the ranks of one gloo group, for as long as one job takes."""

from __future__ import annotations

import os
import socket
import traceback
from importlib import import_module
from multiprocessing import get_context

import torch
import torch.distributed as dist


def on_ranks(world, job, *arguments):
    """What ``module:function(*arguments)`` returns on each rank, rank 0 first."""
    context = get_context("spawn")
    os.environ["KINETO_LOG_LEVEL"] = "5"  # the profiler tells of each start
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, processes = [], []
    for rank in range(world):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_serve, args=(there, rank, world, port, job, arguments), daemon=True)
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    answers = [_answer(pipe) for pipe in pipes]
    for process in processes:
        process.join(30)
    failed = [text for fine, text in answers if not fine]
    if failed:
        msg = f"{job} failed: {failed[0]}"
        raise RuntimeError(msg)
    return [answer for _, answer in answers]


def _answer(pipe):
    try:
        return pipe.recv()
    except EOFError:
        return False, "a rank died"


def _serve(pipe, rank, world, port, job, arguments):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    module, _, function = job.partition(":")
    try:
        pipe.send((True, getattr(import_module(module), function)(*arguments)))
    except Exception:  # noqa: BLE001 - whatever it is, who asked is told
        pipe.send((False, traceback.format_exc()))
    dist.barrier()
    dist.destroy_process_group()
