"""What this machine can do for each part of tierflow, and why not: ``tierflow env``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tierflow import machine
from tierflow.sizes import format_size

if TYPE_CHECKING:
    from rich.console import Console

Status = Literal["ok", "limited", "missing"]


@dataclass(frozen=True)
class Check:
    """One line of the report. ``limited``: it works, at a cost; ``missing``: that part cannot be used."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


def collect(paths: Sequence[str | os.PathLike[str]] = ()) -> list[Check]:
    """Every check, in the order of the report; ``paths`` are the directories of the swap store, if any are meant.

    Never raises: a check that fails is itself a finding.
    """
    checks: list[tuple[str, Callable[[], Check]]] = [
        ("Python", _python),
        ("torch", _torch),
        ("CUDA", _cuda),
        ("processor", _processor),
        ("update kernels", _kernels),
        ("host memory", _memory),
        ("control group", _cgroup),
        ("locked memory", _memlock),
        ("huge pages", _huge_pages),
        ("io_uring", _io_uring),
        *(pair for path in paths or (os.getcwd(),) for pair in _of_folder(os.fspath(path))),
        ("finetune", _finetune),
    ]
    return [_guarded(name, check) for name, check in checks]


def _of_folder(path: str) -> list[tuple[str, Callable[[], Check]]]:
    return [("O_DIRECT", lambda: _direct(path)), ("disk", lambda: _disk(path))]


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return Check(name, "missing", f"the check itself failed with {reason}", "report this, with the whole table")


