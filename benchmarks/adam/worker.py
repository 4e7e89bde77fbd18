"""A process that makes what it is told to and times it. One JSON object a line in, one out."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import contenders
import torch


def make(order: dict[str, Any]) -> tuple[Callable[[], None], int, float]:
    """What to run, the parameters that it steps, and the bytes that each must move, 0 if that is not ours to say."""
    kind, numel, threads = order["kind"], order["numel"], order["threads"]
    dtype = contenders.DTYPES[order["dtype"]]
    if kind in ("step", "L2", "roof"):
        buffers = contenders.OurBuffers(numel, dtype, order["format"], order["rule"])
        if kind == "L2":
            repeats = max(1, (1 << 22) // numel)
            return buffers.raw_step(order["isa"], repeats), repeats * numel, buffers.bytes_per_element
        run = buffers.step if kind == "step" else buffers.stream
        return run(order["isa"], threads), numel, buffers.bytes_per_element
    if kind == "optimizer":
        from tierflow.cpu_adam import kernels

        kernels.set_threads(threads)
        return contenders.our_optimizer(numel, order["tensors"], dtype, order["format"]), numel, 0.0
    maker = getattr(contenders, kind)
    return maker(numel, order["tensors"], dtype, order["option"]), numel, 0.0


def serve() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # libraries greet
    for line in sys.stdin:
        order = json.loads(line)
        torch.set_num_threads(order["threads"])
        try:
            run, numel, size = make(order)
            run()
            seconds = []
            work = contenders.torch_work() if order.get("after") else None
            for _ in range(order["repeats"]):
                if work is not None:
                    work()
                begin = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - begin)
            answer: dict[str, Any] = {"seconds": seconds, "numel": numel, "bytes_per_element": size}
            del run
        except Exception as error:  # a contender that cannot is a result
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        gc.collect()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
