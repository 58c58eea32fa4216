"""The house rules of the design, section 3, read from the source with `ast`: who imports whom, sizes, docstrings."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONGEST_FILE, LONGEST_FUNCTION, LONGEST_TOOL = 350, 59, 150

GROUPS = (
    ("config",),
    ("codecs", "kernels", "data", "model"),
    ("parallel", "preparation"),
    ("checkpoint",),
    ("training", "planning", "streaming"),
    ("conversion",),
    ("benchmarks",),
    ("train", "tools", "examples"),
)
"""A room may import those of the groups before its own."""
ALSO = {("model", "kernels"), ("data", "codecs")}
NEVER = {("kernels", "config"), ("training", "kernels"), ("training", "preparation"), ("preparation", "model")}
MAY_SAY_CUDA = ("megaspeech/parallel/", "megaspeech/preparation/decode.py", "megaspeech/streaming/", "kernels/")
VAGUE_NAMES = {"utils.py", "helpers.py", "common.py", "misc.py"}

LIBRARY = sorted([*ROOT.glob("megaspeech/**/*.py"), *ROOT.glob("kernels/**/*.py")])
COMMANDS = sorted([*ROOT.glob("tools/**/*.py"), *ROOT.glob("examples/**/*.py")])
TESTS = sorted(ROOT.glob("tests/**/*.py"))
EVERY_FILE = [*LIBRARY, *COMMANDS, *TESTS, ROOT / "setup.py"]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def each(files: list[Path]) -> pytest.MarkDecorator:
    """The test once for every file."""
    return pytest.mark.parametrize("path", files, ids=_name)


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_name(path: Path) -> str:
    """The dotted name a file of the tree is imported by; `kernels/` is `megaspeech.kernels`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("megaspeech", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.Module, *, module: str, is_package: bool = False) -> Iterator[str]:
    """Dotted names of all imports, those inside functions and under TYPE_CHECKING included.

    `from a.b import c` gives `a.b.c`, so that a room imported from its parent is seen.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room_of(name: str) -> str | None:
    """The room of a dotted name: `megaspeech.ROOM...`, or `tools`, `examples`; None for other packages."""
    parts = name.split(".")
    known = {room for group in GROUPS for room in group}
    if parts[0] == "megaspeech":
        parts = parts[1:]
    elif parts[0] not in ("tools", "examples"):
        return None
    return parts[0] if parts and parts[0] in known else None


def may_import(room: str, other: str) -> bool:
    """Whether a file of `room` may import from the room `other`."""
    place = {name: index for index, group in enumerate(GROUPS) for name in group}
    if (room, other) in NEVER:
        return False
    return room == other or (room, other) in ALSO or place[other] < place[room]


@pytest.mark.parametrize(
    "room, other, allowed",
    [
        ("model", "config", True),
        ("model", "kernels", True),
        ("kernels", "model", False),
        ("kernels", "config", False),
        ("data", "codecs", True),
        ("data", "model", False),
        ("data", "preparation", False),
        ("preparation", "data", True),
        ("training", "preparation", False),
        ("config", "data", False),
        ("checkpoint", "model", True),
        ("parallel", "checkpoint", False),
        ("training", "kernels", False),
        ("training", "streaming", False),
        ("streaming", "checkpoint", True),
        ("benchmarks", "training", True),
        ("streaming", "benchmarks", False),
        ("streaming", "conversion", False),
        ("conversion", "streaming", True),
        ("benchmarks", "conversion", True),
        ("tools", "training", True),
        ("train", "tools", False),
    ],
)
def test_the_rule_itself(room: str, other: str, allowed: bool) -> None:
    assert may_import(room, other) is allowed


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
from typing import TYPE_CHECKING
from megaspeech import data
if TYPE_CHECKING:
    import megaspeech.training.trainer
def f():
    from ..parallel import host
"""
    names = set(imported(ast.parse(source), module="megaspeech.model.depth"))
    assert {"megaspeech.data", "megaspeech.training.trainer", "megaspeech.parallel.host"} <= names
    assert {room_of(name) for name in names} == {None, "data", "training", "parallel"}
    (name,) = imported(ast.parse("from . import x"), module="megaspeech.model", is_package=True)
    assert name == "megaspeech.model.x"


def test_the_tree_is_found() -> None:
    rooms = {room_of(module_name(path)) for path in LIBRARY}
    assert {"config", "codecs", "data", "model", "parallel", "checkpoint", "training", "planning"} <= rooms
    assert {"streaming", "benchmarks", "train"} <= rooms
    assert room_of(module_name(ROOT / "kernels/depth_attention/reference.py")) == "kernels"


@each([*LIBRARY, *COMMANDS])
def test_imports_flow_one_way(path: Path) -> None:
    room = room_of(module_name(path))
    names = imported(_tree(path), module=module_name(path), is_package=path.name == "__init__.py")
    others = {room_of(name) for name in names} - {None}
    if room is None:  # the package's own __init__ stands before every room
        assert not others, f"{_name(path)} imports {others}"
        return
    wrong = sorted(other for other in others if not may_import(room, other))
    assert not wrong, f"{_name(path)}: {room} may not import {', '.join(wrong)}"


