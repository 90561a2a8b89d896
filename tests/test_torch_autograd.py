"""How the norms behave inside PyTorch's machinery: autograd, checkpoints, compilers, transformations, threads."""

import copy
import subprocess
import sys

import numba
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import nbnorm.torch  # noqa: E402
from nbnorm.torch import _reference  # noqa: E402
from torch_cases import (  # noqa: E402
    NORMS,
    always_nbnorm,  # noqa: F401
    assert_close,
    assert_same_state,
    computed_by_nbnorm,
)

EACH = [NORMS[2], NORMS[5], NORMS[7], NORMS[8], NORMS[10]]
BATCH = NORMS[2]
on_each = pytest.mark.parametrize("norm", EACH, ids=str)


ALONE = [(norm, wanted) for norm in EACH for wanted in ("x", "weight", "bias")]
ALONE.remove((NORMS[10], "bias"))  # RMSNorm has none


@pytest.mark.parametrize(("norm", "wanted"), ALONE, ids=str)
def test_only_what_requires_grad(norm, wanted):
    """One gradient alone equals the one among all of them."""
    _, module = norm.pair(torch.float32)
    inputs = {"x": norm.tensor(torch.float32).requires_grad_(), **dict(module.named_parameters())}
    dy = norm.tensor(torch.float32)
    expected = torch.autograd.grad(module(inputs["x"]), inputs[wanted], dy)[0]
    for name, tensor in inputs.items():
        tensor.requires_grad_(name == wanted)
    y = module(inputs["x"])
    y.backward(dy)
    assert torch.equal(inputs[wanted].grad, expected)
    assert all(tensor.grad is None for name, tensor in inputs.items() if name != wanted)


def test_without_gradients():
    """Under no_grad, and where nothing requires a gradient, there is no graph."""
    _, module = BATCH.pair(torch.float32)
    x = BATCH.tensor(torch.float32)
    with torch.no_grad():
        assert module(x).grad_fn is None
    module.requires_grad_(False)
    assert module(x).grad_fn is None
    assert module.eval()(x).grad_fn is None


def test_eval_keeps_x_only_for_the_weight():
    """With fixed statistics dx needs the weight alone."""
    kept = []
    _, module = BATCH.pair(torch.float32)
    module.eval()
    x = BATCH.tensor(torch.float32).requires_grad_()

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x)
        assert any(tensor.shape == x.shape for tensor in kept)
        kept.clear()
        module.requires_grad_(False)
        y = module(x)
    assert not any(tensor.shape == x.shape for tensor in kept)
    dy = torch.randn_like(x)
    y.backward(dy)
    scale = module.weight / (module.running_var + module.eps).sqrt()
    assert_close(x.grad, dy * scale.view(1, -1, 1, 1))


@on_each
def test_second_derivatives(norm):
    """A gradient penalty, through PyTorch's own operators."""
    theirs, ours = norm.pair(torch.float64)
    x = norm.tensor(torch.float64).requires_grad_()
    found, expected = [], []
    for module, results in ((ours, found), (theirs, expected)):
        (dx,) = torch.autograd.grad(module(x).sin().sum(), x, create_graph=True)
        results += [dx, *torch.autograd.grad(dx.square().sum(), [x, module.weight])]
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, roundings=1000)


@pytest.mark.parametrize("affine", [True, False])
def test_second_derivatives_in_eval(affine):
    """Constant statistics, with and without a weight to keep x for."""
    module = nbnorm.torch.BatchNorm2d(6, affine=affine, dtype=torch.float64).eval()
    x = BATCH.tensor(torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(module, (x,))


@on_each
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(norm, use_reentrant):
    """Recomputing gives the same gradients, and counts the batch twice as in PyTorch."""
    theirs, ours = norm.pair(torch.float32)
    x, dy = norm.tensor(torch.float32), norm.tensor(torch.float32)
    gradients = []
    for module in (theirs, ours):
        own = x.clone().requires_grad_()
        checkpoint(nn.Sequential(module, nn.SiLU()), own, use_reentrant=use_reentrant).backward(dy)
        gradients.append(own.grad)
    assert_close(gradients[1], gradients[0])
    assert_same_state(ours, theirs)


def test_a_buffer_changed_between_the_passes():
    """Autograd notices that x was overwritten; running statistics may change, their values were kept."""
    _, module = BATCH.pair(torch.float32)
    x = BATCH.tensor(torch.float32).requires_grad_()
    inside = x * 1
    y = module(inside)
    inside.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    module.eval()
    y = module(x)
    module.running_var.mul_(2)
    before = module.running_mean._version
    module.train()(x)
    assert module.running_mean._version > before
    y.sum().backward()


def test_in_place_activation():
    """ReLU may overwrite y, which is not needed."""
    theirs, ours = BATCH.pair(torch.float32)
    x, dy = BATCH.tensor(torch.float32), BATCH.tensor(torch.float32)
    gradients = []
    for module in (theirs, ours):
        own = x.clone().requires_grad_()
        nn.Sequential(module, nn.ReLU(inplace=True))(own).backward(dy)
        gradients.append(own.grad)
    assert_close(gradients[1], gradients[0])


BEHIND = [(None, True), ("relu", False), ("relu", True), ("silu", True)]


@pytest.mark.parametrize(("activation", "with_residual"), BEHIND, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_activation_and_residual(activation, with_residual, training):
    """What follows the norm in the same pass: values and gradients, first and second, as in separate steps."""
    _, module = BATCH.pair(torch.float64)
    module.train(training)
    x, r, dy = (BATCH.tensor(torch.float64).requires_grad_() for _ in range(3))
    residual = r if with_residual else None
    inputs = [x, *module.parameters(), *([r] if with_residual else [])]
    together = module(x, activation=activation, residual=residual)
    apart = _reference.finish(module(x), activation, residual)
    assert computed_by_nbnorm(together)
    assert_close(together, apart)
    results = []
    for y in (together, apart):
        plain = torch.autograd.grad(y, inputs, dy, retain_graph=True)
        first = torch.autograd.grad(y, inputs, dy, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), [x, dy])
        results.append([*plain, *first, *second])
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected, roundings=1000)
    with torch.no_grad():
        assert_close(
            module.eval()(x, activation=activation, residual=residual),
            _reference.finish(module(x), activation, residual),
        )


