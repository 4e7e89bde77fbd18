"""A file system that fails on purpose: a FUSE server of one directory, run beneath the real code.

    python faulty_fs.py MOUNTPOINT RULES

RULES is a JSON list; the first that matches a request answers it. One rule:

    {"op": "read" | "write" | "fsync", "from": n, "to": n, "times": n, and "errno": n or "short": n or "hold": path or
     "delay": seconds}

``from``/``to`` bound the request's offset in bytes, ``times`` how often the rule applies (default: always).
``short`` serves at most so many bytes, ``hold`` answers (correctly) once the file named exists, ``delay`` serves
all requests that match one after the other, each taking so long. Files live in this process's memory. Prints a line when mounted; unmounts when its standard input closes.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import select
import struct
import sys
import time
from pathlib import Path
from typing import Any

LOOKUP, FORGET, GETATTR, SETATTR, UNLINK, OPEN, READ, WRITE, STATFS = 1, 2, 3, 4, 10, 14, 15, 16, 17
RELEASE, FLUSH, INIT, OPENDIR, RELEASEDIR, ACCESS, CREATE, INTERRUPT = 18, 25, 26, 27, 29, 34, 35, 36
FSYNC, READDIR, BATCH_FORGET = 20, 28, 42
ROOT = 1
DIRECT_IO, PARALLEL_DIRECT_WRITES = 1, 1 << 6
BIG_WRITES, MAX_PAGES = 1 << 5, 1 << 22
LARGEST = 1 << 20
SIZE_VALID = 1 << 3

libc = ctypes.CDLL(None, use_errno=True)


class Server:
    def __init__(self, rules: list[dict[str, Any]]) -> None:
        self.fuse = os.open("/dev/fuse", os.O_RDWR)
        self.rules = rules
        self.files: dict[int, bytearray] = {}
        self.names: dict[bytes, int] = {}
        self.next_node = ROOT + 1
        self.held: list[tuple[str, int, bytes]] = []  # gate, unique, answer

    def serve(self) -> None:
        while True:
            ready, _, _ = select.select([self.fuse, sys.stdin], [], [], 0.01 if self.held else None)
            self.open_gates()
            if sys.stdin in ready:
                return
            if self.fuse not in ready:
                continue
            try:
                request = os.read(self.fuse, LARGEST + 8192)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                continue
            _, opcode, unique, node = struct.unpack_from("<IIQQ", request)
            if opcode not in (FORGET, BATCH_FORGET, INTERRUPT):
                self.handle(opcode, unique, node, request[40:])

    def open_gates(self) -> None:
        for entry in list(self.held):
            if os.path.exists(entry[0]):
                self.held.remove(entry)
                self.answer(entry[1], entry[2])

    def answer(self, unique: int, body: bytes = b"", error: int = 0) -> None:
        os.write(self.fuse, struct.pack("<IiQ", 16 + len(body), -error, unique) + body)

    def handle(self, opcode: int, unique: int, node: int, body: bytes) -> None:
        if opcode in (READ, WRITE):
            self.transfer(opcode, unique, node, body)
        elif opcode == FSYNC:
            self.answer(unique, error=self.match("fsync", 0).get("errno", 0))
        elif opcode == INIT:
            flags = BIG_WRITES | MAX_PAGES  # and not ASYNC_DIO, with which the kernel calls a short write EIO
            self.answer(unique, struct.pack("<IIIIHHIIHH32x", 7, 31, 0, flags, 64, 48, LARGEST, 1, 256, 0))
        elif opcode in (LOOKUP, CREATE):
            self.entry(opcode, unique, body)
        elif opcode in (GETATTR, SETATTR):
            valid, size = struct.unpack_from("<I12xQ", body) if opcode == SETATTR else (0, 0)
            if valid & SIZE_VALID:
                data = self.files[node]
                del data[size:]
                data.extend(bytes(size - len(data)))
            self.answer(unique, struct.pack("<QII", 0, 0, 0) + self.attributes(node))
        elif opcode == UNLINK:
            del self.names[body.rstrip(b"\0")]
            self.answer(unique)
        elif opcode == STATFS:
            self.answer(
                unique, struct.pack("<QQQQQIIII24x", 1 << 20, 1 << 20, 1 << 20, 9, 9, 4096, 255, 4096, 0)
            )
        elif opcode == READDIR:
            first = struct.unpack_from("<8xQ", body)[0] == 0
            self.answer(unique, b"".join(map(self.directory_entry, self.names)) if first else b"")
        elif opcode in (OPENDIR, OPEN):
            self.answer(unique, struct.pack("<QII", 0, 0, 0))
        elif opcode in (RELEASE, RELEASEDIR, FLUSH, ACCESS):
            self.answer(unique)
        else:  # O_TMPFILE and fallocate among them: the store has to do without
            self.answer(unique, error=errno.ENOSYS)

    def entry(self, opcode: int, unique: int, body: bytes) -> None:
        name = (body[16:] if opcode == CREATE else body).split(b"\0")[0]
        node = self.names.get(name)
        if node is None and opcode == LOOKUP:
            return self.answer(unique, error=errno.ENOENT)
        if node is None:
            node, self.next_node = self.next_node, self.next_node + 1
            self.names[name] = node
            self.files[node] = bytearray()
        found = struct.pack("<QQQQII", node, 0, 0, 0, 0, 0) + self.attributes(node)
        opened = struct.pack("<QII", 0, DIRECT_IO | PARALLEL_DIRECT_WRITES, 0) if opcode == CREATE else b""
        self.answer(unique, found + opened)

    def directory_entry(self, name: bytes) -> bytes:
        return struct.pack("<QQII", self.names[name], 1, len(name), 8) + name + bytes(-len(name) % 8)

    def attributes(self, node: int) -> bytes:
        size = 0 if node == ROOT else len(self.files[node])
        mode = 0o40777 if node == ROOT else 0o100600
        return struct.pack("<6Q3I7I", node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def transfer(self, opcode: int, unique: int, node: int, body: bytes) -> None:
        _, offset, size = struct.unpack_from("<QQI", body)
        rule = self.match("read" if opcode == READ else "write", offset)
        if "errno" in rule:
            return self.answer(unique, error=rule["errno"])
        time.sleep(rule.get("delay", 0))
        size = min(size, rule.get("short", size))
        data = self.files[node]
        if opcode == READ:
            reply = bytes(data[offset : offset + size])
        else:
            data[offset : offset + size] = body[40 : 40 + size]
            reply = struct.pack("<II", size, 0)
        if "hold" in rule:
            self.held.append((rule["hold"], unique, reply))
        else:
            self.answer(unique, reply)

    def match(self, op: str, offset: int) -> dict[str, Any]:
        for rule in self.rules:
            inside = rule.get("from", 0) <= offset < rule.get("to", 1 << 62)
            if rule["op"] == op and inside and rule.get("times", 1) > 0:
                if "times" in rule:
                    rule["times"] -= 1
                return rule
        return {}


def main(mountpoint: str, rules: str) -> None:
    server = Server(json.loads(rules))
    options = f"fd={server.fuse},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
    if libc.mount(b"faulty", os.fsencode(mountpoint), b"fuse", 0, options.encode()) != 0:
        sys.exit(f"mount: {os.strerror(ctypes.get_errno())}")
    try:
        print("mounted", flush=True)
        server.serve()
    finally:
        libc.umount2(os.fsencode(mountpoint), 2)


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).resolve()), sys.argv[2])
