"""What `replace`, `restore` and `fold` do to a model, and what keeps fusion from going wrong."""

import copy
import pickle
import random

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402, N812

import nbnorm.torch  # noqa: E402
from nbnorm.torch import _tracing  # noqa: E402
from torch_cases import always_nbnorm, assert_close  # noqa: E402, F401


def test_same_objects():
    """Modules, parameters, buffers, hooks and modes stay; only classes change."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout())
    seen = []
    model[1].register_forward_hook(lambda *_: seen.append("hook"))
    model[1].eval()
    objects = [*model.modules(), *model.parameters(), *model.buffers()]
    nbnorm.torch.replace(model)
    assert all(
        a is b
        for a, b in zip(objects, [*model.modules(), *model.parameters(), *model.buffers()], strict=True)
    )
    assert type(model[1]) is nbnorm.torch.BatchNorm1d
    assert not model[1].training
    model(torch.randn(5, 3))
    assert seen == ["hook"]


class Subclass(nn.BatchNorm1d):
    """Somebody's own batch norm."""


def test_report():
    """What was replaced and what was left is said by name; a second time there is nothing to do."""
    model = nn.ModuleDict(
        {"a": nn.BatchNorm1d(2), "b": Subclass(2), "c": nn.SyncBatchNorm(2), "d": nn.LayerNorm(2)}
    )
    done = nbnorm.torch.replace(model)
    assert done.replaced == {"a": "BatchNorm1d", "d": "LayerNorm"}
    assert set(done.left) == {"b", "c"}
    assert type(model["b"]) is Subclass
    assert "replaced 2 modules, left 2" in str(done)
    assert "b: Subclass" in str(done)
    again = nbnorm.torch.replace(model)
    assert again.replaced == {}
    nbnorm.torch.restore(model)
    assert [type(m) for m in model.values()] == [nn.BatchNorm1d, Subclass, nn.SyncBatchNorm, nn.LayerNorm]


