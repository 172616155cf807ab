"""Check what built wheels and sdists hold: ``python tools/check_distributions.py DIST PROJECT ...``.

DIST has two folders: ``direct``, a wheel made from each project, and ``through-sdist``, an sdist of each and the wheel
made from that.
"""

from __future__ import annotations

import sys
import tarfile
from configparser import ConfigParser
from pathlib import Path
from zipfile import ZipFile

from packaging.metadata import Metadata

SDIST_HOLDS = {"CHANGELOG.md", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml", "tests", ".gitignore"}


def check_project(dist: Path, project: Path) -> str:
    """Check the wheel and the sdist of one project; return a line about them."""
    package = next(project.glob("attn_*/py.typed")).parent
    (wheel,) = dist.glob(f"direct/{package.name}-*-py3-none-any.whl")
    (sdist,) = dist.glob(f"through-sdist/{package.name}-*.tar.gz")
    (wheel_of_sdist,) = dist.glob(f"through-sdist/{package.name}-*.whl")
    assert wheel.read_bytes() == wheel_of_sdist.read_bytes(), f"{sdist.name} builds another wheel than {project} does"
    modules = check_wheel(wheel, package, (project / "LICENSE").read_bytes())
    check_sdist(sdist, package.name)
    return (
        f"{wheel.name}: {modules} files of {package.name}, licence, typing mark, metadata; {sdist.name} builds the same"
    )


def check_wheel(wheel: Path, package: Path, licence: bytes) -> int:
    """Check that a wheel holds its package, whole, and its metadata, and nothing else; return how many files it has."""
    sources = {
        path.relative_to(package.parent).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = next(name.split("/")[0] for name in names if ".dist-info/" in name)
        found = {name for name in names if not name.startswith(f"{info}/")}
        assert found == sources, f"{wheel.name} and {package} differ in {sorted(found ^ sources)}"
        assert f"{package.name}/py.typed" in found, f"{wheel.name} has no py.typed"
        assert archive.read(f"{info}/licenses/LICENSE") == licence, f"{wheel.name} has another LICENSE than its project"
        check_metadata(wheel.name, Metadata.from_email(archive.read(f"{info}/METADATA")))
        points = ConfigParser()
        points.read_string(archive.read(f"{info}/entry_points.txt").decode())
    expected = ["console_scripts"] if package.name == "attn_core" else ["attn.backends"]
    assert points.sections() == expected, f"{wheel.name} has entry points {points.sections()}, expected {expected}"
    return len(found)


def check_metadata(owner: str, metadata: Metadata) -> None:
    """Check what pip and package indexes read."""
    assert metadata.license_expression == "Apache-2.0", f"{owner}: License-Expression is {metadata.license_expression}"
    assert str(metadata.requires_python) == ">=3.10", f"{owner}: Requires-Python is {metadata.requires_python}"
    required = {requirement.name: str(requirement.specifier) for requirement in metadata.requires_dist or ()}
    assert required.get("torch") == ">=2.6", f"{owner}: requires torch{required.get('torch')}"
    assert metadata.description_content_type == "text/markdown", f"{owner}: no README"
    assert "Typing :: Typed" in (metadata.classifiers or ()), f"{owner}: classifiers are missing"


def check_sdist(sdist: Path, package: str) -> None:
    """Check that an sdist holds what builds, explains and tests the package, and nothing of its neighbours."""
    with tarfile.open(sdist) as archive:
        names = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert {"LICENSE", "README.md", "pyproject.toml", package} <= names, f"{sdist.name} holds only {sorted(names)}"
    assert names <= {package, *SDIST_HOLDS}, f"{sdist.name} holds too much: {sorted(names - {package, *SDIST_HOLDS})}"


if __name__ == "__main__":
    for name in sys.argv[2:]:
        print(check_project(Path(sys.argv[1]), Path(name)))
