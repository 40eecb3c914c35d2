"""The text model inside a larger one computes what transformers' larger one does without images.

transformers gives a token of Qwen2.5-VL three positions; for text they are equal. An adapter of the
text model is PEFT's over the whole, and an export of the whole is the base but for its text.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tiny_families import TinyCheckpoint, make_wrapper, write_tokenizer

from torchprime.adapters.spec import AdapterSpec
from torchprime.checkpoint.adapter.export import export_adapter
from torchprime.checkpoint.adapter.folder import AdapterFolder
from torchprime.checkpoint.adapter.load import load_model
from torchprime.checkpoint.adapter.logits import adapted_logits
from torchprime.checkpoint.adapter.merged_export import Merge, export_merged
from torchprime.checkpoint.adapter.read import StoredAdapter, read_adapter
from torchprime.checkpoint.adapter.recheck import recheck_any
from torchprime.checkpoint.export import export_hf
from torchprime.checkpoint.hf.card import CardFacts
from torchprime.checkpoint.hf.export_facts import ExportFacts
from torchprime.checkpoint.hf.folder import HfFolder
from torchprime.checkpoint.hf.read import SafetensorsReader, check_names
from torchprime.checkpoint.hf.whole import WholeModel
from torchprime.checkpoint.proof.certificate import certify
from torchprime.checkpoint.proof.logits import PromptLogits, decoder_logits, encode_prompts
from torchprime.errors import CheckpointError
from torchprime.losses.chunks import Projection
from torchprime.losses.cross_entropy import chunked_cross_entropy
from torchprime.models.architecture import architecture_from_hf
from torchprime.models.decoder import CausalLM

S = 12


def compare(made: TinyCheckpoint, name: str, config: dict[str, Any]) -> None:
    """Compare logits and gradients of one row, for a config.json of the same model."""
    theirs = getattr(transformers, f"{name}ForConditionalGeneration").from_pretrained(made.folder)
    ids = torch.randint(3, 60, (1, S), generator=torch.Generator().manual_seed(0))
    logits = theirs(input_ids=ids).logits
    F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").backward()

    ours = CausalLM(architecture_from_hf(config))
    spec = {name: tuple(weight.shape) for name, weight in ours.named_parameters()}
    check_names(spec, made.reader, tied=ours.architecture.tie_word_embeddings)
    ours.load_state_dict({name: made.reader.get(name).clone() for name in spec})
    place, ones = torch.arange(S)[None], torch.ones_like(ids)
    _close(ours.logits(ids, place, ones), logits, "logits")
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)
    hidden = ours(ids, place, ones)
    chunked_cross_entropy(
        hidden, Projection(*ours.output), targets, torch.ones(1, S), 3
    ).loss_sum.backward()
    inner = {f"model.{n}": p for n, p in theirs.model.language_model.named_parameters()}
    if not ours.architecture.tie_word_embeddings:
        inner["lm_head.weight"] = theirs.lm_head.weight
    assert inner.keys() == spec.keys()
    for weight, parameter in ours.named_parameters():
        _close(parameter.grad, inner[weight].grad, weight)


def _close(ours: Any, theirs: Any, what: str) -> None:
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < 1e-5, f"{what}: {error:.1e}"


@pytest.mark.parametrize("name", ["Gemma3", "Mistral3", "Qwen2_5_VL"])
def test_logits_and_gradients(name: str, tmp_path: Path) -> None:
    made = make_wrapper(tmp_path, name)
    compare(made, name, made.config)


def test_ministral_3_with_images(tmp_path: Path) -> None:
    """Its text model has a model_type of its own."""
    scaling = {"type": "yarn", "rope_theta": 1e4, "factor": 4.0, "llama_4_scaling_beta": 0.4}
    scaling |= {"original_max_position_embeddings": 5}
    made = make_wrapper(tmp_path, "Mistral3", model_type="ministral3", rope_parameters=scaling)
    assert architecture_from_hf(made.config).family == "ministral3"
    compare(made, "Mistral3", made.config)


YARN = {"factor": 4.0, "original_max_position_embeddings": 8, "mrope_section": [1, 1, 2]}


@pytest.mark.parametrize("kind", ["mrope", "yarn"])
def test_a_flat_config_of_qwen_2_5_vl(kind: str, tmp_path: Path) -> None:
    """As the hub has it: the text model's keys beside the wrapper's, the rope of version 4."""
    scaling = {"type": kind, **(YARN if kind == "yarn" else {"mrope_section": [1, 1, 2]})}
    made = make_wrapper(tmp_path, "Qwen2_5_VL", rope_scaling=dict(scaling), rope_theta=100.0)
    outer = {k: v for k, v in made.config.items() if k != "text_config"}
    inner = {k: v for k, v in made.config["text_config"].items() if k != "model_type"}
    for key in ("rope_parameters", "layer_types", "rms_norm_eps"):
        del inner[key]
    flat = {**inner, **outer, "rope_theta": 100.0, "rope_scaling": scaling}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    compare(made, "Qwen2_5_VL", flat)
    nested = architecture_from_hf(made.config)
    assert architecture_from_hf(flat) == nested
    assert nested.family == "qwen2" and nested.rms_norm_eps == 1e-5
    # transformers 4.57 writes both.
    assert architecture_from_hf({**flat, "text_config": made.config["text_config"]}) == nested
    del flat["rope_theta"]
    assert architecture_from_hf(flat).rope.theta == 1e6


@pytest.mark.parametrize("inside", [None, False, True])
@pytest.mark.parametrize("outside", [False, True])
def test_the_wrappers_own_key_ties(outside: bool, inside: bool | None, tmp_path: Path) -> None:
    """A new Mistral 3 of transformers 5 is tied, whatever its text model's config says."""
    made = make_wrapper(tmp_path, "Mistral3")
    config = transformers.Mistral3Config.from_pretrained(tmp_path)
    config.tie_word_embeddings = outside
    text: Any = config.text_config
    text.tie_word_embeddings = bool(inside)
    transformers.Mistral3ForConditionalGeneration(config).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    if inside is None:
        saved["text_config"].pop("tie_word_embeddings", None)
    fresh = TinyCheckpoint(tmp_path, saved, type(made.reader)(tmp_path), {})
    assert architecture_from_hf(saved).tie_word_embeddings == outside
    compare(fresh, "Mistral3", saved)


