"""`compile_only` for TorchTPU: the environment of its process, and what is refused."""

from __future__ import annotations

import pytest

from torchprime.config.compose import compose_config
from torchprime.errors import ConfigError, RuntimeSetupError
from torchprime.torch_native import train
from torchprime.torch_native.compile.command import compile_only, environment

ARGV = ["model.pretrained_model=x", "task.max_steps=1", "mesh=fsdp8", "compile_only=v6e-8"]


def test_the_process_loads_torchtpu_without_a_chip() -> None:
    given = {"TPU_ACCELERATOR_TYPE": "v4-8", "LIBTPU_INIT_ARGS": "--mine=1", "HOME": "/h"}
    found = environment(compose_config(ARGV), given)
    assert found["TPU_ACCELERATOR_TYPE"] == "v6e-8" and found["TPU_SKIP_MDS_QUERY"] == "1"
    assert found["LIBTPU_INIT_ARGS"] == "--mine=1" and found["HOME"] == "/h"
    assert found["JAX_PLATFORMS"] == "cpu" and found["PYTHONPATH"]


def test_without_torchtpu_the_message_names_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose_config(ARGV)
    monkeypatch.setattr(train, "installed_version", lambda name: None)
    with pytest.raises(ConfigError, match=r"compile_only: given 'v6e-8'.*--backend xla.*setup-tor"):
        train.main(config)
    with pytest.raises(RuntimeSetupError, match="torch-tpu: it is not installed"):
        compile_only(config)
