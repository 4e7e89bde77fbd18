"""A store whose transfers take their time in the background, one after the other, as on a slow drive."""

from __future__ import annotations

import time
from typing import Any


class SlowTicket:
    """Done when the real one is and its time has come."""

    def __init__(self, real: Any, ready: float):
        self._real, self._ready = real, ready
        self.times, self.nbytes = real.times, real.nbytes

    def done(self) -> bool:
        return time.perf_counter() >= self._ready and self._real.done()

    def wait(self) -> None:
        self._real.wait()
        time.sleep(max(self._ready - time.perf_counter(), 0.0))


class SlowStore:
    """Wraps a store: each transfer takes ``seconds`` more, and they queue. ``spent``: all of them, in seconds."""

    def __init__(self, real: Any, seconds: float):
        self._real, self._seconds = real, seconds
        self._free = self.spent = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def _later(self, ticket: Any) -> SlowTicket:
        self._free = max(self._free, time.perf_counter()) + self._seconds
        self.spent += self._seconds
        return SlowTicket(ticket, self._free)

    def read(self, *args: Any, **kwargs: Any) -> SlowTicket:
        return self._later(self._real.read(*args, **kwargs))

    def write(self, *args: Any, **kwargs: Any) -> SlowTicket:
        return self._later(self._real.write(*args, **kwargs))


class PromptTicket:
    """Is over as soon as somebody asks."""

    def __init__(self, real: Any):
        self._real = real
        self.times, self.nbytes = real.times, real.nbytes

    def done(self) -> bool:
        self._real.wait()
        return True

    def wait(self) -> None:
        self._real.wait()


class PromptStore:
    """Wraps a store so that what is done when does not depend on time."""

    def __init__(self, real: Any):
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def read(self, *args: Any, **kwargs: Any) -> PromptTicket:
        return PromptTicket(self._real.read(*args, **kwargs))

    def write(self, *args: Any, **kwargs: Any) -> PromptTicket:
        return PromptTicket(self._real.write(*args, **kwargs))


def prompt(engine: Any) -> None:
    """Puts a prompt store under the engine."""
    if engine.manager.store is not None:
        engine.manager.store = PromptStore(engine.manager.store)


def slow_down(engine: Any, seconds: float) -> SlowStore:
    """Puts a slow store under the engine and returns it."""
    engine.manager.store = found = SlowStore(engine.manager.store, seconds)
    return found
