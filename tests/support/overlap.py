"""One training run as a value: the same case under the plain schedule and under any other must give the same bits."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tiny
import torch
from loops import Tower
from outcome import Stack, states_of
from slow import slow_down
from torch import nn

import tierflow
from tierflow.swap import DebugMemory, Tier

STEPS = 7


class Abandoned(Exception):
    """Raised where a step should have come."""


@dataclass(frozen=True)
class Case:
    """What trains, where, under which schedule, and what happens in between: ``events`` are (step, place, what)."""

    model: str = "stack"
    dtype: str = "float32"
    placement: str = "everything"
    update: str = "speculative"
    loop: str = "owned"  # plain: offload(); owned: expect_step(); batch: train_batch()
    accumulation: int = 1
    order: str = "micro_batch"
    clip: float = 0.0
    groups: int = 1
    schedule: bool = False
    fp16: bool = False
    through_host: bool = False
    slack: float = 0.0
    seed: int = 0
    delay: float = 0.0  # of the drive for each transfer, seconds
    worker: bool = False  # kernels on a thread of their own, as with an accelerator
    bad_step: int = -1  # whose loss is infinite
    loud_step: int = -1  # whose loss is large
    abandoned: int = -1  # whose gradients are thrown away
    gradients: str = "host"
    steps: int = STEPS
    events: tuple[tuple[int, str, str], ...] = ()


#: On an accelerator the norm of gradients that lie there has other last bits.
RESIDENT = "device" if tiny.DEVICE.type == "cpu" else "host"


def plain_of(case: Case) -> Case:
    """The same training with nothing moved and nothing overlapped."""
    return replace(
        case, placement=RESIDENT, gradients="host", update="immediate", loop="owned", order="micro_batch",
        through_host=False, delay=0.0, worker=False,
    )  # fmt: skip


@dataclass
class Seen:
    """All that a run showed, and how often updates in a backward counted or were undone."""

    log: list[Any] = field(default_factory=list)
    states: dict[str, torch.Tensor] = field(default_factory=dict)
    committed: int = 0
    undone: int = 0
    read: int = 0

    def difference(self, other: Seen) -> str:
        """The first thing in which the runs differ; empty if there is none."""
        for i, (mine, theirs) in enumerate(zip(self.log, other.log, strict=False)):
            if repr(mine) != repr(theirs):  # NaN is equal to itself here
                return f"entry {i}: {mine} and {theirs}"
        if len(self.log) != len(other.log):
            return f"{len(self.log)} and {len(other.log)} entries"
        names = [n for n in self.states if not torch.equal(self.states[n], other.states[n])]
        return f"states {names}" if names or self.states.keys() != other.states.keys() else ""


def make_model(case: Case) -> nn.Module:
    """The case's model, the same each time."""
    dtype = getattr(torch, case.dtype)
    if case.model in ("llama", "frozen_llama", "untied"):
        model = tiny.llama(layers=2, hidden=32, vocab=96, tied=case.model != "untied", dtype=dtype)
        if case.model == "frozen_llama":
            model.model.layers[0].requires_grad_(False)
            model.model.norm.requires_grad_(False)
        return model
    torch.manual_seed(5)
    if case.model == "tower":
        model = Tower(depth=4).to(dtype)
        model.blocks[2].requires_grad_(False)
        return model
    return Stack(layers=5, width=64, dtype=dtype)


def loss_of(model: nn.Module, case: Case, step: int, part: int) -> torch.Tensor:
    """One micro-batch's share of the step's loss."""
    generator = torch.Generator().manual_seed(100 * step + part)
    if "llama" in case.model or case.model == "untied":
        ids = torch.randint(0, 96, (1, 8), generator=generator)
        loss = model(input_ids=ids, labels=ids).loss
    elif case.model == "tower":
        model.order = [0, 1, 2, 3] if step % 3 else [1, 0, 3, 1]
        dtype = torch.float16 if case.fp16 else getattr(torch, case.dtype)
        loss = model(torch.randn(2, 32, generator=generator).to(dtype)).float().square().mean()
    else:
        loss = model(model.input(100 * step + part, rows=2))
    if step == case.bad_step and part == case.accumulation - 1:
        loss = loss * float("inf")
    if step == case.loud_step:
        loss = loss * 1000.0
    return loss / case.accumulation