def test_residual_alone():
    """Only the residual requires a gradient."""
    module = nbnorm.torch.BatchNorm2d(6, affine=False)
    x, r, dy = (BATCH.tensor(torch.float32) for _ in range(3))
    r.requires_grad_()
    module(x, residual=r).backward(dy)
    assert torch.equal(r.grad, dy)
    r.grad = None
    module(x, activation="relu", residual=r).backward(dy)
    assert_close(r.grad, dy * (module(x) + r > 0))
    with pytest.raises(ValueError, match="activation must be"):
        module(x, activation="tanh")


def test_hooks():
    """Forward, pre-forward and gradient hooks of a module run."""
    seen = []
    _, module = BATCH.pair(torch.float32)
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    module.register_forward_hook(lambda *_: seen.append("after"))
    module.register_full_backward_hook(lambda *_: seen.append("backward"))
    module.weight.register_hook(lambda g: seen.append("weight"))
    module(BATCH.tensor(torch.float32).requires_grad_()).sum().backward()
    assert sorted(seen) == ["after", "backward", "before", "weight"]


@on_each
def test_transformations_fall_back(norm):
    """torch.func computes with PyTorch's own operators."""
    theirs, ours = norm.pair(torch.float32)
    theirs.eval(), ours.eval()
    stacked = torch.stack([norm.tensor(torch.float32) for _ in range(3)])
    assert torch.equal(torch.vmap(ours)(stacked), torch.vmap(theirs)(stacked))
    a, b = (torch.func.grad(lambda x, m=module: m(x).sin().sum())(stacked[0]) for module in (ours, theirs))
    assert torch.equal(a, b)


def test_complex_and_subclasses_fall_back():
    """What nbnorm does not compute is left to PyTorch, errors included."""
    module = nbnorm.torch.LayerNorm(7)
    with pytest.raises(RuntimeError):
        module(torch.randn(3, 7, dtype=torch.complex64))
    x = torch.nn.Buffer(torch.randn(3, 7))
    assert_close(module(x), nn.LayerNorm(7)(x))
    negated = torch.complex(torch.zeros(3, 7), torch.randn(3, 7)).conj().imag
    assert negated.is_neg()
    assert_close(module(negated), nn.LayerNorm(7)(negated.clone()))


@pytest.mark.slow
@on_each
def test_compile(norm):
    """One graph, without a break, in training and eval."""
    theirs, ours = norm.pair(torch.float32)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for training in (True, True, False):
        theirs.train(training), ours.train(training)
        x, dy = norm.tensor(torch.float32), norm.tensor(torch.float32)
        results = []
        for module in (theirs, compiled):
            own = x.clone().requires_grad_()
            y = module(own)
            y.backward(dy)
            results.append((y, own.grad))
        assert_close(results[1][0], results[0][0], "y")
        assert_close(results[1][1], results[0][1], "dx")
        assert_same_state(ours, theirs)


@pytest.mark.slow
def test_export():
    """An exported program holds nbnorm's operator and computes the same."""
    theirs, ours = BATCH.pair(torch.float32)
    theirs.eval(), ours.eval()
    x = BATCH.tensor(torch.float32)
    program = torch.export.export(ours, (x,))
    assert "nbnorm.forward" in str(program.graph)
    assert_close(program.module()(x), theirs(x))


