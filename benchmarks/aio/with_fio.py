"""fio, one process a run. Its buffers are everyone's small pages, or come from malloc: a tunable of glibc (2.35 and
newer) puts those on huge pages.

fio itself offers huge pages of hugetlbfs (which a system must have set aside) and of shared memory, and no anonymous
ones; the tunable makes malloc ask for these with madvise.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from typing import Any

from aio.worker import Run, own_the_processor

TUNABLE = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
_MODES = {"read": "read", "write": "write", "mixed": "rw"}


def command(engine: str, run: Run) -> list[str]:
    """fio's command line."""
    memory = f"mmapshared:{run['scattered']}" if run["scattered"] else "malloc"
    # files take turns request by request, the bytes are those of all of them together
    return [
        "fio", "--name=run", f"--filename={':'.join(run['files'])}", f"--rw={_MODES[run['kind']]}", f"--bs={run['request']}",
        f"--iodepth={run['in_flight']}", f"--ioengine={engine}", "--direct=1", f"--filesize={run['file_bytes']}",
        f"--io_size={run['nbytes']}", "--file_service_type=roundrobin:1", f"--iomem={memory}", "--thread", "--fallocate=none",
        "--allow_file_create=0", "--randrepeat=0", "--output-format=json",
    ]  # fmt: skip


def measure(engine: str, run: Run) -> dict[str, Any]:
    """As worker.timed, from fio's own clock; "error" where it failed."""
    environment = dict(os.environ) | ({} if run["scattered"] else TUNABLE)
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        command(engine, run), env=environment, capture_output=True, text=True, start_new_session=True,
        preexec_fn=own_the_processor, timeout=300,
    )  # fmt: skip
    begin = done.stdout.find("{")
    if done.returncode or begin < 0:
        return {"error": (done.stderr or done.stdout).strip()[-300:]}
    job = json.loads(done.stdout[begin:])["jobs"][0]
    nbytes = sum(job[op]["io_bytes"] for op in ("read", "write"))
    # milliseconds of the job; of a mixed load both directions run from start to end
    seconds = max(job[op]["runtime"] for op in ("read", "write")) / 1e3
    kernel, user = job["sys_cpu"] / 100 * seconds, job["usr_cpu"] / 100 * seconds
    return {"bytes": nbytes, "seconds": seconds, "cpu": kernel + user, "kernel": kernel}


def huge_page_bytes(run: Run) -> int:
    """What fio has on huge pages while it runs with the tunable: 0 means that its figures are of 4 KiB pages."""
    process = subprocess.Popen(
        [*command("io_uring", run | {"nbytes": run["file_bytes"]}), "--time_based", "--runtime=2"],
        env=dict(os.environ) | TUNABLE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    most = 0
    try:
        while process.poll() is None:
            most = max(most, _huge(process.pid))
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    return most


def _huge(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("AnonHugePages:")), 0)
    except OSError:
        return 0
