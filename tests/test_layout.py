"""The layout: imports point one way, importing is cheap, and a wheel holds the two packages and nothing else."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "coreinfer_sim"
COMMANDS = ROOT / "cli"
ROOMS = (
    "base",
    "models",
    "index",
    "choosing",
    "engines",
    "generation",
    "evaluation",
    "fitting",
    "building",
    "export",
    "bench",
    "reporting",
    "serving",
)
"""A room imports only from itself and those above it."""


def module_name(path: Path) -> str:
    """Return a file's module, such as ``coreinfer_sim.building.shards``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Draw (line, full name) of everything that a file imports, also inside functions."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = [*base, *([node.module] if node.module else [])]
            for alias in node.names:
                yield node.lineno, ".".join([*origin, alias.name])


def room_of(name: str) -> str | None:
    """Return the room that a full name belongs to, or None for other packages."""
    parts = name.split(".")
    return parts[1] if parts[0] == "coreinfer_sim" and len(parts) > 1 else None


SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = {module_name(path) for path in SOURCES}


def module_of(name: str) -> str | None:
    """Return the module of the package that a full name is, or is in."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def against_the_order() -> list[str]:
    """Return what is imported from a room below, as "importing module -> imported module"."""
    found = set()
    for path in SOURCES:
        own = room_of(module_name(path))
        for _, name in imports(path):
            room = room_of(name)
            if own is not None and room in ROOMS and ROOMS.index(room) > ROOMS.index(own):
                found.add(f"{module_name(path)} -> {module_of(name)}")
    return sorted(found)


def circles() -> list[str]:
    """Return the modules that import themselves by way of others, imports inside functions included."""
    edges = {module_name(path): {module_of(name) for _, name in imports(path)} - {None} for path in SOURCES}

    def reaches(start: str) -> bool:
        seen: set[str] = set()
        left = [each for each in edges[start] if each != start]
        while left:
            module = left.pop()
            if module == start:
                return True
            if module not in seen:
                seen.add(module)
                left += edges[module]
        return False

    return sorted(module for module in edges if module != "coreinfer_sim" and reaches(module))


def test_the_package_holds_only_rooms():
    parts = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert parts == {"__init__.py", "py.typed", *ROOMS}


def test_rooms_import_only_rooms_above():
    assert against_the_order() == []


@pytest.mark.parametrize("room", ROOMS)
def test_others_use_only_what_a_room_offers(room):
    """Each room's first sentence says its job, and its ``__all__`` the modules that others may import."""
    tree = ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))
    assert (ast.get_docstring(tree) or "").count(". ") == 0
    (offered,) = (ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))
    assert all((PACKAGE / room / name).is_dir() or (PACKAGE / room / f"{name}.py").exists() for name in offered)
    used = {
        name.split(".")[2]
        for path in (*SOURCES, *COMMANDS.glob("*.py"))
        for _, name in imports(path)
        if room_of(name) == room != room_of(module_name(path)) and name.count(".") > 1
    }
    assert used - {*offered} == set()


def test_options_of_commands_are_not_named_in_the_package():
    """The library names its own parameters; commands of others are lm-eval's, in the harness, and llama.cpp's."""
    of_others = ("harness.py", "native.py")
    named = re.compile(r"(?<![\w-])(?<!llama-gguf-split )--[a-z][a-z-]+")
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and path.name not in of_others:
                assert not named.search(node.value), f"{path.name}:{node.lineno}: {node.value[:80]}"


def test_no_file_is_long():
    for path in (*SOURCES, *COMMANDS.glob("*.py")):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 350, path


def test_nothing_imports_in_circles():
    assert circles() == []


def test_the_test_of_imports_sees_imports():
    found = {name for _, name in imports(PACKAGE / "index" / "index.py")}
    assert {"gc", "coreinfer_sim.index.clustering.nearest", "coreinfer_sim.index.manifest.Manifest"} <= found
    nested = {name for _, name in imports(PACKAGE / "choosing" / "statistics.py")}
    assert "coreinfer_sim.choosing.accumulate.accumulate" in nested
    relative = {name for _, name in imports(COMMANDS / "main.py")}
    assert "cli.generate.generate" in relative


