"""Swap the norms of an existing model for nbnorm's, and back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from nbnorm.torch import fusion
from nbnorm.torch.modules import REPLACEMENTS

_ORIGINALS = {ours: theirs for theirs, ours in REPLACEMENTS.items()}
_NORMS = (
    nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm,
)  # fmt: skip


@dataclass(frozen=True)
class Replaced:
    """What `replace` did, by the names of the modules.

    Attributes
    ----------
    replaced : dict of str to str
        The modules that nbnorm computes now, with their class.
    left : dict of str to str
        The norms that it left alone, with the reason.
    fused : dict of str to tuple of str
        What happens in one step now, by the module whose forward call holds it.
    unfused : dict of str to str
        The modules with batch norms whose forward call cannot be rewritten safely, with the reason.
    """

    replaced: dict[str, str]
    left: dict[str, str]
    fused: dict[str, tuple[str, ...]]
    unfused: dict[str, str]

    def __str__(self) -> str:
        fusions = sum(map(len, self.fused.values()))
        lines = [f"replaced {len(self.replaced)} modules, left {len(self.left)}, fused {fusions}"]
        for title, reasons in (("left", self.left), ("not fused", self.unfused)):
            lines += [f"  {title}: {name or '(the model)'}: {reason}" for name, reason in reasons.items()]
        return "\n".join(lines)


def replace(model: nn.Module, fuse: bool = False) -> Replaced:
    """Let nbnorm compute the norms of a model.

    The modules stay the objects that they are, and so do parameters, buffers and hooks: only the class of a module
    changes, to a subclass of its own. Optimizers, averages of the weights and wrappers made before go on working.

    Parameters
    ----------
    model : torch.nn.Module
        Is changed in place.
    fuse : bool
        Whether batch norm also takes over a relu or silu behind it, and a sum in between, wherever that is sure to
        leave the results as they are. The forward call of the module around them is rewritten then: it runs the
        same submodules, but for those fused away. Hooks on these bring the original call back.

    Returns
    -------
    Replaced
        What was replaced, and what was left and why; print it.

    Examples
    --------
    >>> import torch, nbnorm.torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    >>> print(nbnorm.torch.replace(model))
    replaced 1 modules, left 0, fused 0
    >>> isinstance(model[1], torch.nn.BatchNorm1d), isinstance(model[1], nbnorm.torch.BatchNorm1d)
    (True, True)
    """
    replaced, left = {}, {}
    for name, module in model.named_modules():
        kind = type(module)
        if kind in REPLACEMENTS:
            module.__class__ = REPLACEMENTS[kind]
            replaced[name] = kind.__name__
        elif isinstance(module, _NORMS) and kind not in _ORIGINALS:
            left[name] = f"{kind.__name__} is a class of its own"
    return Replaced(replaced, left, *(fusion.fuse(model) if fuse else ({}, {})))


def restore(model: nn.Module) -> None:
    """Undo `replace`: every module of nbnorm's becomes PyTorch's again, and forward calls are the original ones.

    Parameters
    ----------
    model : torch.nn.Module
        Is changed in place.

    Examples
    --------
    >>> import torch, nbnorm.torch
    >>> model = nbnorm.torch.BatchNorm1d(4)
    >>> nbnorm.torch.restore(model)
    >>> type(model) is torch.nn.BatchNorm1d
    True
    """
    fusion.unfuse(model)
    for module in model.modules():
        if type(module) in _ORIGINALS:
            module.__class__ = _ORIGINALS[type(module)]