def test_states_go_both_ways():
    """A state dict of either model loads into the other."""
    theirs = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    ours = copy.deepcopy(theirs)
    nbnorm.torch.replace(ours, fuse=True)
    theirs(torch.randn(2, 3, 8, 8))
    ours.load_state_dict(theirs.state_dict())
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    other.load_state_dict(ours.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


# ---- fusion: each module with the fusions that are right for it ----


class Block(nn.Module):
    """What the blocks below have in common."""

    differentiable = True

    def __init__(self):
        super().__init__()
        self.conv, self.other = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.bn, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.factor = 2.0
        self.flag = True
        self.steps = nn.ModuleList([nn.BatchNorm2d(4), nn.SiLU()])


class Relu(Block):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


class Functional(Block):
    def forward(self, x):
        x = F.relu(self.bn(x), inplace=True)
        x = F.silu(self.bn2(x))
        return torch.relu(x)


class Method(Block):
    def forward(self, x):
        return self.bn(self.conv(x)).relu_() * self.factor


class Residual(Block):
    def forward(self, x):
        y = self.bn(self.conv(x))
        y += self.bn2(self.other(x))
        return self.relu(y)


class ResidualSecond(Block):
    def forward(self, x):
        return F.silu(torch.add(x, self.bn(self.conv(x))))


class BroadcastResidual(Block):
    def forward(self, x):
        return F.relu(self.bn(self.conv(x)) + x.mean((2, 3), keepdim=True))


class Loop(Block):
    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return self.finish(x)

    def finish(self, x):
        if self.flag and self.bn is not None:
            return self.relu(self.bn2(x))
        return x


class InPlaceLater(Block):
    """The input of the norm is changed between the norm and the activation: it must not move."""

    differentiable = False

    def forward(self, x):
        x = x * 1
        y = self.bn(x)
        z = F.relu_(x)
        return self.relu(y + z)


class UsedTwice(Block):
    def forward(self, x):
        y = self.bn(x)
        return self.relu(y) + y


class CalledTwice(Block):
    def forward(self, x):
        return self.relu(self.bn(self.relu(self.bn(x))))


class SumWithFactor(Block):
    def forward(self, x):
        return self.relu(torch.add(self.bn(x), x, alpha=2))


class IntoOther(Block):
    """The sum goes into x, which is returned as well."""

    differentiable = False

    def forward(self, x):
        x = x * 1
        x += self.bn(self.conv(x))
        return self.relu(x) + x


class RandomBranch(Block):
    def forward(self, x):
        if random.random() < 0.5:
            return x
        return self.relu(self.bn(x))


class RandomTensor(Block):
    def forward(self, x):
        return self.relu(self.bn(x)) * torch.rand(1)


class Counter(Block):
    def forward(self, x):
        self.factor = self.factor + 1
        return self.relu(self.bn(x)) * self.factor


class OptionalArgument(Block):
    def forward(self, x, extra=None):
        y = self.relu(self.bn(x))
        if extra is not None:
            y = y + extra
        return y


class OnShape(Block):
    def forward(self, x):
        if x.shape[0] > 2:
            return x
        return self.relu(self.bn(x))


SCALE = 3.0


class GlobalValue(Block):
    def forward(self, x):
        return self.relu(self.bn(x)) * SCALE


class Prints(Block):
    def forward(self, x):
        print(x.shape)
        return self.relu(self.bn(x))


class LeavesPython(Block):
    def forward(self, x):
        return self.relu(self.bn(x)) * self.bn.weight[0].item()


class DeepSetting(Block):
    def forward(self, x):
        return self.relu(self.bn(x)) * self.bn.eps


class Super(Relu):
    def forward(self, x):
        return super().forward(x)


FUSED = {
    Relu: ["bn + relu"],
    Functional: ["bn + relu", "bn2 + silu"],
    Method: ["bn + relu"],
    Residual: ["bn + add + relu"],
    ResidualSecond: ["bn + add + silu"],
    BroadcastResidual: ["bn + add + relu"],
    Loop: ["steps.0 + silu", "bn2 + relu"],
    InPlaceLater: [],
    UsedTwice: [],
    CalledTwice: [],
    SumWithFactor: [],
    IntoOther: [],
}
REFUSED = [
    RandomBranch, RandomTensor, Counter, OptionalArgument, OnShape, GlobalValue, Prints, LeavesPython, DeepSetting,
    Super,
]  # fmt: skip


@pytest.mark.parametrize("kind", FUSED, ids=lambda kind: kind.__name__)
def test_fusions(kind):
    """The expected steps are fused, and results, gradients and running statistics stay."""
    theirs = kind()
    ours = copy.deepcopy(theirs)
    done = nbnorm.torch.replace(ours, fuse=True)
    assert list(done.fused.get("", ())) == FUSED[kind]
    assert not done.unfused
    for training in (True, True, False, True):
        theirs.train(training), ours.train(training)
        x, dy = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5)
        results = []
        for module in (theirs, ours):
            module.zero_grad()
            own = x.clone().requires_grad_()
            with torch.set_grad_enabled(kind.differentiable):
                results.append([module(own)])
            if kind.differentiable:
                results[-1][0].backward(dy)
                results[-1] += [own.grad, *(p.grad for p in module.parameters() if p.grad is not None)]
            results[-1] += module.state_dict().values()
        for expected, found in zip(*results, strict=True):
            if expected.is_floating_point():
                assert_close(found, expected, roundings=200)


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_refused(kind):
    """Code that one run does not tell all about is left alone, with a reason that says where."""
    module = kind()
    done = nbnorm.torch.replace(module, fuse=True)
    assert not done.fused
    assert ("super()" if kind is Super else "line") in done.unfused[""]
    assert f"not fused: (the model): {done.unfused['']}" in str(done)
    assert "forward" not in module.__dict__


