"""Training with PyTorch's layers and with ours, from the same start, over the same batches."""

import numpy as np
import pytest

import nbnorm
import oracle

torch = pytest.importorskip("torch")

SHAPES = {
    "BatchNorm1d": [(16, 5), (6, 5, 9)],
    "BatchNorm2d": [(4, 6, 7, 7)],
    "BatchNorm3d": [(2, 3, 4, 5, 6)],
}
MODULES = [(module, shape) for module, shapes in SHAPES.items() for shape in shapes]


def close(found, tensor, what, size=1.0):
    """Compare within a few roundings of the type, in units of the largest value."""
    expected = tensor.detach().numpy()
    assert found.dtype == expected.dtype, what
    bound = 16 * np.finfo(expected.dtype).eps * max(size, oracle.largest(expected))
    oracle.assert_within(found, expected, bound, what)


def assert_same_state(layer, module):
    """Parameters, running statistics and the count agree."""
    state = module.state_dict()
    assert list(layer.state_dict()) == list(state)
    for name, value in layer.state_dict().items():
        if name == "num_batches_tracked":
            assert int(value) == int(state[name])
        else:
            close(value, state[name], name)


@pytest.mark.parametrize(("module", "shape"), MODULES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_three_steps_and_eval(module, shape, dtype, momentum, rng):
    """Outputs, gradients, running statistics and parameters of gradient descent, then eval with backward."""
    theirs = getattr(torch.nn, module)(shape[1], momentum=momentum, dtype=getattr(torch, dtype))
    ours = nbnorm.BatchNorm(shape[1], momentum=momentum, dtype=np.dtype(dtype))
    start = {"weight": rng.uniform(0.5, 2, shape[1]), "bias": rng.standard_normal(shape[1])}
    for name, values in start.items():
        ours.params[name][:] = values.astype(dtype)
        getattr(theirs, name).data = torch.from_numpy(values.astype(dtype))

    for training in (True, True, True, False):
        ours.train() if training else ours.eval()
        theirs.train(training)
        x = (rng.standard_normal(shape) * 1.5 + 0.7).astype(dtype)
        dy = rng.standard_normal(shape).astype(dtype)
        tensor = torch.from_numpy(x).requires_grad_()
        theirs.zero_grad()
        output = theirs(tensor)
        output.backward(torch.from_numpy(dy))
        close(ours(x), output, "y")
        close(ours.backward(dy), tensor.grad, "dx")
        for name in ("weight", "bias"):
            # Both round a sum of this many terms.
            close(ours.grads[name], getattr(theirs, name).grad, f"d{name}", size=np.sqrt(dy.size / shape[1]))
            ours.params[name] -= ours.params[name].dtype.type(0.05) * ours.grads[name]
            getattr(theirs, name).data -= 0.05 * getattr(theirs, name).grad
        assert_same_state(ours, theirs)


def test_a_state_from_pytorch_loads(rng):
    """PyTorch's own state dict, as arrays, is a state dict of ours."""
    theirs = torch.nn.BatchNorm1d(5)
    theirs(torch.from_numpy(rng.standard_normal((16, 5)).astype(np.float32)))
    ours = nbnorm.BatchNorm(5)
    ours.load_state_dict({name: value.detach().numpy().copy() for name, value in theirs.state_dict().items()})
    for name, value in theirs.state_dict().items():
        np.testing.assert_array_equal(ours.state_dict()[name], value.numpy())