# Adapters over the whole --------------------------------------------------------------------------

WRAPPERS = ("Gemma3", "Mistral3", "Qwen2_5_VL")
VOCAB = 320  # of the tokenizer
IDS = torch.randint(3, VOCAB, (2, S), generator=torch.Generator().manual_seed(1))
SPECS = {
    "all": AdapterSpec(rank=4, alpha=8),
    "some": AdapterSpec(rank=2, alpha=3, targets=("q_proj", "down_proj"), layers=(1,)),
    "whole": AdapterSpec(
        rank=2, alpha=4, targets=("v_proj",), modules_to_train=("embed_tokens", "norm")
    ),
}


@cache
def _made(folder: Path, name: str) -> TinyCheckpoint:
    text = {"sliding_window": 16} if name == "Gemma3" else {}
    made = make_wrapper(folder / name, name, vocab_size=VOCAB, eos_token_id=0, **text)
    write_tokenizer(made.folder)
    return made


@pytest.fixture(scope="module")
def wrappers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wrappers")


def whole_model(name: str, folder: Path) -> Any:
    return getattr(transformers, f"{name}ForConditionalGeneration").from_pretrained(folder)


def in_peft(name: str, made: TinyCheckpoint, spec: AdapterSpec) -> Any:
    """PEFT's own adapter of the same layers of the whole model, with random values."""
    base = whole_model(name, made.folder)
    inner = {n: m for n, m in base.named_modules() if n.startswith("model.language_model.layers.")}
    linear = [n for n, m in inner.items() if isinstance(m, torch.nn.Linear)]
    if spec.targets != ("all-linear",):
        linear = [n for n in linear if n.rpartition(".")[2] in spec.targets]
    if spec.layers is not None:
        linear = [n for n in linear if int(n.split(".")[3]) in spec.layers]
    tied = bool(spec.modules_to_train) and made.config["tie_word_embeddings"]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.rank,
        lora_alpha=int(spec.alpha),
        target_modules=linear,
        modules_to_save=[f"model.language_model.{n}" for n in spec.modules_to_train] or None,
        ensure_weight_tying=tied,
    )
    model = peft.get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def our_folder(made: TinyCheckpoint, spec: AdapterSpec, wrapper: str) -> AdapterFolder:
    layout = ExportFacts(made.spec, torch.float32, 10**9, (0,)).layout
    hf = HfFolder(layout, made.config, None, made.folder, 0)
    return AdapterFolder(hf, spec, str(made.folder), wrapper=wrapper)


