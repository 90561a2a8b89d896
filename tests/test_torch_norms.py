"""All five norms in all four number types beside PyTorch's functions: output and gradients of the same arrays."""

import numpy as np
import pytest

import nbnorm
import oracle

torch = pytest.importorskip("torch")
ml_dtypes = pytest.importorskip("ml_dtypes")
F = torch.nn.functional

TYPES = {
    "float32": (np.float32, torch.float32),
    "float64": (np.float64, torch.float64),
    "float16": (np.float16, torch.float16),
    "bfloat16": (ml_dtypes.bfloat16, torch.bfloat16),
}
SHAPE, GROUPS = (4, 6, 5, 7), 3


def tensor(array):
    """Copy an array into a tensor of its type."""
    return torch.from_numpy(np.asarray(array, np.float64)).to(TYPES[array.dtype.name][1])


# For each norm: PyTorch's function, ours, and the shape of the parameters.
NORMS = {
    "batch": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), nbnorm.batch_norm_forward, (6,)),
    "layer": (lambda x, w, b: F.layer_norm(x, (7,), w, b), nbnorm.layer_norm_forward, (7,)),
    "rms": (
        lambda x, w, b: F.rms_norm(x, (7,), w, 1e-6),
        lambda x, w, b: nbnorm.rms_norm_forward(x, w),
        (7,),
    ),
    "group": (
        lambda x, w, b: F.group_norm(x, GROUPS, w, b),
        lambda x, w, b: nbnorm.group_norm_forward(x, GROUPS, w, b),
        (6,),
    ),
    "instance": (lambda x, w, b: F.instance_norm(x, None, None, w, b), nbnorm.instance_norm_forward, (6,)),
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("norm", NORMS)
def test_same_as_pytorch(norm, dtype, rng):
    """PyTorch computes in its type or in float32, so that results differ by a few of its roundings."""
    theirs, ours, parameters = NORMS[norm]
    kind = TYPES[dtype][0]
    x, dy = ((rng.standard_normal(SHAPE) * 1.5 + 0.3).astype(kind) for _ in range(2))
    weight = rng.uniform(0.5, 2, parameters).astype(kind)
    bias = rng.standard_normal(parameters).astype(kind)
    inputs = [tensor(array).requires_grad_() for array in (x, weight, bias)]
    wanted = theirs(*inputs)
    wanted.backward(tensor(dy))
    y, saved = ours(x, weight, bias)
    found = getattr(nbnorm, f"{norm}_norm_backward")(dy, saved)
    eps = oracle.eps(kind)
    wide = [result.astype(np.float64) for result in (y, *found)]
    targets = [wanted, *(array.grad for array in inputs)]
    for name, value, target in zip(("y", "dx", "dweight", "dbias"), wide, targets, strict=False):
        target = target.detach().to(torch.float64).numpy()
        bound = (8 if name == "y" else 64) * eps * max(1.0, np.abs(target).max())
        oracle.assert_within(value, target, bound, name)
