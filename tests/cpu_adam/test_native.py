"""The C++ kernels without Python, for this machine and cross-compiled for aarch64 under an emulator: each build equals
the scalar one, and the scalar one gives the same bits on both architectures."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "cpu_adam" / "csrc"
FLAGS = ["-O2", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-pthread", f"-I{CSRC}"]
WIDE = ["-mavx2", "-mfma", "-mf16c"]
BUILDS = {
    "x86_64": ("CPU_ADAM_X86", {"avx2": WIDE, "avx512": [*WIDE, *(f"-mavx512{x}" for x in ("f", "bw", "dq", "vl"))]}),
    "aarch64": ("CPU_ADAM_NEON", {"neon": []}),
}
# What scalar and vector builds of every architecture gave when this was written.
HASH = "93a4e64c950e38bf"


def build(compiler, machine, folder, link=()):
    define, isas = BUILDS[machine]
    objects = []
    jobs = {name: [] for name in ("dispatch", "launch", "pool", "topology", "isa_scalar")} | {f"isa_{k}": v for k, v in isas.items()}
    sources = {name: (CSRC / f"{name}.cpp", flags) for name, flags in jobs.items()}
    sources["driver"] = (HERE / "native" / "driver.cpp", [])
    for name, (source, flags) in sources.items():
        objects.append(str(folder / f"{name}.o"))
        subprocess.run([compiler, *FLAGS, f"-D{define}=1", *flags, "-c", str(source), "-o", objects[-1]], check=True)
    program = folder / "driver"
    subprocess.run([compiler, *objects, "-pthread", *link, "-o", str(program)], check=True)
    return program


def outcome(*command):
    run = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return dict(line.split(": ", 1) for line in run.stdout.splitlines()[-2:])


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in BUILDS or not shutil.which("g++"), reason="needs g++ on x86-64 or aarch64")
def test_this_machine(tmp_path):
    found = outcome(build("g++", platform.machine(), tmp_path))
    assert found["builds"].split()[-1] == "scalar" and found["hash"] == HASH


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("aarch64-linux-gnu-g++") or not shutil.which("qemu-aarch64"),
    reason="needs g++-aarch64-linux-gnu and qemu-user",
)
def test_aarch64_under_emulation(tmp_path):
    found = outcome("qemu-aarch64", build("aarch64-linux-gnu-g++", "aarch64", tmp_path, ["-static"]))
    assert found == {"builds": "neon scalar", "hash": HASH}
