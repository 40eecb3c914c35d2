"""Command lines as users type them: what composes, what each mistake says, what is left behind."""

from __future__ import annotations

import argparse
import errno
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from torchprime.cli.shared.arguments import run_command
from torchprime.config.compose import assets_dir, compose_config
from torchprime.config.entry import run_main
from torchprime.config.schema import TrainConfig
from torchprime.errors import INTERRUPTED, ConfigError, DataError

QUICKSTART = ["--config-name", "quickstart"]


def message_of(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose_config(list(argv))
    return str(caught.value)


@pytest.fixture
def user_configs(tmp_path: Path) -> Path:
    folder = tmp_path / "my_configs"
    (folder / "dataset").mkdir(parents=True)
    (folder / "dataset" / "mine.yaml").write_text("file_dataset_path: mine.jsonl\n")
    (folder / "dataset" / "gsm8k.yaml").write_text("file_dataset_path: my_gsm8k.jsonl\n")
    (folder / "my_run.yaml").write_text(
        "defaults: [quickstart, override /dataset: mine, _self_]\ntask: {max_steps: 7}\n"
    )
    return folder


def test_overrides_in_the_style_of_hydra() -> None:
    config = compose_config(
        [
            "task.max_steps=100",
            *QUICKSTART,
            "task.optimizer.learning_rate=1e-5",
            "mesh=single",
            "+sharding.parameters.extra=[fsdp,null]",
            "~task.sample_prompts",
        ]
    )
    assert config.task.max_steps == 100
    assert config.task.optimizer.learning_rate == 1e-5
    assert config.device_count == 1
    assert config.sharding.parameters["extra"] == ["fsdp", None]
    assert config.task.sample_prompts == 0  # removed: back to the schema's default


def test_shipped_files_are_found() -> None:
    config = compose_config(QUICKSTART)
    assert config.model.pretrained_model == f"{assets_dir()}/quickstart/base"


def test_run_name_is_the_configs_name_unless_given() -> None:
    assert compose_config(QUICKSTART).run_name == "quickstart"
    assert compose_config([*QUICKSTART, "run_name=mine"]).run_name == "mine"


def test_users_own_folder(user_configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(user_configs.parent)
    option = compose_config([*QUICKSTART, "--config-dir", "my_configs", "dataset=mine"])
    assert option.dataset.file_dataset_path == "mine.jsonl"
    assert option.dataset.block_size == 256  # what the file leaves out comes from run and schema
    assert (
        compose_config(["-cd", "my_configs", *QUICKSTART, "dataset.split=a"]).dataset.split == "a"
    )
    run = compose_config(["-cd", str(user_configs), "-cn", "my_run"])
    assert (run.run_name, run.task.max_steps) == ("my_run", 7)
    assert run.dataset.file_dataset_path == "mine.jsonl"


def test_users_file_wins_over_ours_of_the_same_name(user_configs: Path) -> None:
    argv = [*QUICKSTART, "-cd", str(user_configs), "dataset=gsm8k"]
    assert compose_config(argv).dataset.file_dataset_path == "my_gsm8k.jsonl"
    # ... and is forgotten with the next command.
    again = compose_config([*QUICKSTART, "dataset=gsm8k"])
    assert again.dataset.hf_dataset_name == "openai/gsm8k"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["task.max_stepz=4"], ["task.max_stepz: given '4'", "mean task.max_steps?"]),
        (["max_steps=4"], ["max_steps: given '4'", "mean task.max_steps?"]),
        (["~task.max_stepz"], ["task.max_stepz", "mean task.max_steps?"]),
        (["+task.quux=1"], ["task.quux: given '1'", "Keys of task: name"]),
        (["datset=gsm8k"], ["datset: given 'gsm8k'", "mean dataset=gsm8k?"]),
        (["dataset=gsm8"], ["dataset: given 'gsm8'", "mean dataset=gsm8k?", "quickstart"]),
        (["task.max_steps"], ["task.max_steps: given without '='"]),
        (["--task.max_steps=3"], ["--task.max_steps=3", "Write task.max_steps=3"]),
        (["--config-path", "x"], ["--config-path: no such flag", "--config-dir"]),
        (["--package", "task"], ["--package", "--cfg job"]),
        (["--config-dir", "nowhere"], ["--config-dir: given 'nowhere'", "folder"]),
        (["--config-name"], ["--config-name", "expected one argument"]),
        (["--cfg", "jobs"], ["--cfg", "jobs", "job"]),
        (["task=[sft"], ["task=[sft: cannot be read", "Quote"]),
        (["task.max_steps=3,4"], ["several values", "-m"]),
        (["task.max_steps=abc"], ["task.max_steps: given 'abc'", "whole number"]),
        (["output_dir='${nope}/x'"], ["output_dir", "nope"]),
        (["output_dir='${torchprime:asets}'"], ["asets", "${torchprime:assets}"]),
        (["task.max_steps=???"], ["task.max_steps: given nothing (???)", "task.max_steps=..."]),
        (["dataset=file", "+dataset=gsm8k"], ["dataset"]),
        (["-m"], ["-m"]),
    ],
)
def test_message_about_a_command(argv: list[str], expected: list[str]) -> None:
    message = message_of(*QUICKSTART, *argv)
    for part in expected:
        assert part in message, message


