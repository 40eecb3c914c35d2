"""DFT and label smoothing against TRL's SFTTrainer on the same batch: loss and gradients.

TRL runs in a process of its own, without XLA. Its label smoothing is transformers' LabelSmoother.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from torchprime.losses.chunks import Projection
from torchprime.losses.cross_entropy import chunked_cross_entropy
from torchprime.losses.token_loss import TokenLoss
from torchprime.models.architecture import architecture_from_hf
from torchprime.models.decoder import CausalLM

pytestmark = [
    pytest.mark.slow,  # importing TRL; test_cross_entropy.py has the definitions
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed"),
]

WORKER = Path(__file__).with_name("trl_loss_worker.py")
BASE = Path(__file__).resolve().parents[2] / "torchprime" / "assets" / "quickstart" / "base"
CASES = {
    "nll": ({"loss_type": "nll"}, TokenLoss()),
    "dft": ({"loss_type": "dft"}, TokenLoss(dft=True)),
    "smoothing": ({"loss_type": "nll", "label_smoothing_factor": 0.1}, TokenLoss(0.1)),
}
LENGTHS = ((23, 7), (40, 1), (12, 11))  # of a row, and of its prompt


def rows() -> list[dict[str, list[int]]]:
    rng, vocab = (
        np.random.default_rng(0),
        json.loads((BASE / "config.json").read_text())["vocab_size"],
    )
    found = []
    for length, prompt in LENGTHS:
        ids = rng.integers(3, vocab, length).tolist()
        found.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return found


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trl")
    case = {"model": str(BASE), "rows": rows()}
    case["cases"] = {name: options for name, (options, _) in CASES.items()}
    (folder / "cases.json").write_text(json.dumps(case))
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder / "cases.json"), str(folder)],
        env=os.environ | {"USE_TORCH_XLA": "0", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_trls(name: str, theirs: Path) -> None:
    model = CausalLM(architecture_from_hf(json.loads((BASE / "config.json").read_text())))
    model.load_state_dict(load_file(BASE / "model.safetensors"))
    model.float()
    sums = []
    for row in rows():
        ids = torch.tensor([row["input_ids"]])
        targets = torch.tensor([[*row["labels"][1:], -100]])
        hidden = model(ids, torch.arange(ids.shape[1])[None], torch.ones_like(ids))
        ones = torch.ones(targets.shape)
        kind = CASES[name][1]
        output = Projection(*model.output)
        sums.append(chunked_cross_entropy(hidden, output, targets, ones, 3, kind=kind))
    loss = torch.stack([s.loss_sum for s in sums]).sum() / sum(s.weight_sum for s in sums)
    loss.backward()
    expected = load_file(theirs / f"{name}.safetensors")
    torch.testing.assert_close(loss.detach(), expected.pop("loss"), rtol=1e-5, atol=0)
    ours = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == expected.keys()
    for key, gradient in expected.items():
        atol = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(ours[key], gradient, rtol=1e-4, atol=atol, msg=key)
