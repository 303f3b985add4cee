"""The structure of the code, held by tests: who may import whom, what stays light, no package shadowing another."""

from __future__ import annotations

import ast
import functools
import gc
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = ("schemas", "producers", "consumers", "streams", "infra")
HEAVY = ("torch", "transformers", "deepspeed", "vllm")
MAX_FUNCTION_LINES = 70


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package / "fulgurite" / package).rglob("*.py"))


@functools.cache
def parsed(path: Path) -> ast.Module:
    """Without garbage collection meanwhile: CPython 3.11 miscounts its depth when a finaliser interrupts it."""
    gc.disable()
    try:
        return ast.parse(path.read_text())
    finally:
        gc.enable()


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module, node.lineno


@pytest.mark.parametrize("package", ORDER)
def test_imports_go_one_way(package: str):
    allowed = ORDER[: ORDER.index(package) + 1]
    wrong: list[str] = []
    for path in sources(package):
        for name, line in imported(parsed(path)):
            parts = name.split(".")
            if parts[0] == "fulgurite" and len(parts) > 1 and parts[1] not in allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_every_formula_is_one_that_trains():
    """What objectives/ has is what is compared with other libraries' code: none of it beside what the trainer does."""
    trees = [parsed(path) for path in sources("streams")]
    used = {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)}
    unused = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in sources("streams")
        if path.parent.name == "objectives"
        for node in parsed(path).body
        if isinstance(node, ast.FunctionDef) and node.name not in used
    ]
    assert not unused, "\n".join(unused)


@pytest.mark.parametrize("package", [p for p in ORDER if p != "streams"])
def test_torch_stays_in_streams(package: str):
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources(package)
        for name, line in imported(parsed(path))
        if name.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def test_the_agents_install_stays_light():
    """What `pip install fulgurite` brings is enough for everything an agent's process imports."""
    modules = [
        f"fulgurite.producers.{path.stem}"
        for path in sources("producers")
        if path.parent.name == "producers" and path.stem != "__init__"
    ]
    forbidden = (*HEAVY, "clickhouse_connect", "pyarrow", "starlette", "fastapi", "faststream", "typer", "uvicorn")
    code = f"import sys, importlib\nfor m in {modules!r}: importlib.import_module(m)\n"
    code += f"print(sorted(set({forbidden!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_no_init_hides_the_namespace():
    """An __init__.py directly in any */fulgurite/ would hide the other packages."""
    assert list(ROOT.glob("*/fulgurite/__init__.py")) == []


def test_every_package_is_typed():
    assert [p for p in ORDER if not (ROOT / p / "fulgurite" / p / "py.typed").exists()] == []


def test_every_module_says_what_it_is():
    silent = [
        str(path.relative_to(ROOT))
        for package in ORDER
        for path in sources(package)
        if not ast.get_docstring(parsed(path))
    ]
    assert not silent, "\n".join(silent)


def test_functions_fit_a_screen():
    long: list[str] = []
    for package in ORDER:
        for path in sources(package):
            for node in ast.walk(parsed(path)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                    lines = node.end_lineno - node.lineno + 1
                    if lines > MAX_FUNCTION_LINES:
                        long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {lines} lines")
    assert not long, "\n".join(long)


def test_nothing_is_left_for_nobody():
    marks = ("TO" + "DO", "FIX" + "ME", "X" + "XX")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for package in ORDER
        for path in sources(package)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(rf"\b({'|'.join(marks)})\b", line)
    ]
    assert not found, "\n".join(found)


def test_topic_names_stand_in_one_place():
    """`fulgurite.` plus a topic's name appears as a literal nowhere but in the module of topics."""
    from fulgurite.schemas.topics import TOPICS

    names = {f"fulgurite.{topic.name}" for topic in TOPICS}
    found: list[str] = []
    for package in ORDER:
        for path in sources(package):
            for node in ast.walk(parsed(path)):
                if isinstance(node, ast.Constant) and node.value in names:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.value}")
    assert not found, "\n".join(found)
