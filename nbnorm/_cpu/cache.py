"""Compiled kernels on disk, so that a new process need not compile them again. Every failure is a miss.

Numba's own cache does not notice a change of a function that a kernel calls, nor of a compiler flag; two processes can
mix up its index; a damaged file or a full disk raises out of the user's call; and where it finds no folder to write to
it fails at import. Here one file holds one compiled signature. Its name is a digest of everything that the code depends
on, it comes into being whole or not at all, and what it holds is verified before it is run.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import pickle
import platform
import secrets
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from numba import config
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

# Folders of other sources, versions and flags that stay beside a new one.
GENERATIONS = 8
# Settings of Numba that change nothing about the code of a kernel, besides those of CUDA.
_IRRELEVANT = {
    "CACHE_DIR", "CACHE_LOCATOR_CLASSES", "COLOR_SCHEME", "DEBUG_CACHE", "DEVELOPER_MODE",
    "DISABLE_PERFORMANCE_WARNINGS", "FULL_TRACEBACKS", "FUNCTION_CACHE_SIZE", "NUMBA_DEFAULT_NUM_THREADS",
    "NUMBA_NUM_THREADS", "RUNNING_UNDER_PROFILER", "SHOW_HELP", "THREADING_LAYER", "THREADING_LAYER_PRIORITY",
}  # fmt: skip
# A place that is missing or may not be written to is a way to install software, not a fault.
_HARMLESS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR}
_HERE = Path(__file__).parent


def _source_digest() -> str | None:
    """Digest of everything that kernels are made of; None where there are no source files, as in a zip."""
    digest = hashlib.sha256()
    try:
        names = ("_activation.py", "_inner.py", "_math.py", "_rounds.py")
        shared = [_HERE.parent / name for name in names]
        for path in sorted([*_HERE.glob("*.py"), *shared]):
            digest.update(b"%s\0%s\0" % (path.name.encode(), path.read_bytes()))
    except OSError:
        return None
    return digest.hexdigest()


# Read while the sources are being imported: what is edited later belongs to the next process.
_SOURCES = _source_digest()


class Cache:
    """The compiled signatures of one kernel, with the methods that Numba's dispatcher calls."""

    def __init__(self, kernel: Any) -> None:
        self.name = f"{kernel.__module__}.{kernel.__name__}".removeprefix("nbnorm._cpu.")
        self.options = sorted((name, _stable(value)) for name, value in kernel.targetoptions.items())

    @property
    def cache_path(self) -> str:
        """Where Numba's statistics say that the code is."""
        return str(next(iter(folders()), ""))

    def load_overload(self, signature: Any, target: Any) -> CompileResult | None:
        """Return the verified code of a signature, or None."""
        target.refresh()  # as before a compilation: loaded code relies on what is registered here
        key = self._key(signature, target)
        for folder in folders():
            path = folder / _file_name(self.name, key)
            try:
                return _verified(path.read_bytes(), key, signature, target)
            except Exception as error:  # a damaged file may raise anything
                _report(error, f"{path} cannot be used")
        return None

    def save_overload(self, signature: Any, result: Any) -> None:
        """Keep the code of a signature in the first folder that takes it."""
        if result.lifted or result.library.has_dynamic_globals:
            return
        key = self._key(signature, result.target_context)
        try:
            payload = dumps((key, result._reduce()))
        except Exception as error:
            _report(error, f"{self.name} cannot be stored")
        else:
            content = _digest(payload) + payload
            any(_write(folder, _file_name(self.name, key), content) for folder in folders())

    def enable(self) -> None:
        """Do nothing: a cache has no other state than its files."""

    disable = flush = enable

    def _key(self, signature: Any, target: Any) -> str:
        """Everything besides the generation that the code depends on."""
        return repr((self.name, signature, self.options, target.codegen().magic_tuple()))


def folders() -> list[Path]:
    """Return the folders of this generation, the preferred one first; they may be missing or read-only."""
    if _SOURCES is None:
        return []
    roots = [config.CACHE_DIR] if config.CACHE_DIR else [_HERE / "__pycache__", _user_folder()]  # type: ignore[attr-defined]
    return [Path(root).absolute() / f"nbnorm-{_generation()[:16]}" for root in roots if root is not None]


def _generation() -> str:
    """Digest of the sources, the versions and the settings that every kernel depends on."""
    relevant = [
        (name, repr(value))
        for name, value in sorted(vars(config).items())
        if name.isupper() and name not in _IRRELEVANT and not name.startswith("CUDA")
    ]
    versions = (numba.__version__, llvmlite.__version__, np.__version__, sys.version, platform.machine())
    return _digest(repr((_SOURCES, versions, relevant)).encode()).hex()


def _user_folder() -> Path | None:
    """Return the user's folder for caches, None without a home."""
    if sys.platform == "win32":
        root = os.environ.get("LOCALAPPDATA", "")
    elif sys.platform == "darwin":
        root = os.path.expanduser("~/Library/Caches")
    else:
        root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root, "nbnorm") if os.path.isabs(root) else None


def _stable(option: Any) -> str:
    """Write an option out; the order of a set differs from process to process."""
    return repr(sorted(option) if isinstance(option, set) else option)


def _file_name(kernel: str, key: str) -> str:
    return f"{kernel}-{_digest(key.encode()).hex()[:32]}.nbc"


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _verified(content: bytes, key: str, signature: Any, target: Any) -> CompileResult:
    """Rebuild what a file holds; raise unless it is whole, and the code of this very key and signature."""
    digest, payload = content[:32], content[32:]
    if digest != _digest(payload):
        raise ValueError("it is damaged")
    stored_key, reduced = pickle.loads(payload)
    if stored_key != key:
        raise ValueError("it belongs to another kernel")
    result: Any = CompileResult._rebuild(target, *reduced)
    if tuple(result.signature.args) != tuple(signature):
        raise ValueError(f"it is code for {result.signature.args}, expected {signature}")
    return result  # type: ignore[no-any-return]


def _write(folder: Path, name: str, content: bytes) -> bool:
    """Write a file whole or not at all, whoever else writes it; return whether it is there."""
    temporary = folder / f".{name}.{secrets.token_hex(8)}"
    try:
        if not folder.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _drop_old_generations(folder.parent)
        temporary.write_bytes(content)
        temporary.replace(folder / name)
    except OSError as error:
        _report(error, f"{folder} takes no file")
        return False
    finally:
        _delete(temporary)
    return True


def _drop_old_generations(root: Path) -> None:
    """Delete all but the youngest generations; a process that still uses one compiles again."""
    for folder in sorted(root.glob("nbnorm-*"), key=_last_written)[:-GENERATIONS]:
        shutil.rmtree(folder, ignore_errors=True)


def _delete(path: Path) -> None:
    """Delete a file that may not be there, or not be ours."""
    with contextlib.suppress(OSError):
        path.unlink()


def _last_written(folder: Path) -> float:
    """Time of the last write, long ago for what another process has just deleted."""
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


_reported = False


def _report(error: Exception, what: str) -> None:
    """Warn of a fault, once in the life of the process: the next kernel has the same one."""
    global _reported
    if not _reported and not (isinstance(error, OSError) and error.errno in _HARMLESS):
        _reported = True
        message = f"kernels are compiled anew, since {what}: {type(error).__name__}: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
