"""Several runs of one command: what differs, and mistakes found before any run is composed."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchprime.config.command_line import parse_command
from torchprime.config.entry import run_main
from torchprime.config.many_runs.jobs import Multirun, compose_jobs, read_multirun
from torchprime.errors import ConfigError

MANY = ["-cn", "quickstart", "-m"]
RATE = "task.optimizer.learning_rate"


def read(*argv: str) -> Multirun:
    return read_multirun(parse_command([*MANY, *argv]))


@pytest.mark.parametrize(
    ("argv", "varied"),
    [
        ([f"{RATE}=1e-3,3e-3", "seed=1"], (RATE,)),
        (["seed=range(1,4)", "adapter=lora,none"], ("seed", "adapter")),
        ([f"{RATE}=interval(1e-5,1e-3)", "seed=choice(1,2)"], (RATE, "seed")),
        (["adapter=glob(*)", "seed=1,2"], ("adapter", "seed")),
        (["seed=7"], ()),
    ],
)
def test_what_differs_is_found(argv: list[str], varied: tuple[str, ...]) -> None:
    many = read(*argv)
    assert many.varied == varied and (many.sweeper, many.launcher) == ("basic", "basic")
    assert not many.names_runs and many.folder is None


def test_the_first_values_are_composed() -> None:
    config = read(f"{RATE}=2e-3,1", "seed=3,4", "adapter=lora,none").config
    assert (config.task.optimizer.learning_rate, config.seed) == (2e-3, 3)
    assert config.adapter.rank is not None
    assert read("run_name=lr_${seed}", "seed=1,2").names_runs
    assert read("hydra.sweep.dir=some/where", "seed=1,2").folder == "some/where"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([f"{RATE}z=1,2"], f"{RATE}z: given '1,2', but there is no such key"),
        (["optim.lr=1e-3,3e-3"], "optim.lr: given '1e-3,3e-3', but there is no such key"),
        ([f"{RATE}=-1,1"], f"{RATE}: given -1"),
        (["hydra/sweeper=optuna", "sed=interval(1,2)"], "sed: given"),
        (["hydra/launcher=joblib"], "pip install hydra-joblib-launcher"),
        (["hydra/launcher=submitit_slurm"], "pip install hydra-submitit-launcher"),
        (["hydra/launcher=ray"], "pip install hydra-ray-launcher"),
        (["hydra/sweeper=optuna"], "pip install hydra-optuna-sweeper"),
        (["hydra/launcher=jobli"], "Expected one of: basic, joblib, ray"),
        (["hydra/sweeper=ax"], "hydra/sweeper: given 'ax', but there is no such plugin"),
        (["hydra.sweep.subdir=x"], "named by the values that differ"),
        (["seed=3", "seed=1,2"], "seed: given 2 times (seed=3 and seed=1,2), expected once"),
        (["hydra.run.dir=x"], "output_dir=FOLDER run_name=NAME"),
    ],
)
def test_a_mistake_is_one_message(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(*given: object) -> int:
        read(*argv)
        return 0

    code = run_main(refuses, [*MANY, *argv, "seed=1,2"], lambda: ["program"], refuses)
    errors = capsys.readouterr().err
    assert code == 2 and said in errors and errors.count("\n") == 1


def test_a_launcher_in_a_file_that_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        "defaults: [quickstart, override hydra/launcher: joblib, _self_]\n"
    )
    command = parse_command(["-cd", str(tmp_path), "-cn", "own", "-m", "seed=1,2"])
    with pytest.raises(ConfigError, match="pip install hydra-joblib-launcher"):
        read_multirun(command)


def test_params_of_a_file_are_swept(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        "defaults: [quickstart, _self_]\nhydra: {sweeper: {params: {seed: '5,6'}}}\n"
    )
    command = parse_command(["-cd", str(tmp_path), "-cn", "own", "-m"])
    assert read_multirun(command).varied == ("seed",)
    assert [job.config.seed for job in compose_jobs(command)] == [5, 6]
    assert [job.config.run_name for job in compose_jobs(command)] == ["own_0", "own_1"]


def test_an_unknown_key_in_params_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        "defaults: [quickstart, _self_]\nhydra: {sweeper: {params: {task.maxsteps: '5,6'}}}\n"
    )
    with pytest.raises(ConfigError, match="hydra.sweeper.params.task.maxsteps: given '5,6'"):
        read_multirun(parse_command(["-cd", str(tmp_path), "-cn", "own", "-m"]))


def test_a_wrong_value_in_a_later_run_is_found() -> None:
    with pytest.raises(ConfigError, match="seed: given 'abc'"):
        compose_jobs(parse_command([*MANY, "seed=1,abc"]))
    with pytest.raises(ConfigError, match="adapter: given 'loraa', but there is no such config"):
        compose_jobs(parse_command([*MANY, "adapter=none,loraa"]))
