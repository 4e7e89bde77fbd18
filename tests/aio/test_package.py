"""The package's edges: what it imports, and that the stub tells the truth about the extension module."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import tierflow.aio as aio

PACKAGE = Path(aio.__file__).parent
MODULE = aio.store._aio


def test_no_torch(python: Any) -> None:
    done = python(
        "import sys, tierflow.aio as a; a.probe();"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'numpy', 'pydantic'}))"
    )
    assert done.stdout == "[]\n", done.stderr


def test_nothing_of_ours_is_imported_but_aio() -> None:
    for file in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith(("tierflow", "torch")) for alias in node.names), file
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 or (node.level == 0 and node.module is not None), file
                assert not (node.module or "").startswith(("tierflow", "torch")), file


def stub() -> ast.Module:
    return ast.parse((PACKAGE / "_aio.pyi").read_text())


def members(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    named = {node.name: node for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    fields = {n.target.id: n for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    return {**named, **fields}


def public(names: Any) -> set[str]:
    return {name for name in names if not name.startswith("_")}


def arguments(function: Any) -> list[str]:
    """From the signature that opens a bound function's docstring."""
    signature = function.__doc__.split("\n")[0]
    return [name for name in re.findall(r"(\w+): ", signature) if name != "self"]


def check_function(node: ast.FunctionDef, function: Any) -> None:
    stated = [argument.arg for argument in node.args.args if argument.arg != "self"]
    assert stated == arguments(function), node.name


def test_the_stub_has_what_the_module_has() -> None:
    stated = members(stub().body)
    assert public(stated) == public(dir(MODULE)) - {"inject"}  # of test builds
    for name, node in stated.items():
        found = getattr(MODULE, name)
        if isinstance(node, ast.FunctionDef):
            check_function(node, found)
        elif isinstance(node, ast.ClassDef):
            inside = members(node.body)
            assert public(inside) == public(vars(found)), name
            for inner, inner_node in inside.items():
                assert isinstance(inner_node, ast.FunctionDef)
                member = vars(found)[inner]
                is_property = any(
                    isinstance(d, ast.Name) and d.id == "property" for d in inner_node.decorator_list
                )
                assert isinstance(member, property) == is_property, f"{name}.{inner}"
                if not is_property:
                    check_function(inner_node, member)
        else:
            assert isinstance(node, ast.AnnAssign) and isinstance(node.annotation, ast.Name)
            assert type(found).__name__ == node.annotation.id


def test_every_public_name_has_a_docstring() -> None:
    for name in aio.__all__:
        value = getattr(aio, name)
        if callable(value):
            assert value.__doc__, name
            for inner, member in vars(value).items() if isinstance(value, type) else ():
                if not inner.startswith("_") and (callable(member) or isinstance(member, property)):
                    assert member.__doc__, f"{name}.{inner}"
