"""The import rule of docs/architecture.md: who may import whom, and what must not import torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "aio": set(),
    "cpu_adam": set(),
    "swap": {"aio"},
    "scheduler": {"swap", "cpu_adam", "aio"},
}


def imported(path: Path) -> set[str]:
    """Dotted names of everything a file imports, relative imports resolved."""
    package = path.relative_to(ROOT).parts[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(("tierflow", *package)[: len(package) + 2 - node.level]) if node.level else []
            module = ".".join([*base, node.module] if node.module else base)
            found.add(module)
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("component", ALLOWED)
def test_components_import_only_what_lies_below(component: str) -> None:
    files = [p for p in (ROOT / component).rglob("*.py")]
    assert files
    for path in files:
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "tierflow" and len(parts) > 1:
                assert parts[1] in ALLOWED[component] | {component}, f"{path} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "aio").rglob("*.py")), ids=lambda p: p.name)
def test_aio_does_not_know_torch(path: Path) -> None:
    assert not any(name.split(".")[0] == "torch" for name in imported(path))


def test_the_ledger_knows_neither_torch_nor_io() -> None:
    for name in ("ledger.py", "types.py"):
        names = {n.split(".")[0] for n in imported(ROOT / "swap" / name)}
        assert not names & {"torch", "os", "mmap", "numpy"}
        assert not any(n.startswith("tierflow.aio") for n in imported(ROOT / "swap" / name))


@pytest.mark.parametrize(
    "code",
    [
        "import tierflow",
        "import tierflow.aio",
        "from typer.testing import CliRunner; from tierflow.cli import app; CliRunner().invoke(app, ['--help'])",
        "from typer.testing import CliRunner; from tierflow.cli import app; CliRunner().invoke(app, ['finetune', '--help'])",
        "from typer.testing import CliRunner; from tierflow.cli import app; CliRunner().invoke(app, ['bench', 'train', '--help'])",
        "from typer.testing import CliRunner; from tierflow.cli import app; CliRunner().invoke(app, ['tune', '--help'])",
    ],
)
def test_light_entry_points_leave_torch_alone(code: str) -> None:
    check = f"{code}; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd="/").returncode == 0
