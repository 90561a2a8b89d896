"""The modules of nbnorm.torch beside PyTorch's own: the same results, gradients, states and errors."""

import pytest

torch = pytest.importorskip("torch")

import nbnorm.torch  # noqa: E402
from nbnorm import _call, _gradients  # noqa: E402
from torch_cases import (  # noqa: E402
    NORMS,
    VARIANTS,
    Norm,
    always_nbnorm,  # noqa: F401
    assert_close,
    assert_same_state,
    computed_by_nbnorm,
)

FORMATS = [(norm, memory_format) for norm in NORMS for memory_format in norm.memory_formats]
on_formats = pytest.mark.parametrize(("norm", "memory_format"), FORMATS, ids=str)


def step(module, x, dy):
    """Return output, gradient and parameters' gradients of one call."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(dy)
    return y, x.grad, {name: p.grad for name, p in module.named_parameters()}


def assert_same_steps(theirs, ours, inputs, modes=(True, True, True, False, True)):
    """Compare some steps in training and eval."""
    for training, x in zip(modes, inputs, strict=True):
        theirs.train(training), ours.train(training)
        dy = torch.randn_like(x)
        expected, found = step(theirs, x, dy), step(ours, x, dy)
        assert_close(found[0], expected[0], "y")
        assert_close(found[1], expected[1], "dx")
        assert found[0].stride() == x.stride() == found[1].stride()
        for name, gradient in expected[2].items():
            assert_close(found[2][name], gradient, f"d{name}", size=x.numel() ** 0.5)
        assert_same_state(ours, theirs)


@on_formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_as_in_pytorch(norm, memory_format, dtype):
    """Five calls in training and eval, memory formats kept."""
    theirs, ours = norm.pair(dtype)
    assert isinstance(ours, type(theirs))
    assert_same_steps(theirs, ours, [norm.tensor(dtype, memory_format) for _ in range(5)])
    assert computed_by_nbnorm(ours(norm.tensor(dtype, memory_format)))


@pytest.mark.parametrize("norm", VARIANTS, ids=str)
def test_options(norm):
    """Every option means what it means in PyTorch."""
    theirs, ours = norm.pair(torch.float32)
    assert_same_steps(theirs, ours, [norm.tensor(torch.float32) for _ in range(5)])
    assert repr(ours) == repr(theirs)


@on_formats
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradcheck(norm, memory_format, training):
    """Gradients in float64 against finite differences, with parameters and without."""
    bare = {"elementwise_affine" if norm.name in ("LayerNorm", "RMSNorm") else "affine": False}
    for options in ({}, bare):
        arguments = {**norm.options, **options}
        _, module = Norm(norm.name, norm.arguments, norm.shape, arguments).pair(torch.float64)
        module.train(training)
        x = norm.tensor(torch.float64, memory_format).requires_grad_()
        parameters = tuple(module.parameters())

        def call(x, *parameters, module=module):
            names = [name for name, _ in module.named_parameters()]
            return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

        assert computed_by_nbnorm(call(x, *parameters))
        assert torch.autograd.gradcheck(call, (x, *parameters))


STRANGE = {
    "gaps": lambda x: torch.stack([x, x + 100], -1)[..., 0],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "broadcast": lambda x: x[:1].expand_as(x),
    "offset": lambda x: torch.cat([x[:1], x])[1:],
    "swapped": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
}


@pytest.mark.parametrize("strides", STRANGE)
@pytest.mark.parametrize("norm", [NORMS[1], NORMS[2], NORMS[5], NORMS[7], NORMS[8], NORMS[10]], ids=str)
def test_strides(norm, strides):
    """Views of any strides as x and as dy."""
    theirs, ours = norm.pair(torch.float32)
    x, dy = (STRANGE[strides](norm.tensor(torch.float32)) for _ in range(2))
    expected, found = step(theirs, x, dy), step(ours, x, dy)
    assert computed_by_nbnorm(found[0])
    for what, a, b in zip(("y", "dx"), found, expected, strict=False):
        assert_close(a, b, what)
    for name, gradient in expected[2].items():
        assert_close(found[2][name], gradient, f"d{name}", size=x.numel() ** 0.5)


def test_gradient_of_a_sum():
    """A dy that is one number, expanded."""
    x = NORMS[2].tensor(torch.float32).requires_grad_()
    _, ours = NORMS[2].pair(torch.float32)
    ours(x).sum().backward()
    assert_close(x.grad, torch.zeros_like(x), "dx")
    torch.testing.assert_close(ours.bias.grad, torch.full((6,), 60.0))


def test_results_do_not_share_memory_with_inputs():
    """What torch.from_numpy could get wrong: x, y and gradients are apart, and x keeps its values."""
    _, ours = NORMS[2].pair(torch.float32)
    x = NORMS[2].tensor(torch.float32).requires_grad_()
    before = x.detach().clone()
    y = ours(x)
    y.backward(y.detach())
    tensors = [x, y, x.grad, *ours.parameters(), *(p.grad for p in ours.parameters()), *ours.buffers()]
    assert len({t.data_ptr() for t in tensors}) == len(tensors)
    assert torch.equal(x, before)


HALF = [(norm, whole) for norm in (NORMS[2], NORMS[7], NORMS[8], NORMS[10]) for whole in (True, False)]
HALF.remove((NORMS[10], False))  # PyTorch promotes the result of RMSNorm, and computes it


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("norm", "whole"), HALF, ids=str)
def test_half_precision(norm, dtype, whole):
    """Halves, with parameters and running statistics in half or single precision, beside PyTorch in float64.

    PyTorch itself rounds in between: its float32 gradients of parameters have the errors of halves.
    """
    theirs, ours = norm.pair(dtype if whole else torch.float32)
    theirs.double()
    x, dy = norm.tensor(dtype), norm.tensor(dtype)
    expected, found = step(theirs, x.double(), dy.double()), step(ours, x, dy)
    assert computed_by_nbnorm(found[0])
    assert_close(found[0], expected[0].to(dtype), "y", roundings=2)
    assert_close(found[1], expected[1].to(dtype), "dx", roundings=2)
    parameters = dict(theirs.named_parameters())
    for name, gradient in found[2].items():
        what = parameters[name].grad.to(gradient.dtype)
        assert_close(gradient, what, f"d{name}", roundings=2, size=x.numel() ** 0.5)
    assert_same_state(ours, theirs.to(ours.weight.dtype), roundings=2)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_are_tensors_as_any_other(dtype, memory_format):
    """NumPy's memory under them: layout, changes in place, gradients.

    In float64, as PyTorch adds up long columns of float32 one by one and is off by some 1e-4 itself.
    """
    theirs, ours = torch.nn.BatchNorm2d(8, dtype=torch.float64), nbnorm.torch.BatchNorm2d(8)
    x = torch.randn(4, 8, 26, 26).to(dtype, memory_format=memory_format)
    y, expected = ours(x), theirs(x.double())
    assert computed_by_nbnorm(y)
    assert not y._is_view()
    assert y.stride() == x.stride()
    assert y.is_contiguous(memory_format=memory_format)
    y.relu_().sum().backward()
    expected.relu_().sum().backward()
    assert_close(y, expected.to(dtype), "y")
    assert_close(ours.weight.grad, theirs.weight.grad.float(), "dweight", size=x.numel() ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layout_of_results(dtype):
    """Y has the strides that PyTorch gives what is like x: with gaps, axes of length 1, any order of axes."""
    dense = torch.randn(4, 8, 6, 10).to(dtype)
    last = dense.contiguous(memory_format=torch.channels_last)
    inputs = [
        dense[:, :, :, ::2], last[:, :, 1:4], dense[:, :, :1, :1], last[:, :, :1, :1].clone(), dense.transpose(0, 1),
        dense.transpose(1, 3), dense[:, :1].contiguous(memory_format=torch.channels_last),
        dense.permute(2, 3, 0, 1)[::2], dense[:1].expand(4, 8, 6, 10),
    ]  # fmt: skip
    for x in inputs:
        ours = nbnorm.torch.BatchNorm2d(x.shape[1])
        y, theirs = ours(x), torch.nn.BatchNorm2d(x.shape[1], dtype=torch.float64)
        assert computed_by_nbnorm(y)
        assert y.stride() == torch.empty_like(x).stride(), x.stride()
        assert not y._is_view()
        assert_close(y, theirs(x.double()).to(dtype), "y", roundings=2)


def test_another_default_device():
    """New tensors are where x is, whatever device is the default."""
    module, x = nbnorm.torch.BatchNorm2d(8), torch.randn(4, 8, 1, 1).to(torch.bfloat16)
    x = x.to(memory_format=torch.channels_last)
    with torch.device("meta"):
        y = module(x)
    assert computed_by_nbnorm(y)
    assert y.is_cpu


@pytest.mark.parametrize("momentum", [-0.5, 1.5])
def test_odd_momentum(momentum):
    """A weight of the batch that only PyTorch knows what to do with."""
    theirs, ours = torch.nn.BatchNorm1d(8, momentum=momentum), nbnorm.torch.BatchNorm1d(8, momentum=momentum)
    x = torch.randn(16, 8)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_calls_of_a_known_kind(norm, monkeypatch):
    """Tensors are views of memory, which takes no call the long way, forward or backward."""
    _, ours = norm.pair(torch.float32)
    ours(norm.tensor(torch.float32))
    monkeypatch.setattr(_call, "_call", None)
    monkeypatch.setattr(_gradients, "_needed", None)
    x = norm.tensor(torch.float32).requires_grad_()
    y = ours(x)
    assert computed_by_nbnorm(y)
    y.backward(torch.ones_like(y))
    assert x.grad is not None


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # PyTorch's, of its own RMSNorm
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_autocast(norm):
    """Autocast changes types as it does with PyTorch's modules."""
    theirs, ours = norm.pair(torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        x = norm.tensor(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(ours(x), theirs(x), "y", roundings=4)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (NORMS[2], (0, 6, 4, 5)),
        (NORMS[2], (2, 6, 0, 5)),
        (NORMS[8], (0, 7)),
        (NORMS[7], (0, 6, 4)),
        (Norm("LayerNorm", (0,), ()), (3, 0)),
    ],
    ids=str,
)
def test_empty(norm, shape):
    """Empty tensors give what PyTorch gives."""
    theirs, ours = norm.pair(torch.float32)
    x = torch.empty(shape)
    torch.testing.assert_close(ours(x), theirs(x), equal_nan=True)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, equal_nan=True)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (NORMS[0], (1, 5)),  # one value per channel
        (NORMS[2], (1, 6, 1, 1)),
        (NORMS[5], (2, 4, 1, 1)),
        (NORMS[2], (3, 6, 4)),  # the wrong rank
        (NORMS[8], (4, 3, 6)),  # the wrong sizes
        (NORMS[7], (3, 5, 4)),
    ],
    ids=str,
)
def test_errors(norm, shape):
    """What PyTorch refuses is refused with the same error."""
    theirs, ours = norm.pair(torch.float32)
    with pytest.raises((ValueError, RuntimeError)) as expected:
        theirs(torch.randn(shape))
    with pytest.raises(expected.type) as found:
        ours(torch.randn(shape))
    assert str(found.value) == str(expected.value)


def test_wrong_number_of_channels():
    """Here the message is nbnorm's, which says what was expected."""
    with pytest.raises(ValueError, match=r"expected .*number of channels"):
        nbnorm.torch.BatchNorm2d(6)(torch.randn(3, 5, 4, 4))
