"""Checksums: the arithmetic against one bit at a time, and a disk that gives back something else."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tierflow.aio as aio

PAGE = 4096
NBYTES = 64 * PAGE
EXTENSION = aio.store._aio


def crc32c(data: bytes) -> int:
    """The definition: the reflected polynomial, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_the_reference_is_crc32c() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720
    assert crc32c(bytes(range(32))) == 0x46DD794E


@pytest.mark.parametrize("hardware", [False, True])
@pytest.mark.parametrize("pages", [0, 1, 2, 3, 4, 7])
def test_every_page_has_its_checksum(hardware: bool, pages: int) -> None:
    data = os.urandom(pages * PAGE)
    wanted = [crc32c(data[at : at + PAGE]) for at in range(0, len(data), PAGE)]
    assert EXTENSION.checksums(data, hardware) == wanted


@settings(max_examples=30)
@given(st.binary(min_size=1, max_size=40), st.integers(0, 6), st.integers(0, 9))
def test_hardware_and_table_agree(seed: bytes, pages: int, shift: int) -> None:
    data = bytearray(seed * ((pages + 1) * PAGE // len(seed) + 1))
    view = memoryview(data)[shift : shift + pages * PAGE]
    assert EXTENSION.checksums(view, True) == EXTENSION.checksums(view, False)


def test_this_processor_is_told_right() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    if "sse4_2" not in flags:
        pytest.skip("not a processor with SSE4.2")
    assert EXTENSION.CRC32C_IN_HARDWARE


@pytest.fixture
def checked(disk: Path, engine: str) -> Any:
    with aio.open(disk, 4 * NBYTES, engine=engine, block_size=16 * PAGE, checksum=True) as store:  # type: ignore[arg-type]
        store.allocate(4 * NBYTES)
        yield store


def flip(link: str, offset: int, bit: int = 0) -> None:
    with open(link, "r+b", buffering=0) as file:
        (old,) = os.pread(file.fileno(), 1, offset)
        os.pwrite(file.fileno(), bytes([old ^ 1 << bit]), offset)
        os.fsync(file.fileno())


@pytest.mark.parametrize("at", [0, PAGE - 1, PAGE, 17 * PAGE + 100, NBYTES - 1])
def test_one_bit_is_enough(checked: aio.Store, disk: Path, memory: Any, backing: Any, at: int) -> None:
    checked.write(memory(os.urandom(NBYTES)), 0).wait()
    checked.read(memory(NBYTES), 0).wait()
    (link,) = backing(disk)
    flip(link, at, at % 8)
    with pytest.raises(aio.CorruptData, match="checksum") as raised:
        checked.read(memory(NBYTES), 0).wait()
    error = raised.value
    assert (error.errno, error.filename, error.op) == (errno.EBADMSG, str(disk), "read")
    assert (error.offset, error.length) == (at // PAGE * PAGE, PAGE)
    checked.write(memory(NBYTES), 0).wait()  # what is written anew is whole again
    checked.read(memory(NBYTES), 0).wait()


def test_without_checksums_nobody_notices(store: aio.Store, disk: Path, memory: Any, backing: Any) -> None:
    """So that the tests above are about the checksums and not about the disk."""
    store.allocate(NBYTES)
    content = os.urandom(NBYTES)
    store.write(memory(content), 0).wait()
    (link,) = backing(disk)
    flip(link, 5000)
    back = memory(NBYTES)
    store.read(back, 0).wait()
    assert back[:] != content


def test_a_write_into_a_damaged_page_is_refused(checked: aio.Store, disk: Path, memory: Any, backing: Any) -> None:
    """It would make the damage right: the page's new checksum would cover it."""
    checked.write(memory(os.urandom(NBYTES)), 0).wait()
    (link,) = backing(disk)
    flip(link, 5 * PAGE + 4000)
    with pytest.raises(aio.CorruptData) as raised:
        checked.write(memory(100), 5 * PAGE + 8).wait()
    assert (raised.value.op, raised.value.offset) == ("write", 5 * PAGE)


def test_what_was_never_written_is_not_judged(checked: aio.Store, disk: Path, memory: Any, backing: Any) -> None:
    (link,) = backing(disk)
    flip(link, 3 * NBYTES)
    checked.read(memory(NBYTES), 3 * NBYTES).wait()


def test_the_path_of_several_is_named(disk: Path, engine: str, memory: Any, backing: Any) -> None:
    other = disk / "other"
    other.mkdir()
    stripe = 8 * PAGE
    with aio.open([disk, other], NBYTES, engine=engine, stripe=stripe, block_size=stripe, checksum=True) as store:  # type: ignore[arg-type]
        store.allocate(NBYTES)
        store.write(memory(os.urandom(NBYTES)), 0).wait()
        (link,) = backing(other)
        flip(link, stripe + 2 * PAGE)
        with pytest.raises(aio.CorruptData) as raised:
            store.read(memory(NBYTES), 0).wait()
        # the second path's second stripe is the store's fourth
        assert (raised.value.filename, raised.value.offset) == (str(other), 3 * stripe + 2 * PAGE)


def test_checksums_where_io_is_buffered(small_tmpfs: Path, engine: str, memory: Any, backing: Any) -> None:
    with aio.open(small_tmpfs, NBYTES, engine=engine, checksum=True) as store:  # type: ignore[arg-type]
        assert store.alignment == PAGE and not store.direct
        store.allocate(NBYTES)
        content = os.urandom(10_001)
        store.write(bytearray(content), 333).wait()
        back = bytearray(10_001)
        store.read(back, 333).wait()
        assert back == content
        (link,) = backing(small_tmpfs)
        flip(link, 400)
        with pytest.raises(aio.CorruptData):
            store.read(back, 333).wait()
