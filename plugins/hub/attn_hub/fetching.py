"""Fetches kernels from the hub, and loads what was fetched. Neither torch nor ``kernels`` is imported before that.

Two doors, and no third: ``fetch`` downloads, when the user names a backend and allows it; ``loaded``, which an adapter asks
when its backend is chosen, takes what ``fetch`` returned or what lies in the cache, and downloads nothing.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from attn_core.errors import BackendNotUsable
from attn_hub.repositories import PUBLISHERS, REPOSITORIES

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

ALLOWED = "ATTN_ALLOW_REMOTE_KERNELS"
LOCKFILE = "ATTN_KERNELS_LOCK"

_COMMIT = re.compile(r"[0-9a-f]{40}")
_DISTRIBUTION = "attn-hub"
_fetched: dict[str, ModuleType] = {}
_commits: dict[str, str] = {}
"""At which commit each of them is."""


class NotLoadedError(BackendNotUsable, ImportError):
    """A kernel that an adapter can't be imported without is not there."""


class Pin(NamedTuple):
    """What fixes the code that is loaded: a commit, or a lock file with one for each kernel."""

    revision: str | None = None
    lockfile: Path | None = None


def fetch(
    name: str,
    *,
    allow_remote_kernels: bool = False,
    revision: str | None = None,
    lockfile: str | os.PathLike[str] | None = None,
) -> ModuleType:
    """Download the kernel of a backend, showing progress, and load it: code of its publisher runs in this process.

    Later processes find it in the cache, and need the same permission and the same pin.

    Args:
        name: the backend, as ``backend=`` takes it: "flash_hub", "flash_varlen_hub" or "attn-hub:flash_hub".
        allow_remote_kernels: the permission; ``ATTN_ALLOW_REMOTE_KERNELS=1`` gives it to a whole process.
        revision: the commit to take, 40 hex digits, in place of attn-hub's own where it has one. A branch or a tag is
            refused, since it moves.
        lockfile: a ``kernels.lock``, as ``kernels lock`` writes it; ``ATTN_KERNELS_LOCK`` names one for a whole process.

    Returns:
        The kernel's module.

    Raises:
        BackendNotUsable: not allowed, not pinned, of a publisher that is not on the list, not to be had, or fetched in this
            process at another commit already.

    Example:
        >>> fetch("flash_hub", revision="main")
        Traceback (most recent call last):
        ...
        attn_core.errors.BackendNotUsable: flash_hub: remote kernels are somebody else's code, ... not allowed...
    """
    name = _own_name(name)
    _require_permission(name, allowed=allow_remote_kernels)
    pin = _pin(name, revision, None if lockfile is None else Path(lockfile))
    if name not in _fetched:
        return _kept(name, pin, download=True)
    commit = _load(name, pin, _commit_of)
    if commit != _commits[name]:
        msg = (
            f"{name}: found the commit {commit}; accepted in this process: {_commits[name]}, which is loaded, and which calls "
            "go on with. Next: fetch the other one in a new process"
        )
        raise BackendNotUsable(msg)
    return _fetched[name]


def loaded(name: str) -> ModuleType:
    """The module of a backend's kernel: what was fetched in this process, or lies in the cache. Downloads nothing.

    Raises:
        NotLoadedError: not allowed, not pinned, or not fetched yet.
    """
    if name in _fetched:
        return _fetched[name]
    try:
        _require_permission(name, allowed=False)
        return _kept(name, _pin(name, None, None), download=False)
    except BackendNotUsable as refusal:
        raise NotLoadedError(str(refusal)) from refusal


def _kept(name: str, pin: Pin, *, download: bool) -> ModuleType:
    commit = _load(name, pin, _commit_of)
    _fetched[name] = _load(name, pin, _locked if pin.lockfile else _at_revision, download=download)
    _commits[name] = commit
    return _fetched[name]


def _own_name(name: str) -> str:
    """The name of the backend that is meant by it, by an alias, or with the distribution before it."""
    from attn_hub.plugin import attn_backends

    distribution, colon, rest = name.rpartition(":")
    asked = rest if colon and distribution == _DISTRIBUTION else name
    for spec in attn_backends():
        if asked == spec.name or asked in spec.aliases:
            return spec.name
    msg = f"attn-hub has no backend {name!r}; it has {', '.join(REPOSITORIES)}"
    raise BackendNotUsable(msg)


def _require_permission(name: str, *, allowed: bool) -> None:
    if not allowed and os.environ.get(ALLOWED) != "1":
        msg = (
            f"{name}: remote kernels are somebody else's code, {REPOSITORIES[name].name} of the Hugging Face hub here, and are "
            f"not allowed in this process. Next: {ALLOWED}=1, or attn_hub.fetch({name!r}, allow_remote_kernels=True)"
        )
        raise BackendNotUsable(msg)
    publisher = REPOSITORIES[name].name.partition("/")[0]
    if publisher not in PUBLISHERS:
        msg = f"{name}: found the publisher {publisher}; accepted: {', '.join(sorted(PUBLISHERS))}"
        raise BackendNotUsable(msg)


