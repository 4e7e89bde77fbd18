"""What ``torch.cuda`` offers, over the emulated device."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch

from .native import native

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

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        return int(native.register_host(address, size))

    def cudaHostUnregister(self, address: int) -> int:
        return int(native.unregister_host(address))


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


def memory_stats(device: Any = None) -> dict[str, int]:
    found = native.stats()
    return {
        "num_device_alloc": found["device_allocs"],
        "segment.all.allocated": found["device_allocs"],
        "reserved_bytes.all.current": found["reserved"],
    }


def set_per_process_memory_fraction(part: float, device: Any = None) -> None:
    native.limit(int(part * TOTAL))


_generator = torch.Generator()

#: Attributes of ``torch.cuda``, and what they are here.
REPLACED: dict[str, Any] = {
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
    "cudart": lambda: Runtime(),
    "mem_get_info": lambda device=None: (TOTAL - native.stats()["reserved"], TOTAL),
    "memory_allocated": lambda device=None: native.stats()["allocated"],
    "memory_reserved": lambda device=None: native.stats()["reserved"],
    "max_memory_allocated": lambda device=None: native.stats()["peak_allocated"],
    "max_memory_reserved": lambda device=None: native.stats()["peak_reserved"],
    "reset_peak_memory_stats": lambda device=None: native.reset_peaks(),
    "memory_stats": memory_stats,
    "set_per_process_memory_fraction": set_per_process_memory_fraction,
    "default_generators": (_generator,),
    "manual_seed_all": _generator.manual_seed,
    "get_rng_state": lambda device=None: _generator.get_state(),
    "get_rng_state_all": lambda: [_generator.get_state()],
    "set_rng_state": lambda state, device=None: _generator.set_state(state),
    "set_rng_state_all": lambda states: _generator.set_state(states[0]),
}
