"""What a check of the kit comes to: data that needs no torch, for the commands that show it."""

from __future__ import annotations

from dataclasses import dataclass

PASSED = "passed"
FAILED = "failed"
EXCUSED = "excused"
WARNED = "warned"
NOT_CHECKED = "not checked"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one check of one backend came to.

    Attributes:
        backend: its name.
        check: the check's identifier.
        status: "passed", "failed", "excused" (it fails, and why is known), "warned" (it fails a check that is new in this
            release) or "not checked".
        detail: what was tried, what is wrong, or why it can't be tried.
        snippet: code that shows the failure, where a call does.
        seconds: how long it took.
    """

    backend: str
    check: str
    status: str
    detail: str = ""
    snippet: str = ""
    seconds: float = 0.0
