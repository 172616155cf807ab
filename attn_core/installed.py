"""Which distributions are installed: the first on ``sys.path`` of each name, as import has it."""

from __future__ import annotations

import importlib
import re
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

if sys.version_info >= (3, 12):
    from importlib import metadata
else:
    import importlib_metadata as metadata

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Installed", "forget", "installed", "metadata", "normalized"]

normalized = canonicalize_name

_FOLD = re.compile(r"\n[ \t]+")
"""A field that goes on in the next line."""


class Installed:
    """A distribution that import reaches.

    Attributes:
        name: normalised, ``attn-native`` for ``attn_native``.
        source: the distribution, as importlib.metadata has it.
        folder: where it lies.
        shadowed: other versions of it, which import does not reach, with their folders.
    """

    __slots__ = ("folder", "label", "name", "shadowed", "source")

    def __init__(self, name: str, label: str, folder: str, source: metadata.Distribution) -> None:
        self.name = name
        self.folder = folder
        self.source = source
        self.shadowed: tuple[tuple[str, str], ...] = ()
        self.label = label

    @property
    def version(self) -> str:
        """Its version; from the folder's name where that has it, which spares the reading of METADATA."""
        stem, _, kind = self.label.rpartition(".")
        version = stem.partition("-")[2]
        if version and kind == "dist-info":
            return version
        written = (self.headers() or {}).get("version", [])
        return written[0] if written else version.partition("-")[0]

    @property
    def is_egg_info(self) -> bool:
        """Whether its metadata are in setuptools' own form."""
        return self.label.lower().endswith("egg-info")

    def read(self, file: str) -> str | None:
        """The text of one of its metadata files, None where there is none."""
        return self.source.read_text(file)

    def headers(self) -> dict[str, list[str]] | None:
        """The fields of its METADATA or PKG-INFO by lower-case name; None where it is absent, no text, or has no name.

        Read line by line: the parsers of ``email``, which importlib.metadata uses, take a tenth of a listing's time to
        import, and importlib.metadata has another answer to a file that is not there on each version of Python.
        """
        try:
            text = self.read("METADATA") or self.read("PKG-INFO") or ""
        except UnicodeDecodeError:
            return None
        fields: dict[str, list[str]] = {}
        for line in _FOLD.sub(" ", text.partition("\n\n")[0]).splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip().lower(), []).append(value.strip())
        return fields if "name" in fields else None


@cache
def installed() -> Mapping[str, Installed]:
    """Every distribution that import reaches, by normalised name. Read once; ``forget`` reads again."""
    found: dict[str, list[Installed]] = {}
    sources: Iterable[Any] = metadata.distributions()  # typed by either of the two libraries
    for source in sources:
        item = _read(source)
        if item is not None:
            found.setdefault(item.name, []).append(item)
    return {name: items[0] if len(items) == 1 else _first(items) for name, items in found.items()}


def forget() -> None:
    """Read again next time; distributions may have come or gone."""
    installed.cache_clear()
    importlib.invalidate_caches()


def _read(source: metadata.Distribution) -> Installed | None:
    path = getattr(
        source, "_path", None
    )  # the folder's name is the distribution's; METADATA may be unreadable, and is slow
    if path is None:
        name = source.metadata["Name"]
        return Installed(normalized(name), "", "", source)
    label = path.parent.name if path.name == "EGG-INFO" else path.name
    name = label.rpartition(".")[0].partition("-")[0]
    if not name[:1].isalnum():  # pip renames what it is about to remove to ~ttn_native-0.1.0.dist-info
        return None
    return Installed(normalized(name), label, str(path.parent), source)


def _first(items: list[Installed]) -> Installed:
    """Return the one that import reaches, with the versions that it hides."""
    first = max((item for item in items if item.folder == items[0].folder), key=_rank)
    version = first.version
    others = {item.version: item.folder for item in reversed(items)}
    first.shadowed = tuple(sorted((other, folder) for other, folder in others.items() if other != version))
    return first


def _rank(item: Installed) -> tuple[bool, bool, Version]:
    """Order two of one name in one folder, which a cut-off upgrade leaves: what is whole first, then the newest."""
    try:
        version = Version(item.version)
    except InvalidVersion:
        version = Version("0")
    return item.headers() is not None, not item.is_egg_info, version
