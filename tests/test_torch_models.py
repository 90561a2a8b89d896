"""Whole models, written in plain PyTorch, with nbnorm's norms put in: training, eval, folding."""

import copy
import importlib.util
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

import nbnorm.torch  # noqa: E402
from torch_cases import always_nbnorm, assert_close, assert_same_state  # noqa: E402, F401

EXAMPLE = Path(__file__).parents[1] / "examples" / "pytorch_resnet.py"


@pytest.fixture(scope="module")
def example():
    """Import examples/pytorch_resnet.py, which is no part of any package."""
    spec = importlib.util.spec_from_file_location("pytorch_resnet_example", EXAMPLE)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


class UNet3d(nn.Module):
    """One level down and up again, with instance norm on the way down and group norm on the way up."""

    def __init__(self):
        super().__init__()
        self.inside = nn.Sequential(
            nn.Conv3d(1, 4, 3, padding=1), nn.InstanceNorm3d(4, affine=True), nn.ReLU()
        )
        self.down = nn.Sequential(nn.Conv3d(4, 8, 2, stride=2), nn.BatchNorm3d(8), nn.SiLU())
        self.up = nn.ConvTranspose3d(8, 4, 2, stride=2, bias=False)
        self.norm = nn.BatchNorm3d(4)
        self.outside = nn.Sequential(nn.Conv3d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.LeakyReLU())
        self.last = nn.Conv3d(8, 1, 1)

    def forward(self, x):
        across = self.inside(x)
        x = functional.relu(self.norm(self.up(self.down(across))))
        return self.last(self.outside(torch.cat([x, across], 1)))


class MLP(nn.Module):
    """Linear layers with batch norm, and a root mean square norm at the end."""

    def __init__(self):
        super().__init__()
        sizes = [(20, 64), (64, 64)]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()) for a, b in sizes
        )
        self.last = nn.Sequential(nn.RMSNorm(64), nn.Linear(64, 3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


def transformer():
    return nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)


MODELS = {
    "ResNet-18": (lambda example: example.ResNet18(), (4, 3, 48, 48)),
    "U-Net": (lambda _: UNet3d(), (2, 1, 8, 8, 8)),
    "Transformer": (lambda _: transformer(), (3, 7, 32)),
    "MLP": (lambda _: MLP(), (16, 20)),
}
FUSIONS = {"ResNet-18": 17, "U-Net": 2, "Transformer": 0, "MLP": 2}
FOLDED = {"ResNet-18": 20, "U-Net": 2, "Transformer": 0, "MLP": 2}
on_models = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "ResNet-18" else []) for name in MODELS]
)
on_fusion = pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])


@pytest.fixture
def model(name, example):
    """Return a model and a function that draws an input for it."""
    make, shape = MODELS[name]
    return make(example), lambda: torch.randn(shape)


def train(model, optimizer, inputs):
    """Return the losses of steps towards zero output."""
    losses = []
    for x in inputs:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@on_models
@on_fusion
def test_training(model, name, fuse):
    """Twenty steps, then eval: losses to 1e-4, states and outputs; and one step with the optimizer made before."""
    theirs, draw = model
    # In float32 the 16 values per channel of its last stage amplify rounding beyond any tolerance.
    dtype = torch.float64 if name == "ResNet-18" else torch.float32
    theirs.to(dtype)
    ours = copy.deepcopy(theirs)
    optimizers = [torch.optim.SGD(m.parameters(), 1e-3, momentum=0.9) for m in (theirs, ours)]
    done = nbnorm.torch.replace(ours, fuse=fuse)
    assert sum(map(len, done.fused.values())) == (FUSIONS[name] if fuse else 0)
    assert not done.left
    inputs = [draw().to(dtype) for _ in range(20)]
    expected, found = train(theirs, optimizers[0], inputs), train(ours, optimizers[1], inputs)
    assert found == pytest.approx(expected, rel=1e-4)
    assert_same_state(ours, theirs, roundings=1e5 if dtype is torch.float64 else 2000)
    theirs.eval(), ours.eval()
    x = draw().to(dtype)
    assert_close(ours(x), theirs(x), roundings=1e5 if dtype is torch.float64 else 2000)


