"""The examples run from end to end, and what they print is what they found."""

import importlib.util
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.slow

PNG = b"\x89PNG\r\n\x1a\n"
# The least that each one can do: this is about whether they run, not about what they find.
SHORT = {
    "accumulation": ["--epochs", "1", "--smallest", "16"],
    "batch_sizes": ["--epochs", "1", "--seeds", "1", "--smallest", "32"],
    "camera": ["--frames", "2"],
    "convolution": ["--epochs", "1", "--repeats", "1"],
    "drift": ["--epochs", "1"],
    "generalization": ["--epochs", "1", "--seeds", "1"],
    "gradient_norms": ["--depth", "6", "--seeds", "1"],
    "initialization": ["--epochs", "1", "--seeds", "1"],
    "online": ["--samples", "60", "--seeds", "1"],
    "sequences": ["--epochs", "1", "--seeds", "1", "--longest", "8"],
    "standardize": [],
    "step_share": ["--repeats", "1"],
    "transformer": ["--epochs", "1", "--depth", "1", "--seeds", "1"],
    "volumes": ["--epochs", "1", "--scans", "24", "--seeds", "1"],
}
# These have tests of their own: below, and with PyTorch.
ELSEWHERE = {"digits", "networks", "pytorch_resnet"}


@contextmanager
def example(name):
    """Import an example, which is no part of any package, as if it were run in its folder."""
    for package in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(f"{name}_example", EXAMPLES / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(EXAMPLES))
        del sys.modules[spec.name]


def run(name, folder):
    """Run an example in short; return its results and its picture."""
    with example(name) as module:
        results = module.main([*SHORT[name], "--output", str(folder / "picture.png")])
    return results, (folder / "picture.png").read_bytes()


def numbers(results):
    """All numbers in nested results, as one array."""
    if isinstance(results, dict):
        results = list(results.values())
    if isinstance(results, (list, tuple)):
        return np.concatenate([numbers(part) for part in results])
    return np.atleast_1d(np.asarray(results, float)).ravel()


def test_all_examples_are_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == SHORT.keys() | ELSEWHERE


@pytest.mark.parametrize(
    "name", sorted(SHORT.keys() - {"accumulation", "camera", "gradient_norms", "standardize"})
)
def test_runs(name, tmp_path, capsys):
    """It prints a table, saves a picture and returns numbers."""
    results, picture = run(name, tmp_path)
    assert picture.startswith(PNG)
    assert np.isfinite(numbers(results)).all()
    assert len(capsys.readouterr().out.splitlines()) > 2


def test_accumulation(tmp_path):
    """Two phases give the gradient of the whole batch, statistics of the parts another one."""
    results, picture = run("accumulation", tmp_path)
    assert picture.startswith(PNG)
    assert results["two phases"][0].max() < 1e-5
    assert results["own statistics"][0].min() > 1e-2


def test_camera(tmp_path):
    """The folded convolution shows the same picture."""
    results, picture = run("camera", tmp_path)
    assert picture.startswith(PNG)
    np.testing.assert_allclose(results["y"], results["y_folded"], rtol=0, atol=1e-4)
    assert results["y"].std() > 0.1


def test_gradient_norms(tmp_path):
    """With batch norm the scale of the weights cancels; without, it multiplies layer by layer."""
    results, picture = run("gradient_norms", tmp_path)
    assert picture.startswith(PNG)
    np.testing.assert_allclose(results["batch norm", 0.5], results["batch norm", 2], rtol=0.1)
    assert results["plain", 2][0, 0] > 500 * results["plain", 0.5][0, 0]


def test_standardize(tmp_path):
    """Merged moments are right where sums of squares have lost all digits."""
    results, picture = run("standardize", tmp_path)
    assert picture.startswith(PNG)
    assert results["nbnorm.Moments"].max() < 1e-6
    assert results["squares, float32"].max() > 0.1


@pytest.fixture(scope="module")
def digits():
    """Give examples/digits.py."""
    with example("digits") as module:
        yield module


ARGUMENTS = ["--epochs", "2", "--batch-size", "32", "--learning-rates", "0.01", "--seeds", "1"]


def test_digits(digits, tmp_path, capsys):
    """Both networks learn, the figure is a PNG, the table and the text hold the accuracies."""
    figure = tmp_path / "digits.png"
    results = digits.main([*ARGUMENTS, "--output", str(figure)])
    assert figure.read_bytes().startswith(PNG)
    assert [result.network for result in results] == ["batch norm", "plain"]
    printed = capsys.readouterr().out
    for result in results:
        assert result.learning_rate == 0.01
        assert result.accuracy.shape == (1, 2)
        # Ten digits: guessing gives 0.1, and two epochs are enough for most of the way.
        assert 0.8 < result.final_accuracy[0] <= 1
        assert f"{result.median_accuracy:.1%}" in printed
        assert result.seconds > 0
    assert 0 < results[0].nbnorm_share < 1
    assert results[1].nbnorm_share == 0


def test_digits_again(digits, tmp_path, monkeypatch):
    """The same seed gives the same accuracies; --no-plot leaves no file behind."""
    monkeypatch.chdir(tmp_path)
    first, second = (digits.main([*ARGUMENTS, "--no-plot"]) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.accuracy, other.accuracy)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "must be at least 1, not 0"),
        (["--learning-rates", "-1"], "must be positive and finite"),
        (["--output", "digits.jpg"], "must end in .png"),
    ],
)
def test_digits_refuses(digits, arguments, message, capsys):
    """A bad argument ends the run at once, with a reason."""
    with pytest.raises(SystemExit):
        digits.main(arguments)
    assert message in capsys.readouterr().err