def write_ours(
    out: Path, made: TinyCheckpoint, spec: AdapterSpec, tensors: dict[str, torch.Tensor]
) -> None:
    """Write the folder as a run does, and require its certificate."""
    kind = made.config["model_type"]
    facts = ExportFacts(
        made.spec, torch.float32, 10**9, (0,), step=9, card=CardFacts(name="mine", wrapper=kind)
    )
    prompts = encode_prompts(made.folder / "tokenizer.json")
    logits = adapted_logits(made.config, made.reader.get, tensors, spec, torch.float32, prompts)
    result = export_adapter(
        out,
        our_folder(made, spec, kind),
        facts=facts,
        weights=tensors.items(),
        origin="a test",
        trained=PromptLogits(prompts, logits, "a test"),
        base=made.folder,
    )
    assert result.certificate is not None
    result.certificate.require(out)
    passed = {check.name for check in result.certificate.checks if check.passed}
    assert {"weights", "adapter", "trained", "base", "logits", "merged"} <= passed


def our_logits(made: TinyCheckpoint, stored: StoredAdapter) -> torch.Tensor:
    stored.fit(made.config)
    config, tensors = stored.config_for(made.config), stored.tensors
    found = adapted_logits(
        config, made.reader.get, tensors, stored.spec, torch.float32, IDS.numpy()
    )
    return torch.from_numpy(found)


@torch.no_grad()
def their_logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "all") for name in WRAPPERS), ("Gemma3", "whole"), ("Mistral3", "some")],
)
def test_an_adapter_has_pefts_names_and_logits(
    name: str, kind: str, wrappers: Path, tmp_path: Path
) -> None:
    made, spec = _made(wrappers, name), SPECS[kind]
    theirs = in_peft(name, made, spec)
    theirs.save_pretrained(str(tmp_path / "peft"))
    read = read_adapter(tmp_path / "peft")
    expected = their_logits(theirs)
    _close(our_logits(made, read), expected, "what PEFT wrote, in our model")

    ours = replace(read.spec, targets=spec.targets, layers=spec.layers)
    write_ours(tmp_path / "ours", made, ours, dict(read.tensors))
    config, other = (
        json.loads((tmp_path / folder / "adapter_config.json").read_text())
        for folder in ("ours", "peft")
    )
    assert set(config["target_modules"]) == set(other["target_modules"])
    assert set(config["modules_to_save"] or []) == set(other["modules_to_save"] or [])
    for key in ("base_model_name_or_path", "task_type", "r", "lora_alpha", "peft_type"):
        assert config[key] == other[key], key
    mine, its = (
        load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ours", "peft")
    )
    assert mine.keys() == its.keys() and all(torch.equal(mine[n], its[n]) for n in its)

    base = whole_model(name, made.folder)
    before = {n: p.clone() for n, p in base.named_parameters()}
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "ours"))
    _close(their_logits(loaded), expected, "PEFT over the whole")
    merged = dict(loaded.merge_and_unload().named_parameters())
    changed = {n for n, p in merged.items() if not torch.equal(p, before[n])}
    assert changed and all(n.startswith("model.language_model.") for n in changed)
    _, again = recheck_any(tmp_path / "ours", made.folder)
    assert not [check for check in again if check.passed is False]
    assert {"base", "logits", "merged"} <= {check.name for check in again if check.passed}


def test_other_spellings_of_an_adapter_are_read(wrappers: Path, tmp_path: Path) -> None:
    """Names of transformers up to 4.51, and a regular expression as most people write it."""
    made = _made(wrappers, "Gemma3")
    theirs = in_peft("Gemma3", made, SPECS["all"])
    theirs.save_pretrained(str(tmp_path))
    expected = their_logits(theirs)
    path, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config = json.loads(path.read_text())
    config["target_modules"] = r"model\.language_model\..*_proj"
    path.write_text(json.dumps(config))
    _close(our_logits(made, read_adapter(tmp_path)), expected, "a regular expression")
    tensors = load_file(weights)
    inner = "base_model.model.model.language_model."
    old = {
        n.replace(inner, "base_model.model.language_model.model."): t for n, t in tensors.items()
    }
    weights.unlink()
    save_file(old, weights)
    config |= {"target_modules": r".*language_model.*_proj", "exclude_modules": ".*vision.*"}
    path.write_text(json.dumps(config))
    _close(our_logits(made, read_adapter(tmp_path)), expected, "names of 4.51")
    vision = "base_model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    weights.unlink()
    save_file({**old, vision: torch.ones(4, 32)}, weights)
    with pytest.raises(CheckpointError, match="1 of 29 tensors are not of the text model"):
        read_adapter(tmp_path)


