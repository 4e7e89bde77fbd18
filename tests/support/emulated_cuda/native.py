"""Builds the device's native half and loads it before torch has asked which devices there are."""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

NAME = "emulated_cuda_native"
HERE = Path(__file__).parent

_BUILD = """
import sys
import torch
from torch.utils.cpp_extension import load
assert torch.version.cuda is None, "this build of torch has CUDA: nothing is to be emulated"
load(sys.argv[1], [sys.argv[2]], build_directory=sys.argv[3], extra_cflags=["-O1", "-std=c++20"], is_python_module=False)
"""


def _built() -> Path:
    """The shared object, compiled where it is missing or older than its sources: 20 seconds."""
    folder = HERE.parents[2] / "build" / f"emulated_cuda-{importlib.metadata.version('torch')}"
    made = folder / f"{NAME}.so"
    newest = max(source.stat().st_mtime for source in (*HERE.glob("*.hpp"), *HERE.glob("*.cpp")))
    if not made.exists() or made.stat().st_mtime < newest:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", _BUILD, NAME, str(HERE / "module.cpp"), str(folder)]
        tools = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # ninja
        done = subprocess.run(command, capture_output=True, text=True, env=tools)
        if done.returncode:
            raise RuntimeError(f"the emulated device could not be built:\n{done.stdout}{done.stderr}")
    return made


def _load(path: Path) -> Any:
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    for name in ("libc10.so", "libtorch_cpu.so", "libtorch.so", "libtorch_python.so"):
        ctypes.CDLL(str(Path(found.origin).parent / "lib" / name))
    ctypes.CDLL(str(path))  # which registers it
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(path))
    spec = importlib.util.spec_from_loader(NAME, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


native = _load(_built())
