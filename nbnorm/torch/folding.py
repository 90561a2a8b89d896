"""Batch norm folded into the convolution or linear layer in front of it, for inference."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import fx, nn

from nbnorm.batch_layer import BatchNorm
from nbnorm.conventions import fold_batch_norm
from nbnorm.torch import _tracing
from nbnorm.torch.replacing import restore

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def fold(model: nn.Module) -> nn.Module:
    r"""Return a copy of a model in eval mode without the batch norms that a layer in front can absorb.

    .. math::

       scale = \frac{weight_{norm}}{\sqrt{running\_var + eps}}, \qquad
       weight' = weight \cdot scale, \qquad
       bias' = (bias - running\_mean) \cdot scale + bias_{norm}

    A batch norm goes where `torch.fx` can show that it is the only one to use the output of a linear layer or a
    convolution, transposed ones included; `torch.nn.Identity` takes its place. All others stay.

    Parameters
    ----------
    model : torch.nn.Module
        In eval mode; it is not changed.

    Returns
    -------
    torch.nn.Module
        With the same results up to rounding, and PyTorch's own modules.

    Raises
    ------
    ValueError
        If the model is in training mode.

    Examples
    --------
    >>> import torch, nbnorm.torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).eval()
    >>> nbnorm.torch.fold(model)
    Sequential(
      (0): Linear(in_features=3, out_features=4, bias=True)
      (1): Identity()
    )
    """
    if model.training:
        raise ValueError("fold expects a model in eval mode; call model.eval() first")
    folded = copy.deepcopy(model)
    restore(folded)
    shared = _shared(folded)
    for module in folded.modules():
        if not any(type(child) in _NORMS for child in _tracing.steps(module)):
            continue
        try:
            graph = _tracing.trace(module)
        except _tracing.UntraceableError:
            continue
        for layer, norm, name in _pairs(graph, module):
            if layer not in shared and norm not in shared and _foldable(layer, norm):
                _absorb(layer, norm)
                module.set_submodule(name, nn.Identity())
    return folded


def _shared(model: nn.Module) -> set[nn.Module]:
    """Modules that stand in more than one place, or whose parameters do."""
    places: dict[int, list[nn.Module]] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        for owned in (module, *module._parameters.values()):
            if owned is not None:
                places.setdefault(id(owned), []).append(module)
    return {module for owners in places.values() if len(owners) > 1 for module in owners}


def _pairs(graph: fx.Graph, module: nn.Module) -> list[tuple[nn.Module, nn.Module, str]]:
    """Return each layer with the norm that alone uses its only output, and the norm's name."""
    calls = [node for node in graph.nodes if node.op == "call_module"]
    targets = [str(node.target) for node in calls]
    pairs = []
    for node in calls:
        source = node.args[0] if len(node.args) == 1 else None
        if not (isinstance(source, fx.Node) and source.op == "call_module" and len(source.users) == 1):
            continue
        names = str(source.target), str(node.target)
        if all(targets.count(name) == 1 for name in names):
            pairs.append((module.get_submodule(names[0]), module.get_submodule(names[1]), names[1]))
    return pairs


def _foldable(layer: nn.Module, norm: nn.Module) -> bool:
    """Whether both are of a known kind, plain tensors of one type on the CPU, and seen by no hook."""
    if type(layer) not in (*_PLAIN, *_TRANSPOSED) or type(norm) not in _NORMS or norm.running_mean is None:
        return False
    if type(layer) is nn.Linear and type(norm) is not nn.BatchNorm1d:
        return False
    weight = layer.weight
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in (layer, norm))
    channels = norm.num_features == (
        layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    )
    known = type(weight) is nn.Parameter and weight.is_cpu and weight.dtype in (torch.float32, torch.float64)
    return known and channels and not hooked


@torch.no_grad()
def _absorb(layer: nn.Module, norm: nn.Module) -> None:
    """Fold a norm into a layer."""
    twin = BatchNorm(norm.num_features, eps=norm.eps, affine=norm.affine, dtype=np.float64)
    state = {name: value.double().numpy() for name, value in norm.state_dict().items()}
    twin.load_state_dict({**state, "num_batches_tracked": 0})
    transposed = type(layer) in _TRANSPOSED
    place = {"output_axis": 1, "groups": layer.groups} if transposed else {"output_axis": 0}
    old = None if layer.bias is None else layer.bias.numpy()
    weight, bias = fold_batch_norm(layer.weight.numpy(), old, twin, **place)
    layer.weight = nn.Parameter(torch.from_numpy(weight), layer.weight.requires_grad)
    layer.bias = nn.Parameter(torch.from_numpy(bias), layer.weight.requires_grad)
