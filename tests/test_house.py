"""The house stands: types and layers are checked through the symlink, and packages hold what they should."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOUSE = ("onnx_decomp", "passes", "pyproject.toml", "README.md", "LICENSE")
LINT_IMPORTS = "from importlinter.cli import lint_imports_command as lint; lint(['--no-logo', '--no-cache'])"
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.egg-info")


def needs(module: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{module} is not installed: pip install -e .[dev]")


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of what packages are built from, the symlink as a symlink."""
    copy = tmp_path / "house"
    copy.mkdir()
    for name in HOUSE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, symlinks=True, ignore=LEFT_OUT)
        else:
            shutil.copy(source, copy / name)
    return copy


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run this Python there, so that only the copy can be imported."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def modules() -> set[str]:
    """Every file that an installed package needs, as `onnx_decomp/...`."""
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "onnx_decomp").rglob("*.py")}
    found |= {f"onnx_decomp/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "passes").rglob("*.py")}
    for folder in ("tables", "templates"):
        found |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "onnx_decomp" / folder).iterdir()}
    return found | {"onnx_decomp/py.typed"}


def test_passes_is_reached_through_a_symlink() -> None:
    link = ROOT / "onnx_decomp" / "passes"
    assert link.is_symlink()
    assert os.readlink(link) == "../passes"


@needs("mypy")
def test_a_type_error_in_a_pass_fails(house: Path) -> None:
    # Only the bones of the copy stay: what is proved is that the settings reach `passes`, in a second.
    for package in ("onnx_decomp", "passes"):
        for path in (house / package).glob("*.py"):
            path.write_text("")
    shutil.rmtree(house / "onnx_decomp" / "init_stats")
    assert run("-m", "mypy", cwd=house).returncode == 0
    (house / "passes" / "planted.py").write_text('"""Planted."""\n\nvalue: int = "text"\n')
    checked = run("-m", "mypy", cwd=house)
    assert checked.returncode == 1
    assert "planted.py:3: error: Incompatible types" in checked.stdout


@needs("importlinter")
@pytest.mark.parametrize(
    ("place", "imported"),
    [
        ("onnx_decomp/sites.py", "onnx_decomp.report"),
        ("passes/criterion.py", "onnx_decomp.compiler"),
        ("passes/criterion.py", "onnx_decomp.passes.planning"),
    ],
)
def test_an_upward_import_fails(house: Path, place: str, imported: str) -> None:
    with (house / place).open("a") as file:
        file.write(f"\nimport {imported}  # planted\n")
    checked = run("-c", LINT_IMPORTS, cwd=house)
    module = f"onnx_decomp.{place.removeprefix('onnx_decomp/').removesuffix('.py').replace('/', '.')}"
    assert checked.returncode == 1
    assert f"{module} -> {imported}" in checked.stdout


@needs("importlinter")
def test_a_file_without_a_place_fails(house: Path) -> None:
    (house / "onnx_decomp" / "elsewhere.py").write_text("")
    checked = run("-c", LINT_IMPORTS, cwd=house)
    assert checked.returncode == 1
    assert "elsewhere" in checked.stdout


@needs("ruff")
def test_ruff_sees_a_pass_once(house: Path) -> None:
    (house / "passes" / "planted.py").write_text("import os\n")
    checked = run("-m", "ruff", "check", "--no-cache", "--output-format", "concise", cwd=house)
    assert [line.split(":")[0] for line in checked.stdout.splitlines() if "planted.py" in line] == [
        str(Path("passes", "planted.py"))
    ]


@needs("build")
def test_wheels_hold_every_module_whether_from_the_tree_or_from_an_sdist(house: Path, tmp_path: Path) -> None:
    build = ("-m", "build", "--no-isolation", "--outdir")
    for built in (
        run(*build, str(tmp_path / "direct"), "--wheel", cwd=house),
        run(*build, str(tmp_path / "packed"), cwd=house),  # an sdist, and a wheel from it
    ):
        assert built.returncode == 0, built.stdout + built.stderr
    (packed,) = (tmp_path / "packed").glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        held = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert modules() <= held
    for folder in ("direct", "packed"):
        (wheel,) = (tmp_path / folder).glob("*.whl")
        held = set(zipfile.ZipFile(wheel).namelist())
        assert {name for name in held if ".dist-info/" not in name} == modules()
        assert any(name.endswith("licenses/LICENSE") for name in held)


@needs("setuptools")
def test_an_editable_install_imports_passes_from_the_tree(house: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    hook = f"from setuptools.build_meta import build_editable; build_editable({str(target)!r})"
    built = run("-c", hook, cwd=house)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = target.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(target)
    probe = (
        f"import site; site.addsitedir({str(target)!r})\n"
        "import onnx_decomp.passes; print(onnx_decomp.passes.__file__)"
    )
    # -S -I: neither this checkout's own installation nor the working folder can help.
    found = run("-S", "-I", "-c", probe, cwd=tmp_path)
    assert found.stdout.strip() == str(house / "onnx_decomp" / "passes" / "__init__.py"), found.stderr
