"""Writes the package of a new backend, small and whole: declaration, kernel, tests. Imports no torch."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from importlib.resources import files
from keyword import iskeyword
from string import Template
from typing import TYPE_CHECKING

from attn_core.declaration import NAME
from attn_core.errors import AttnError
from attn_core.installed import installed, normalized
from attn_core.registry import known_rows
from attn_core.requirements import module_is_there

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable
    from pathlib import Path


class ScaffoldError(AttnError):
    """A package that can't be written as asked for."""


@dataclass(frozen=True)
class Kind:
    """A kind of kernel that a package is written for.

    Attributes:
        about: one line for people.
        summary: what the declaration says of the kernel, with ``$name``.
        note: a further paragraph of the package's README.
        test: what its tests need beside what every kind's do.
        settings: how its tests call the kit, beside its name.
        imports: what its tests import for that.
        environment: what CI sets for the tests.
    """

    about: str
    summary: str
    note: str = ""
    test: tuple[str, ...] = ()
    settings: str = ""
    imports: str = ""
    environment: str = ""


KINDS = {
    "eager": Kind("plain torch, on any device", "$name, attention in plain torch"),
    "triton": Kind(
        "a Triton kernel, on a GPU or, interpreted, on a CPU",
        "$name, attention in Triton, forward only",
        note="\n\nWithout a GPU, `TRITON_INTERPRET=1 pytest` runs the kernel in Triton's interpreter. That is slow, so the tests"
        "\nmake fewer calls there, as `TRITON_INTERPRET=1 attn check $name --quick` does.",
        test=("numpy", "triton; sys_platform == 'linux'"),
        settings=", quick=INTERPRETED",
        imports="\n\nfrom $package.plugin import INTERPRETED",
        environment='\n        env:\n          TRITON_INTERPRET: "1"',
    ),
    "library": Kind(
        "a wrapper of a library that is installed by itself",
        "$name, the attention of $library",
        note="\n\nWhere `$library` is not installed, `attn list-backends` says how to install it, and the tests are skipped.",
    ),
}

_TEST = ("pytest", "build")
"""What authors install to work on a package of any kind."""

_WORD = re.compile(r"[a-z0-9]+(_[a-z0-9]+)*")
"""What makes the name of a distribution too, once its underscores are hyphens."""


def write(name: str, kind: str, folder: Path, library: str | None = None) -> Path:
    """Write the package of a backend.

    Args:
        name: of the backend.
        kind: one of ``KINDS``.
        folder: where the package's own folder is made.
        library: the module that a "library" backend wraps; ``NAME_kernels`` where not given.

    Returns:
        The package's folder, such as ``folder / "acme-attn"``.

    Raises:
        ScaffoldError: the name is none, or taken; the folder is there already, or can't be written.
    """
    _check_name(name)
    _check_free(name)
    target = folder / distribution_of(name)
    texts = _texts(name, kind, _library(name, kind, library))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        target.mkdir()
    except FileExistsError:
        msg = f"new-backend: {target} is there already, and is left as it is; move it away, or give another --folder"
        raise ScaffoldError(msg) from None
    except OSError as error:
        msg = f"new-backend: can't make {target}: {error.strerror}; give another --folder"
        raise ScaffoldError(msg) from error
    try:
        _write(target, texts)
    except OSError as error:
        shutil.rmtree(target, ignore_errors=True)  # made above, and by nobody else
        msg = f"new-backend: can't write into {target}: {error.strerror}; give another --folder"
        raise ScaffoldError(msg) from error
    return target


def distribution_of(name: str) -> str:
    """The distribution that brings a backend of this name.

    >>> distribution_of("acme_fast")
    'acme-fast-attn'
    """
    return normalized(f"{name}-attn")


def package_of(name: str) -> str:
    """Its import package.

    >>> package_of("acme_fast")
    'acme_fast_attn'
    """
    return f"{name}_attn"


def _check_name(name: str) -> None:
    if NAME.fullmatch(name) and _WORD.fullmatch(name):
        return
    plain = "_".join(re.findall(r"[a-z0-9]+", name.lower())).lstrip("0123456789_")
    msg = (
        f"new-backend: found the name {name!r}; accepted: a plain word of a-z, 0-9 and single _ between them, not starting "
        f"with a digit. Next: attn new-backend {plain or 'acme'}"
    )
    raise ScaffoldError(msg)


def _check_free(name: str) -> None:
    distribution, package = distribution_of(name), package_of(name)
    taken = [row for row in known_rows() if name in (row.name, *row.aliases)]
    if taken:
        owner = " ".join(filter(None, (taken[0].distribution, taken[0].version)))
        here = "is installed" if taken[0].distribution in installed() else "is not installed here"
        msg = f"new-backend: the name {name!r} is taken by {owner}, which {here}; choose another"
    elif distribution in installed():
        msg = f"new-backend: a distribution {distribution} is installed already; choose another name"
    elif module_is_there(package):
        msg = f"new-backend: a Python module {package} can be imported already; choose another name"
    else:
        return
    raise ScaffoldError(msg)


def _library(name: str, kind: str, library: str | None) -> str:
    if library is None:
        return f"{name}_kernels"
    if kind != "library":
        msg = f"new-backend: --library belongs to --kind library, found --kind {kind}; leave one of them out"
        raise ScaffoldError(msg)
    if not all(part.isidentifier() and not iskeyword(part) for part in library.split(".")):
        msg = f"new-backend: found --library {library!r}; accepted: a module as it is imported, such as acme_kernels"
        raise ScaffoldError(msg)
    return library


def _texts(name: str, kind: str, library: str) -> dict[str, str]:
    """Each file of the package by its place in it."""
    known = {
        "name": name,
        "distribution": distribution_of(name),
        "package": package_of(name),
        "library": library,
        "installed": normalized(library.partition(".")[0]),
    }
    about = KINDS[kind]
    known["summary"] = Template(about.summary).substitute(known)
    known["note"] = Template(about.note).substitute(known)
    known["imports"] = Template(about.imports).substitute(known)
    known |= {"settings": about.settings, "environment": about.environment}
    known["test"] = ", ".join(f'"{requirement}"' for requirement in (*_TEST, *about.test))
    templates = files("attn_core").joinpath("templates")

    def text(folder: Traversable, file: str) -> str:
        return Template(folder.joinpath(f"{file}.template").read_text("utf-8")).substitute(known)

    package = package_of(name)
    return {
        "pyproject.toml": text(templates, "pyproject.toml"),
        "LICENSE": templates.joinpath("LICENSE").read_text("utf-8"),
        "README.md": text(templates, "README.md"),
        f"{package}/__init__.py": text(templates, "__init__.py"),
        f"{package}/plugin.py": text(templates.joinpath(kind), "plugin.py"),
        f"{package}/kernel.py": text(templates.joinpath(kind), "kernel.py"),
        f"{package}/py.typed": "",
        f"tests/test_{name}.py": text(templates, "test_backend.py"),
        ".github/workflows/test.yml": text(templates, "test.yml"),
        ".gitignore": "__pycache__/\n*.egg-info/\n/dist/\n",
    }


def _write(target: Path, texts: dict[str, str]) -> None:
    for place, text in texts.items():
        path = target / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