def test_unknown_config_name() -> None:
    message = message_of("-cn", "quikstart")
    assert message.startswith("--config-name: given 'quikstart'")
    assert "Did you mean --config-name quickstart?" in message
    assert "llama-3-8b-sft-w-gsm8k" in message


def test_architecture_key_that_the_model_lacks() -> None:
    scratch = ["model=llama-3-8b", "task=train", "task.max_steps=4"]
    fewer = compose_config([*scratch, "model.architecture.num_hidden_layers=2"])
    assert fewer.model.architecture and fewer.model.architecture["num_hidden_layers"] == 2
    message = message_of(*scratch, "model.architecture.num_hidden_layer=2")
    assert "Did you mean model.architecture.num_hidden_layers?" in message
    assert "write +model.architecture.num_hidden_layer=2" in message


def test_default_says_what_it_needs() -> None:
    assert "task.max_steps=100" in message_of()
    assert "model.pretrained_model: given null" in message_of("task.max_steps=3")


def test_broken_yaml_names_file_and_line(user_configs: Path) -> None:
    (user_configs / "broken.yaml").write_text("task: {max_steps: 7\nseed: [\n")
    message = message_of("-cd", str(user_configs), "-cn", "broken")
    assert "broken.yaml" in message and "line 2" in message


def test_missing_option_in_a_users_run(user_configs: Path) -> None:
    (user_configs / "lost.yaml").write_text(
        "defaults: [quickstart, override /dataset: mime, _self_]"
    )
    message = message_of("-cd", str(user_configs), "-cn", "lost")
    assert "dataset: given 'mime'" in message and "mean dataset=mine?" in message


def test_unknown_key_in_a_users_run(user_configs: Path) -> None:
    (user_configs / "typo.yaml").write_text("defaults: [quickstart, _self_]\ntask: {max_step: 7}\n")
    message = message_of("-cd", str(user_configs), "-cn", "typo")
    assert "task.max_step: given 7" in message and "task.max_steps" in message


def test_user_mistake_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def refuses(config: TrainConfig) -> int:
        raise DataError("rows.jsonl is empty")

    assert run_main(refuses, ["task.max_stepz=4"]) == 2
    assert run_main(refuses, QUICKSTART) == 2
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()
    assert first.startswith("error: task.max_stepz: ")
    assert second == "error: rows.jsonl is empty"


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(config: TrainConfig) -> int:
        raise KeyboardInterrupt

    def broken(config: TrainConfig) -> int:
        raise ZeroDivisionError

    assert run_main(lambda config: config.device_count, QUICKSTART) == 4
    assert run_main(interrupted, QUICKSTART) == INTERRUPTED == 130
    with pytest.raises(ZeroDivisionError):  # our own bugs keep their traceback
        run_main(broken, QUICKSTART)


def test_a_disk_fault_of_any_write_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    for error, told in (
        (OSError(errno.ENOSPC, "No space left on device"), "A file cannot be read or written: No"),
        (
            OSError(errno.EROFS, "Read-only file system", "/a/b"),
            "/a/b cannot be written: Read-only",
        ),
    ):

        def fails(_: object, error: OSError = error) -> int:
            raise error

        assert run_main(fails, QUICKSTART) == run_command(parser, [], fails) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2 and all(line.startswith(f"error: {told}") for line in lines)

    def missing(_: object) -> int:
        raise FileNotFoundError(errno.ENOENT, "No such file", "x")

    for run in (lambda: run_main(missing, QUICKSTART), lambda: run_command(parser, [], missing)):
        with pytest.raises(FileNotFoundError):  # somebody should have looked
            run()


def test_cfg_job_in_a_process_of_its_own(user_configs: Path) -> None:
    """A real entry point: Hydra prints the config, nothing is left behind, torch stays out."""
    entry = user_configs.parent / "entry.py"
    entry.write_text(
        "import sys\n"
        "from torchprime.config.entry import run_main\n"
        "try:\n"
        "    code = run_main(lambda config: 99)\n"
        "finally:\n"
        "    assert not {'torch', 'torch_xla', 'transformers'} & set(sys.modules)\n"
        "sys.exit(code)\n"
    )
    before = sorted(user_configs.parent.iterdir())

    def call(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(entry), *argv],
            cwd=user_configs.parent,
            capture_output=True,
            text=True,
        )

    shown = call("-cn", "my_run", "-cd", "my_configs", "--cfg", "job", "task.max_steps=9")
    assert shown.returncode == 0, shown.stderr
    tree = yaml.safe_load(shown.stdout)
    assert tree["task"]["max_steps"] == 9
    assert tree["dataset"]["file_dataset_path"] == "mine.jsonl"
    assert tree["model"]["pretrained_model"] == "${torchprime:assets}/quickstart/base"

    refused = call("-cn", "my_run", "-cd", "my_configs", "--cfg", "job", "task.max_stepz=9")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: task.max_stepz")

    helped = call("--help")
    assert helped.returncode == 0
    assert "torchprime is powered by Hydra" in helped.stdout
    assert "dataset: file, gsm8k, gsm8k_think, pirate, quickstart" in helped.stdout

    assert sorted(user_configs.parent.iterdir()) == before