def config_of(case: Case, path: Path) -> dict[str, Any]:
    """Caps as low as they can be, and ``slack`` units more; for the plain schedule generous ones."""

    def with_caps(caps: dict[str, Any]) -> dict[str, Any]:
        found = tiny.config(case.placement, path, case.clip, case.accumulation, update=case.update, gradients=case.gradients, **caps)
        found["tierflow"]["accumulation"] = case.order
        if case.fp16:
            found["fp16"] = {"enabled": True, "initial_scale_power": 22, "loss_scale_window": 2, "hysteresis": 1}
        return found

    if case.placement == RESIDENT:
        return with_caps({})
    model = make_model(case)
    trained = {id(p) for p in model.parameters() if p.requires_grad}

    def plan(caps: dict[str, int]) -> Any:
        loaded = tierflow.load_config(with_caps(caps))
        owned = case.loop != "plain"
        return tierflow.offloading.make_run(model, loaded, tiny.DEVICE, trained, None, owned, not case.through_host)

    (units, _, _), caps = tiny.least(plan)
    caps["device_memory"] += int(case.slack * max(u.chunk.nbytes for u in units))
    caps["host_memory"] += int(case.slack * 4096 * 14)
    return with_caps({name: str(n) for name, n in caps.items()})


def groups_of(model: nn.Module, case: Case) -> list[dict[str, Any]]:
    """Parameters by their number of dimensions, with settings of their own."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    if case.groups == 1:
        return [{"params": wanted}]
    return [
        {"params": [p for p in wanted if p.dim() > 1], "weight_decay": 0.2, "lr": 5e-3},
        {"params": [p for p in wanted if p.dim() <= 1], "weight_decay": 0.0, "betas": (0.8, 0.9)},
    ]


def digest(tensors: Any) -> str:
    """Of a mapping or list of tensors, in order."""
    found = hashlib.sha256()
    for tensor in tensors.values() if isinstance(tensors, dict) else tensors:
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Run:
    """A case under way."""

    def __init__(self, case: Case, path: Path, change: Callable[[Any], None] = lambda engine: None):
        self.case, self.path, self.seen = case, path, Seen()
        self.model = make_model(case)
        debug = DebugMemory(random.Random(case.seed), case.through_host) if case.placement != RESIDENT else None
        self.engine: Any = None
        options = {"param_groups": groups_of(self.model, case), "debug_memory": debug}
        if case.loop == "batch":
            self.engine = tierflow.initialize(self.model, config_of(case, path), **options)
            self.optimizer = self.engine.optimizer
        else:
            _, self.optimizer = tierflow.offload(
                self.model, config_of(case, path), owned_loop=case.loop == "owned", **options
            )
        self.inner = self.optimizer.engine
        if case.delay and self.inner.manager.store is not None:
            slow_down(self.inner, case.delay)
        if case.worker:
            self.inner.updates.stager._worker = ThreadPoolExecutor(1)
        change(self.inner)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda s: 1 / (s + 1)) if case.schedule else None
        self.log = self.seen.log

    def run(self) -> Seen:
        """Trains to the end, closes, and returns all that was seen."""
        try:
            for step in range(self.case.steps):
                self._step(step)
                self.events(step, "between")
                self.inner.manager.ledger.check()
            self.seen.states = states_of(self.inner)
            self._nothing_is_held()
            speculation = self.inner.speculation
            if speculation is not None:
                self.seen.committed, self.seen.undone = speculation.committed, speculation.undone
            return self.seen
        finally:
            self.optimizer.close() if self.engine is None else self.engine.close()

    def _nothing_is_held(self) -> None:
        manager = self.inner.manager
        manager.fetches.settle()
        assert not any(manager.ledger.pins(c, t) for u in self.inner.units for k in u.chunks for c in u.parts(k) for t in Tier)
        assert not any(manager.ledger._scratch.values())

    def _step(self, step: int) -> None:
        try:
            losses = self._batch(step) if self.engine is not None else self._loop(step)
            self.log.append(("loss", losses.item(), "norm", self.optimizer.last_grad_norm, self.optimizer.overflow))
        except tierflow.NonFiniteGradient as error:
            self.log.append(("not finite", error.parameter))
        except Abandoned:
            self.log.append("abandoned")
        self.events(step, "after_step")
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()

    def _loop(self, step: int) -> torch.Tensor:
        if self.case.loop == "owned":
            self.optimizer.expect_step()
        total: Any = None
        for part in range(self.case.accumulation):
            loss = loss_of(self.model, self.case, step, part)
            self.optimizer.backward(loss)
            total = loss.detach() if total is None else total + loss.detach()
        self._before_update(step)
        self.optimizer.step()
        return total

    def _batch(self, step: int) -> torch.Tensor:
        def observer(phase: str | None) -> None:
            if phase == "update":
                self._before_update(step)

        parts = list(range(self.case.accumulation))
        return self.engine.train_batch(parts, lambda model, part: loss_of(model, self.case, step, part), observer)

    def _before_update(self, step: int) -> None:
        self.events(step, "before_step")
        if step == self.case.abandoned:
            raise Abandoned

    # ---- what happens in between

    def events(self, step: int, place: str) -> None:
        """Does what the case says for here."""
        for at, where, what in self.case.events:
            if (at, where) == (step, place):
                self.log.append((what, getattr(self, f"do_{what}")(step)))

    def _params(self) -> Iterator[nn.Parameter]:
        return (p for p in self.model.parameters() if p.requires_grad)

    def do_state_dict(self, _step: int) -> str:
        return digest(self.model.state_dict())

    def do_load_state_dict(self, _step: int) -> None:
        self.model.load_state_dict({k: v * 1.125 + 0.0625 for k, v in self.model.state_dict().items()})

    def do_evaluate(self, step: int) -> float:
        self.model.eval()
        with torch.no_grad():
            found = loss_of(self.model, replace(self.case, bad_step=-1), step + 50, 0).item()
        self.model.train()
        return found

    def do_write(self, step: int) -> None:
        chosen = list(self._params())[step % 3]
        with torch.no_grad(), tierflow.gathered([chosen]):
            chosen.mul_(0.75).add_(0.0625)

    def do_read(self, step: int) -> str:
        chosen = list(self._params())[step % 3]
        with tierflow.gathered([chosen]):
            return digest([chosen])

    def do_touch(self, _step: int) -> None:
        """A look at the weights: refused where they are not, and what it finds is in the log of ``state_dict``."""
        for p in self._params():
            with contextlib.suppress(tierflow.EvictedParameterError):
                p.sum()

    def do_save(self, _step: int) -> str:
        from safetensors.torch import load_file

        folder = self.path / "checkpoint"
        tierflow.save_checkpoint(self.model, self.optimizer, folder)
        return digest(load_file(folder / "model.safetensors")) + digest(load_file(folder / "optimizer.safetensors"))

    def do_restore(self, step: int) -> str:
        found = self.do_save(step)
        self.do_write(step)
        tierflow.load_checkpoint(self.model, self.optimizer, self.path / "checkpoint")
        return found

    def do_zero(self, _step: int) -> None:
        self.optimizer.zero_grad(set_to_none=False)

    def do_forget(self, step: int) -> None:
        for p in list(self._params())[:: 2 + step % 2]:
            p.grad = None

    def do_read_grad(self, _step: int) -> list[float | None]:
        return [None if p.grad is None else p.grad.float().sum().item() for p in self._params()]

    def do_scale_grad(self, _step: int) -> None:
        for p in self._params():
            if p.grad is not None:
                p.grad.mul_(0.5)

    def do_assign_grad(self, step: int) -> None:
        for p in list(self._params())[:: 2 + step % 2]:
            p.grad = torch.full(p.shape, 0.01, dtype=p.dtype, device=p.device)

    def do_lr(self, _step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.5

    def do_group(self, _step: int) -> None:
        """The last group leaves and comes back with other settings, as its first half and its second."""
        group = self.optimizer.param_groups.pop()
        half = max(len(group["params"]) // 2, 1)
        for i, part in enumerate((group["params"][:half], group["params"][half:])):
            if part:
                self.optimizer.add_param_group({**group, "params": part, "lr": group["lr"] * (0.5 + i)})

    def do_manifest(self, _step: int) -> None:
        self.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))


EVENTS = sorted(name[3:] for name in vars(Run) if name.startswith("do_"))


def check(case: Case, path: Path, change: Callable[[Any], None] = lambda engine: None) -> Seen:
    """Runs the case and its plain schedule; fails where they differ. Returns what the case's own run showed."""
    plain = Run(plain_of(case), path).run()
    mine = Run(case, path, change).run()
    assert not mine.difference(plain), (mine.difference(plain), case)
    return mine
