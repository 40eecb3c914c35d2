"""The built wheel is whole: away from the repository it still finds its configs and assets."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed; run make setup")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    done = subprocess.run([*command, str(REPO)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_wheel_holds_configs_and_assets(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"torchprime/configs/{path.relative_to(REPO / 'configs').as_posix()}"
        for path in (REPO / "configs").rglob("*.yaml")
    } | {
        path.relative_to(REPO).as_posix()
        for path in (REPO / "torchprime" / "assets").rglob("*")
        if path.is_file()
    }
    assert len(wanted) > 30
    assert wanted | {"torchprime/py.typed"} <= held
    assert not [name for name in held if not name.startswith("torchprime")]
    assert any(name.endswith("licenses/LICENSE") for name in held)


@pytest.mark.slow
def test_wheel_runs_away_from_the_repository(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-m", "torchprime.torch_xla_models.train"]
    done = subprocess.run(
        [*command, "--config-name", "quickstart", "--cfg", "job", "--resolve"],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"{site}/torchprime/assets/quickstart/base" in done.stdout
    assert not list(elsewhere.iterdir()), "showing the config leaves nothing behind"