@pytest.mark.parametrize(
    "arguments",
    [
        ("batch_norm", 0, False, ""),
        ("batch_norm", 0, True, ""),
        ("batch_norm", 0, False, "relu"),
        ("group_norm", 2, False, ""),
        ("instance_norm", 0, False, ""),
        ("layer_norm", 2, False, ""),
        ("rms_norm", 1, False, ""),
    ],
    ids=str,
)
def test_operators(arguments):
    """PyTorch's own checks of schema, autograd and fake kernels."""
    norm, size, constant, activation = arguments
    x = BATCH.tensor(torch.float32).requires_grad_()
    shape = x.shape[-size:] if norm in ("layer_norm", "rms_norm") else (6,)
    weight, bias = (torch.randn(shape, requires_grad=True) for _ in range(2))
    given = (torch.randn(6), torch.rand(6)) if constant else (None, None)
    parameters = weight, None if norm == "rms_norm" else bias
    residual = torch.randn_like(x).requires_grad_() if activation else None
    operator = torch.ops.nbnorm.forward.default
    torch.library.opcheck(operator, (x, *parameters, residual, *given, norm, size, 1e-5, activation))


def test_update_operator():
    """The operator that changes the running statistics says so."""
    statistics = torch.randn(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    arguments = (torch.zeros(6), torch.ones(6), *statistics, 5.0, 0.1)
    torch.library.opcheck(torch.ops.nbnorm.update_running_.default, arguments)


def test_small_tensors_are_left_to_pytorch(monkeypatch):
    """The thresholds decide, by layout; fused steps come out the same on either side."""
    monkeypatch.undo()
    policy = nbnorm.torch._policy
    x = torch.randn(2, 4, 16, 16, requires_grad=True)
    module = nbnorm.torch.BatchNorm2d(4)
    monkeypatch.setitem(policy.SMALLEST, "batch_norm", x.numel() + 1)
    small = module(x)
    assert not computed_by_nbnorm(small)
    apart = module(x, activation="relu", residual=x)
    monkeypatch.setitem(policy.SMALLEST, "batch_norm", x.numel())
    large = module(x)
    assert computed_by_nbnorm(large)
    assert_close(large, small)
    assert_close(module(x, activation="relu", residual=x), apart)
    last = x.contiguous(memory_format=torch.channels_last)
    assert not computed_by_nbnorm(module(last))
    monkeypatch.setattr(policy, "SMALLEST_WITH_ACTIVATION", x.numel())
    assert computed_by_nbnorm(module(last, activation="relu"))
    assert not computed_by_nbnorm(module(last[:1], activation="relu"))
    monkeypatch.setitem(policy.SMALLEST, "batch_norm", 1)
    assert computed_by_nbnorm(module(x[..., :7, :7].contiguous()))
    assert not computed_by_nbnorm(module(x[..., :6, :6].contiguous()))


def test_threads_of_pytorch(monkeypatch):
    """Kernels run with PyTorch's number of threads, and Numba's setting comes back, after errors too."""
    seen = []
    original = nbnorm.functional.batch_norm_forward

    def watched(*args, **kwargs):
        seen.append(numba.get_num_threads())
        return original(*args, **kwargs)

    monkeypatch.setattr(nbnorm.functional, "batch_norm_forward", watched)
    before, ours = torch.get_num_threads(), numba.get_num_threads()
    _, module = BATCH.pair(torch.float32)
    try:
        torch.set_num_threads(1)
        module(BATCH.tensor(torch.float32))
        module.weight = nn.Parameter(torch.ones(5))
        with pytest.raises(ValueError, match="weight has shape"):
            module(BATCH.tensor(torch.float32))
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1]
    assert numba.get_num_threads() == ours


WORKERS = """
import torch, numpy as np, nbnorm.torch

norm = nbnorm.torch.BatchNorm2d(4)

class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, i):
        x = torch.full((2, 4, 64, 64), float(i)) + torch.arange(64.0)
        return norm(x)

if __name__ == "__main__":
    expected = torch.stack([norm(torch.full((2, 4, 64, 64), float(i)) + torch.arange(64.0)) for i in range(8)])
    loader = torch.utils.data.DataLoader(Images(), batch_size=4, num_workers=2, multiprocessing_context="fork")
    with torch.no_grad():
        found = torch.cat(list(loader))
    assert torch.equal(found, expected), (found - expected).abs().max()
    print("same")
"""


@pytest.mark.slow
def test_workers_after_fork(tmp_path):
    """Normalizing in a DataLoader's forked workers after the parent has run parallel kernels."""
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["same"]


def test_deepcopy_and_pickle(tmp_path):
    """Modules copy, save and load."""
    _, module = BATCH.pair(torch.float32)
    x = BATCH.tensor(torch.float32)
    twin = copy.deepcopy(module)
    torch.save(module, tmp_path / "module.pt")
    loaded = torch.load(tmp_path / "module.pt", weights_only=False)
    y = module(x)
    assert torch.equal(twin(x), y)
    assert torch.equal(loaded(x), y)
    assert computed_by_nbnorm(loaded(x))
    np.testing.assert_array_equal(twin.running_mean.numpy(), module.running_mean.numpy())
