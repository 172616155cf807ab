"""Distributions written to disk as an installer leaves them, whole or not, and a world in which only they exist."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from textwrap import dedent
from types import SimpleNamespace

import pytest

HEAD = """
from attn_core.plugin import (
    Approximate, BackendSpec, Backward, CapabilityRange, Constraints, ContextParallelSupport, Needs, No, Rule, hookimpl)

PLAIN = Constraints(platforms={"cpu"}, dtypes={"float32"}, masks={"none"})

def spec(name, **changes):
    return BackendSpec(**{**dict(
        api=1, name=name, summary=f"the backend {name}", forward="nowhere:forward", constraints=PLAIN), **changes})
"""


def declaring(*specs):
    """A declaration that yields these; each is the text between the parentheses of ``spec(...)``."""
    body = "".join(f"    yield spec({item})\n" for item in specs)
    return f"{HEAD}\n@hookimpl\ndef attn_backends():\n{body}"


def written(text):
    """A declaration written out after the usual head."""
    return HEAD + dedent(text)


class World:
    """Folders with distributions; those of the machine that runs the tests are not seen."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        self.monkeypatch = monkeypatch
        self.folders = []
        self.path("first")

    def path(self, name):
        """A further folder, behind the others on sys.path."""
        folder = self.folder / name
        folder.mkdir()
        self.order([*self.folders, folder])
        return folder

    def order(self, folders):
        """Put the folders into this order on sys.path, and look again."""
        from attn_core import installed, registry

        others = [entry for entry in sys.path if entry not in map(str, self.folders)]
        self.folders = list(folders)
        names = list(map(str, self.folders))
        self.monkeypatch.setattr(sys, "path", [*names, *others])
        real = getattr(installed.metadata, "real", installed.metadata)
        seen = SimpleNamespace(distributions=partial(real.distributions, path=names), real=real)
        self.monkeypatch.setattr(installed, "metadata", seen)
        registry.refresh()

    def wheel(self, name, source=None, *, version="1.0", requires=(), extras=(), point=None, folder=None, **files):
        """Install a wheel of attn; its one module is named after it and holds ``source``."""
        module = point or f"{name.lower().replace('-', '_').replace('.', '_')}_declaration"
        folder = folder or self.folders[0]
        if source is not None:
            (folder / f"{module}.py").write_text(source, encoding="utf-8")
        files.setdefault("entry_points", f"[attn.backends]\n{name} = {module}\n")
        return self.distribution(name, version, requires=requires, extras=extras, folder=folder, **files)

    def distribution(
        self, name, version="1.0", *, requires=(), extras=(), folder=None, label=None, metadata=None, entry_points=None
    ):
        """Install metadata alone. Text or bytes; ``metadata=False`` leaves METADATA out."""
        label = label or f"{name.replace('-', '_')}-{version}.dist-info"
        info = (folder or self.folders[0]) / label
        info.mkdir()
        if metadata is None:
            lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
            lines += [f"Requires-Dist: {line}" for line in requires] + [f"Provides-Extra: {extra}" for extra in extras]
            metadata = "\n".join([*lines, "", "A description."])
        self._write(info / ("PKG-INFO" if label.endswith(".egg-info") else "METADATA"), metadata)
        self._write(info / "entry_points.txt", entry_points)
        return info

    @staticmethod
    def _write(file, content):
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif content:
            file.write_text(content, encoding="utf-8")

    def rows(self):
        """Every row, looked at anew."""
        from attn_core import registry

        registry.refresh()
        return registry.rows()

    def row(self):
        """The one row that there is."""
        (row,) = self.rows()
        return row

    def statuses(self):
        """Name and status of each row."""
        return [(row.name, row.status) for row in self.rows()]

    def modules(self):
        """The modules that were imported from here."""
        here = str(self.folder)
        files = {name: str(getattr(module, "__file__", None) or "") for name, module in list(sys.modules.items())}
        return [name for name, file in files.items() if file.startswith(here)]

    def run(self, *arguments, check=True, **environment):
        """``attn`` with these arguments as a process of its own; the machine's distributions are seen there."""
        return self.python("-m", "attn_core", *arguments, check=check, **environment)

    def python(self, *arguments, check=True, **environment):
        """Python with these arguments, and the folders first on its path."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ATTN_", "PYTHON"))}
        path = os.pathsep.join(filter(None, [*map(str, self.folders), os.environ.get("PYTHONPATH", "")]))
        return subprocess.run(
            [sys.executable, *arguments],
            capture_output=True, text=True, check=check, env={**inherited, "PYTHONPATH": path, **environment},
        )  # fmt: skip


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A world without distributions."""
    from attn_core import registry

    monkeypatch.delenv("ATTN_DISABLE", raising=False)
    monkeypatch.delenv("ATTN_ONLY", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a module rewritten within a second would be the old one
    made = World(tmp_path, monkeypatch)
    yield made
    for name in made.modules():
        del sys.modules[name]
    monkeypatch.undo()
    registry.refresh()
