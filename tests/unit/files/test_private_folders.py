"""Folders that other users may write are refused; folders that only look so are accepted."""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from torchprime.errors import RuntimeSetupError
from torchprime.files import private_folders
from torchprime.files.private_folders import fault_of, require_private

ANA, TEAM = 12345, 54321
ME = os.geteuid()
root_only = pytest.mark.skipif(ME != 0, reason="only root can give files away")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    def make(uid: int, gid: int, mode: int) -> Path:
        folder = tmp_path / "folder"
        folder.mkdir()
        os.chown(folder, uid, gid)
        folder.chmod(mode)
        return folder

    return make


@root_only
@pytest.mark.parametrize(
    ("uid", "gid", "mode", "says"),
    [
        (0, 0, 0o755, None),
        (0, TEAM, 0o750, None),
        (0, 0, 0o700, None),
        (0, 0, 0o1777, None),
        (0, TEAM, 0o3775, None),
        (0, TEAM, 0o775, f"written by the group {TEAM} .mode 0775.*chmod g-w FOLDER; or .*chmod"),
        (0, TEAM, 0o2775, "chmod [+]t FOLDER"),
        (0, 0, 0o777, "written by every user .mode 0777.*chmod go-w FOLDER"),
        (0, 0, 0o757, "written by every user"),
        (ANA, TEAM, 0o755, f"belongs to user {ANA}.*--user {ANA}:{TEAM}.*chown -R 0 FOLDER"),
        (ANA, TEAM, 0o1777, f"belongs to user {ANA}"),
    ],
)
def test_owner_and_mode(
    uid: int, gid: int, mode: int, says: str | None, make: Callable[..., Path]
) -> None:
    folder = make(uid, gid, mode)
    if says is None:
        require_private(folder, "key")
        return
    pattern = says.replace("FOLDER", str(folder))
    with pytest.raises(RuntimeSetupError, match=f"^key: {folder} .*{pattern}") as error:
        require_private(folder, "key")
    assert "\n" not in str(error.value)


@root_only
@pytest.mark.parametrize("mends", ["chmod g-w {}", "chmod +t {}", "mkdir {}/mine"])
def test_the_command_in_the_message_mends_it(mends: str, make: Callable[..., Path]) -> None:
    folder = make(0, TEAM, 0o775)
    assert fault_of(folder) is not None
    subprocess.run(mends.format(folder), shell=True, check=True)
    assert fault_of(folder / "mine" if "mine" in mends else folder) is None


def test_what_is_not_there_or_no_folder_is_for_others_to_say(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert fault_of(tmp_path / "none") is None and fault_of(tmp_path / "file") is None
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert "which is not there" in str(fault_of(tmp_path / "link"))


def test_a_link_of_my_own_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert fault_of(tmp_path / "link") is None


@root_only
def test_a_link_of_others_is_not(tmp_path: Path) -> None:
    """On the way, too. The owner of the folder it lies in may do what he likes anyway."""
    (tmp_path / "real" / "run").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    os.lchown(tmp_path / "link", ANA, TEAM)
    for path in (tmp_path / "link", tmp_path / "link" / "run"):
        assert f"{tmp_path / 'link'} is a link that belongs to user {ANA}" in str(fault_of(path))
    os.chown(tmp_path, ANA, TEAM)
    assert fault_of(tmp_path / "link") is None


def group_of_mine(monkeypatch: pytest.MonkeyPatch, members: list[str], name: str) -> None:
    mine = SimpleNamespace(pw_name="ana", pw_gid=TEAM)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: mine)
    group = SimpleNamespace(gr_name=name, gr_gid=TEAM, gr_mem=members)
    monkeypatch.setattr(grp, "getgrgid", lambda gid: group)


@root_only
@pytest.mark.parametrize(
    ("members", "name", "private"),
    [([], "ana", True), (["ana"], "ana", True), (["ana", "ben"], "ana", False), ([], "ml", False)],
)
def test_a_group_of_ones_own_is_nobody_else(
    members: list[str],
    name: str,
    private: bool,
    make: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Many systems give each user a group, and a umask that lets it write."""
    group_of_mine(monkeypatch, members, name)
    assert (fault_of(make(0, TEAM, 0o775)) is None) == private


@root_only
@pytest.mark.skipif(shutil.which("setfacl") is None, reason="no setfacl here")
def test_an_access_list_is_not_taken_for_ones_own_group(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    group_of_mine(monkeypatch, [], "ana")
    folder = make(0, TEAM, 0o755)
    if subprocess.run(["setfacl", "-m", f"u:{ANA}:rwx", str(folder)]).returncode:
        pytest.skip("this file system has no access lists")
    assert "can be written by the group" in str(fault_of(folder))


class Mount:
    """A stand-in for a mount that shows numbers or modes of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **facts: int) -> None:
        original = os.stat

        def stat(path: Any, **options: Any) -> Any:
            found = original(path, **options)
            if str(path).startswith(self.place):
                values = {n: getattr(found, n) for n in ("st_mode", "st_uid", "st_gid")}
                return SimpleNamespace(**values | facts)
            return found

        self.place = "/nowhere"
        monkeypatch.setattr(private_folders.os, "stat", stat)


def test_a_mount_with_other_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS takes root for nobody: what root makes there belongs to nobody, too."""
    Mount(monkeypatch, st_uid=65534).place = str(tmp_path)
    assert fault_of(tmp_path) is None


def test_a_mount_without_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFS shows 0777 for everything, and chmod changes nothing."""
    Mount(monkeypatch, st_mode=0o40777).place = str(tmp_path)
    assert fault_of(tmp_path) is None


@root_only
def test_the_attempt_leaves_nothing(make: Callable[..., Path]) -> None:
    folder = make(ANA, TEAM, 0o777)
    assert fault_of(folder) is not None
    assert list(folder.iterdir()) == []


@root_only
def test_another_users_process_can_exchange_nothing_in_a_run(tmp_path: Path) -> None:
    """Nobody else can put a link into a folder that the rule accepts."""
    place = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        place.chmod(0o1777)
        (place / "run").mkdir(mode=0o755)
        assert fault_of(place / "run") is None and fault_of(place) is None
        code = (
            f"import os; os.setgid({TEAM}); os.setuid({ANA})\n"
            f"for act in (lambda: os.symlink('/etc', '{place}/run/x'),\n"
            f"            lambda: os.rename('{place}/run', '{place}/other')):\n"
            "    try: act()\n"
            "    except PermissionError: print('no')\n"
        )
        done = subprocess.run(["python3", "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "no\nno\n"
    finally:
        shutil.rmtree(place)
