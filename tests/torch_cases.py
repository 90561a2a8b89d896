"""What the tests of nbnorm.torch share: modules with their inputs, and how close results must be."""

from dataclasses import dataclass, field

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import nbnorm.torch  # noqa: E402


@dataclass(frozen=True)
class Norm:
    """A module of PyTorch's, named as ours is, with the shape of an input."""

    name: str
    arguments: tuple
    shape: tuple
    options: dict = field(default_factory=dict, hash=False)

    def __str__(self):
        listed = "".join(f", {name}={value}" for name, value in self.options.items())
        return f"{self.name} {'x'.join(map(str, self.shape))}{listed}"

    def pair(self, dtype, **options):
        """Return PyTorch's module and ours with the same random state."""
        theirs = getattr(nn, self.name)(*self.arguments, **self.options, **options, dtype=dtype)
        ours = getattr(nbnorm.torch, self.name)(*self.arguments, **self.options, **options, dtype=dtype)
        for name, value in theirs.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.5 if "var" in name else torch.randn_like(value))
        ours.load_state_dict(theirs.state_dict())
        return theirs, ours

    def tensor(self, dtype, memory_format=torch.contiguous_format):
        """Draw an input."""
        return (torch.randn(self.shape, dtype=dtype) * 1.5 + 0.7).contiguous(memory_format=memory_format)

    @property
    def memory_formats(self):
        """The memory formats that a tensor of this rank has."""
        last = {4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(len(self.shape), [])
        return [torch.contiguous_format, *last]


NORMS = [
    Norm("BatchNorm1d", (5,), (8, 5)),
    Norm("BatchNorm1d", (5,), (4, 5, 6)),
    Norm("BatchNorm2d", (6,), (3, 6, 4, 5)),
    Norm("BatchNorm3d", (3,), (2, 3, 4, 3, 2)),
    Norm("InstanceNorm1d", (5,), (3, 5, 6), {"affine": True}),
    Norm("InstanceNorm2d", (4,), (2, 4, 5, 3), {"affine": True}),
    Norm("InstanceNorm3d", (3,), (2, 3, 4, 3, 2), {"affine": True}),
    Norm("GroupNorm", (2, 6), (3, 6, 4, 5)),
    Norm("LayerNorm", (7,), (4, 3, 7)),
    Norm("LayerNorm", ((5, 7),), (4, 5, 7)),
    Norm("RMSNorm", (7,), (4, 3, 7)),
]

# Options beyond the usual ones, each with another meaning in training, in eval, or in the state.
VARIANTS = [
    Norm("BatchNorm1d", (5,), (8, 5), {"momentum": None}),
    Norm("BatchNorm2d", (6,), (3, 6, 4, 5), {"track_running_stats": False}),
    Norm("BatchNorm2d", (6,), (3, 6, 4, 5), {"affine": False}),
    Norm("BatchNorm2d", (6,), (3, 6, 4, 5), {"momentum": 0.3, "eps": 0.1}),
    Norm("InstanceNorm2d", (4,), (2, 4, 5, 3)),
    Norm("InstanceNorm2d", (4,), (2, 4, 5, 3), {"track_running_stats": True}),
    Norm("InstanceNorm2d", (4,), (4, 5, 3)),
    Norm("GroupNorm", (2, 6), (3, 6, 4, 5), {"affine": False}),
    Norm("GroupNorm", (1, 6), (3, 6)),
    Norm("LayerNorm", (7,), (4, 3, 7), {"bias": False}),
    Norm("LayerNorm", (7,), (4, 3, 7), {"elementwise_affine": False}),
    Norm("LayerNorm", (7,), (7,)),
    Norm("RMSNorm", (7,), (4, 3, 7), {"elementwise_affine": False, "eps": 1e-3}),
]


def assert_close(found, expected, what="", roundings=16.0, size=1.0):
    """Compare within a few roundings of the type, in units of the largest value."""
    assert found.dtype == expected.dtype, what
    assert found.shape == expected.shape, what
    largest = max(size, expected.abs().max().item()) if expected.numel() else size
    bound = roundings * torch.finfo(expected.dtype).eps * largest
    torch.testing.assert_close(found, expected, rtol=0, atol=bound, msg=lambda text: f"{what}: {text}")


def assert_same_state(ours, theirs, **tolerance):
    """Parameters, running statistics and counts agree."""
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, expected in theirs.state_dict().items():
        if expected.is_floating_point():
            assert_close(ours.state_dict()[name], expected, name, **tolerance)
        else:
            assert torch.equal(ours.state_dict()[name], expected), name


def computed_by_nbnorm(y):
    """Whether the last operation of a tensor's graph is nbnorm's."""
    return type(y.grad_fn).__name__ == "NormalizeBackward"


@pytest.fixture(autouse=True)
def always_nbnorm(monkeypatch):
    """Let nbnorm compute tensors of every size, and make PyTorch's random numbers the same in every run."""
    monkeypatch.setattr(nbnorm.torch._policy, "smallest", lambda *_: 0)
    torch.manual_seed(0)
