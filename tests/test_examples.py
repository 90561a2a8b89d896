"""The examples run from end to end, and what they print is what they found."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def digits():
    """Import examples/digits.py, which is no part of any package."""
    for package in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("digits_example", EXAMPLES / "digits.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


ARGUMENTS = ["--epochs", "2", "--batch-size", "32", "--learning-rates", "0.01", "--seeds", "1"]


def test_digits(digits, tmp_path, capsys):
    """Both networks learn, the figure is a PNG, the table and the text hold the accuracies."""
    figure = tmp_path / "digits.png"
    results = digits.main([*ARGUMENTS, "--output", str(figure)])
    assert figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
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
