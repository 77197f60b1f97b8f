"""What the editable install hides: packages the wheel would miss, links and rules that lag behind.

The folders at the root install as ``huizhen.<folder>`` (docs/adr/0001-import-name.md).
"""

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
LISTED = set(SETUPTOOLS["packages"])
FOLDERS = {name.split(".")[1] for name in LISTED}  # server, not server.api
RUFF = (sys.executable, "-m", "ruff", "check", "--output-format=json", "--no-cache")
NOT_CODE = {"build", "dist", "runs", "tests"}  # and whatever begins with a dot


def python_files(root: Path) -> set[Path]:
    """Every Python file that is neither a test nor made by a tool, relative to ``root``."""
    found = (path.relative_to(root) for path in root.rglob("*.py"))
    return {
        path
        for path in found
        if path.parts[0] not in NOT_CODE and not any(p.startswith(".") for p in path.parts)
    }


def packages_on_disk(root: Path) -> set[str]:
    files = python_files(root)
    return {"huizhen." + ".".join(f.parent.parts) for f in files if f.name == "__init__.py"}


def files_outside(packages: set[str], root: Path) -> set[Path]:
    return {f for f in python_files(root) if "huizhen." + ".".join(f.parent.parts) not in packages}


def ruff_codes(source: str) -> set[str]:
    """The rules that ``source`` breaks when it stands in server/."""
    run = subprocess.run(  # noqa: S603 - our own ruff, on text written here
        [*RUFF, "--stdin-filename=server/planted.py", "-"],
        input=f'"""A planted module."""\n\n{source}\n',
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode in (0, 1), run.stderr
    return {finding["code"] for finding in json.loads(run.stdout)}


# Trap 1: a package that is not listed works in the editable install and is missing from the wheel.


def test_the_listed_packages_are_those_on_disk():
    assert packages_on_disk(ROOT) == LISTED


def test_no_python_file_is_outside_a_package():
    assert files_outside(LISTED, ROOT) == set()


def test_an_unlisted_package_and_a_stray_file_are_seen(tmp_path):
    for name in ("server/__init__.py", "server/api/__init__.py", "scripts/run.py", "setup.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_server.py").touch()
    assert packages_on_disk(tmp_path) == {"huizhen.server", "huizhen.server.api"}
    strays = files_outside({"huizhen.server"}, tmp_path)
    assert strays == {Path("server/api/__init__.py"), Path("scripts/run.py"), Path("setup.py")}


@pytest.mark.parametrize("package", sorted(LISTED))
def test_the_installed_package_is_this_folder(package):
    spec = importlib.util.find_spec(package)
    folder = ROOT.joinpath(*package.split(".")[1:])
    assert spec is not None, "not installed: run make setup"
    assert spec.origin is not None
    assert Path(spec.origin).resolve() == folder / "__init__.py"


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_every_folder_says_that_it_is_typed(folder):
    assert (ROOT / folder / "py.typed").is_file()
    assert "py.typed" in SETUPTOOLS["package-data"]["*"]


def test_every_data_file_reaches_the_wheel():
    patterns = SETUPTOOLS["package-data"]
    packed: set[Path] = set()
    for package in LISTED:
        folder = ROOT.joinpath(*package.split(".")[1:])
        for pattern in [*patterns["*"], *patterns.get(package, [])]:
            packed.update(folder.glob(pattern))
    data = {
        path
        for folder in FOLDERS - {"benchmarks"}  # its results are for readers
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
        and path.suffix not in {".py", ".pyc", ".md"}
        and path.parent.parent != ROOT / "simulations" / "experiments"  # nor are theirs packed
    }
    assert {str(path.relative_to(ROOT)) for path in data - packed} == set()


# Trap 2: one file under two names. The type checkers reach the folders through .namespace only.


def test_the_links_for_the_type_checkers_point_at_the_folders():
    links = {link.name: link for link in (ROOT / ".namespace" / "huizhen").iterdir()}
    assert set(links) == FOLDERS
    for name, link in links.items():
        assert link.is_symlink(), f"{link} is no link: this checkout lost its symbolic links"
        assert link.readlink() == Path("..", "..", name)
        assert link.resolve() == ROOT / name


def test_mypy_sees_each_file_once():
    mypy = PYPROJECT["tool"]["mypy"]
    assert set(mypy["files"]) == {".namespace/huizhen", "tests"}
    assert mypy["mypy_path"] == "$MYPY_CONFIG_FILE_DIR/.namespace"


def test_relative_imports_are_refused():
    assert "TID252" in ruff_codes("from .rounds import x")


def test_cycles_are_looked_for_in_every_package_that_may_have_them():
    contracts = PYPROJECT["tool"]["importlinter"]["contracts"]
    [cycles] = [c for c in contracts if c["type"] == "acyclic_siblings"]
    # cli and benchmarks stand at the top of the layers: nothing may import them.
    assert set(cycles["ancestors"]) >= {f"huizhen.{f}" for f in FOLDERS - {"cli", "benchmarks"}}


# Trap 3: `import server` works by accident from the repository's root.


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_only_the_full_name_may_be_imported(folder):
    assert "TID251" in ruff_codes(f"import {folder}")
    assert "TID251" not in ruff_codes(f"import huizhen.{folder}")


# The order of the packages (DESIGN §3).


def test_the_import_layers_name_every_package():
    linter = PYPROJECT["tool"]["importlinter"]
    [layers] = [c["layers"] for c in linter["contracts"] if c["type"] == "layers"]
    named = [name for layer in layers for name in re.split(r"\s*[|:]\s*", layer)]
    assert sorted(named) == sorted(f"huizhen.{folder}" for folder in FOLDERS)
    assert sorted(linter["root_packages"]) == sorted(f"huizhen.{folder}" for folder in FOLDERS)


# constraints.txt


def test_the_constraints_pin_every_direct_dependency_within_its_range():
    text = (ROOT / "constraints.txt").read_text("utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    pins = {canonicalize_name(name): version for name, version in (s.split("==") for s in lines)}

    extras = PYPROJECT["project"]["optional-dependencies"].values()
    wanted = [*PYPROJECT["project"]["dependencies"], *(line for extra in extras for line in extra)]
    for requirement in map(Requirement, wanted):
        if requirement.name == "huizhen":  # an extra that takes in others
            continue
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} is not pinned in constraints.txt"
        assert pin in requirement.specifier
