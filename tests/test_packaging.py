"""What the packaging files say, compared with each other and with the folders they speak of."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP = ("reference", "optimized", "oracle")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
TEST_COMMAND = "python3 -m venv .venv && .venv/bin/pip install -q tox && .venv/bin/tox"
PASSED = {"CUDA_*", "NVIDIA_*", "TRITON_*", "TORCH_*", "HYPOTHESIS_*", "CI", "GITHUB_*", "OMP_NUM_THREADS"}


def source_folders() -> list[Path]:
    return sorted({path.parent for top in TOP for path in (ROOT / top).rglob("*.py")})


def pins() -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return dict(line.split("==") for line in lines if line)


def tox() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "tox.ini")
    return parser


def test_packages_are_the_folders_on_disk() -> None:
    folders = {"pageproof." + ".".join(path.relative_to(ROOT).parts) for path in source_folders()}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == folders
    assert PROJECT["tool"]["setuptools"]["package-dir"] == {f"pageproof.{top}": top for top in TOP}


@pytest.mark.parametrize("folder", source_folders(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_package_is_typed(folder: Path) -> None:
    assert (folder / "__init__.py").is_file()
    assert (folder / "py.typed").read_bytes() == b""


def test_packages_hold_nothing_that_a_wheel_would_leave_out() -> None:
    kept = [
        path for top in TOP for path in (ROOT / top).rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    assert [path for path in kept if path.suffix != ".py" and path.name != "py.typed"] == []


def test_the_plugin_is_named_like_its_module() -> None:
    points = PROJECT["project"]["entry-points"]["pytest11"]
    assert points == {"pageproof.oracle.pytest_plugin": "pageproof.oracle.pytest_plugin"}
    assert f'pytest_plugins = ["{next(iter(points))}"]' in (ROOT / "conftest.py").read_text()


def test_the_plugin_is_loaded_once(pytestconfig: pytest.Config) -> None:
    loaded = [name for name, _ in pytestconfig.pluginmanager.list_name_plugin() if "pageproof" in name]
    assert loaded == ["pageproof.oracle.pytest_plugin"]


def test_an_installation_has_the_entry_points_of_this_checkout() -> None:
    if getattr(sys.modules["pageproof"], "__file__", None) == str(ROOT / "tests" / "checkout" / "pageproof.py"):
        pytest.skip("a plain checkout has no entry points")
    points = {(point.group, point.name, point.value) for point in distribution("pageproof").entry_points}
    declared = {("console_scripts", *item) for item in PROJECT["project"]["scripts"].items()}
    assert points == declared | {("pytest11", *item) for item in PROJECT["project"]["entry-points"]["pytest11"].items()}


def test_metadata_that_a_build_leaves_behind_lies_beside_the_module_it_speaks_of() -> None:
    # At the top, `python -m pytest` with any other interpreter would take it for an installed plugin and stop.
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    assert settings["egg_info"]["egg_base"] == "tests/checkout"
    assert list(ROOT.glob("*.egg-info")) == []


def test_constraints_pin_every_direct_dependency() -> None:
    project = PROJECT["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"], "ruff", "mypy"]
    assert {re.split(r"[>=;]", line)[0] for line in wanted} == set(pins())


def test_the_hooks_run_the_pinned_ruff() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert set(re.findall(r"ruff==([\d.]+)", hooks)) == {pins()["ruff"]}


def test_readme_and_ci_run_the_same_command() -> None:
    readme = (ROOT / "README.md").read_text().splitlines()
    assert {TEST_COMMAND, f"{TEST_COMMAND} -e fuzz"} <= {line.strip() for line in readme}
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == TEST_COMMAND


def test_tox_lets_the_settings_of_a_gpu_machine_through() -> None:
    environments = tox()
    assert set(environments["testenv"]["pass_env"].split()) == PASSED
    assert environments["tox"]["requires"] == "tox>=4.28"  # older ones ignore `constraints`
    assert environments["testenv"]["constraints"] == "constraints.txt"


def test_the_command_line_starts() -> None:
    command = [sys.executable, "-m", "pageproof.oracle", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert {"fuzz", "replay"} <= set(re.findall(r"\w+", done.stdout))


def test_the_examples_of_the_readme_run() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    exec("\n".join(blocks), {"__name__": "readme"})
