"""Kernel repositories as the hub's cache holds them, and lock files, in the formats of kernels 0.17."""

from __future__ import annotations

import json


def commit_of(repository):
    return repository.encode().hex()[:40].ljust(40, "0")


def write_kernel(cache, repository, source, *, commit=None, depends=()):
    """A repository at one commit, with one build: of plain Python, for the CPU. ``source`` is one file, or some by name."""
    commit = commit or commit_of(repository)
    publisher, name = repository.split("/")
    folder = cache / f"kernels--{publisher}--{name}" / "snapshots" / commit / "build" / "torch-cpu"
    folder.mkdir(parents=True)
    files = {"__init__.py": source} if isinstance(source, str) else source
    for file, text in files.items():
        (folder / file).write_text(text, encoding="utf-8")
    metadata = {
        "id": f"{name.replace('-', '_')}_cpu_{commit[:8]}", "name": name, "version": 1, "license": "Apache-2.0",
        "python-depends": [], "kernel-depends": list(depends), "backend": {"type": "cpu"},
    }  # fmt: skip
    (folder / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")
    return commit


def write_lock(file, repositories):
    """A ``kernels.lock`` of these repositories, each at a commit."""
    entries = [
        {"dependency": {"repo-id": repository, "version": 1}, "lock": {"commit": commit}}
        for repository, commit in repositories.items()
    ]
    file.write_text(json.dumps(entries), encoding="utf-8")
    return file
