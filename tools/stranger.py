"""Play authors who know nothing of this repository: ``python tools/stranger.py CONSTRAINTS WHEEL ...``.

In an empty folder, and an environment that has nothing but these wheels and what they need, the first writes a backend
with ``attn new-backend``, tries it as its author would, builds a wheel, installs it and calls it. Further strangers then
install wheels that clash with it, want another attn, fail, or lack their library: each may spoil its own row and no other.
At the end everybody leaves, and the list of backends is what it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

FURTHER = ("hatchling",)
"""What later authors build with, without an environment of its own; all else comes with the first one's package."""

CALL = """
import torch
from attn_core import attention
q, k, v = (torch.randn(2, 50, 4, 16, requires_grad=True) for _ in range(3))
out = attention(q, k, v, causal=True, backend="{backend}")
expected = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
torch.testing.assert_close(out, expected.transpose(1, 2))
out.sum().backward()
"""

IMPORT = "from collections.abc import Iterator"
"""The first line of a declaration that does something."""

Rows = dict[str, tuple[str, str]]
"""Status and reason of each backend, by distribution and name."""


class Machine:
    """An environment of its own, and an empty folder to work in."""

    def __init__(self, folder: Path, constraints: Path) -> None:
        self.folder = folder / "work"
        self.folder.mkdir()
        self.bin = folder / "environment" / ("Scripts" if os.name == "nt" else "bin")
        venv.create(self.bin.parent, with_pip=True)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ATTN_", "PYTHON"))}
        pins = {"PIP_CONSTRAINT": str(constraints), "PIP_BUILD_CONSTRAINT": str(constraints)}
        quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_QUIET": "1"}
        path = os.pathsep.join([str(self.bin), inherited.get("PATH", "")])
        self.environment = {**inherited, **pins, **quiet, "PATH": path, "VIRTUAL_ENV": str(self.bin.parent)}

    def run(self, *command: str, inside: str = ".", status: int = 0, show: int = 3, interpreted: bool = False) -> str:
        """Run a command as it would be typed, hold it to its exit status, and return what it printed."""
        shown = command if len(command[-1]) < 100 else (*command[:-1], "...")
        variables = {"TRITON_INTERPRET": "1"} if interpreted else {}
        print("$", *(f"{name}={value}" for name, value in variables.items()), *shown, flush=True)
        done = subprocess.run(
            [str(self.bin / command[0]), *command[1:]],
            check=False, cwd=self.folder / inside, env={**self.environment, **variables}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == status, f"exit status {done.returncode}, not {status}:\n{done.stdout}\n{done.stderr}"
        for line in done.stdout.strip().splitlines()[-show:] if show else ():
            print("   ", line, flush=True)
        return done.stdout

    def rows(self) -> Rows:
        """The list of backends."""
        found = json.loads(self.run("attn", "list-backends", "--json", show=0))
        return {f"{row['distribution']}:{row['name']}": (row["status"], row["reason"]) for row in found}

    def write(self, name: str, *options: str, **changes: tuple[str, str]) -> str:
        """Write the package of a backend; in plugin.py (plugin=) or pyproject.toml (project=), one text replaces another."""
        self.run("attn", "new-backend", name, *options, show=0)
        folder = self.folder / f"{name}-attn"
        places = {"plugin": folder / f"{name}_attn" / "plugin.py", "project": folder / "pyproject.toml"}
        for label, (old, new) in changes.items():
            text = places[label].read_text(encoding="utf-8")
            assert old in text, f"{places[label]} does not have {old!r}"
            places[label].write_text(text.replace(old, new), encoding="utf-8")
        return folder.name

    def install_built(self, package: str, *options: str) -> None:
        """Build a package's wheel and install that, whatever else it may ask for."""
        self.run("python", "-m", "build", "--outdir", "dist", *options, inside=package, show=1)
        (wheel,) = (self.folder / package / "dist").glob("*.whl")
        self.run("pip", "install", "--no-deps", str(wheel))


def play_author(machine: Machine, before: Rows) -> Rows:
    """The first half hour, as it is printed; return the list of backends with acme in it."""
    package = machine.write("acme")
    machine.run("pip", "install", "-e", ".[test]", inside=package)
    assert machine.rows() == {**before, "acme-attn:acme": ("available", "")}, machine.rows()
    machine.run("pytest", "-q", inside=package)
    machine.run("attn", "check", "acme", "--quick", show=1)
    machine.run("pip", "uninstall", "--yes", "acme-attn")
    assert machine.rows() == before, "an editable install left something behind"
    machine.install_built(package)
    after = machine.rows()
    assert after == {**before, "acme-attn:acme": ("available", "")}, after
    machine.run("python", "-c", CALL.format(backend="acme"))
    machine.run("attn", "new-backend", "acme", "--folder", "again", status=2)
    return after


def play_rival(machine: Machine, before: Rows) -> None:
    """Another wheel claims the name: neither has it, and each can be named in full."""
    package = machine.write("rival", plugin=('name="rival"', 'name="acme"'))
    machine.install_built(package, "--wheel", "--no-isolation")
    after = machine.rows()
    for name in ("acme-attn:acme", "rival-attn:acme"):
        assert after[name][0] == "ambiguous", after
        machine.run("python", "-c", CALL.format(backend=name))
    said = machine.run(
        "python", "-c", f"try:{CALL.format(backend='acme')}".replace("\n", "\n ") + "\nexcept Exception as e: print(e)"
    )
    assert "ambiguous" in said, said
    assert "acme-attn:acme or rival-attn:acme" in said, said
    leave(machine, before, after, "rival-attn", spoiled={"acme-attn:acme"})


def play_newer(machine: Machine, before: Rows) -> None:
    """A wheel that asks for a later attn-core is not imported."""
    package = machine.write(
        "newer",
        project=("attn-core>=0.1,<1", "attn-core>=99"),
        plugin=(IMPORT, f"raise SystemExit('imported')\n{IMPORT}"),
    )
    machine.install_built(package, "--wheel", "--no-isolation")
    after = machine.rows()
    status, reason = after["newer-attn:newer"]
    assert status == "incompatible", after
    assert "attn-core>=99" in reason, reason
    leave(machine, before, after, "newer-attn")


def play_broken(machine: Machine, before: Rows) -> None:
    """A wheel whose declaration raises has a row that says so."""
    package = machine.write("boom", plugin=(IMPORT, f"raise RuntimeError('boom went the declaration')\n{IMPORT}"))
    machine.install_built(package, "--wheel", "--no-isolation")
    after = machine.rows()
    status, reason = after["boom-attn:boom"]
    assert status == "broken", after
    assert "RuntimeError: boom went the declaration" in reason, reason
    machine.run("attn", "check", "boom", status=1, show=1)
    leave(machine, before, after, "boom-attn")


def play_wrapper(machine: Machine, before: Rows) -> None:
    """A wheel whose library is not there says how to install it; its own tests are skipped and not failed."""
    package = machine.write("wrapped", "--kind", "library", "--library", "library_of_a_stranger")
    machine.install_built(package, "--wheel", "--no-isolation")
    after = machine.rows()
    assert after["wrapped-attn:wrapped"] == ("missing", "needs the module library_of_a_stranger"), after
    machine.run("attn", "check", "wrapped", status=3, show=1)
    assert " passed" not in machine.run("pytest", "-q", inside=package, show=1)
    leave(machine, before, after, "wrapped-attn")


def play_triton(machine: Machine, before: Rows) -> None:
    """A kernel in Triton passes in its interpreter, with what its package asks for and nothing else."""
    package = machine.write("tiled", "--kind", "triton")
    machine.run("pip", "install", "-e", ".[test]", inside=package)
    after = machine.rows()
    assert after["tiled-attn:tiled"] == ("available", ""), after
    assert " passed" in machine.run("pytest", "-q", inside=package, show=1, interpreted=True)
    machine.run("attn", "check", "tiled", "--quick", "--only", "results,causal,lse", show=1, interpreted=True)
    leave(machine, before, after, "tiled-attn")


def leave(
    machine: Machine, before: Rows, after: Rows, distribution: str, spoiled: frozenset[str] | set[str] = frozenset()
) -> None:
    """Hold a visitor to having touched no other row, and to leaving nothing behind."""
    others = {name: row for name, row in after.items() if not name.startswith(f"{distribution}:")}
    touched = {name for name in before | others if before.get(name) != others.get(name)}
    assert touched == set(spoiled), f"{distribution} changed {touched}"
    machine.run("python", "-c", CALL.format(backend="acme-attn:acme"))
    machine.run("python", "-c", CALL.format(backend="native_math"))
    machine.run("pip", "uninstall", "--yes", distribution)
    assert machine.rows() == before, f"{distribution} left something behind"
    print(f"{distribution} changed no other row, and left as it came\n", flush=True)


def main(constraints: str, *wheels: str) -> None:
    """Play them all."""
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(Path(folder).resolve(), Path(constraints).resolve())
        machine.run("pip", "install", *map(os.path.abspath, wheels), *FURTHER)
        start = machine.rows()
        print(f"{len(start)} backends at the start\n", flush=True)
        with_acme = play_author(machine, start)
        print("acme-attn was written, tried, built, installed and called\n", flush=True)
        play_rival(machine, with_acme)
        play_newer(machine, with_acme)
        play_broken(machine, with_acme)
        play_wrapper(machine, with_acme)
        if sys.platform == "linux":  # where Triton is
            play_triton(machine, with_acme)
        machine.run("pip", "uninstall", "--yes", "acme-attn")
        assert machine.rows() == start, "acme-attn left something behind"
        print("at the end the list of backends is what it was")


if __name__ == "__main__":
    main(*sys.argv[1:])
