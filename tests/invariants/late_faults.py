"""The failing file system of the aio tests, with rules that may change while it is mounted.

    python late_faults.py MOUNTPOINT FILE

FILE holds the rules as JSON and is read again whenever it was replaced; while it is not there, nothing fails.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "aio"))
import faulty_fs


class LateServer(faulty_fs.Server):
    def __init__(self, file: str) -> None:
        super().__init__([])
        self.file, self.seen = file, 0

    def match(self, op: str, offset: int) -> dict[str, Any]:
        found = os.stat(self.file).st_ino if os.path.exists(self.file) else 0
        if found != self.seen:
            self.seen = found
            self.rules = json.loads(Path(self.file).read_text()) if found else []
        return super().match(op, offset)


if __name__ == "__main__":
    faulty_fs.Server = LateServer  # type: ignore[misc]
    faulty_fs.main(sys.argv[1], json.dumps(sys.argv[2]))
