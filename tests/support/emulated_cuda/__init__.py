"""A device behind torch's ``cuda`` where torch has none: host memory, streams that are threads, copies that lag.

The lines of tierflow that are for CUDA run on it as they are: streams, events, registration, copies in both directions
and memory that its stream hands on. Work of a stream that nobody waits for is late, so that a missing wait is seen in the
numbers; freed memory is NaN. It says nothing of speed, of the driver, nor of CUDA's own kernels.
"""

from __future__ import annotations

import sys

if "torch" in sys.modules:  # it asks once which device there is, while it is imported
    raise ImportError("the emulated device has to be imported before torch")

from .native import native as native  # isort: skip  (before torch)

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch

TOTAL = 8 << 30


class Stream(torch.Stream):
    """``torch.cuda.Stream``."""

    def __new__(cls, device: Any = None, priority: int = 0, **known: Any) -> Stream:
        made = super().__new__(cls, **known) if known else super().__new__(cls, device=torch.device("cuda", 0))
        assert isinstance(made, Stream)
        return made

    @property
    def cuda_stream(self) -> int:
        return self.stream_id

    def record_event(self, event: Any = None) -> Any:
        event = Event() if event is None else event
        event.record(self)
        return event


class _IsEvent(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, torch.Event)


class Event(metaclass=_IsEvent):
    """``torch.cuda.Event``. torch's own are no base for classes: they would not take each other."""

    def __new__(cls, enable_timing: bool = False, **_: Any) -> Any:
        return torch.Event("cuda", enable_timing=enable_timing)


class Runtime:
    """``torch.cuda.cudart()``."""

    def __init__(self, native: Any):
        self._native = native

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        return int(self._native.register_host(address, size))

    def cudaHostUnregister(self, address: int) -> int:
        return int(self._native.unregister_host(address))


def inputs_follow_models() -> None:
    """A model's inputs are brought to the device that it is on: tests make them on the host."""
    called = torch.nn.Module.__call__

    def call(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        device = next((p.device for p in self.parameters()), None)
        if device is None or device.type == "cpu":
            return called(self, *args, **kwargs)
        there = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), (args, kwargs))
        return called(self, *there[0], **there[1])

    torch.nn.Module.__call__ = call  # type: ignore[method-assign, assignment]


def install() -> None:
    """Makes ``torch.cuda`` that of the emulated device, in this process for good."""
    cuda: Any = torch.cuda
    generator = torch.Generator()

    @contextlib.contextmanager
    def stream(wanted: Any) -> Iterator[None]:
        before = native.current_stream()
        native.set_current_stream(before if wanted is None else wanted.stream_id)
        try:
            yield
        finally:
            native.set_current_stream(before)

    def current_stream(device: Any = None) -> Stream:
        return Stream(stream_id=native.current_stream(), device_index=0, device_type=1)

    def default_stream(device: Any = None) -> Stream:
        return Stream(stream_id=0, device_index=0, device_type=1)

    def statistics(device: Any = None) -> dict[str, int]:
        found = native.stats()
        return {
            "num_device_alloc": found["device_allocs"],
            "segment.all.allocated": found["device_allocs"],
            "reserved_bytes.all.current": found["reserved"],
        }

    def fraction(part: float, device: Any = None) -> None:
        native.limit(int(part * TOTAL))

    patches: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *a, **k: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "_is_in_bad_fork": lambda: False,
        "device": lambda device=None: contextlib.nullcontext(),
        "get_device_name": lambda device=None: "emulated device",
        "get_device_properties": lambda device=None: types.SimpleNamespace(name="emulated device", total_memory=TOTAL),
        "get_device_capability": lambda device=None: (9, 0),
        "Stream": Stream,
        "Event": Event,
        "stream": stream,
        "current_stream": current_stream,
        "default_stream": default_stream,
        "synchronize": lambda device=None: native.synchronize(),
        "empty_cache": native.empty_cache,
        "cudart": lambda: Runtime(native),
        "mem_get_info": lambda device=None: (TOTAL - native.stats()["reserved"], TOTAL),
        "memory_allocated": lambda device=None: native.stats()["allocated"],
        "memory_reserved": lambda device=None: native.stats()["reserved"],
        "max_memory_allocated": lambda device=None: native.stats()["peak_allocated"],
        "max_memory_reserved": lambda device=None: native.stats()["peak_reserved"],
        "reset_peak_memory_stats": lambda device=None: native.reset_peaks(),
        "memory_stats": statistics,
        "set_per_process_memory_fraction": fraction,
        "default_generators": (generator,),
        "manual_seed_all": generator.manual_seed,
        "get_rng_state": lambda device=None: generator.get_state(),
        "get_rng_state_all": lambda: [generator.get_state()],
        "set_rng_state": lambda state, device=None: generator.set_state(state),
        "set_rng_state_all": lambda states: generator.set_state(states[0]),
    }
    for name, value in patches.items():
        setattr(cuda, name, value)
