"""Several backends are checked in processes that nothing else depends on, and that end with the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from fake_distributions import HEAD, world  # noqa: F401 (a fixture)

DECLARATION = """
LIMITS = Constraints(platforms={"cpu"}, dtypes={"float32"}, masks={"none"}, causal=True)

@hookimpl
def attn_backends():
    for name in ("right", "other", "slow"):
        yield spec(name, forward=f"loud_kernels:{name}", constraints=LIMITS)
"""
KERNELS = """
import os, subprocess, sys, time
from attn_core.testing import reference

def right(query, key, value, *, scale, causal=False):
    print("from Python")
    os.write(1, b"from C")
    return reference(query, key, value, scale=scale, causal=causal)[0].to(query.dtype)

other = right

WAITS = "import os, time; open(os.environ['STARTED'] + str(os.getpid()), 'w').close(); time.sleep(60)"

def slow(query, key, value, *, scale, causal=False):
    open(os.environ["STARTED"] + str(os.getpid()), "w").close()
    subprocess.run([sys.executable, "-c", WAITS])
"""
SCRIPT = "from attn_core.cli import main; raise SystemExit(main([{words}]))"


@pytest.fixture
def started(world, tmp_path):  # noqa: F811
    """Start ``attn check`` from a user's script, which has no guard of its main module."""
    (world.folder / "first" / "loud_kernels.py").write_text(KERNELS)
    world.wheel("attn-loud", HEAD + DECLARATION)
    running = []

    def start(*words):
        file = tmp_path / "script.py"
        file.write_text(SCRIPT.format(words=", ".join(map(repr, ("check", *words)))))
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "STARTED": f"{tmp_path}/pid-",
        }
        command = [sys.executable, str(file)]
        heeding = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # who runs the tests may ignore it
        running.append(
            subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True, preexec_fn=heeding)  # noqa: PLW1509
        )
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.mark.parametrize("names", [("right", "other"), ("right",)])
def test_outcomes_are_json_whatever_kernels_print_and_a_script_runs_once(started, names):
    out, err = started(*names, "--only", "results,causal", "--json").communicate(timeout=480)
    outcomes = [(item["backend"], item["check"], item["status"]) for item in json.loads(out)]
    assert outcomes == [(name, check, "passed") for name in names for check in ("results", "causal")], err
    assert "from Python" in err
    assert "from C" in err


def alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{process}/stat", encoding="utf-8") as file:  # noqa: PTH123
        return file.read().rpartition(")")[2].split()[0] != "Z"


def until(holds, seconds=90):
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.1)
    return holds()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left_over_however_the_command_ends(started, tmp_path, how):
    command = started("slow", "right", "--only", "results", "--processes", "1")
    assert until(lambda: len([*tmp_path.glob("pid-*")]) == 2), command.stderr.read()
    processes = [int(file.name.removeprefix("pid-")) for file in tmp_path.glob("pid-*")]
    assert all(map(alive, processes))
    command.send_signal(how)
    _, err = command.communicate(timeout=300)
    assert command.returncode == (130 if how == signal.SIGINT else -how)
    assert "Traceback" not in err
    assert until(lambda: not any(map(alive, processes)), 20)
