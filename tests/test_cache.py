"""Compiled kernels on disk: found again when they fit, and a fault of the cache is never a fault of the call."""

import errno
import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from numba.core import event

import nbnorm
from nbnorm._cpu import cache, launch
from processes import finish, run, start

numba_config = pytest.importorskip("numba").config
pytestmark = pytest.mark.skipif(bool(numba_config.DISABLE_JIT), reason="nothing is compiled")


def scale(x, factor):
    """Stand for a kernel that compiles in no time."""
    for i in range(x.shape[0]):
        x[i] *= factor


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Put the cache into an empty folder."""
    monkeypatch.setattr(numba_config, "CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_reported", False)
    return tmp_path / "cache"


def compiled_by(dtype=np.float32, factor=2.0, **options):
    """Call the kernel as a new process would; check the result; return how often it was compiled."""
    x = np.arange(5, dtype=dtype)
    with event.install_recorder("numba:compile") as recorder:
        launch.kernel(scale, **options)(x, factor)
    np.testing.assert_array_equal(x, np.arange(5) * factor)
    return len(recorder.buffer) // 2


def files(folder):
    """Every file of the cache, temporary ones too."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_found_again(folder):
    """A second process compiles nothing; every signature and every set of options has a file of its own."""
    for count, (dtype, options) in enumerate(
        [(np.float32, {}), (np.float64, {}), (np.float32, {"fastmath": {"reassoc", "contract"}})]
    ):
        assert compiled_by(dtype, **options) == 1
        assert compiled_by(dtype, **options) == 0
        assert len(files(folder)) == count + 1


