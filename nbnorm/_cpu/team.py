"""When a team of threads may work on a kernel: threading layers, callers at the same time, forks.

Numba's workqueue layer aborts the process when two threads use it at once. GNU OpenMP kills a forked child whose
parent has used it, and a grandchild hangs. A child that is forked while another thread compiles waits forever for the
compiler's locks. Parallel kernels have serial twins with the same bits, which run wherever there is no safe team.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable

import numba
from numba.core.compiler_lock import global_compiler_lock
from numba.np.ufunc import parallel

# Seconds that a fork waits for the end of a compilation in another thread. It must go on in the end, for the
# compiling thread may itself wait for something that the forking one holds, such as an import.
PATIENCE = 30.0


class Team:
    """The threads of this process."""

    def __init__(self) -> None:
        self.enabled = os.environ.get("NBNORM_PARALLEL", "1") != "0"
        self._started = False
        self.shared = False  # whether callers at the same time may each have a team
        self._busy = threading.Lock()
        # Numba's own function, which starts the threads; it takes two locks, and once they run is not called again.
        self._count: Callable[[], int] = numba.get_num_threads

    def size(self) -> int:
        """Return how many threads a kernel may have; the first call starts them."""
        if self.enabled and not self._started:
            self._start()
        return int(self._count()) if self.enabled else 1

    def enter(self) -> Callable[[], None] | None:
        """Take a team that is not shared; return what is to be called at the end, or None where there is none."""
        return self._busy.release if self._busy.acquire(blocking=False) else None

    def after_fork_in_child(self) -> None:
        """Take new locks, and no team that the child has only the memory of."""
        self._busy = threading.Lock()
        if layer() == "omp":
            self.enabled = False

    def _start(self) -> None:
        """Let Numba choose its threading layer, and say what is lost where the choice is poor."""
        self._started = True
        try:
            numba.get_num_threads()
        except ValueError as error:
            self.enabled = False
            _warn(f"nbnorm runs on one thread, since Numba has no threading layer: {error}")
        else:
            self.shared = layer() in ("omp", "tbb")
            if layer() == "workqueue" != numba.config.THREADING_LAYER:  # type: ignore[attr-defined]
                _warn(
                    "Numba found neither TBB nor OpenMP and fell back to its workqueue layer, which serves one caller "
                    "at a time: of several Python threads that use nbnorm at once, one runs in parallel"
                )
            self._count = getattr(parallel, "_get_num_threads", self._count)


def layer() -> str | None:
    """Name of Numba's threading layer; None until threads are started."""
    try:
        return str(numba.threading_layer())  # type: ignore[attr-defined]
    except ValueError:
        return None


class _ForkGuard:
    """Holds the compiler's lock during a fork, so that no child is born in the middle of a compilation."""

    def __init__(self) -> None:
        self._lock = getattr(global_compiler_lock, "_lock", threading.RLock())
        self._own = threading.local()

    def before(self) -> None:
        """Wait for other threads to finish what they compile."""
        self._own.held = False  # in case the next line is interrupted
        self._own.held = self._lock.acquire(timeout=PATIENCE)

    def after_in_parent(self) -> None:
        """Let compilations go on."""
        if self._own.held:
            self._lock.release()

    def after_in_child(self) -> None:
        """Let compilations go on, or say that they cannot."""
        self.after_in_parent()
        if not self._own.held:
            _warn(
                f"this process was forked while another thread had been compiling for {PATIENCE:g} s; it will hang if "
                "it compiles, too. Compile before you fork"
            )


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


team = Team()
if hasattr(os, "register_at_fork"):
    _guard = _ForkGuard()
    os.register_at_fork(
        before=_guard.before, after_in_parent=_guard.after_in_parent, after_in_child=_guard.after_in_child
    )
    os.register_at_fork(after_in_child=team.after_fork_in_child)
