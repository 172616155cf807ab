"""A backend in a process of its own, in which nothing was loaded before: what that, and its first call, leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

from attn_core.errors import BackendNotUsable
from attn_core.testing.outcomes import CheckFailed, NotChecked

if TYPE_CHECKING:
    from attn_core.testing.drawing import Case
    from attn_core.testing.subject import Subject

_PROBE = "from attn_core.testing.fresh import main; main()"
_MANY_HAVE_SOME = "the filters of warnings"
"""A module that is imported may add a filter for a warning of its own; ignoring whole kinds of warnings is another thing."""
_WHAT_AUTOTUNING_DRAWS = "the state of torch's random numbers"


def left_by_first_call(subject: Subject, case: Case) -> str | None:
    """Say what is other in a new process after the backend is declared and loaded, or after its first call; None for nothing.

    Raises:
        CheckFailed: the process ends otherwise.
        NotChecked: it is not to be had in another process than this one, as what a test makes up is.
    """
    distribution = str(subject.row.distribution)
    environment = {**os.environ, "ATTN_ONLY": distribution, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("ATTN_DISABLE", None)
    command = [sys.executable, "-c", _PROBE, str(subject.row.qualified_name), str(subject.device), repr(case)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603 (our own words)
    if done.returncode:
        msg = f"in a process of its own it fails: {done.stderr.strip()[-300:]}"
        raise CheckFailed(msg)
    unable, said = json.loads(done.stdout.splitlines()[-1])
    if unable:
        raise NotChecked(unable)
    return None if said is None else str(said)


def main() -> None:
    """What the process does: name, device and case are its arguments."""
    try:
        said: tuple[str | None, str | None] = None, _left(*sys.argv[1:])
    except (BackendNotUsable, NotChecked) as error:
        said = f"in a process of its own: {error}", None
    print(json.dumps(said))  # noqa: T201 (it is read by who started it)


def _left(name: str, device: str, case: str) -> str | None:
    import torch

    from attn_core.testing.drawing import Case
    from attn_core.testing.subject import subject
    from attn_core.testing.surroundings import USUAL, changes, look, unusual
    from attn_core.testing.trying import steps_of

    some = torch.zeros(1, 1, 1, 8, device=device)  # what CUDA does when it is first used is nobody's doing here,
    torch.nn.functional.scaled_dot_product_attention(some, some, some)  # nor that SDPA puts its kernels in order then
    place = some.device
    call: Case = eval(case, {"Case": Case})  # noqa: S307 (its repr is what makes it again)
    with unusual(place, USUAL) as settings:
        before = look(settings)
        tested = subject(name, device=device)
        _ = tested.adapter
        asked = [setting for setting in settings if setting.name != _MANY_HAVE_SOME]
        found = changes(before, look(asked))
        if found:
            return f"loading it changes {', '.join(found)}"
        if tested.spec.first_call_compiles:
            asked = [setting for setting in asked if setting.name != _WHAT_AUTOTUNING_DRAWS]
        for what, step in zip(("first call", "first backward"), steps_of(tested, call), strict=False):
            step()
            found = changes(before, look(asked))
            if found:
                return f"its {what} changes {', '.join(found)}"
    return None
