"""What ``p.grad`` is: a handle that acts on managed memory, whatever a training loop does to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from tierflow.scheduler.hooks import in_backward

if TYPE_CHECKING:
    from tierflow.scheduler.gradients import GradSlot, Spilled

_aten = torch.ops.aten
_SCALINGS = (_aten.mul_.Tensor, _aten.mul_.Scalar)
_ZEROINGS = (_aten.zero_.default, _aten._foreach_zero_.default)


class ManagedGrad(torch.Tensor):
    """What ``p.grad`` is: shape, dtype and device of the parameter, data in the GRAD memory.

    In-place operations act on the managed memory, views stay managed, everything else computes on a copy or
    on the memory itself and returns ordinary tensors on the parameter's device.
    """

    _slot: GradSlot
    _memory: torch.Tensor

    @staticmethod
    def __new__(
        cls, slot: GradSlot, memory: torch.Tensor, dtype: torch.dtype, device: torch.device
    ) -> ManagedGrad:
        handle = torch.Tensor._make_wrapper_subclass(
            cls, memory.shape, strides=memory.stride(), dtype=dtype, device=device
        )
        handle._slot, handle._memory = slot, memory
        return handle

    def __init__(self, *args: Any) -> None:
        pass

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Runs ``func`` on the managed memory."""
        if _record_scale(func, args):
            return args[0]
        if func is _aten.add_.Tensor and _is_whole(args[0]) and not kwargs and _same_kind(args[0], args[1]):
            slot = args[0]._slot
            loss_scale = slot.context.scaling.of_backward(slot.name) if in_backward() else 1.0
            if in_backward() or slot.loss_scale == 1.0:
                slot.add(args[1], loss_scale)
                return args[0]
        return _on_memory(func, args, kwargs or {})

    def materialize(self) -> torch.Tensor:
        """A copy of the gradient as an ordinary tensor on the parameter's device."""
        self._slot.settle()
        copy = self._slot.unscaled(self._memory).to(dtype=self.dtype, copy=True)  # on its own: no copy may cross registrations
        return copy.to(device=self.device)

    def numpy(self, *, force: bool = False) -> Any:
        """A copy as a numpy array."""
        return self.materialize().numpy(force=force)

    def tolist(self) -> Any:
        """The values as nested lists."""
        return self.materialize().tolist()

    def data_ptr(self) -> int:
        """Refused: the gradient has no memory on the parameter's device."""
        raise RuntimeError(f"the gradient of {self._slot.name!r} is managed by tierflow; use grad.clone() first")

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return self.materialize()

    def __reduce_ex__(self, proto: Any) -> Any:
        return self.materialize().__reduce_ex__(proto)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"ManagedGrad({self.materialize()!r})"


def _is_whole(value: Any) -> bool:
    return isinstance(value, ManagedGrad) and value is value._slot.handle


def _same_kind(handle: ManagedGrad, other: Any) -> bool:
    plain = isinstance(other, torch.Tensor) and not isinstance(other, ManagedGrad)
    return plain and other.shape == handle.shape and other.is_floating_point()


def _record_scale(func: Any, args: tuple[Any, ...]) -> bool:
    """In-place multiplication of whole gradients by one number, as clipping does: fused into the update."""
    if func not in _SCALINGS or not _is_whole(args[0]):
        return False
    factor = args[1]
    if isinstance(factor, torch.Tensor):
        if factor.numel() != 1 or isinstance(factor, ManagedGrad):
            return False
        factor = factor.item()
    slot = args[0]._slot
    slot.rescale(float(torch.tensor(factor, dtype=torch.float32)))
    slot.user_scaled = True
    return True


def _on_memory(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    handles = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, ManagedGrad)]
    first = handles[0]
    if len(handles) > 1 and "_foreach_" in func._schema.name and any(h._slot.context.spilled for h in handles):
        return _one_by_one(func, args, kwargs)
    moved: list[tuple[torch.Tensor, torch.Tensor]] = []
    as_they_are = func in _ZEROINGS or _makes_views(func)
    data: dict[int, torch.Tensor] = {}
    held: list[Spilled] = []

    def unwrap(value: Any) -> Any:
        if isinstance(value, ManagedGrad):
            value._slot.settle()
            if value._slot.context.spilled is not None:
                value._slot.context.spilled.hold()
                held.append(value._slot.context.spilled)
            if "norm" in func._schema.name:
                value._slot.norm_was_read = True
            if id(value) not in data:
                data[id(value)] = value._memory if as_they_are else value._slot.unscaled(value._memory)
            return data[id(value)]
        if isinstance(value, torch.Tensor) and value.device != first._memory.device:
            here = value.to(first._memory.device)
            moved.append((value, here))
            return here
        return value

    if func._schema.is_mutable:
        for handle in handles:
            handle._slot.context.before_write(handle._slot)
    try:
        result = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
        if func._schema.is_mutable:
            for handle in _written(func, args, kwargs):
                if data[id(handle)] is not handle._memory:
                    handle._memory.copy_(data[id(handle)].mul(handle._slot.loss_scale))
                handle._slot.changed()
            for there, here in moved:  # an argument such as GradScaler's found_inf was written on this side
                there.copy_(here)
    finally:
        for spilled in held:
            spilled.let_go()
    # a dtype that was asked for is the result's; else it has the gradient's where it was computed in the memory's
    own = None if kwargs.get("dtype") is not None else data[id(first)].dtype
    return _wrap(result, handles, data, own, kwargs.get("device"))


def _one_by_one(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function of lists, item by item: there may not be room for all at once."""
    count = next(len(a) for a in (*args, *kwargs.values()) if isinstance(a, (list, tuple)))

    def item(value: Any, i: int) -> Any:
        return [value[i]] if isinstance(value, (list, tuple)) and len(value) == count else value

    found: list[Any] = []
    for i in range(count):
        result = func(*(item(a, i) for a in args), **{k: item(a, i) for k, a in kwargs.items()})
        found += result if isinstance(result, (list, tuple)) else []
    return found or None


def _makes_views(func: Any) -> bool:
    """Whether results share memory with arguments that ``func`` does not write."""
    return any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[ManagedGrad]:
    named = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    written = [named.get(a.name) for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [a for a in tree_flatten(written)[0] if isinstance(a, ManagedGrad)]


def _wrap(
    result: Any, handles: list[ManagedGrad], data: dict[int, torch.Tensor], own: torch.dtype | None, device: Any
) -> Any:
    """``own``: the dtype that becomes the gradient's; ``device``: what was asked for, instead of the gradient's."""
    first = handles[0]
    leaves, spec = tree_flatten(result)
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, torch.Tensor):
            continue
        same = next((h for h in handles if leaf is data[id(h)]), None)
        owner = next((h for h in handles if _shares(leaf, h._memory)), None)
        if same is not None:
            leaves[i] = same
        elif owner is not None:
            leaves[i] = ManagedGrad(owner._slot, leaf, first.dtype, first.device)
        else:
            dtype = first.dtype if leaf.dtype == own else leaf.dtype
            leaves[i] = leaf.to(device=device or first.device, dtype=dtype)
    return tree_unflatten(leaves, spec)


def _shares(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata
