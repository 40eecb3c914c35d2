"""Keep package registries' hosts and one machine's paths out of the repository."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
# Written in pieces, so that this file does not find itself.
REGISTRIES = ["pypi" + ".org", "python" + "hosted.org", "--index" + "-url", "download." + "pytorch"]
MACHINE_PATHS = ["/" + "work/", "/" + "root/", "/" + "Users/", "/" + r"home/\w+/", r"[A-Z]:\\Users"]
FORBIDDEN = re.compile(
    "|".join([*map(re.escape, REGISTRIES), *[rf"(?<![\w./]){p}" for p in MACHINE_PATHS]])
)


def offences(text: str) -> list[str]:
    return [
        f"{number}: {line.strip()[:100]}"
        for number, line in enumerate(text.splitlines(), 1)
        if FORBIDDEN.search(line)
    ]


def repository_files() -> list[Path]:
    """Tracked files, and those that would be with the next commit."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [REPO / name for name in done.stdout.splitlines() if (REPO / name).is_file()]


def test_no_registry_and_no_machine_path() -> None:
    found = []
    for path in repository_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(REPO)}:{each}" for each in offences(text)]
    assert not found, "\n".join(found)


def test_offences_are_found() -> None:
    assert offences("pip install --index" + "-url x")
    assert offences("see https://pypi" + ".org/project/x")
    assert offences("path = '/" + "work/main'")
    assert not offences(
        "http://www.apache.org/licenses/ ../shared/models homework/ /path/to/python3.11"
    )


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-torchtpu.txt"])
def test_constraints_are_names_and_versions(file: str) -> None:
    line_form = re.compile(r'[A-Za-z0-9._-]+==[A-Za-z0-9.!]+( ; python_version [<>=]+ "[\d.]+")?')
    lines = (REPO / file).read_text().splitlines()
    wrong = [line for line in lines if not line.startswith("#") and not line_form.fullmatch(line)]
    assert not wrong
    assert len(lines) > 50


def test_readme_is_short() -> None:
    readme = REPO / "README.md"
    if not readme.is_file():
        pytest.skip("no README.md yet")
    assert len(readme.read_text().splitlines()) <= 120
