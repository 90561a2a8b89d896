"""Warnings that name the line of the user, however deep inside the package they arise."""

from __future__ import annotations

import sys
import warnings

_PACKAGE = __name__.partition(".")[0]


def warn(message: str, category: type[Warning] = RuntimeWarning) -> None:
    """Warn at the innermost line that is not the package's own: a function and a layer differ in depth."""
    warnings.warn(message, category, stacklevel=_level())


def _level() -> int:
    """Return the ``stacklevel`` that `warn` needs (Python 3.12 could be told ``skip_file_prefixes`` instead)."""
    frame, level = sys._getframe(1), 1  # level 1 is `warn` itself
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__")):
        frame, level = frame.f_back, level + 1
    return level


def _is_ours(module: object) -> bool:
    """Whether a module is one of the package's."""
    return isinstance(module, str) and module.partition(".")[0] == _PACKAGE
