"""A model, rows and a finished run, made once; each attack gets copies of them, and bait."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from tiny_llama import tiny_llama
from tokenizers import decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))

import attack  # noqa: E402

from torchprime.cli.main import main as torchprime  # noqa: E402
from torchprime.config.entry import run_main  # noqa: E402
from torchprime.torch_native.train import main  # noqa: E402

SPECIALS = ["<s>", "</s>", "<pad>"]


def make_model(folder: Path) -> Path:
    """A pretrained model of one layer, as transformers saves it, with a token for every byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*SPECIALS, *alphabet])}
    raw = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.add_special_tokens(SPECIALS)
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = tiny_llama(
        len(vocab),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    raw.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> attack.Samples:
    """Not to be changed: attacks spoil copies."""
    place = tmp_path_factory.mktemp("samples")
    model, rows = make_model(place / "model"), place / "rows.jsonl"
    told = [{"prompt": f"say {n}: ", "completion": f"{n} {n}"} for n in range(8)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in told))
    given = {
        "model.pretrained_model": model,
        "dataset": "file",
        "dataset.file_dataset_path": rows,
        "dataset.prepared_dir": place / "prepared",
        **attack.RUN,
        "output_dir": place,
        "eval": "file",
        "eval.file_dataset_path": rows,
        "task.export_checkpoint_path": "export",
    }
    assert run_main(main, [f"{key}={value}" for key, value in given.items()]) == 0
    given = {key: value for key, value in given.items() if not key.startswith("eval")}
    given["dataset.prepared_dir"] = place / "split"
    given |= {key: value for key, _, value in (each.partition("=") for each in attack.SPLIT)}
    assert torchprime(["prepare", *(f"{key}={value}" for key, value in given.items())]) == 0
    return attack.Samples(model, rows, place / "run", place / "split")


@pytest.fixture
def ground(
    samples: attack.Samples,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> attack.Ground:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    outside = attack.lay_bait(tmp_path / "outside")
    return attack.Ground(samples, here, outside, capsys, monkeypatch)
