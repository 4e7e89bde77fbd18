"""Bytes go where they should, in any order and number; what cannot work is refused before it starts."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tierflow.aio as aio

KIB = 1 << 10
MIB = 1 << 20


@pytest.mark.parametrize("nbytes", [4096, 64 * KIB, 64 * KIB + 4096, MIB + 512, 5 * MIB])
def test_round_trip(store: aio.Store, memory: Any, nbytes: int) -> None:
    content = os.urandom(nbytes)
    extent = store.allocate(nbytes)
    written = store.write(memory(content), extent.offset)
    written.wait()
    written.wait()
    back = memory(nbytes)
    ticket = store.read(back, extent.offset)
    ticket.wait()
    assert back[:] == content
    assert ticket.done() and ticket.nbytes == nbytes and ticket.seconds > 0
    assert (store.bytes_written, store.bytes_read) == (nbytes, nbytes)
    assert store.read_seconds > 0 and store.write_seconds > 0


def test_a_ticket_knows_on_pythons_clock_when_it_began_and_ended(store: aio.Store, memory: Any) -> None:
    extent, content = store.allocate(4 * MIB), memory(4 * MIB)
    before = time.perf_counter()
    tickets = [store.write(content, extent.offset) for _ in range(8)]
    for ticket in tickets:
        ticket.wait()
    after = time.perf_counter()
    for ticket in tickets:
        assert ticket.began is not None and ticket.ended is not None
        assert before <= ticket.began < ticket.ended <= after
        # submission is not counted as the beginning: what waits in the queue has not begun
        assert ticket.ended - ticket.began <= ticket.seconds
    # first in, first out: the queue's tail begins after its head
    assert [t.began for t in tickets] == sorted(t.began for t in tickets)  # type: ignore[type-var]


def test_a_ticket_in_the_queue_has_neither_begun_nor_ended(disk: Path, engine: str, memory: Any) -> None:
    with aio.open(disk, 64 * MIB, engine=engine, block_size=MIB, queue_depth=1, threads=1) as store:  # type: ignore[arg-type]
        extent, content = store.allocate(64 * MIB), memory(64 * MIB)
        ahead, behind = (store.write(content, extent.offset) for _ in range(2))
        seen = behind.began, behind.ended, ahead.ended
        behind.wait()
    assert seen == (None, None, None)


def test_many_at_once_against_a_model(store: aio.Store, memory: Any) -> None:
    """Four threads, each with its own extents and several transfers in flight, and a dict as the model."""
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            one_worker(store, memory, random.Random(seed))
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []
    assert store.allocated == 0


def one_worker(store: aio.Store, memory: Any, rng: random.Random) -> None:
    model: dict[aio.Extent, bytes] = {}
    for _ in range(30):
        sizes = [512 * rng.randint(1, 400) for _ in range(rng.randint(1, 6))]
        contents = {store.allocate(size): rng.randbytes(size) for size in sizes}
        writes = [store.write(memory(content), extent.offset) for extent, content in contents.items()]
        old = rng.sample(sorted(model), k=min(4, len(model)))
        backs = {extent: memory(len(model[extent])) for extent in old}
        reads = [store.read(back, extent.offset) for extent, back in backs.items()]
        for ticket in rng.sample(writes + reads, k=len(writes) + len(reads)):
            ticket.wait()
        for extent, back in backs.items():
            assert back[:] == model[extent]
            if rng.random() < 0.8:
                store.free(extent)
                del model[extent]
        model.update(contents)
        while len(model) > 8:
            extent = next(iter(model))
            store.free(extent)
            del model[extent]
    for extent in model:
        store.free(extent)


def test_a_part_of_an_extent(store: aio.Store, memory: Any) -> None:
    store.allocate(MIB)
    store.write(memory(b"a" * MIB), 0).wait()
    store.write(memory(b"b" * 512), 4096 + 512).wait()
    back = memory(MIB)
    store.read(back, 0).wait()
    assert back[:] == b"a" * 4608 + b"b" * 512 + b"a" * (MIB - 5120)


def test_nothing_outside_the_buffer_is_touched(store: aio.Store, memory: Any) -> None:
    store.allocate(MIB)
    store.write(memory(b"x" * MIB), 0).wait()
    around = memory(b"." * (192 * KIB))
    store.read(memoryview(around)[64 * KIB : 128 * KIB], 0).wait()
    assert around[:] == b"." * 64 * KIB + b"x" * 64 * KIB + b"." * 64 * KIB


@pytest.mark.parametrize("shift", [1, 8, 100, 511, 512, 4095])
def test_any_alignment(store: aio.Store, memory: Any, shift: int) -> None:
    """Address, offset and length, each alone and all at once; nothing around is touched, and it is counted."""
    store.allocate(MIB)
    everything = bytearray(os.urandom(MIB))
    store.write(memory(bytes(everything)), 0).wait()
    for address, offset, nbytes in [
        (shift, 0, 128 * KIB),
        (0, shift, 128 * KIB),
        (0, 0, 128 * KIB + shift),
        (shift, shift, 200 * KIB - 3),
        (0, shift, 5),
    ]:
        around = memory(b"." * (nbytes + 8192))
        view = memoryview(around)[4096 + address : 4096 + address + nbytes]
        before = store.bounced_bytes
        content = os.urandom(nbytes)
        view[:] = content
        store.write(view, offset).wait()
        everything[offset : offset + nbytes] = content
        view[:] = bytes(nbytes)
        store.read(view, offset).wait()
        assert view == content
        assert around[: 4096 + address] == b"." * (4096 + address)
        assert around[4096 + address + nbytes :] == b"." * (4096 - address)
        straight = (
            address % store.memory_alignment == 0 and offset % store.alignment == 0 == nbytes % store.alignment
        )
        assert (store.bounced_bytes == before) == straight
        assert store.bounced_bytes - before <= 2 * nbytes
    back = memory(MIB)
    store.read(back, 0).wait()
    assert back[:] == everything


def test_only_what_has_to_is_bounced(store: aio.Store, memory: Any) -> None:
    """The ends of a long transfer pass through other memory; its middle does not, if its address allows it."""
    store.allocate(MIB)
    odd = memoryview(memory(MIB))[100 : 100 + 512 * KIB]
    store.write(odd, 100).wait()
    assert 0 < store.bounced_bytes < 2 * store.alignment


def test_a_vector_is_one_crossing_and_one_ticket(store: aio.Store, memory: Any, monkeypatch: Any) -> None:
    crossings = []

    class Counting:
        def __init__(self, array: Any) -> None:
            self.array = array

        def __getattr__(self, name: str) -> Any:
            crossings.append(name)
            return getattr(self.array, name)

    store.allocate(8 * MIB)
    monkeypatch.setattr(store, "_array", Counting(store._array))
    content = memory(os.urandom(4 * MIB))
    spots = random.Random(1).sample(range(2048), 1000)
    view = memoryview(content)
    written = store.writev((view[i * 4096 : (i + 1) * 4096], spot * 4096) for i, spot in enumerate(spots))
    assert crossings == ["submit"]
    written.wait()
    assert written.nbytes == 1000 * 4096 and written.offset == spots[0] * 4096
    assert "1000 ranges" in repr(written)
    back = memory(4 * MIB)
    read = store.readv([(memoryview(back)[i * 4096 : (i + 1) * 4096], spot * 4096) for i, spot in enumerate(spots)])
    read.wait()
    assert back[: 1000 * 4096] == content[: 1000 * 4096]
    assert crossings == ["submit", "submit"]


def test_a_vector_with_one_bad_request_starts_nothing(store: aio.Store, memory: Any) -> None:
    extent = store.allocate(MIB)
    good = (memory(4096), 0)
    for bad, kind in (((memory(4096), extent.end), ValueError), ((bytearray(), 0), ValueError), (([], 0), TypeError)):
        with pytest.raises(kind):
            store.writev([good, bad])
    with pytest.raises(ValueError, match="requests is empty"):
        store.readv([])
    with pytest.raises(TypeError):
        store.read(memory(4096), 1.5)  # type: ignore[arg-type]
    assert store.bytes_written == 0
    store.free(extent)


def test_several_rings(disk: Path, memory: Any) -> None:
    if not aio.probe().io_uring:
        pytest.skip(aio.probe().reason)
    with aio.open(disk, 16 * MIB, engine="io_uring", block_size=64 * KIB, queue_depth=5, rings=3) as store:
        store.allocate(16 * MIB)
        contents = [os.urandom(MIB + 17) for _ in range(8)]
        tickets = [store.write(content, i * (MIB + 17)) for i, content in enumerate(contents)]
        for ticket in tickets:
            ticket.wait()
        backs = [bytearray(MIB + 17) for _ in range(8)]
        store.readv((back, i * (MIB + 17)) for i, back in enumerate(backs)).wait()
        assert backs == contents


def test_outside_the_extent(store: aio.Store, memory: Any) -> None:
    first, second = store.allocate(8192), store.allocate(8192)
    for offset in (first.offset + 4096, second.offset + 4096, second.end, -4096, 1 << 40):
        with pytest.raises(ValueError, match=r"extent|offset"):
            store.read(memory(8192), offset)
    store.free(first)
    with pytest.raises(ValueError, match="not inside one extent"):
        store.write(memory(4096), first.offset)


def test_nothing_to_transfer(store: aio.Store) -> None:
    store.allocate(4096)
    with pytest.raises(ValueError, match="length is 0"):
        store.read(bytearray(), 0)


def test_read_only_memory(store: aio.Store, memory: Any) -> None:
    store.allocate(4096)
    read_only = memoryview(memory(b"r" * 4096)).toreadonly()
    store.write(read_only, 0).wait()
    with pytest.raises(ValueError, match="writable"):
        store.read(read_only, 0)


def test_not_a_buffer(store: aio.Store) -> None:
    with pytest.raises(TypeError, match="list has neither"):
        store.write([1, 2], 0)


def test_numpy(store: aio.Store, memory: Any) -> None:
    numpy = pytest.importorskip("numpy")
    store.allocate(8192)
    array = numpy.frombuffer(memory(8192), dtype="<f4").reshape(32, 64)
    array[:] = numpy.arange(2048).reshape(32, 64)
    store.write(array, 0).wait()
    back = numpy.frombuffer(memory(8192), dtype="<f4").reshape(32, 64)
    store.read(back, 0).wait()
    assert (back == array).all()
    with pytest.raises(ValueError, match="contiguous"):
        store.write(array[:, ::2], 0)
    back.setflags(write=False)
    with pytest.raises(ValueError, match=r"read-only|writable"):
        store.read(back, 0)


class FakeTensor:
    """What the store asks of a tensor, over mmap memory."""

    def __init__(self, raw: Any, *, device: str = "cpu", contiguous: bool = True) -> None:
        import ctypes

        self.raw = raw
        self.device = SimpleNamespace(type=device)
        self.contiguous = contiguous
        self.nbytes = len(raw)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(raw))

    def data_ptr(self) -> int:
        return self.address

    def is_contiguous(self) -> bool:
        return self.contiguous


def test_whatever_looks_like_a_tensor(store: aio.Store, memory: Any) -> None:
    store.allocate(4096)
    store.write(FakeTensor(memory(b"t" * 4096)), 0).wait()
    back = FakeTensor(memory(4096))
    store.read(back, 0).wait()
    assert back.raw[:] == b"t" * 4096
    with pytest.raises(ValueError, match="host memory"):
        store.write(FakeTensor(memory(4096), device="cuda"), 0)
    with pytest.raises(ValueError, match="not contiguous"):
        store.write(FakeTensor(memory(4096), contiguous=False), 0)


def test_a_real_tensor(store: aio.Store, memory: Any) -> None:
    torch = pytest.importorskip("torch")
    store.allocate(4096)
    tensor = torch.frombuffer(memory(4096), dtype=torch.bfloat16)
    tensor.copy_(torch.arange(2048))
    store.write(tensor, 0).wait()
    back = torch.frombuffer(memory(4096), dtype=torch.bfloat16)
    store.read(back, 0).wait()
    assert torch.equal(back, tensor)
    with pytest.raises(ValueError, match="not contiguous"):
        store.write(tensor[::2], 0)
    with pytest.raises(ValueError, match="host memory"):
        store.write(torch.empty(2048, device="meta"), 0)


def test_out_of_space(store: aio.Store) -> None:
    store.allocate(10 * MIB)
    with pytest.raises(aio.OutOfSpace) as raised:
        store.allocate(7 * MIB)
    error = raised.value
    assert (error.requested, error.free, error.largest) == (7 * MIB, 6 * MIB, 6 * MIB)
    assert store.allocated == 10 * MIB
