"""-m: every run is checked before the first begins, and each is a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from torchprime.config.command_line import parse_command
from torchprime.config.compose import compose_config
from torchprime.config.entry import run_main
from torchprime.config.many_runs.jobs import compose_jobs
from torchprime.config.many_runs.processes import run_jobs
from torchprime.errors import ConfigError

ENTRY = """
import json, os, signal, sys, time
from pathlib import Path
from torchprime.config.entry import run_main

def main(config):
    # As XLA does: what a process has set for its first run holds for all that follow.
    devices = os.environ.setdefault("DEVICES", str(config.device_count))
    facts = {"argv": sys.argv[1:], "seed": config.seed, "devices": devices, "pid": os.getpid()}
    Path(f"{config.run_name}.json").write_text(json.dumps(facts))
    if config.seed == 4:
        signal.signal(signal.SIGINT, lambda *_: sys.exit(75))
        print("begun", flush=True)
        time.sleep(60)
    return 2 if config.seed == 3 else 0

sys.exit(run_main(main))
"""
QUICKSTART = ("-cn", "quickstart")


@pytest.fixture
def entry(tmp_path: Path) -> Callable[..., subprocess.Popen]:
    path = tmp_path / "entry.py"
    path.write_text(ENTRY)

    def start(*argv: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, str(path), *argv],
            cwd=tmp_path,
            env={k: v for k, v in os.environ.items() if k != "WORLD_SIZE"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def facts(tmp_path: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}


def test_each_run_has_its_process_and_its_own_command(
    entry: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    process = entry(*QUICKSTART, "-m", "mesh=single,fsdp4", "seed=3", "output_dir=~/a b")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 2, err
    found = facts(tmp_path)
    assert [found[f"quickstart_{n}"]["devices"] for n in (0, 1)] == ["1", "4"]
    assert len({found[name]["pid"] for name in found} | {process.pid}) == 3
    last = err.splitlines()[-2:]
    assert last[0].startswith("job 1 of 2: exit code 2") and " mesh=single " in last[0]
    assert last[1].startswith("job 2 of 2: exit code 2") and "a b/quickstart_1" in last[1]
    # The command that a job records does the same when run alone.
    again = compose_config(found["quickstart_1"]["argv"])
    assert (again.run_name, again.device_count) == ("quickstart_1", 4)


def test_a_mistake_in_one_is_found_before_the_first() -> None:
    with pytest.raises(ConfigError, match="seed: given 'abc'"):
        compose_jobs(parse_command([*QUICKSTART, "-m", "seed=1,abc"]))
    jobs = compose_jobs(parse_command([*QUICKSTART, "-m", "run_name=mine", "seed=1,2"]))
    with pytest.raises(ConfigError, match="jobs 1 and 2 would both write outputs/mine"):
        run_jobs(jobs, ["false"])


@pytest.mark.slow
def test_an_interrupt_reaches_the_run_once_and_ends_the_rest(
    entry: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    process = entry(*QUICKSTART, "-m", "seed=4,5")
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 75 and time.monotonic() - started < 30
    assert "job 1 of 2: exit code 75" in err and "job 2 of 2: not started" in err
    assert list(facts(tmp_path)) == ["quickstart_0"]


def test_torchrun_and_calls_that_cannot_be_repeated_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert run_main(lambda config: 0, [*QUICKSTART, "-m", "seed=1,2"]) == 2
    assert "did not come from one" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_main(lambda config: 0, [*QUICKSTART, "-m", "seed=1,2"]) == 2
    assert "-m: given under torchrun" in capsys.readouterr().err
