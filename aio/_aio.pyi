"""The C++ side: no argument is checked here, see store.py."""

BUILT_WITH_IO_URING: bool
END_OF_FILE: int
CORRUPT: int
CRC32C_IN_HARDWARE: bool

class View:
    """Keeps an object's memory exported. Raises BufferError, TypeError or ValueError when it cannot be."""

    def __init__(self, object: object, writable: bool) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

class File:
    """Sole owner of the descriptor. A nonzero ``checksummed`` keeps checksums for that many bytes."""

    def __init__(
        self, fd: int, alignment: int, memory_alignment: int, direct: bool, checksummed: int
    ) -> None: ...
    @property
    def fd(self) -> int: ...
    @property
    def grain(self) -> int:
        """Bytes that are transferred whole or not at all."""

    def close(self) -> None: ...

class Ticket:
    """Made by Array."""

    def done(self) -> bool: ...
    def wait(self) -> int:
        """0, an errno, END_OF_FILE or CORRUPT."""

    @property
    def orphaned(self) -> bool:
        """Whether the kernel may still use the memory although the ticket is over."""

    @property
    def failed_path(self) -> int: ...

    @property
    def failed_offset(self) -> int: ...
    @property
    def failed_length(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def began(self) -> float | None: ...
    @property
    def ended(self) -> float | None: ...

class Engine:
    """Of one path. Made by thread_engine or uring_engine."""

    def close(self) -> None: ...
    def abandon(self) -> None:
        """In a forked child: gives up inherited descriptors, takes no lock."""

    def bytes_moved(self, write: bool) -> int: ...

class Array:
    """Several engines as one range of bytes; stripes of ``unit`` bytes in the order of ``pattern``."""

    def __init__(self, engines: list[Engine], unit: int, pattern: list[int]) -> None: ...
    def submit(self, write: bool, urgent: bool, requests: list[tuple[int, int, int]]) -> Ticket:
        """Requests are (address, offset, length)."""

    def sync(self) -> Ticket: ...
    def bytes_moved(self, write: bool) -> int: ...
    def bytes_bounced(self) -> int: ...
    def busy_seconds(self, write: bool) -> float: ...

def thread_engine(file: File, path: int, block_size: int, threads: int) -> Engine: ...
def uring_engine(file: File, path: int, block_size: int, queue_depth: int, rings: int) -> Engine: ...
def checksums(buffer: object, hardware: bool) -> list[int]:
    """CRC32C of every 4096 bytes."""

def probe_io_uring() -> int:
    """0, or the errno with which a ring is refused."""

def filesystem_magic(fd: int) -> int: ...
def direct_alignment(fd: int) -> tuple[int, int] | None:
    """Of memory and of offsets, as statx tells; 0 where the file takes no direct I/O."""

def reserve(fd: int, nbytes: int) -> None: ...