@on_models
@on_fusion
def test_first_gradients(model, name, fuse):
    """Gradients of every parameter after one pass in float64, in both memory formats."""
    theirs, draw = model
    theirs.double()
    ours = copy.deepcopy(theirs)
    nbnorm.torch.replace(ours, fuse=fuse)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = draw().double()
        if x.ndim == 4:
            x = x.contiguous(memory_format=memory_format)
        for m in (theirs, ours):
            m.zero_grad()
            m(x).sin().sum().backward()
        for (what, expected), found in zip(theirs.named_parameters(), ours.parameters(), strict=True):
            assert_close(found.grad, expected.grad, what, roundings=1e5)


@on_models
@on_fusion
def test_restore(model, name, fuse):
    """Bit for bit the original: outputs, state, classes, attributes."""
    original, draw = model
    changed = copy.deepcopy(original)
    attributes = [dict(module.__dict__) for module in changed.modules()]
    nbnorm.torch.replace(changed, fuse=fuse)
    nbnorm.torch.restore(changed)
    assert [type(m) for m in changed.modules()] == [type(m) for m in original.modules()]
    for module, before in zip(changed.modules(), attributes, strict=True):
        assert module.__dict__ == before
    x = draw()
    assert torch.equal(changed(x), original(x))
    for name, value in original.state_dict().items():
        assert torch.equal(changed.state_dict()[name], value), name


@on_models
@on_fusion
def test_fold(model, name, fuse):
    """A folded model agrees with the original in eval, and has no batch norm left that could be folded."""
    original, draw = model
    train(original, torch.optim.SGD(original.parameters(), 1e-2), [draw() for _ in range(3)])
    original.eval()
    model = copy.deepcopy(original)
    nbnorm.torch.replace(model, fuse=fuse)
    before = copy.deepcopy(model.state_dict())
    folded = nbnorm.torch.fold(model)
    identities = [m for m in folded.modules() if type(m) is nn.Identity]
    assert len(identities) == FOLDED[name]
    x = draw()
    torch.testing.assert_close(folded(x), original(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x), original(x), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ResNet-18", "MLP"])
@on_fusion
def test_compiled(model, name, fuse):
    """torch.compile of a replaced model agrees with the original."""
    theirs, draw = model
    ours = copy.deepcopy(theirs)
    nbnorm.torch.replace(ours, fuse=fuse)
    compiled = torch.compile(ours, backend="aot_eager")
    x = draw()
    for m in (theirs, compiled):
        m(x).square().mean().backward()
    for (what, expected), found in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert_close(found.grad, expected.grad, what, roundings=5000)
    assert_same_state(ours, theirs, roundings=100)


@pytest.mark.slow
def test_example(example, tmp_path, capsys):
    """The example trains all its networks alike, prints that, and draws a PNG."""
    pytest.importorskip("matplotlib")
    figure = tmp_path / "resnet.png"
    # Four images of 32 x 32 leave four values per channel in the last stage: PyTorch's own losses come out 14 % apart
    # after four steps if its first weights are changed by 1e-7; here by 1e-5.
    arguments = ["--steps", "4", "--batch-size", "8", "--size", "64", "--learning-rate", "0.0001"]
    first, *rest = example.main([*arguments, "--output", str(figure)])
    assert figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    printed = capsys.readouterr().out
    for run in rest:
        assert run.losses == pytest.approx(first.losses, rel=1e-3)
        assert f"{run.step * 1e3:7.1f} ms per step" in printed
    assert len(first.losses) == 4
    with pytest.raises(SystemExit):
        example.main(["--steps", "2"])
