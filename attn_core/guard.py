"""Runs the code of wheels and libraries that others wrote, and hands back what it raised."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_LONGEST = 500


class Raised:
    """What the code raised."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __str__(self) -> str:
        return one_line(self.error)


class Done(Generic[T]):
    """What the code returned."""

    __slots__ = ("value",)

    def __init__(self, value: T) -> None:
        self.value = value


def attempt(work: Callable[[], T]) -> Done[T] | Raised:
    """Call ``work``, and return what it returned or raised.

    >>> attempt(lambda: 1).value
    1
    >>> str(attempt(lambda: int("one")))
    "ValueError: invalid literal for int() with base 10: 'one'"
    """
    # Broad, and the only one in attn: what runs here was written by anybody, and one bad wheel must not stop another.
    # A module that calls sys.exit() when it is imported raises SystemExit, which is no Exception; nor are errors of
    # libraries that derive from BaseException. Ctrl-C is the user's and goes on.
    try:
        return Done(work())
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001
        return Raised(error)


def one_line(error: BaseException) -> str:
    """An error as one line of text: its type and its message.

    >>> one_line(ImportError("no module named 'acme_config'"))
    "ImportError: no module named 'acme_config'"
    """
    from traceback import format_exception_only  # survives an error whose own __str__ raises

    lines = format_exception_only(type(error), error)
    text = f"{type(error).__name__}: {error}" if isinstance(error, SyntaxError) else "".join(lines)
    text = plain(text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def plain(text: str) -> str:
    r"""Text on one line, without control characters, so that no wheel can write escapes to a terminal.

    >>> plain("two\nlines and \x1b[31mred")
    'two lines and [31mred'
    """
    spaced = " ".join(text.split())
    return spaced if spaced.isprintable() else "".join(letter for letter in spaced if letter.isprintable())