def test_an_adapter_over_the_whole_is_merged_and_loaded(wrappers: Path, tmp_path: Path) -> None:
    made = _made(wrappers, "Mistral3")
    theirs = in_peft("Mistral3", made, SPECS["all"])
    theirs.save_pretrained(str(tmp_path / "peft"))
    expected = their_logits(theirs)
    stored = read_adapter(tmp_path / "peft")
    _close(their_logits(load_model(tmp_path / "peft")), expected, "loaded to chat")
    said: list[str] = []
    export_merged(Merge(stored, made.folder, str(made.folder)), tmp_path / "text", said.append)
    text = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    assert text.config.model_type == "mistral"
    _close(their_logits(text), expected, "merged")
    assert "`mistral3`" in (tmp_path / "text" / "README.md").read_text()
    whole = Merge(stored, made.folder, str(made.folder), parts="all")
    export_merged(whole, tmp_path / "whole", said.append)
    model = whole_model("Mistral3", tmp_path / "whole")
    _close(their_logits(model), expected, "merged in the whole")
    merged = dict(theirs.merge_and_unload().named_parameters())
    for name, parameter in model.named_parameters():
        if "language_model" not in name and not name.startswith("lm_head"):
            assert torch.equal(parameter, merged[name]), name


# Exports of all parts -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRAPPERS)
def test_an_export_of_all_parts_is_the_base_but_for_its_text(
    name: str, wrappers: Path, tmp_path: Path
) -> None:
    made = _made(wrappers, name)
    generator = torch.Generator().manual_seed(3)
    trained = {
        n: made.reader.get(n) + 0.05 * torch.randn(shape, generator=generator)
        for n, shape in made.spec.items()
    }
    facts = ExportFacts(made.spec, torch.float32, 10**9, (0,), step=9, parts="all")
    prompts = encode_prompts(made.folder / "tokenizer.json")
    logits = decoder_logits(made.config, trained.__getitem__, torch.float32, prompts)
    whole, out = WholeModel(made.folder), tmp_path / "out"
    result = export_hf(
        out,
        HfFolder(facts.layout, made.config, None, made.folder, 0),
        card="",
        weights=trained.items(),
        certify=lambda folder, hashes: certify(
            folder,
            hashes,
            facts=facts,
            origin="a test",
            trained=PromptLogits(prompts, logits, "a test"),
            base=made.folder,
            whole=whole,
        ),
        whole=whole,
    )
    assert result.certificate is not None and not result.certificate.failed
    passed = {check.name for check in result.certificate.checks if check.passed}
    assert {"weights", "other parts", "tied weights", "base", "logits"} <= passed
    assert (out / "config.json").read_bytes() == (made.folder / "config.json").read_bytes()
    before, after = (SafetensorsReader(folder, stored_names=True) for folder in (made.folder, out))
    assert before.names() == after.names()
    of_text = set(whole.text.values())
    assert all(
        torch.equal(before.get(n), after.get(n)) == (n not in of_text) for n in after.names()
    )

    reference = whole_model(name, made.folder)
    inner = {n.removeprefix("model."): t for n, t in trained.items()}
    if (head := inner.pop("lm_head.weight", None)) is not None:
        reference.lm_head.weight.data.copy_(head)
    reference.model.language_model.load_state_dict(inner, strict=True)
    model = whole_model(name, out)
    _close(their_logits(model), their_logits(reference), "the export")
    _, again = recheck_any(out, made.folder)
    assert not [check for check in again if check.passed is False]
    # A tensor of the vision tower that was changed is found, with and without the base.
    path = out / "model.safetensors"
    tensors = load_file(path)
    vision = next(n for n in tensors if n not in of_text)
    path.unlink()
    save_file({**tensors, vision: tensors[vision] + 1}, path, metadata={"format": "pt"})
    for base in (None, made.folder):
        _, again = recheck_any(out, base)
        failed = {check.name for check in again if check.passed is False}
        assert failed == {"files", "other parts"}