DAMAGE = {
    "empty": lambda content: b"",
    "shorter than a digest": lambda content: content[:20],
    "truncated": lambda content: content[:-1],
    "one bit": lambda content: content[:500] + bytes([content[500] ^ 1]) + content[501:],
    "text": lambda content: b"not a kernel\n",
    "pickle of something else": lambda content: cache._digest(b"N.") + b"N.",
    "no pickle": lambda content: cache._digest(b"???") + b"???",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_file(damage, folder):
    """Warned of once, compiled anew, and repaired for the next process."""
    compiled_by()
    (path,) = files(folder)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(RuntimeWarning, match=r"kernels are compiled anew, since .*scale.* cannot be used"):
        assert compiled_by() == 1
    assert compiled_by() == 0
    assert files(folder) == [path]


def test_one_warning_for_many_faults(folder):
    """A folder of damaged files is one message."""
    for dtype in (np.float32, np.float64):
        compiled_by(dtype)
    for path in files(folder):
        path.write_bytes(b"")
    with pytest.warns(RuntimeWarning, match="cannot be used") as caught:
        assert [compiled_by(dtype) for dtype in (np.float32, np.float64)] == [1, 1]
    assert len(caught) == 1


def test_file_under_a_foreign_name(folder):
    """The code of another signature is not run, whatever its file is called: that was memory corruption."""
    compiled_by(np.float32)
    (single,) = files(folder)
    compiled_by(np.float64)
    double = next(path for path in files(folder) if path != single)
    shutil.copy(single, double)
    with pytest.warns(RuntimeWarning, match="it belongs to another kernel"):
        assert compiled_by(np.float64) == 1


def test_code_of_another_signature_under_the_right_key(folder, monkeypatch):
    """Even where the key lies, the signature of the loaded code is compared with the one that is asked for."""
    monkeypatch.setattr(cache.Cache, "_key", lambda self, signature, target: "the same for all")
    compiled_by(np.float32)
    with pytest.warns(RuntimeWarning, match="it is code for"):
        assert compiled_by(np.float64) == 1


CHANGES = {
    "sources": lambda patch: patch.setattr(cache, "_SOURCES", "0" * 64),
    "Numba": lambda patch: patch.setattr(cache.numba, "__version__", "0.0"),
    "NumPy": lambda patch: patch.setattr(cache.np, "__version__", "0.0"),
    "Python": lambda patch: patch.setattr(cache.sys, "version", "4.0"),
    "bounds checks": lambda patch: patch.setattr(numba_config, "BOUNDSCHECK", 1),
    "optimization": lambda patch: patch.setattr(numba_config, "LOOP_VECTORIZE", 0),
    "processor": lambda patch: patch.setattr(
        cache.Cache, "_key", lambda self, s, target: repr((self.name, s, self.options, "another CPU"))
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_stale_code_is_not_found(change, folder, monkeypatch):
    """What was compiled from other sources, by other versions or with other flags."""
    compiled_by()
    with monkeypatch.context() as patch:
        change(patch)
        assert compiled_by() == 1
    assert compiled_by() == 0


def test_the_digest_covers_every_source_of_kernels(tmp_path, monkeypatch):
    """Of all that kernels import, and that says how they are compiled: what it left out would keep stale code alive."""
    package = Path(nbnorm.__file__).parent
    copy = shutil.copytree(package, tmp_path / "nbnorm", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(cache, "_HERE", copy / "_cpu")
    expected = cache._source_digest()
    own = re.compile(r"^from nbnorm\.(\w+) import", re.MULTILINE)
    without_influence = {"_cpu", "_options", "_view"}  # what Python does before it calls a kernel
    sources, found = list((package / "_cpu").glob("*.py")), set()
    while sources:
        path = sources.pop()
        names = set(own.findall(path.read_text())) - without_influence
        sources += {package / f"{name}.py" for name in names} - found
        found |= {path}
    assert {"_math.py", "_rounds.py"} <= {path.name for path in found}
    for path in found:
        source = copy / path.relative_to(package)
        text = source.read_text()
        source.write_text(text + "# changed")
        assert cache._source_digest() != expected, path.name
        source.write_text(text)
    assert cache._source_digest() == expected


def test_settings_without_influence(folder, monkeypatch):
    """The number of threads and the threading layer change no code."""
    compiled_by()
    monkeypatch.setattr(numba_config, "NUMBA_NUM_THREADS", 77)
    monkeypatch.setattr(numba_config, "THREADING_LAYER", "workqueue")
    assert compiled_by() == 0


def test_bounds_checks_after_a_warm_cache(folder, monkeypatch):
    """NUMBA_BOUNDSCHECK=1 is no use if the code comes from a run without it."""

    def beyond(x, i):
        x[i] = 0

    x = np.zeros(3)
    launch.kernel(beyond)(x, 2)
    monkeypatch.setattr(numba_config, "BOUNDSCHECK", 1)
    with pytest.raises(IndexError):
        launch.kernel(beyond)(x, 2000)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_folder_that_takes_no_file(number, folder, monkeypatch):
    """Read-only is silent, a full or failing disk a warning; the call is right, and no half of a file stays."""
    write = Path.write_bytes

    def fail(path, content):
        write(path, content[:100])
        raise OSError(number, "simulated")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert compiled_by() == compiled_by() == 1
    silent = number in (errno.EROFS, errno.EACCES)
    assert [str(w.message).count("takes no file") for w in caught] == ([] if silent else [1])
    assert files(folder) == []


def test_interrupt_while_writing(folder, monkeypatch):
    """Ctrl-C goes through, and leaves no half of a file."""
    write = Path.write_bytes

    def interrupt(path, content):
        write(path, content[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compiled_by()
    assert files(folder) == []
    monkeypatch.undo()


def test_code_that_cannot_be_stored(folder, monkeypatch):
    """A version of Numba that packs its results differently costs the cache, not the call."""
    monkeypatch.setattr(cache, "dumps", lambda value: 1 / 0)
    with pytest.warns(RuntimeWarning, match="cannot be stored: ZeroDivisionError"):
        assert compiled_by() == 1


def test_second_folder(tmp_path, monkeypatch):
    """Where the package is read-only, the user's folder keeps the code."""
    monkeypatch.setattr(numba_config, "CACHE_DIR", "")
    monkeypatch.setattr(cache, "_HERE", tmp_path / "file" / "below")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert [compiled_by(), compiled_by()] == [1, 0]
    assert len(files(tmp_path / "user" / "nbnorm")) == 1


def test_no_folder_at_all(tmp_path, monkeypatch):
    """XDG_CACHE_HOME="" means unset, not the current folder; without a home there is no cache, and no error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(numba_config, "CACHE_DIR", "")
    monkeypatch.setattr(cache, "_HERE", tmp_path / "file" / "below")
    (tmp_path / "file").touch()
    for home in ("/dev/null", "relative"):
        monkeypatch.setenv("HOME", home)
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        assert compiled_by() == 1
    monkeypatch.setattr(cache, "_SOURCES", None)  # the package is in a zip
    assert cache.folders() == []
    assert compiled_by() == 1
    assert files(tmp_path) == [tmp_path / "file"]


def test_old_generations_are_dropped(folder, monkeypatch):
    """A folder per edit of the sources must not pile up."""
    for number in range(cache.GENERATIONS + 3):
        monkeypatch.setattr(cache, "_SOURCES", str(number))
        assert compiled_by() == 1
    assert len(list(folder.iterdir())) == cache.GENERATIONS
    assert compiled_by() == 0


# ---- whole processes, with the real kernels ----

# One small serial kernel that calls a formula of another file.
RSTD = """
import warnings; warnings.simplefilter("error")
import numpy as np, nbnorm
from numba.core import event
with event.install_recorder("numba:compile") as recorder:
    value = nbnorm.Moments(4.0, np.zeros(1), np.full(1, 8.0)).rstd(2.0)
print(value.item(), len(recorder.buffer) > 0)
"""


@pytest.fixture
def package(tmp_path):
    """Copy the package to where it may be changed."""
    shutil.copytree(
        Path(nbnorm.__file__).parent,
        tmp_path / "lib" / "nbnorm",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    return tmp_path / "lib"


def test_changed_formula(package):
    """A kernel does not survive a change of a formula in another file: Numba's own cache kept the old one."""
    environment = {"package": package, "NUMBA_CACHE_DIR": None}
    assert run(RSTD, **environment)[0] == "0.5 True"
    assert run(RSTD, **environment)[0] == "0.5 False"
    source = package / "nbnorm" / "_math.py"
    text = source.read_text()
    # Of another length: Python itself takes an edit of the same second and size for none.
    changed = re.sub(r"np\.float64\(1\.0\)( / np\.float64\(sqrt\(var\)\))", r"np.float64(9.00)\1", text)
    assert len(changed) == len(text) + 1
    source.write_text(changed)
    assert run(RSTD, **environment)[0] == "4.5 True"
    source.write_text(text)
    assert run(RSTD, **environment)[0] == "0.5 False"


def test_nowhere_to_write(package):
    """A read-only installation without a home: import and call work, without any warning."""
    (package / "nbnorm" / "_cpu" / "__pycache__").touch()
    places = {"NUMBA_CACHE_DIR": None, "HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null"}
    for _ in range(2):
        assert run(RSTD, package=package, **places)[0] == "0.5 True"


def test_full_disk(tmp_path):
    """The system refuses the write half way through: a warning, the right result, nothing left behind."""
    code = """
import resource, warnings
import numpy as np, nbnorm
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    value = nbnorm.Moments(4.0, np.zeros(1), np.full(1, 8.0)).rstd(2.0)
print(value.item(), [w.category.__name__ for w in caught if "takes no file" in str(w.message)])
"""
    pytest.importorskip("resource")
    assert run(code, NUMBA_CACHE_DIR=tmp_path)[0] == "0.5 ['RuntimeWarning']"
    assert files(tmp_path) == []


UPDATES = """
import sys
import numpy as np, nbnorm
types = [np.float32, np.float64]
for dtype in types[::{order}]:
    mean, var = np.zeros(3, dtype), np.ones(3, dtype)
    nbnorm.update_running_stats(mean, var, nbnorm.Moments(3.0, np.ones(3), np.full(3, 6.0)), momentum=0.5)
    assert (mean == 0.5).all() and (var == 2).all() and mean.dtype == dtype, (mean, var)
print("right")
"""


@pytest.mark.parametrize("count", [pytest.param(16, marks=pytest.mark.processes), 4])
def test_race_for_a_cold_cache(count, tmp_path):
    """Many processes, two types in either order, one empty folder: Numba's index mixed the types up."""
    racers = [
        start(UPDATES.format(order=(-1) ** i), NUMBA_CACHE_DIR=tmp_path, NUMBA_NUM_THREADS=1)
        for i in range(count)
    ]
    for process in racers:
        line, err = finish(process, timeout=300)
        assert (line, "RuntimeWarning" in err) == ("right", False)
    assert {path.suffix for path in files(tmp_path)} == {".nbc"}
    checked = UPDATES.replace("print", "import numba.core.event as e; print").format(order=1)
    assert run(checked, NUMBA_CACHE_DIR=tmp_path)[0] == "right"


STEP = """
import json, hashlib
import numpy as np, nbnorm
from numba.core import event
rng = np.random.default_rng(3)
digests = []
with event.install_recorder("numba:compile") as recorder:
    for shape in ((16, 8, 20, 20), (4, 8, 5, 5)):  # a team of threads, and one thread
        x, dy = rng.standard_normal((2, *shape)).astype(np.float32)
        layer = nbnorm.BatchNorm(8)
        found = [layer(x), layer.backward(dy), *layer.grads.values(), layer.running_mean, layer.running_var]
        digests += [hashlib.sha256(a.tobytes()).hexdigest() for a in found]
print(json.dumps([len(recorder.buffer) > 0, digests]))
"""


@pytest.mark.processes
def test_both_twins_from_the_disk(tmp_path):
    """A training step in a new process compiles nothing, under any threading layer, and has the same bits."""
    expected = None
    for number, layer in enumerate(("omp", "omp", "workqueue")):
        environment = {"NUMBA_THREADING_LAYER": layer, "NUMBA_NUM_THREADS": 2}
        compiled, digests = json.loads(run(STEP, NUMBA_CACHE_DIR=tmp_path, **environment)[0])
        expected = expected or digests
        assert compiled == (number == 0)
        assert digests == expected
