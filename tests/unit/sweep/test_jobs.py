"""The names of a sweep and its runs: the same command finds them again."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchprime.config.command_line import parse_command
from torchprime.config.many_runs.jobs import compose_jobs, read_multirun
from torchprime.errors import ConfigError, DataError
from torchprime.sweep.jobs import (
    JOBS,
    SweepJob,
    differing,
    read_job,
    read_jobs,
    refuse_other_run,
    short_names,
    sweep_folder,
    sweep_job,
    write_job,
)

RATE = "task.optimizer.learning_rate"


def jobs_of(*argv: str) -> tuple[Path, list[SweepJob]]:
    many = read_multirun(parse_command(["-cn", "quickstart", "-m", *argv]))
    folder = sweep_folder(many)
    return folder, [sweep_job(job, many, folder) for job in compose_jobs(many.command)]


@pytest.mark.parametrize(
    ("argv", "folder", "names"),
    [
        ([f"{RATE}=1e-3,3e-3"], "quickstart_sweep_learning_rate",
         ["learning_rate=0.001", "learning_rate=0.003"]),
        (["seed=1,2", "adapter=lora", "output_dir=a b"], "a b/quickstart_sweep_seed",
         ["seed=1", "seed=2"]),
        (["seed=1", "adapter=none,lora", "run_name=mine"], "mine",
         ["adapter=none", "adapter=lora"]),
        (["run_name=a,b", "hydra.sweep.dir=some/where"], "some/where", ["a", "b"]),
        (["run_name=s${seed}", "seed=1,2"], "quickstart_sweep_seed", ["s1", "s2"]),
        (["seed=1"], "quickstart_sweep", ["quickstart"]),
        (["dataset.file_dataset_path=rows/../a,b:c"], "quickstart_sweep_file_dataset_path",
         ["file_dataset_path=rows_.._a", "file_dataset_path=b_c"]),
    ],
)  # fmt: skip
def test_names(argv: list[str], folder: str, names: list[str]) -> None:
    found, jobs = jobs_of(*argv)
    assert [job.name for job in jobs] == names
    expected = Path(folder) if "/" in folder else Path("outputs") / folder
    assert found == expected
    for job in jobs:  # the recorded command makes the same run
        again = read_multirun(parse_command([*job.argv, "-m"])).config
        assert again == job.config
        assert Path(again.output_dir) / str(again.run_name) == found / job.name


def test_a_long_name_is_cut_and_still_its_own() -> None:
    texts = [f"dataset.file_dataset_path={'a' * 300}{n}" for n in (1, 2)]
    names = [jobs_of(text)[1][0] for text in texts]
    assert names[0].name == names[1].name == "quickstart"  # nothing differs
    both = jobs_of(f"dataset.file_dataset_path={'a' * 300}1,{'a' * 300}2")[1]
    assert len({job.name for job in both}) == 2 and all(len(job.name) < 140 for job in both)


def test_keys_with_the_same_last_part_keep_their_whole_name() -> None:
    keys = ["eval.every_steps", "checkpoint.every_steps", "seed"]
    assert short_names(keys) == {
        "eval.every_steps": "eval.every_steps",
        "checkpoint.every_steps": "checkpoint.every_steps",
        "seed": "seed",
    }


def test_several_folders_are_refused() -> None:
    with pytest.raises(ConfigError, match="output_dir: given several values"):
        jobs_of("output_dir=a,b")


def test_a_job_is_read_as_written(tmp_path: Path) -> None:
    job = jobs_of("seed=1,2")[1][0]
    assert read_job(tmp_path, job.name) is None and read_jobs(tmp_path) == []
    write_job(tmp_path, job, 2, "dataset: no row")
    found = read_job(tmp_path, job.name)
    assert found is not None and read_jobs(tmp_path) == [found]
    assert (found.code, found.message, found.finished) == (2, "dataset: no row", False)
    assert (found.varied, found.argv) == ({"seed": "1"}, job.argv)
    assert differing(found.config, job.config.to_dict()) == {}
    (tmp_path / JOBS / "seed=1.json").write_text("{")
    with pytest.raises(DataError, match=r"seed=1.json: cannot be read"):
        read_job(tmp_path, "seed=1")


def test_only_a_run_with_other_values_is_refused(tmp_path: Path) -> None:
    (one,) = jobs_of("seed=1", "logging_steps=3", "output_dir=here")[1]
    (same,) = jobs_of("seed=1", "logging_steps=4", "output_dir=there")[1]
    (other,) = jobs_of("seed=2", "logging_steps=3")[1]
    write_job(tmp_path, one, 0)
    refuse_other_run(tmp_path, other)  # it has left nothing
    (tmp_path / one.name).mkdir()
    refuse_other_run(tmp_path, same)
    with pytest.raises(ConfigError, match="seed: given 2, but .*quickstart was made with 1"):
        refuse_other_run(tmp_path, other)