def test_state_is_watched():
    """A plain attribute, a mode or a submodule that changes later has its effect."""
    module = Method()
    reference = copy.deepcopy(module)
    nbnorm.torch.replace(module, fuse=True)
    x = torch.randn(2, 4, 5, 5)

    def same():
        assert_close(module(x), reference(x), roundings=200)

    same()
    module.factor = reference.factor = -1.0
    same()
    module.eval(), reference.eval()
    same()
    module.conv = reference.conv = nn.Conv2d(4, 4, 1)
    same()
    module.bn = reference.bn = nn.Identity()
    same()


@pytest.mark.parametrize("where", ["bn", "relu"])
def test_hooks_come_first(where):
    """A hook on a fused step sees what it always saw."""
    module = Relu()
    nbnorm.torch.replace(module, fuse=True)
    x = torch.randn(2, 4, 5, 5)
    y = module(x)
    seen = []
    hook = getattr(module, where).register_forward_hook(
        lambda _, inputs, output: seen.append(output.detach())
    )
    module(x)
    hook.remove()
    module(x)
    assert len(seen) == 1
    assert (seen[0].min() < 0) == (where == "bn")
    assert_close(F.relu(seen[0]), y.detach())


def test_other_arguments():
    """Keywords are passed on, and wrong calls are refused as before."""
    module = Relu()
    nbnorm.torch.replace(module, fuse=True)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(module(x=x), module(x))
    with pytest.raises(TypeError):
        module(x, x)


def test_copies_of_a_fused_model():
    """A copy runs its own modules, and a pickled one comes back fused."""
    module = nn.Sequential(Relu(), nn.Conv2d(4, 2, 1))
    nbnorm.torch.replace(module, fuse=True)
    x = torch.randn(2, 4, 5, 5)
    y = module(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin[0].forward.module is twin[0]
        assert torch.equal(twin(x), y)
        twin[0].bn.weight.data.zero_()
        assert not torch.equal(twin(x), y)
    assert torch.equal(module(x), y)


def test_no_source(tmp_path):
    """A class made at run time has no source to read: it is left alone."""
    names = {"Block": Block}
    exec("class Made(Block):\n    def forward(self, x):\n        return self.relu(self.bn(x))", names)
    done = nbnorm.torch.replace(names["Made"](), fuse=True)
    assert "source" in done.unfused[""]


def test_trace_reads_before_it_runs():
    """A refused forward is not run at all."""
    module = Prints()
    with pytest.raises(_tracing.UntraceableError, match="calls print"):
        _tracing.trace(module)


# ---- folding ----


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Linear(3, 4), nn.BatchNorm1d(4), (5, 3)),
        (nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4, affine=False), (5, 3)),
        (nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (2, 4, 9)),
        (nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), (2, 4, 6, 6)),
        (nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), (2, 2, 4, 4, 4)),
        (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), nn.BatchNorm2d(6), (2, 4, 3, 3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_folding(layer, norm, shape):
    """Each kind of layer takes its batch norm up."""
    model = nn.Sequential(layer, norm).double()
    for value in norm.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5)
    model.eval()
    folded = nbnorm.torch.fold(model)
    assert [type(m) for m in folded] == [type(layer), nn.Identity]
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)


class Shared(nn.Module):
    """The convolution has a second use, beside the norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


def test_what_is_not_folded():
    """Other uses of the layer's output, shared layers, other statistics, hooks."""
    conv = nn.Conv2d(2, 2, 1)
    hooked = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    hooked[0].register_forward_hook(lambda *_: None)
    tied = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1))
    tied[2].weight = tied[0].weight
    models = [
        Shared(),
        nn.Sequential(conv, nn.BatchNorm2d(2), conv),
        nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)),
        nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1)),
        hooked,
        tied,
    ]
    x = torch.randn(3, 2, 4, 4)
    for model in models:
        folded = nbnorm.torch.fold(model.eval())
        assert not any(isinstance(m, nn.Identity) for m in folded.modules())
        assert torch.equal(folded(x), model(x))


def test_fold_wants_eval():
    """In training there are no statistics to fold."""
    with pytest.raises(ValueError, match="eval mode"):
        nbnorm.torch.fold(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
