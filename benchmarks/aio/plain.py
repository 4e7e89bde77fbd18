"""Whether a plain run of tierflow.aio with a profile of `tierflow tune` gives the figures that the profile has."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from aio.contenders import Field
from aio.summary import row
from aio.worker import own_the_processor
from tierflow.tune.profile import read_profile

#: A plain program's requests: what `tune` moved at once too.
REQUEST = 4 << 20


def check_profile(path: str, seconds: float, rounds: int, with_fio: bool, console: Console) -> dict[str, Any]:
    """Tunes, then runs plainly with the profile's setting, fio with the same blocks and depth in turn with it.

    The profile's mixed load is 14 reads to 12 writes, the plain one's and fio's 1 to 1: both directions are added.
    """
    with tempfile.TemporaryDirectory(prefix="bench-aio-") as folder:
        target = Path(folder) / "profile.json"
        words = [sys.executable, "-m", "tierflow", "tune", path, "--time", str(seconds), "--output", str(target)]
        done = subprocess.run(words, capture_output=True, text=True, start_new_session=True, preexec_fn=own_the_processor)
        if done.returncode:
            raise RuntimeError(f"tierflow tune failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        profile = read_profile(target)
    depth = {"threads" if profile.engine == "threads" else "queue_depth": profile.queue_depth}
    options = {"engine": profile.engine, "block_size": profile.block_size, **depth}
    request = max(REQUEST, profile.block_size)
    count = -(-profile.block_size * profile.queue_depth // request) + 2
    found: dict[str, Any] = {"setting": options | {"huge_pages": profile.huge_pages}, "seconds": profile.seconds,
                             "bytes_written": profile.bytes_written, "complete": profile.complete, "loads": {}}  # fmt: skip
    with Field([path], profile.size, options, request * count) as field:
        pages = "huge" if profile.huge_pages else "4k"
        if with_fio:
            field.add_fio()
        chosen = [c for c in field.contenders if c.pages == pages]
        for kind in ("read", "write", "mixed"):
            figures = getattr(profile, kind)
            nbytes = profile.size // request * request
            samples: dict[str, list[dict[str, Any]]] = {c.key: [] for c in chosen}
            for _ in range(rounds):
                for contender in chosen:
                    own = contender.name == "tierflow"
                    sizes = (request, count) if own else (profile.block_size, profile.queue_depth)
                    samples[contender.key].append(contender.ask(field.run(kind, *sizes, nbytes)))
            rows = {key: row(taken) for key, taken in samples.items()}
            promised = figures.read + figures.write
            ratio = rows[f"tierflow, {pages}"]["rate"] / promised
            found["loads"][kind] = {"profile": promised, "low": figures.low, "high": figures.high, "ratio": ratio, "rows": rows}
            within = "within 10%" if abs(ratio - 1) <= 0.1 else "NOT within 10%"
            shown = ", ".join(f"{key} {r['rate'] / 1e9:.2f}" for key, r in rows.items() if "rate" in r)
            console.print(f"profile, {kind}: {promised / 1e9:.2f} GB/s; plain runs: {shown}; {ratio:.2f}, {within}", highlight=False)
    return found
