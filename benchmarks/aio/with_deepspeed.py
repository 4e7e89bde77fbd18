"""DeepSpeed's aio engine: ``python -m aio.with_deepspeed SPEC`` serves runs; see worker.py. Knows nothing of tierflow.

SPEC: JSON with "window" (bytes of the tensor of one call). The block size is the request's, the queue as deep as the
run says; the tensor is one of DeepSpeed's own locked ones, which its engine moves without a copy in between.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["TORCH_EXTENSIONS_DIR"] = os.path.join(sys.prefix, "operators")  # where install_deepspeed.sh built it
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29431")

import deepspeed
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder

from aio.pages import contiguous_at, put_in_place
from aio.worker import Run, serve


class Contender:
    """One tensor for each file; each call moves a tensor, split in blocks of the request's size by the engine."""

    def __init__(self, window: int):
        self.window = window
        self.load = AsyncIOBuilder().load(verbose=False)
        self.keeper = self.load.aio_handle(1 << 20, 32, False, True, 1)
        self.tensors = [self._tensor() for _ in range(2)]
        self.scattered = ""
        self.handles: dict[tuple[int, int], object] = {}

    def _tensor(self) -> torch.Tensor:
        tensor = self.keeper.new_cpu_locked_tensor(self.window, torch.empty(0, dtype=torch.uint8))
        tensor.copy_(torch.randint(0, 256, (self.window,), dtype=torch.uint8))
        return tensor

    def facts(self) -> dict[str, object]:
        """What its own memory is like."""
        found = contiguous_at(self.tensors[0].data_ptr(), self.window)
        return {"version": deepspeed.__version__, "huge_bytes": self.huge_bytes(), "contiguous": found}

    def prepare(self, run: Run) -> Callable[[], int]:
        """On its own pages, or on everyone's small ones in their place."""
        if run["scattered"] != self.scattered:
            self.scattered = run["scattered"]
            for number, tensor in enumerate(self.tensors):
                put_in_place(self.scattered, number * self.window, tensor.data_ptr(), self.window)
        return partial(self.measure, run)

    def huge_bytes(self) -> int:
        """Bytes of this process on huge pages."""
        with open("/proc/self/smaps_rollup") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("AnonHugePages:"))

    def measure(self, run: Run) -> int:
        """Both tensors under way, one read and one written in a mixed load, or one on each file; then waits for both."""
        key = run["request"], run["in_flight"]
        if key not in self.handles:
            self.handles[key] = self.load.aio_handle(key[0], key[1], False, True, 1)
        handle, files, window = self.handles[key], run["files"], self.window
        moved = at = 0
        while moved < run["nbytes"]:
            for number, tensor in enumerate(self.tensors):
                writes = run["kind"] == "write" or (run["kind"] == "mixed" and number == 1)
                place = at if len(files) > 1 else at + number * run["file_bytes"] // 2
                call = handle.async_pwrite if writes else handle.async_pread
                if call(tensor, files[number % len(files)], place % run["file_bytes"]) != 0:
                    raise RuntimeError("the engine refused a request")
                moved += window
            handle.wait()
            at = (at + window) % (run["file_bytes"] if len(files) > 1 else run["file_bytes"] // 2)
        return moved


def main() -> None:
    contender = Contender(json.loads(sys.argv[1])["window"])
    serve(contender.facts(), contender.prepare)


if __name__ == "__main__":
    main()
