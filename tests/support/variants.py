"""Builds of the extension modules that are only for tests, each in its own folder under build/variants.

A variant's folder holds ``tierflow`` as links to the sources and its own extension modules: a Python started there
imports it before any installed one. ``faults`` lets tests fail system calls (aio/csrc/faults.hpp); ``address`` and
``thread`` have that too and are instrumented.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLAGS = {
    "faults": "",
    "address": "-g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined",
    "thread": "-g -fno-omit-frame-pointer -fsanitize=thread",
}
COMPONENTS = ("aio", "cpu_adam")


def build(variant: str, components: tuple[str, ...] = ("aio",)) -> Path:
    """Brings the variant up to date and returns its folder. Raises CalledProcessError, or OSError without cmake."""
    folder = ROOT / "build" / "variants" / variant
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = folder / "cmake"
        if not (made / "CMakeCache.txt").exists():
            _run("cmake", "-S", str(ROOT), "-B", str(made), *_settings(variant))
        targets = [word for component in components for word in ("--target", f"_{component}")]
        _run("cmake", "--build", str(made), "-j2", *targets)
        _link(folder, made)
    return folder


def _settings(variant: str) -> list[str]:
    import pybind11

    return [
        "-DTIERFLOW_AIO_FAULTS=ON",
        f"-DCMAKE_CXX_FLAGS={FLAGS[variant]}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]


def _run(*command: str) -> None:
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    program = shutil.which(command[0], path=search)
    if program is None:
        raise FileNotFoundError(f"{command[0]} is not installed")
    # What is preloaded here is not for the compiler.
    quiet = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "PYTHONPATH")}
    subprocess.run([program, *command[1:]], check=True, capture_output=True, text=True, env=quiet)


def _link(folder: Path, made: Path) -> None:
    package = folder / "tierflow"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir()
    for source in (ROOT / "tierflow").iterdir():
        if source.name not in COMPONENTS:
            (package / source.name).symlink_to(source.resolve())
    for component in COMPONENTS:
        (package / component).mkdir()
        for source in (ROOT / component).iterdir():
            if source.suffix in (".py", ".pyi"):
                (package / component / source.name).symlink_to(source)
        for built in (made / "tierflow" / component).rglob("*.so"):
            shutil.copy(built, package / component)


def environment() -> dict[str, str]:
    """For a Python outside the virtual environment, whose own import hooks would bring the installed package."""
    paths = [path for path in sys.path if path.endswith("-packages")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}


def python() -> str:
    """The interpreter beneath the virtual environment."""
    return str(getattr(sys, "_base_executable", None) or sys.executable)


def pytest(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs tests against the variant, from its folder."""
    command = [python(), "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    command += ["-p", "no:cacheprovider", *arguments]
    fixed = 0x40000  # ADDR_NO_RANDOMIZE: ThreadSanitizer of older compilers finds no room in a random layout
    return subprocess.run(
        command,
        cwd=folder,
        env=environment() | variables,
        text=True,
        preexec_fn=lambda: ctypes.CDLL(None).personality(fixed),
        stdout=None if "LD_PRELOAD" in variables else subprocess.PIPE,
        stderr=None if "LD_PRELOAD" in variables else subprocess.STDOUT,
    )
