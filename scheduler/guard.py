"""Parameters that are not there: metadata goes through, anything else fetches on demand or raises.

An emptied storage is not safe (``sum`` on it crashes the process), so an unpinned parameter keeps its shape,
dtype and device over a one-element NaN storage and changes its class to one that intercepts every operation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_PROPERTIES = (
    "shape dtype device layout requires_grad grad is_leaf grad_fn ndim names output_nr is_sparse is_cuda is_cpu "
    "is_quantized is_meta is_mkldnn is_nested is_xla is_mps is_xpu is_complex itemsize nbytes _backward_hooks "
    "_post_accumulate_grad_hooks _version _base _grad _grad_fn retains_grad"
).split()
_METHODS = (
    "size dim numel nelement element_size is_floating_point is_complex get_device ndimension register_hook "
    "register_post_accumulate_grad_hook requires_grad_ __len__ __hash__ _is_view is_inference is_signed type "
    "is_distributed"
).split()


def _metadata() -> set[Any]:
    allowed: set[Any] = set()
    for name in _PROPERTIES:
        descriptor = getattr(torch.Tensor, name, None)
        for accessor in ("__get__", "__set__", "__delete__"):
            if hasattr(descriptor, accessor):
                allowed.add(getattr(descriptor, accessor))
    allowed.update(getattr(torch.Tensor, name) for name in _METHODS if hasattr(torch.Tensor, name))
    allowed.update({torch.numel, torch.is_floating_point, torch.is_complex, torch.typename})
    return allowed


_METADATA = _metadata()


class EvictedParameterError(RuntimeError):
    """The data of a parameter was touched while it was not fetched."""

    def __init__(self, name: str, what: str):
        super().__init__(
            f"parameter {name!r} is offloaded and not fetched here, so {what} cannot touch its data. Use "
            "`with tierflow.gathered(model):` (or a list of parameters) around the code that needs it; to save "
            "weights that do not fit in memory use tierflow.save_weights(model, folder)"
        )


class Evicted(nn.Parameter):
    """Mixed into a parameter's class while the parameter is not pinned."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Lets metadata through; else asks the engine to fetch (inside a forward) or raises."""
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        found = list(_evicted((args, kwargs)))
        if not found:  # fetched between dispatch and here, by another argument
            return func(*args, **kwargs)
        # nn.Module reads and writes parameters for state dicts with detach() and copy_(): known by the caller alone
        caller = sys._getframe(1).f_code.co_name
        answer = found[0]._tierflow_owner.on_touch(found, func, args, caller)
        return answer if answer is not None else func(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Any:
        raise EvictedParameterError(self._tierflow_name, "copy.deepcopy")  # type: ignore[attr-defined]

    def __reduce_ex__(self, proto: Any) -> Any:
        raise EvictedParameterError(self._tierflow_name, "pickle")  # type: ignore[attr-defined]

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"<offloaded parameter {self._tierflow_name} {tuple(self.shape)} {self.dtype}>"  # type: ignore[attr-defined]


def _evicted(value: Any) -> Any:
    if isinstance(value, Evicted):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _evicted(item)
    elif isinstance(value, dict):
        yield from _evicted(list(value.values()))


_CLASSES: dict[type, type] = {}


def evicted_class(cls: type) -> type:
    """The class that a parameter of class ``cls`` has while it is not fetched."""
    if cls not in _CLASSES:
        bases = (Evicted,) if cls is nn.Parameter else (Evicted, cls)
        _CLASSES[cls] = type("EvictedParameter", bases, {"__module__": __name__})
    return _CLASSES[cls]


def describe(func: Callable[..., Any]) -> str:
    """A short name of an intercepted function for a message."""
    return getattr(func, "__name__", None) or str(func)
