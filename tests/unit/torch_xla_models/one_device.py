"""Answers on one XLA device, in a process of its own: one_device.py OUT NAME..."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from torchprime.config.schema import AXES
from torchprime.torch_xla_models.runtime import prepare_environment

prepare_environment(1)

import answers  # noqa: E402
import torch  # noqa: E402

from torchprime.config.compose import compose_config  # noqa: E402
from torchprime.config.sections.remat import RematConfig  # noqa: E402
from torchprime.models.architecture import architecture_from_hf  # noqa: E402
from torchprime.models.decoder import CausalLM  # noqa: E402
from torchprime.sharding import ShardingTable  # noqa: E402
from torchprime.torch_xla_models.backend import XlaBackend  # noqa: E402


def main(out: Path, names: list[str]) -> None:
    shipped = compose_config(["model.pretrained_model=x", "task.max_steps=1"]).sharding
    table = ShardingTable(shipped.parameters, shipped.activations, 100)
    found = {}
    for name in names:
        weights = dict(answers.make_model(name).named_parameters())
        ones = dict.fromkeys(AXES, 1)
        backend = XlaBackend(ones, ones, remat=RematConfig(scan_layers=name == "qwen3"))
        with torch.device("meta"):
            model = CausalLM(architecture_from_hf(answers.CONFIGS[name].to_dict()))
        backend.place(model, table, lambda n, w=weights: w[n].detach(), torch.float32)
        found[name] = backend.generate(answers.prompts(), answers.options())
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