def render(paths: Sequence[str | os.PathLike[str]] = (), console: Console | None = None) -> bool:
    """Prints the report. Returns whether nothing is missing."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "limited": "yellow", "missing": "red"}
    table = Table(title="What this machine can do for tierflow", title_justify="left")
    for heading in ("part", "", "here"):
        table.add_column(heading, overflow="fold")
    checks = collect(paths)
    for check in checks:
        found = Text(check.detail)
        if check.remedy:
            found.append(f"\n{check.remedy}", style="italic")
        table.add_row(check.name, Text(check.status, style=colours[check.status]), found)
    (console or Console()).print(table)
    return all(check.status != "missing" for check in checks)


def _python() -> Check:
    version = f"{platform.python_implementation()} {platform.python_version()} on {platform.machine()}, {sys.platform}"
    if sys.platform != "linux":
        return Check("Python", "limited", version, "tierflow is made for Linux: memory and file I/O rest on it")
    return Check("Python", "ok", f"{version} {platform.release()}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> Check:
    version = _version("torch")
    if version is None:
        return Check("torch", "missing", "not installed", "pip install torch (2.6 or newer)")
    if tuple(int(n) for n in version.split("+")[0].split(".")[:2] if n.isdigit()) < (2, 6):
        return Check("torch", "missing", f"{version} is older than 2.6", 'pip install "torch>=2.6"')
    return Check("torch", "ok", version)


def _cuda() -> Check:
    if _version("torch") is None:
        return Check("CUDA", "missing", "torch is not installed", "pip install torch")
    import torch

    if torch.version.cuda is None:
        return Check("CUDA", "limited", "this build of torch has no CUDA: host memory stands in for the device",
                     "for a GPU, install torch's default build from https://pytorch.org")  # fmt: skip
    if not torch.cuda.is_available():
        return Check("CUDA", "limited", f"torch has CUDA {torch.version.cuda} and finds no device: the CPU computes",
                     "check nvidia-smi, the driver, and CUDA_VISIBLE_DEVICES")  # fmt: skip
    names = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        names.append(f"cuda:{index} {name}, {format_size(free)} free of {format_size(total)}")
    return Check("CUDA", "ok", "; ".join(names))


def _processor() -> Check:
    cpu = machine.cpu()
    detail = f"{cpu.name}, {cpu.cores} core(s) for this process; {' '.join(cpu.flags) or 'no vector extensions known'}"
    if cpu.cores == 1:
        return Check(
            "processor", "limited", detail, "one core updates slowly: widen the affinity or the container's CPUs"
        )
    return Check("processor", "ok", detail)


def _kernels() -> Check:
    name = "update kernels"
    try:
        from tierflow.cpu_adam import _cpu_adam
    except ImportError as error:
        return Check(
            name, "missing", f"the extension cannot be loaded: {error}", "build it: pip install . in the sources"
        )
    isas = _cpu_adam.isas()
    detail = f"{isas[0]} (runs here: {', '.join(isas)})"
    forced = os.environ.get("TIERFLOW_ISA")
    if forced:
        return Check(name, "limited", f"TIERFLOW_ISA forces {forced}; {detail}", "unset TIERFLOW_ISA for the fastest")
    if isas[0] == "scalar":
        return Check(name, "limited", detail, "this processor lacks AVX2, so updates run one element at a time")
    return Check(name, "ok", detail)


def _memory() -> Check:
    free, total = machine.mem_available(), machine.mem_total()
    detail = f"{format_size(free)} can be allocated of {format_size(total)}"
    if free < 1 << 30:
        return Check("host memory", "limited", detail, "less than 1 GiB: end other programs, or place more on NVMe")
    return Check("host memory", "ok", detail)


def _cgroup() -> Check:
    group = machine.cgroup()
    if group is None:
        return Check("control group", "ok", "sets no memory limit")
    detail = f"{group.path} allows {format_size(group.limit)}, {format_size(group.free)} of it free"
    if group.free >= machine.meminfo()["MemAvailable"]:
        return Check("control group", "ok", detail)
    return Check("control group", "limited", detail, "raise the container's memory limit to use more of this machine")


def _memlock() -> Check:
    limit = machine.memlock_limit()
    if limit is None:
        return Check("locked memory", "ok", "no limit")
    if machine.may_exceed_memlock():
        return Check("locked memory", "ok", f"limit {format_size(limit)}, lifted by CAP_IPC_LOCK")
    detail = f"limit {format_size(limit)}: buffers cannot be registered with the kernel beyond it"
    if limit < 64 << 20:
        return Check("locked memory", "limited", detail, "ulimit -l unlimited (limits.conf: memlock), or CAP_IPC_LOCK")
    return Check("locked memory", "ok", detail)


def _huge_pages() -> Check:
    setting = machine.huge_pages()
    sysfs = "/sys/kernel/mm/transparent_hugepage/enabled"
    if setting in ("always", "madvise"):
        return Check("huge pages", "ok", f"transparent huge pages: {setting}")
    if setting == "never":
        return Check("huge pages", "limited", "transparent huge pages are off: file I/O costs more",
                     f"echo madvise > {sysfs} as root")  # fmt: skip
    return Check("huge pages", "limited", f"the kernel has no {sysfs}", "a kernel with CONFIG_TRANSPARENT_HUGEPAGE")


def _io_uring() -> Check:
    try:
        from tierflow import aio
    except ImportError as error:
        return Check("io_uring", "missing", f"the extension of tierflow.aio cannot be loaded: {error}",
                     "build it: pip install . in the sources")  # fmt: skip
    probe = aio.probe()
    if probe.io_uring:
        return Check("io_uring", "ok", "can be used")
    return Check("io_uring", "limited", f"the thread-pool engine serves instead: {probe.reason}")


def _direct(path: str) -> Check:
    from tierflow import aio

    kind = machine.file_system(path)
    try:
        with aio.open(path, 1 << 20) as store:
            direct, engine, note = store.direct, store.engine, store.note
    except OSError as error:
        remedy = "name a directory that exists and can be written to" if not os.path.isdir(path) else ""
        return Check("O_DIRECT", "missing", f"no swap store can be made in {path} ({kind}): {error}", remedy)
    detail = f"{path} ({kind}) through {engine}"
    if direct:
        return Check("O_DIRECT", "ok", detail)
    why = f": {note}" if note else ""
    return Check(
        "O_DIRECT", "limited", f"{detail}, buffered{why}", "a path on an NVMe drive with ext4 or xfs has O_DIRECT"
    )


def _disk(path: str) -> Check:
    free = machine.disk_free(path)
    detail = f"{format_size(free)} free at {machine.existing(path)}"
    if free < 1 << 30:
        return Check("disk", "limited", detail, "less than 1 GiB: free some space, or give another path")
    return Check("disk", "ok", detail)


def _finetune() -> Check:
    needed = ("transformers", "matplotlib", "safetensors")
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    if absent:
        return Check("finetune", "missing", f"not installed: {', '.join(absent)}", 'pip install "tierflow[finetune]"')
    return Check("finetune", "ok", ", ".join(f"{name} {_version(name)}" for name in needed))