def _pin(name: str, revision: str | None, lockfile: Path | None) -> Pin:
    if revision is not None and lockfile is not None:
        msg = f"{name}: found a revision and a lock file; accepted: one of them"
        raise BackendNotUsable(msg)
    if revision is None and lockfile is None:
        named = os.environ.get(LOCKFILE)
        lockfile = Path(named) if named else None
        revision = None if lockfile is not None else REPOSITORIES[name].revision
    if lockfile is not None:
        if not lockfile.is_file():
            msg = (
                f"{name}: the lock file {lockfile} is not there. Next: name one that `kernels lock` wrote, by lockfile= or "
                f"{LOCKFILE}"
            )
            raise BackendNotUsable(msg)
        return Pin(lockfile=lockfile)
    if revision is None:
        msg = (
            f"{name}: no revision of {REPOSITORIES[name].name} is pinned, since attn-hub knows none to trust. Next: choose "
            f"a commit that you trust, and attn_hub.fetch({name!r}, revision='<40 hex digits>'), or lock it with `kernels lock`, "
            f"and set {LOCKFILE} to the kernels.lock"
        )
        raise BackendNotUsable(msg)
    _check_commit(name, revision)
    return Pin(revision=revision)


def _check_commit(name: str, revision: str) -> None:
    if not _COMMIT.fullmatch(revision):
        msg = f"{name}: found the revision {revision!r}; accepted: a full commit of 40 hex digits, since branches and tags move"
        raise BackendNotUsable(msg)


def _load(name: str, pin: Pin, load: Callable[..., Any], *, download: bool = False) -> Any:
    """Load a kernel as it is pinned, from the cache or, where that may be, from the hub; or find out what the pin says."""
    try:
        return load(name, pin, download=download)
    except BackendNotUsable:
        raise
    except Exception as error:
        raise BackendNotUsable(_told(name, pin, error, download=download)) from error


def _told(name: str, pin: Pin, error: Exception, *, download: bool) -> str:
    from huggingface_hub import constants

    kernel = f"{name}: {REPOSITORIES[name].name}" + (f" at {pin.revision}" if pin.revision else f" of {pin.lockfile}")
    if isinstance(error, FileNotFoundError) and not download:
        return (
            f"{kernel} is not in the cache of this machine, or has no build for it ({error}). Next: "
            f"attn_hub.fetch({name!r}), which downloads it; a call never does"
        )
    if constants.HF_HUB_OFFLINE and isinstance(error, OSError):
        return (
            f"{kernel} can't be fetched offline (HF_HUB_OFFLINE): {error}. Next: fetch it where there is a network, or "
            "without HF_HUB_OFFLINE"
        )
    return f"{kernel} can't be {'fetched' if download else 'loaded'}: {type(error).__name__}: {error}"


def _at_revision(name: str, pin: Pin, *, download: bool) -> ModuleType:
    import kernels
    from huggingface_hub import constants

    if download and constants.HF_HUB_OFFLINE:
        download = False
    folder = kernels.install_kernel(REPOSITORIES[name].name, revision=pin.revision, local_files_only=not download)
    needed = kernels.Metadata.read_from_file(folder / "metadata.json").kernel_depends
    if needed:
        msg = (
            f"{name}: {REPOSITORIES[name].name} loads further kernels ({', '.join(item.repo_id for item in needed)}), which a "
            "revision does not pin. Next: lock them with `kernels lock`, and give the lock file"
        )
        raise BackendNotUsable(msg)
    module: ModuleType = kernels.get_local_kernel(folder)
    return module


def _commit_of(name: str, pin: Pin, **_: bool) -> str:
    """The commit that a pin means, of a lock file that holds nothing but commits of publishers on the list."""
    if pin.lockfile is None:
        assert pin.revision is not None  # noqa: S101 - one of the two is there
        return pin.revision
    from kernels.locking import get_locked_kernel_revision

    locks, own = get_locked_kernel_revision(REPOSITORIES[name].name, pin.lockfile)
    for item in locks.keys():  # noqa: SIM118 - it is no mapping
        _check_commit(name, locks.get(item).commit)
        if item.repo_id.partition("/")[0] not in PUBLISHERS:
            msg = (
                f"{name}: found {item.repo_id} in {pin.lockfile}; accepted publishers: {', '.join(sorted(PUBLISHERS))}. "
                "Next: a lock file for these kernels alone"
            )
            raise BackendNotUsable(msg)
    commit: str = locks.get(own).commit
    return commit


def _locked(name: str, pin: Pin, *, download: bool) -> ModuleType:
    import kernels

    load = kernels.get_locked_kernel if download else kernels.load_kernel
    module: ModuleType = load(REPOSITORIES[name].name, lockfile=pin.lockfile)
    return module
