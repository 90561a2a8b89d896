"""The reference itself, against derivatives by differences and against hand-made numbers."""

import numpy as np
import pytest

import oracle


@pytest.mark.parametrize("constant", [False, True], ids=["training", "eval"])
def test_gradients_are_the_derivatives(rng, constant):
    """Central differences of sum(dy * y) in a wider type, for every input value."""
    x = rng.standard_normal((4, 3, 5))
    dy, weight, bias = rng.standard_normal(x.shape), rng.standard_normal(3), rng.standard_normal(3)
    running = (rng.standard_normal(3), rng.uniform(0.5, 2, 3)) if constant else None

    def loss(x, weight, bias):
        return float(np.sum(oracle.batch_norm(x, weight, bias, running=running).y * dy))

    gradients = oracle.differentiate(dy, oracle.batch_norm(x, weight, bias, running=running))
    for name, position in (("dx", 0), ("dweight", 1), ("dbias", 2)):
        found = getattr(gradients, name).ravel()
        for index in range(found.size):
            ends = []
            for step in (1e-6, -1e-6):
                arguments = [x.copy(), weight.copy(), bias.copy()]
                arguments[position].flat[index] += step
                ends.append(loss(*arguments))
            assert found[index] == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6, abs=1e-7)


def test_numbers_by_hand():
    """Two channels, two values each: mean 1 and 3, variance 1 and 4, running values halfway with ddof 1."""
    x = np.array([[0.0, 1.0], [2.0, 5.0]])
    forward = oracle.batch_norm(x, np.array([1.0, 10.0]), np.array([0.0, 7.0]), eps=0.0)
    np.testing.assert_array_equal(forward.y, [[-1, -3], [1, 17]])
    np.testing.assert_array_equal(forward.per_slot("mean"), [1, 3])
    np.testing.assert_array_equal(forward.per_slot("var"), [1, 4])
    mean, var = oracle.updated_running((np.zeros(2), np.ones(2)), forward, momentum=0.5)
    np.testing.assert_array_equal(mean, [0.5, 1.5])
    np.testing.assert_array_equal(var, [1.5, 4.5])


@pytest.mark.parametrize("value", [0.1, 1e10, 2.0**24 + 1, 1e300])
def test_a_constant_has_no_variance(value):
    """The mean of a constant is that constant and its variance is 0, also where n * value is rounded."""
    forward = oracle.batch_norm(np.full((7, 1, 4999), value), bias=np.array([0.3]))
    assert forward.var.item() == 0
    assert forward.mean.item() == value
    np.testing.assert_array_equal(forward.y, np.float64(0.3))


def test_comparisons_can_fail():
    """A bound that is too small, a NaN on one side, a sign of zero: each is an error."""
    one = np.ones(3)
    oracle.assert_within(one + 1e-9, one, 1e-8)
    with pytest.raises(AssertionError, match="3 of 3 values are off"):
        oracle.assert_within(one + 1e-7, one, 1e-8)
    with pytest.raises(AssertionError, match="1 of 3 values are off, the worst at \\(1,\\)"):
        oracle.assert_within(np.array([1, np.nan, 1]), one, 1e-8)
    with pytest.raises(AssertionError, match="differ in their bits"):
        oracle.assert_same_bits(np.zeros(2), -np.zeros(2))
