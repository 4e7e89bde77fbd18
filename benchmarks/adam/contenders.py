"""What is timed, as closures over freshly made tensors. Runs in the environment of whoever is timed: what one of them
alone has is imported inside."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[], None]
HYPER: dict[str, Any] = {"lr": 1e-3, "weight_decay": 1e-2}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parameters(numel: int, tensors: int, dtype: torch.dtype) -> list[nn.Parameter]:
    """``numel`` elements in all, with gradients; two dimensions, since optimizers treat vectors apart."""
    found = []
    for _ in range(tensors):
        p = nn.Parameter(torch.full((numel // tensors // 64, 64), 0.02, dtype=dtype))
        p.grad = torch.empty_like(p).uniform_(-1e-3, 1e-3)
        found.append(p)
    return found


def torch_adamw(numel: int, tensors: int, dtype: torch.dtype, way: str) -> Run:
    optimizer = torch.optim.AdamW(parameters(numel, tensors, dtype), **{way: True}, **HYPER)
    return lambda: optimizer.step()


def torch_work() -> Run:
    """Work for all of torch's threads: some milliseconds of memory traffic."""
    values = torch.zeros(1 << 22)
    return lambda: values.add_(1.0)  # type: ignore[return-value]


def deepspeed(numel: int, tensors: int, dtype: torch.dtype, fp32_states: bool) -> Run:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    if os.environ.get("BENCH_DEEPSPEED_AVX2"):
        build_for_avx2()
    optimizer = DeepSpeedCPUAdam(parameters(numel, tensors, dtype), fp32_optimizer_states=fp32_states, **HYPER)
    return lambda: optimizer.step()


def build_for_avx2() -> None:
    """What DeepSpeed's build would choose on a machine without AVX-512."""
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().get_op_builder("CPUAdamBuilder")
    builder.cpu_arch = lambda self: "-march=haswell"
    builder.simd_width = lambda self: "-D__AVX256__"


def bitsandbytes(numel: int, tensors: int, dtype: torch.dtype, name: str) -> Run:
    import bitsandbytes

    optimizer = getattr(bitsandbytes.optim, name)(parameters(numel, tensors, dtype), **HYPER)
    return lambda: optimizer.step()


def torchao(numel: int, tensors: int, dtype: torch.dtype, name: str) -> Run:
    import torchao.optim

    optimizer = getattr(torchao.optim, name)(parameters(numel, tensors, dtype), **HYPER)
    return lambda: optimizer.step()


def our_optimizer(numel: int, tensors: int, dtype: torch.dtype, state_format: str) -> Run:
    from tierflow.cpu_adam import CPUAdamW

    optimizer = CPUAdamW(parameters(numel, tensors, dtype), state_format=state_format, **HYPER)
    return lambda: optimizer.step()


class OurBuffers:
    """Flat buffers of one state format under one rule, and what steps on them or streams over them."""

    def __init__(self, numel: int, dtype: torch.dtype, state_format: str, rule: str) -> None:
        from tierflow.cpu_adam import _cpu_adam, formats, rules

        self.numel, self.native = numel, _cpu_adam
        self.rule = {"adam": rules.ADAM, "lion": rules.LION, "adagrad": rules.ADAGRAD}[rule]
        self.format = formats.resolve(state_format, dtype)
        self.kinds = self.format.kinds(self.rule)
        # A few lines apart within their pages, as neighbours in an arena are.
        self.state = {k.name: self._buffer(k.numel(numel), k.dtype, 9 * i) for i, k in enumerate(self.kinds)}
        self.state["param"].fill_(0.02)
        if self.format.master == torch.float32:
            self.state["master"].fill_(0.02)
        self.grad = self._buffer(numel, dtype, 9 * len(self.kinds))
        self.grad.uniform_(-1e-3, 1e-3)
        self.hyper = rules.Hyper(1, 1e-3, 0.9, 0.999, 1e-8, 1e-2)

    @staticmethod
    def _buffer(numel: int, dtype: torch.dtype, lines: int) -> Tensor:
        skip = lines * 64 // dtype.itemsize
        return torch.zeros(numel + skip, dtype=dtype)[skip:]

    @property
    def bytes_per_element(self) -> float:
        """Read and written together: what a step must move, whoever computes it."""
        return 2 * float(self.format.bytes_at_rest(self.rule)) + self.grad.itemsize

    def step(self, isa: str, threads: int) -> Run:
        from tierflow.cpu_adam import kernels

        moments = {name: self.state[name] for name in self.rule.moments}
        steps = count(1)

        def run() -> None:
            hyper = self.hyper.__class__(next(steps), *list(vars(self.hyper).values())[1:])
            kernels.rule_step(
                self.rule, self.state["param"], self.grad, moments, hyper=hyper, master=self.state.get("master"),
                scale=self.state.get("scale"), isa=isa, threads=threads,
            )  # fmt: skip

        return run

    def raw_step(self, isa: str, repeats: int) -> Run:
        """On one thread, without the checks of Python, which weigh on small operands."""
        pointers = [self.state[k].data_ptr() if k in self.state else 0 for k in ("exp_avg", "exp_avg_sq", "scale")]
        master = self.state["master"].data_ptr() if "master" in self.state else 0
        layout, moments = self.format.codes
        grad = {torch.float32: self.native.F32, torch.bfloat16: self.native.BF16}[self.grad.dtype]
        constants, general = self.rule.constants(self.hyper)

        batch = self.native.Batch(self._isa(isa))
        batch.add(
            self.numel, self.rule.code, layout, moments, self.state["param"].data_ptr(), master, *pointers,
            self.grad.data_ptr(), grad, constants, general, 1.0, 1.0, 0, 1, 0, 0,
        )  # fmt: skip

        def run(_alive: OurBuffers = self) -> None:  # the batch has addresses alone
            for _ in range(repeats):
                batch.run(1)

        return run

    def stream(self, isa: str, threads: int) -> Run:
        arrays = [(self.grad.data_ptr(), 64 * self.grad.itemsize, False)]
        # The scales' eight bytes a group do not fill a vector; they are a hundredth of the traffic.
        arrays += [
            (self.state[k.name].data_ptr(), int(64 * k.bytes_per_element), True) for k in self.kinds if k.name != "scale"
        ]
        index = self._isa(isa)
        return lambda: self.native.stream_pattern(self.numel, arrays, index, threads)

    def _isa(self, isa: str) -> int:
        return int(self.native.isas().index(isa))