@each(LIBRARY)
def test_no_library_file_imports_a_command_or_a_test(path: Path) -> None:
    first = {name.split(".")[0] for name in imported(_tree(path), module=module_name(path))}
    assert not first & {"tools", "examples", "tests", "kernels"}  # `kernels` is another package's import name


@each([path for path in LIBRARY if room_of(module_name(path)) in ("model", "kernels")])
def test_no_collectives_in_model_and_kernels(path: Path) -> None:
    names = set(imported(_tree(path), module=module_name(path)))
    assert not [name for name in names if name.startswith("torch.distributed")]
    attributes = {ast.unparse(node) for node in ast.walk(_tree(path)) if isinstance(node, ast.Attribute)}
    assert "torch.distributed" not in attributes


def test_config_imports_neither_torch_nor_megatron() -> None:
    code = "import sys, megaspeech.config; print(sorted({'torch', 'megatron', 'numpy'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert shown.stdout.strip() == "[]"


@each(EVERY_FILE)
def test_module_has_a_docstring(path: Path) -> None:
    assert ast.get_docstring(_tree(path))


@each(EVERY_FILE)
def test_file_is_short(path: Path) -> None:
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    longest = LONGEST_TOOL if path.is_relative_to(ROOT / "tools") else LONGEST_FILE
    assert num_lines <= longest, f"{_name(path)}: {num_lines} lines"


@each(EVERY_FILE)
def test_functions_are_short(path: Path) -> None:
    functions = (node for node in ast.walk(_tree(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    lengths = [(node.name, node.end_lineno - node.lineno + 1) for node in functions]
    assert not [(name, length) for name, length in lengths if length > LONGEST_FUNCTION]


@each([*LIBRARY, *COMMANDS])
def test_no_vague_file_names(path: Path) -> None:
    assert path.name not in VAGUE_NAMES


def _words(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, word) of every name and string of the code; docstrings and comments are prose."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    fields = ("id", "attr", "arg", "name", "asname", "module")
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield line, node.value
        for field in fields:
            word = getattr(node, field, None)
            if isinstance(word, str):
                yield line, word


def test_words_are_names_and_strings_only() -> None:
    source = '"""a CUDA docstring"""\nx = "cuda:0"  # cuda\ntorch.cuda.x()\n"""of x, cuda"""\nf"{y} cuda"\nf(cuda=1)'
    assert sorted(line for line, word in _words(ast.parse(source)) if "cuda" in word.lower()) == [2, 3, 5, 6]


@each([path for path in LIBRARY if not _name(path).startswith(MAY_SAY_CUDA)])
def test_only_some_rooms_know_the_device(path: Path) -> None:
    lines = sorted({line for line, word in _words(_tree(path)) if "cuda" in word.lower()})
    assert not lines, f"{_name(path)} says cuda in lines {lines}"


def public(body: list[ast.stmt], *, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """(name, node) of public classes, functions and methods; what is inside functions is private."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, prefix=f"{node.name}.")


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    spec = node.args
    named = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, spec.vararg, spec.kwarg]
    return [argument for argument in named if argument is not None and argument.arg not in ("self", "cls")]


def _is_complete(node: ast.AST) -> bool:
    """Whether every argument and the result of a function are annotated; Triton's have pointers and numbers only."""
    if isinstance(node, ast.ClassDef) or any(ast.unparse(each) == "triton.jit" for each in node.decorator_list):
        return True
    return node.returns is not None and all(argument.annotation for argument in _arguments(node))


@each([*LIBRARY, *COMMANDS])
def test_everything_public_has_a_docstring(path: Path) -> None:
    bare = [name for name, node in public(_tree(path).body) if not ast.get_docstring(node)]
    assert not bare, f"{_name(path)}: no docstring: {', '.join(bare)}"


@each([*LIBRARY, *COMMANDS])
def test_everything_public_is_annotated(path: Path) -> None:
    bare = [name for name, node in public(_tree(path).body) if not _is_complete(node)]
    assert not bare, f"{_name(path)}: not annotated: {', '.join(bare)}"


def _tracked() -> list[Path]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


# Written so that this file does not find itself.
MACHINE_PATH = re.compile(r"(?<![\w./-])/(?:" + "|".join(("work", "root", "home/[a-z]+", "tmp/w")) + r")/")


@pytest.mark.parametrize("before, found", [("see /", True), ("=/", True), ("a/", False), ("./", False)])
def test_machine_paths_are_recognised(before: str, found: bool) -> None:
    assert bool(MACHINE_PATH.search(f"{before}work/x")) is found
    assert not MACHINE_PATH.search(".github/workflows/x")


def test_no_machine_paths_in_tracked_files() -> None:
    faults = []
    for path in _tracked():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        faults += [f"{_name(path)}: {match.group()}" for match in MACHINE_PATH.finditer(text)]
    assert not faults


def _is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def _is_harmless(node: ast.stmt) -> bool:
    """Definitions, docstrings, and what is for the type checker alone."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    return isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign))


@each([path for path in [*LIBRARY, *COMMANDS] if "__main__" in path.read_text(encoding="utf-8")])
def test_entry_points_do_nothing_when_imported(path: Path) -> None:
    """megatron-core's checkpoint writer starts processes, which import the entry point again."""
    *definitions, guard = _tree(path).body
    assert _is_main_guard(guard) and all(map(_is_harmless, definitions))
