"""How long people wait: ``attn list-backends`` and ``import attn_core``, as whole processes.

Usage: python benchmarks/startup.py
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 15

DECLARATION = """
from attn_core.plugin import BackendSpec, Constraints, ContextParallelSupport, hookimpl

@hookimpl
def attn_backends():
    for part in ("dense", "packed"):
        yield BackendSpec(
            api=1, name=f"wheel{number}_{{part}}", summary="a wheel", forward="nowhere:forward",
            constraints=Constraints(platforms={{"cuda"}}, dtypes={{"float16"}}, masks={{"none"}}, lse=True),
            context_parallel=ContextParallelSupport(ring=True))
"""


def make_distributions(folder: Path) -> None:
    """A hundred distributions, ten of them wheels of attn with two backends each."""
    for number in range(100):
        metadata = folder / f"dist_{number}-1.{number}.dist-info"
        metadata.mkdir()
        requires = "\n".join(f"Requires-Dist: dist-{other}>=1" for other in range(number % 7))
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: dist-{number}\nVersion: 1.{number}\n{requires}\n"
        )
        entry_points = "[console_scripts]\nsome = some:main\n"
        if number % 10 == 0:
            (folder / f"wheel{number}.py").write_text(DECLARATION.format(number=number))
            entry_points += f"[attn.backends]\nwheel{number} = wheel{number}\n"
        (metadata / "entry_points.txt").write_text(entry_points)


def seconds(code: list[str], folder: Path) -> float:
    """The wall time of one process."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    start = time.perf_counter()
    subprocess.run([sys.executable, *code], check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_distributions(folder)
        metadata = "importlib.metadata" if sys.version_info >= (3, 12) else "importlib_metadata"
        imports = f"import argparse, {metadata}, pluggy, packaging.requirements, packaging.specifiers"
        commands = {
            "python -c pass": ["-c", "pass"],
            "bare imports": ["-c", imports],
            "attn list-backends": ["-m", "attn_core", "list-backends"],
            "import attn_core": ["-c", "import attn_core"],
        }
        times: dict[str, list[float]] = {command: [] for command in commands}
        for turn in range(ROUNDS + 1):
            for command, code in commands.items():
                taken = seconds(code, folder)
                if turn:  # the first writes the bytecode
                    times[command].append(taken)
        bare = statistics.median(times["bare imports"])
        print(
            f"Python {sys.version.split()[0]}; whole processes, seconds, median of {ROUNDS}; bare imports: {imports}\n"
        )
        for command, found in times.items():
            middle = statistics.median(found)
            print(f"  {command:<22}{middle:7.3f}   smallest {min(found):.3f}   {middle / bare:5.2f} x bare imports")


if __name__ == "__main__":
    main()