def test_the_package_does_not_know_its_commands():
    for path in SOURCES:
        for line, name in imports(path):
            assert name.split(".")[0] not in {"cli", "coreinfer_sim_cli", "click", "rich"}, (
                f"{path.name}:{line}: {name}"
            )


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_settings_and_errors_come_without_torch():
    loaded = run_python(
        "import sys, coreinfer_sim; from coreinfer_sim import BuildConfig, CorpusConfig, Mode, Score, CoreInferSimError\n"
        "import coreinfer_sim.base.rows, coreinfer_sim.base.files, coreinfer_sim.index.manifest, coreinfer_sim_cli.main\n"
        "print(*sys.modules)"
    ).split()
    assert "coreinfer_sim.index.manifest" in loaded
    assert not {"torch", "transformers", "datasets", "faiss", "numba", "sentence_transformers"} & set(loaded)


def test_an_index_is_described_without_torch():
    loaded = (
        run_python(
            "import sys; from coreinfer_sim_cli.main import main\n"
            f"main(['info', {'demo'!r}], standalone_mode=False)\n"
            "print(*sys.modules)"
        )
        .splitlines()[-1]
        .split()
    )
    assert "coreinfer_sim.index.index" in loaded
    assert not {"torch", "transformers", "datasets", "numba", "sentence_transformers", "sklearn", "rich"} & set(loaded)


def test_every_public_name_is_there():
    import coreinfer_sim

    assert dir(coreinfer_sim) == coreinfer_sim.__all__
    of_checkers = [name.rpartition(".") for _, name in imports(PACKAGE / "__init__.py") if room_of(name)]
    assert sorted(name for _, _, name in of_checkers) == coreinfer_sim.__all__
    assert all(getattr(coreinfer_sim, name).__module__ == module for module, _, name in of_checkers)
    for name in coreinfer_sim.__all__:
        assert getattr(coreinfer_sim, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'build_indexes'"):
        _ = coreinfer_sim.build_indexes


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the sources."""
    try:
        setuptools = int(version("setuptools").split(".")[0])
    except PackageNotFoundError:
        setuptools = 0
    if setuptools < 77 or importlib.util.find_spec("build") is None:
        pytest.skip("building a wheel offline needs setuptools 77 or later and the package 'build' in this environment")
    source = tmp_path_factory.mktemp("source")
    for path in ROOT.iterdir():
        if path.name.startswith(".") or path.name in {"build", "dist", "models"} or path.suffix == ".egg-info":
            continue
        if path.is_dir():
            shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("__pycache__", "*.gguf"))
        else:
            shutil.copy(path, source)
    for name in ("tests", "indexes", "data_scripts"):
        assert (source / name).is_dir()
        (source / name / "__init__.py").touch()  # what a search for packages would pick up
    out = source / "dist"
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (made,) = out.glob("*.whl")
    return made


def test_a_wheel_holds_only_our_two_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    info = {top for top in tops if top.endswith(".dist-info")}
    assert len(info) == 1
    assert tops - info == {"coreinfer_sim", "coreinfer_sim_cli"}


def test_a_wheel_holds_every_module(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {path.relative_to(ROOT).as_posix() for path in SOURCES} <= names
    assert {f"coreinfer_sim_cli/{path.name}" for path in COMMANDS.glob("*.py")} <= names
    assert {"coreinfer_sim/py.typed", "coreinfer_sim/index/demo/manifest.json"} <= names
    assert {"coreinfer_sim/reporting/report.html", "coreinfer_sim/reporting/report.css"} <= names
    page = [path for path in (PACKAGE / "serving" / "page").rglob("*") if path.is_file()]
    assert {path.relative_to(ROOT).as_posix() for path in page} <= names


def test_a_wheel_installs_the_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert b"coreinfer-sim = coreinfer_sim_cli.main:main" in archive.read(entry_points)
