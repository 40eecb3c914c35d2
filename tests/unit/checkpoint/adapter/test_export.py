"""Folders that we write: PEFT loads them, the certificate says so, and what is wrong fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from torchprime.adapters.spec import AdapterSpec
from torchprime.checkpoint.adapter.card import adapter_card
from torchprime.checkpoint.adapter.certificate import base_fingerprint
from torchprime.checkpoint.adapter.export import (
    export_adapter,
    merged_weights,
)
from torchprime.checkpoint.adapter.folder import AdapterFolder
from torchprime.checkpoint.adapter.logits import adapted_logits
from torchprime.checkpoint.adapter.parts import adapter_parts
from torchprime.checkpoint.adapter.read import read_adapter
from torchprime.checkpoint.adapter.recheck import recheck_any
from torchprime.checkpoint.export import ExportResult, check_export
from torchprime.checkpoint.hf.card import CardFacts
from torchprime.checkpoint.hf.export_facts import ExportFacts
from torchprime.checkpoint.hf.folder import HfFolder
from torchprime.checkpoint.hf.read import SafetensorsReader
from torchprime.checkpoint.hf.write import WeightLayout
from torchprime.checkpoint.proof.logits import PromptLogits, encode_prompts
from torchprime.checkpoint.run.open_storage import open_storage
from torchprime.errors import CheckpointError

FILES = {
    *("adapter_config.json", "adapter_model.safetensors", "README.md", "certificate.json"),
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    "special_tokens_map.json",
}


class Case:
    """An export of an adapter that PEFT made, as a trainer hands it over."""

    def __init__(self, made: Any, dtype: torch.dtype = torch.float32, **spec: Any) -> None:
        reader = SafetensorsReader(made.base)
        self.made, self.dtype = made, dtype
        self.config = json.loads((made.base / "config.json").read_text())
        stored = read_adapter(made.folder)
        self.spec: AdapterSpec = replace(stored.spec, **spec)
        self.tensors = dict(stored.tensors)
        shapes = {name: shape for name, (shape, _) in reader.names().items()}
        self.facts = ExportFacts(
            spec=shapes,
            dtype=dtype,
            max_shard_bytes=10**9,
            stop_ids=(0,),
            step=9,
            card=CardFacts(name="mine", dataset="rows"),
            metrics={"loss": 0.5},
        )
        hf = HfFolder(WeightLayout(shapes, dtype, 10**9), self.config, None, made.base, 0)
        self.adapter = AdapterFolder(hf, self.spec, str(made.base))

    def logits(self) -> PromptLogits:
        ids = encode_prompts(self.made.base / "tokenizer.json")
        reader = SafetensorsReader(self.made.base)
        tensors = {name: tensor.to(self.dtype) for name, tensor in self.tensors.items()}
        found = adapted_logits(self.config, reader.get, tensors, self.spec, self.dtype, ids)
        return PromptLogits(ids, found, "a test")

    def export(self, out: Path | str, **changes: Any) -> ExportResult:
        given = {
            "facts": self.facts,
            "weights": list(self.tensors.items()),
            "origin": "a test",
            "trained": self.logits(),
            "base": self.made.base,
        }
        return export_adapter(out, self.adapter, **{**given, **changes})


def checks_of(result: ExportResult) -> dict[str, bool | None]:
    assert result.certificate is not None
    return {check.name: check.passed for check in result.certificate.checks}


def test_peft_loads_what_we_write(each: Any, ids: Tensor, tmp_path: Path) -> None:
    case = Case(each)
    result = case.export(tmp_path / "out")
    assert set(result.files) == FILES
    passed = {name for name, passed in checks_of(result).items() if passed}
    left_out = {name for name, passed in checks_of(result).items() if passed is None}
    assert left_out == {"chat template"} and len(passed) == 8, [
        (c.name, c.detail) for c in (result.certificate.checks if result.certificate else ())
    ]
    base = AutoModelForCausalLM.from_pretrained(each.base)
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert (logits - each.logits).abs().max() <= 1e-6 * each.logits.abs().max()
    _, again = recheck_any(tmp_path / "out", each.base)
    assert [check.name for check in again if check.passed is False] == []
    assert sum(check.passed is True for check in again) == 10


def test_a_bf16_run_over_nf4_is_proved_over_its_own_values(by_peft, tmp_path: Path) -> None:
    case = Case(by_peft("lora"), torch.bfloat16, base_type="nf4")
    result = case.export(tmp_path / "out")
    assert result.certificate is not None and not result.certificate.failed
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert result.certificate.check("adapter").values["spec"]["base_type"] == "nf4"
    logits = result.certificate.check("logits").values
    assert logits["max_difference"] < 3e-2 < logits["over_original_base"] < 0.5
    gaps = result.certificate.check("merged").values["gaps"]
    assert gaps["dequantized base"] < 3e-2 < gaps["original base"] < 0.5
    _, again = recheck_any(tmp_path / "out", case.made.base)
    assert [check.name for check in again if check.passed is False] == []
    _, alone = recheck_any(tmp_path / "out")
    left_out = {check.name for check in alone if check.passed is None}
    assert {"adapter", "base", "logits", "merged"} <= left_out
    assert not any(check.passed is False for check in alone)


def test_a_wrong_adapter_fails_its_certificate(by_peft, make_base, tmp_path: Path) -> None:
    case = Case(by_peft("lora"))
    zero = {n: t * 0 if "lora_B" in n else t for n, t in case.tensors.items()}
    found = checks_of(case.export(tmp_path / "zero", weights=zero.items()))
    assert found["trained"] is False and found["logits"] is False and found["weights"]
    early = case.export(
        tmp_path / "early", weights=zero.items(), facts=replace(case.facts, step=1), trained="no"
    )
    assert checks_of(early)["trained"] is None and checks_of(early)["logits"] is None
    begun = base_fingerprint(make_base(seed=1))["sha256"]
    case.adapter = replace(case.adapter, base_sha256=begun)
    other = case.export(tmp_path / "other")
    assert checks_of(other)["base"] is False and checks_of(other)["logits"]
    with pytest.raises(CheckpointError, match="which they had when the adapter was trained"):
        assert other.certificate is not None
        other.certificate.require("out")


def test_the_base_is_compared_with_the_one_at_the_start(by_peft, tmp_path: Path) -> None:
    case = Case(by_peft("lora"))
    case.adapter = replace(case.adapter, base_sha256=base_fingerprint(case.made.base)["sha256"])
    result = case.export(tmp_path / "out")
    assert result.certificate is not None
    told = result.certificate.check("base").detail
    assert "as in training" in told and "unchanged in PEFT's model" in told


def test_rows_for_new_tokens(by_peft, tmp_path: Path) -> None:
    case = Case(by_peft("whole modules"))
    generator = torch.Generator().manual_seed(0)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        more = torch.randn(8, 64, generator=generator) * 0.1
        case.tensors[name] = torch.cat([case.tensors[name], more])
    case.config = {**case.config, "vocab_size": 328}
    shapes = {n: (328, *s[1:]) if s[0] == 320 else s for n, s in case.facts.spec.items()}
    hf = replace(
        case.adapter.hf, layout=WeightLayout(shapes, torch.float32, 10**9), config=case.config
    )
    case.adapter = replace(case.adapter, hf=hf)
    result = case.export(tmp_path / "out")
    assert result.certificate is not None and not result.certificate.failed
    assert checks_of(result)["logits"] and checks_of(result)["base"]


def test_a_tied_base_that_stores_its_output_projection(by_peft, tmp_path: Path) -> None:
    made = by_peft("tied embedding")
    base = Path(shutil.copytree(made.base, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    result = Case(made).export(tmp_path / "out", base=base)
    found = checks_of(result)
    assert found["merged"] and found["adapter"] and found["trained"]


@pytest.mark.parametrize("name", ["lora", "tied embedding"])
def test_merged_weights_are_exported_beside_the_adapter(name: str, by_peft) -> None:
    case = Case(by_peft(name))
    reader = SafetensorsReader(case.made.base)
    reader.share_head()
    merged = dict(merged_weights(case.adapter, case.tensors, reader.get))
    assert list(merged) == list(case.facts.spec)
    for each, tensor in merged.items():
        theirs = case.made.merged[each]
        assert (tensor - theirs).abs().max() <= 1e-6 * theirs.abs().max()


def test_a_url_gets_the_folder(by_peft, tmp_path: Path) -> None:
    url = f"memory://adapters/{tmp_path.name}/out"
    result = Case(by_peft("lora")).export(url, trained="no", base="not here")
    assert set(result.files) == FILES
    assert all(open_storage(url).exists(name) for name in FILES)


def test_a_spoilt_folder_is_found(by_peft, make_base: Callable[..., Path], tmp_path: Path) -> None:
    case = Case(by_peft("lora"))
    case.export(tmp_path / "out")
    _, checks = recheck_any(tmp_path / "out", make_base(seed=1))
    failed = {check.name for check in checks if check.passed is False}
    assert failed == {"base", "logits"}
    config = tmp_path / "out" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    _, checks = recheck_any(tmp_path / "out", case.made.base)
    assert {check.name for check in checks if check.passed is False} == {"files", "logits"}


def test_a_tensor_that_is_missing_or_not_finite_leaves_nothing(by_peft, tmp_path: Path) -> None:
    case = Case(by_peft("lora"))
    first, *others = case.tensors.items()
    with pytest.raises(CheckpointError, match="1 of 28 weights never came"):
        case.export(tmp_path / "out", weights=others)
    with pytest.raises(CheckpointError, match="holds NaN or infinite values"):
        case.export(tmp_path / "out", weights=[(first[0], first[1] * torch.inf), *others])
    assert not (tmp_path / "out").exists()


def test_reasons_to_refuse_are_found_before_training(by_peft, tmp_path: Path) -> None:
    case = Case(by_peft("lora"))
    assert check_export(tmp_path / "out", case.adapter) == []
    shutil.copytree(case.made.folder, tmp_path / "used")
    with pytest.raises(CheckpointError, match="used"):
        check_export(tmp_path / "used", case.adapter)


@pytest.mark.parametrize(("name", "served"), [("fused", True), ("fused dora", False)])
def test_the_card_says_whether_vllm_serves_fused_projections(
    by_peft, name: str, served: bool
) -> None:
    """Phi-3's, by their names; of GLM-4 vLLM expects the parts of gate_up_proj."""
    case = Case(by_peft(name))
    spec = replace(case.spec, dora=False)
    card = adapter_card(case.facts, spec, adapter_parts(case.config, spec), "base")
    assert ("vllm serve" in card) == served
    assert ("does not serve an adapter of this family's gate_up_proj" in card) != served


def test_the_card_says_how_to_use_it(by_peft, tmp_path: Path) -> None:
    result = Case(by_peft("rslora")).export(tmp_path / "plain", trained="no", base="not here")
    card = (result.folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n") and "\n- lora\n" in card
    assert "--enable-lora --max-lora-rank 8" in card and "--dtype float32\n" in card
    assert "torchprime export --adapter ." in card
    assert "| rank | 4 |" in card and "alpha / sqrt\\(rank\\)" in card.replace(
        "(rank)", "\\(rank\\)"
    )
    whole = Case(by_peft("whole modules")).export(tmp_path / "w", trained="no", base="not here")
    card = (whole.folder / "README.md").read_text()
    assert "vllm serve" not in card and "does not serve modules that were trained whole" in card
    dora = Case(by_peft("dora")).export(tmp_path / "d", trained="no", base="not here")
    assert "does not serve DoRA" in (dora.folder / "README.md").read_text()
