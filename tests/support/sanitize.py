"""The tests of aio under AddressSanitizer and ThreadSanitizer: ``./run sanitize``.

    python sanitize.py [address] [thread] [arguments of pytest]
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import variants

RUNTIME = {"address": "libasan.so", "thread": "libtsan.so"}
# Python itself is not instrumented: what it does with memory is not judged, and it frees little at exit.
OPTIONS = {
    "address": ("ASAN_OPTIONS", "detect_leaks=0:abort_on_error=0:halt_on_error=1:log_path={log}"),
    "thread": (
        "TSAN_OPTIONS",
        "ignore_noninstrumented_modules=1:die_after_fork=0:report_signal_unsafe=0:log_path={log}",
    ),
}
# torch is left out: instrumenting its import takes longer than all tests.
TESTS = ["tests/aio"]


def runtime(sanitizer: str) -> str:
    """What to preload. Exits where the compiler has no such library.

    The C++ library comes with it: the sanitizer looks for its functions when Python, which has none, starts.
    """
    return " ".join(_library(name) for name in (RUNTIME[sanitizer], "libstdc++.so.6"))


def _library(name: str) -> str:
    asked = ["c++", f"-print-file-name={name}"]
    found = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).is_absolute():
        sys.exit(f"sanitize: the compiler c++ has no {name}; GCC's comes with its g++ package")
    return str(Path(found).resolve())


def run(sanitizer: str, arguments: list[str]) -> bool:
    """True where tests pass and nothing was reported."""
    print(f"sanitize: building with -fsanitize={sanitizer}", file=sys.stderr)
    try:
        folder = variants.build(sanitizer)
    except subprocess.CalledProcessError as error:
        sys.exit(f"sanitize: {error.stdout}{error.stderr}")
    log = folder / "report"
    for old in folder.glob("report.*"):
        old.unlink()
    name, options = OPTIONS[sanitizer]
    chosen = arguments or [str(variants.ROOT / test) for test in TESTS]
    done = variants.pytest(
        folder,
        f"--confcutdir={variants.ROOT / 'tests' / 'aio'}",  # the tests' own conftest.py imports torch
        *chosen,
        **{"LD_PRELOAD": runtime(sanitizer), name: options.format(log=log), "TIERFLOW_SANITIZER": sanitizer},
    )
    reports = sorted(folder.glob("report.*"))
    for report in reports:
        print(report.read_text(), file=sys.stderr)
    print(f"sanitize: {sanitizer}: tests ended with {done.returncode}, {len(reports)} reports", file=sys.stderr)
    return done.returncode == 0 and not reports


def main(arguments: list[str]) -> None:
    """Runs what is named, both by default; exits with 1 where anything was found."""
    chosen = [word for word in RUNTIME if word in arguments] or list(RUNTIME)
    rest = [str(Path(word).resolve()) if Path(word).exists() else word for word in arguments if word not in RUNTIME]
    good = [run(sanitizer, rest) for sanitizer in chosen]
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main(sys.argv[1:])
