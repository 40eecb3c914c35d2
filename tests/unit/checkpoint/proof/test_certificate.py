"""A certificate says what is so, by hashlib, safetensors and transformers; what is wrong with an
export is found when it is written, and when it is verified later."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from torchprime.checkpoint.hf.card import CardFacts
from torchprime.checkpoint.hf.export_facts import ExportFacts
from torchprime.checkpoint.hf.write import tensor_hash
from torchprime.checkpoint.proof.certificate import Certificate, certify, read_certificate
from torchprime.checkpoint.proof.logits import PROMPTS, PromptLogits, encode_prompts
from torchprime.checkpoint.proof.recheck import recheck
from torchprime.checkpoint.proof.verify import load_transformers
from torchprime.errors import CheckpointError

STEP = 7
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>\n{% endfor %}"
UNCHANGED = "model.layers.0.self_attn.q_proj.weight"
MOST = "model.layers.1.mlp.up_proj.weight"
ALL = [
    "weights", "tied weights", "base", "logits", "chat template", "stop tokens", "tokenizer",
]  # fmt: skip


def template_hash() -> str:
    return hashlib.sha256(TEMPLATE.encode()).hexdigest()


@pytest.fixture(scope="session")
def tuned(llama) -> dict[str, torch.Tensor]:
    """The weights of `llama` after a training: all but one moved, one by 0.25."""
    torch.manual_seed(3)
    weights = {}
    for name, tensor in llama.reader.weights(llama.spec):
        away = torch.zeros_like(tensor) if name == UNCHANGED else torch.randn_like(tensor) * 1e-3
        if name == MOST:
            away[0, 0] = 0.25
        weights[name] = tensor + away
    return weights


@pytest.fixture(scope="session")
def trained(tuned, llama, tokenizer_folder) -> PromptLogits:
    """Return the logits of transformers' own class on the same tensors."""
    model = transformers.LlamaForCausalLM.from_pretrained(llama.folder, attn_implementation="eager")
    model.load_state_dict(tuned)
    ids = encode_prompts(tokenizer_folder / "tokenizer.json")
    with torch.no_grad():
        logits = model(torch.as_tensor(ids)).logits.numpy()
    return PromptLogits(ids, logits, "a test")


@pytest.fixture(scope="session")
def facts(llama) -> ExportFacts:
    return ExportFacts(
        spec=llama.spec,
        dtype=torch.float32,
        max_shard_bytes=30_000,
        stop_ids=(0,),
        template=template_hash(),
        base_model="some/llama",
        base_folder=str(llama.folder),
        step=STEP,
        card=CardFacts(versions={"torch": torch.__version__}),
        metrics={"loss": 1.5, "held-out loss after": float("nan")},
        fingerprints={"data": "d" * 64, "config": "c" * 64},
    )


@pytest.fixture
def certified(export, llama, tuned, trained, facts, tmp_path) -> Callable[..., Any]:
    """Export and certify; `changes` are of `certify`'s arguments or of the export's."""

    def run(*, tensors: Any = None, write: dict[str, Any] | None = None, **changes: Any):
        arguments: dict[str, Any] = dict(
            facts=facts, origin="a test", trained=trained, base=llama.folder
        )
        writing = dict(
            weights=iter((tensors or tuned).items()),
            max_shard_bytes=30_000,
            chat_templates={"default": TEMPLATE},
            certify=partial(certify, **{**arguments, **changes}),
        )
        return export(tmp_path / "out", llama, **{**writing, **(write or {})})

    return run


# Contents of the certificate ----------------------------------------------------------------------


def test_every_file_is_named_with_its_size_and_hash(certified) -> None:
    folder = certified().folder
    content = json.loads((folder / "certificate.json").read_text())
    there = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    del there["certificate.json"]
    assert len([name for name in there if name.endswith(".safetensors")]) > 2
    assert content["files"] == {
        name: {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for name, path in there.items()
    }


def test_all_checks_pass_and_say_where_the_weights_come_from(certified, facts) -> None:
    result = certified()
    assert read_certificate(result.folder).checks == result.certificate.checks
    content = json.loads(
        (result.folder / "certificate.json").read_text(), parse_constant=pytest.fail
    )
    assert content["passed"] is True and content["step"] == STEP
    assert [check["name"] for check in content["checks"]] == ALL
    assert {check["passed"] for check in content["checks"]} == {True}, content["checks"]
    assert content["base_model"] == "some/llama" and content["dtype"] == "float32"
    assert content["fingerprints"] == facts.fingerprints
    assert content["metrics"] == {"loss": 1.5, "held-out loss after": "nan"}
    assert content["versions"] == facts.card.versions
    result.certificate.require(result.folder)


def test_tensors_are_counted(certified, tuned) -> None:
    values = certified().certificate.check("weights").values
    assert values["tensors"] == len(tuned)
    assert values["parameters"] == sum(tensor.numel() for tensor in tuned.values())
    assert values["dtypes"] == {"float32": len(tuned)}


def test_the_hash_of_all_tensors_does_not_depend_on_files(
    certified, llama, tuned, tmp_path
) -> None:
    several = certified().certificate.check("weights").values["sha256"]
    shutil.rmtree(tmp_path / "out")
    one = certified(write={"max_shard_bytes": 10**9})
    assert (one.folder / "model.safetensors").is_file()
    assert one.certificate.check("weights").values["sha256"] == several
    shutil.rmtree(tmp_path / "out")
    other = tuned | {UNCHANGED: -tuned[UNCHANGED]}
    values = certified(tensors=other, trained="a test").certificate.check("weights").values
    assert values["sha256"] != several


def test_what_changed_against_the_base(certified, llama, tuned) -> None:
    base = load_file(llama.folder / "model.safetensors")
    away = {name: (tuned[name] - base[name]).abs().max().item() for name in tuned}
    values = certified().certificate.check("base").values
    assert values == {
        "tensors": len(tuned),
        "changed": len(tuned) - 1,
        "largest_change": max(away.values()),
        "largest_change_in": MOST,
    }
    assert max(away, key=lambda name: away[name]) == MOST and away[UNCHANGED] == 0


def test_a_base_is_compared_in_the_exports_dtype(certified, facts, tuned, llama) -> None:
    """A bf16 export of untouched fp32 weights has not changed by being rounded."""
    rounded = dataclasses.replace(facts, dtype=torch.bfloat16)
    result = certified(facts=rounded, trained="a test", write={"dtype": torch.bfloat16})
    assert result.certificate.check("weights").values["dtypes"] == {"bfloat16": len(tuned)}
    base = load_file(llama.folder / "model.safetensors")
    changed = [n for n in tuned if not torch.equal(tuned[n].bfloat16(), base[n].bfloat16())]
    values = result.certificate.check("base").values
    assert values["changed"] == len(changed) < len(tuned)


def test_prompts_and_likeliest_tokens_are_kept(certified, trained, tokenizer_folder) -> None:
    values = certified().certificate.check("logits").values
    assert values["max_difference"] <= values["tolerance"] == 1e-4
    raw = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    assert [prompt["text"] for prompt in values["prompts"]] == list(PROMPTS)
    for prompt, logits in zip(values["prompts"], trained.logits, strict=True):
        assert prompt["tokens"] == 64 <= len(raw.encode(prompt["text"]).ids)
        best = torch.as_tensor(logits[-1]).topk(8)
        assert [int(token) for token in prompt["likeliest_next"]] == best.indices.tolist()
        assert list(prompt["likeliest_next"].values()) == pytest.approx(best.values.tolist(), 1e-6)


def test_no_row_and_no_place_of_this_machine_is_in_it(certified, llama, tmp_path) -> None:
    """It is published with the weights."""
    folder = certified().folder
    text = (folder / "certificate.json").read_text()
    assert str(tmp_path) not in text and str(llama.folder) not in text


def test_transformers_still_loads_the_folder(certified) -> None:
    folder = certified().folder
    assert load_transformers(folder).config.model_type == "llama"
    assert transformers.AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE


@pytest.mark.parametrize(
    ("change", "name", "reason"),
    [
        (dict(trained="no room here"), "logits", "logits not compared (no room here)"),
        (dict(base=None), "base", "random weights"),
        (dict(base="it is elsewhere"), "base", "it is elsewhere"),
    ],
)
def test_what_is_not_checked_says_why(certified, change, name, reason) -> None:
    certificate = certified(**change).certificate
    check = certificate.check(name)
    assert check.passed is None and reason in check.detail
    assert not certificate.failed
    assert certificate.tally() == f"6 checks passed, 1 not made ({name})"


def test_without_conversations_the_template_is_not_judged(certified, facts) -> None:
    check = certified(facts=dataclasses.replace(facts, template=None)).certificate.check(
        "chat template"
    )
    assert check.passed is None and "no conversations" in check.detail


# Failures while it is written ---------------------------------------------------------------------


def refused(result: Any, name: str, *details: str) -> None:
    """The check failed, is recorded, and ends a run; the export is there all the same."""
    certificate = result.certificate
    assert [check.name for check in certificate.failed] == [name]
    assert json.loads((result.folder / "certificate.json").read_text())["passed"] is False
    assert ".partial" not in certificate.failed[0].detail  # where it was written is of no use
    with pytest.raises(CheckpointError) as caught:
        certificate.require(result.folder)
    for detail in (f"\n  {name}: ", str(result.folder), *details):
        assert detail in str(caught.value)
    assert load_transformers(result.folder)


def test_logits_of_another_model_fail(certified, trained) -> None:
    other = PromptLogits(trained.ids, trained.logits * np.float32(1.01), "a test")
    refused(certified(trained=other), "logits", "logits differ by")


def test_untrained_weights_fail(certified, llama, tuned, facts) -> None:
    base = dict(llama.reader.weights(llama.spec))
    result = certified(tensors=base, trained="a test")
    refused(result, "base", f"none of {len(base)} tensors differs", f"{STEP} updates")
    shutil.rmtree(result.folder)
    early = certified(tensors=base, trained="a test", facts=dataclasses.replace(facts, step=1))
    assert early.certificate.check("base").passed is None  # the first learning rate may be 0


def test_a_base_of_another_shape_fails(certified, tied_llama) -> None:
    refused(
        certified(base=tied_llama.folder), "base", "lm_head.weight", "the base does not have it"
    )


# A base with fewer rows than the export, two of which were made anew -----------------------------

SHARED, UNUSED = 300, (5, 299)
GROWN = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def small_base(llama, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small_base")
    tensors = load_file(llama.folder / "model.safetensors")
    for name in GROWN:
        tensors[name] = tensors[name][:SHARED].clone()
        tensors[name][list(UNUSED)] = 100.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_new_rows_are_counted_and_the_others_compared(
    certified, facts, small_base, tuned, llama
) -> None:
    grown = dataclasses.replace(facts, unused_rows=UNUSED)
    result = certified(base=small_base, facts=grown)
    values = result.certificate.check("base").values
    kept = [row for row in range(SHARED) if row not in UNUSED]
    base = load_file(llama.folder / "model.safetensors")
    away = {
        name: (tuned[name] - base[name])[kept if name in GROWN else ...].abs().max().item()
        for name in tuned
    }
    assert values["changed"] == sum(a > 0 for a in away.values())
    assert values["largest_change"] == pytest.approx(max(away.values()), rel=1e-6)
    assert values["new_rows"] == 2 * (320 - SHARED + len(UNUSED))
    assert "44 rows are new" in result.certificate.check("base").detail
    assert verdicts(result.folder, small_base)["base"] is True


def test_untrained_weights_with_new_rows_fail(certified, facts, small_base, llama) -> None:
    grown = dataclasses.replace(facts, unused_rows=UNUSED)
    base = dict(llama.reader.weights(llama.spec))
    result = certified(tensors=base, trained="a test", base=small_base, facts=grown)
    refused(result, "base", f"none of {len(base)} tensors differs", f"{STEP} updates")


def test_a_base_with_more_rows_fails(certified, llama, tmp_path) -> None:
    tensors = load_file(llama.folder / "model.safetensors")
    tensors[GROWN[0]] = torch.cat([tensors[GROWN[0]], tensors[GROWN[0]][:1]])
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused(certified(base=tmp_path), "base", GROWN[0], "has it as [321, 32]")


def test_another_chat_template_fails(certified) -> None:
    result = certified(write={"chat_templates": {"default": TEMPLATE + " "}})
    refused(result, "chat template", "chat_template.jinja", template_hash())


def test_a_missing_chat_template_fails(certified) -> None:
    refused(certified(write={"chat_templates": {}}), "chat template", "here is none")


def test_a_stop_token_that_no_server_knows_fails(certified, facts) -> None:
    result = certified(facts=dataclasses.replace(facts, stop_ids=(0, 1)))
    refused(result, "stop tokens", "stops at [0], not at [1]")


def test_whatever_a_check_raises_keeps_the_export(certified, monkeypatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a library is broken")

    monkeypatch.setattr("torchprime.checkpoint.proof.certificate.compare_logits", broken)
    result = certified()
    refused(result, "logits", "RuntimeError: a library is broken")


def test_a_byte_lost_on_the_way_to_the_disk_fails(certified, facts, trained, llama) -> None:
    def spoil_and_certify(folder: Path, hashes: dict[str, str]) -> Certificate:
        flip(shard(folder, 1), -1)
        return certify(
            folder, hashes, facts=facts, origin="a test", trained="a test", base=llama.folder
        )

    result = certified(write={"certify": spoil_and_certify})
    refused(result, "weights", "different 1 (")


# Verifying it later -------------------------------------------------------------------------------


def shard(folder: Path, number: int) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[number - 1]


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pristine") / "export"


@pytest.fixture
def exported(pristine, certified, tmp_path) -> Path:
    """A copy of one certified export."""
    if not pristine.exists():
        shutil.copytree(certified().folder, pristine)
    return Path(shutil.copytree(pristine, tmp_path / "copy"))


def verdicts(folder: Path, base: Path | None = None) -> dict[str, bool | None]:
    return {check.name: check.passed for check in recheck(folder, base)[1]}


def detail(folder: Path, name: str, base: Path | None = None) -> str:
    return next(check.detail for check in recheck(folder, base)[1] if check.name == name)


def test_an_export_as_it_was_verifies(exported, llama) -> None:
    untold = {"fingerprints": None, "metrics": None}
    passed = {"when written": True, "files": True, **dict.fromkeys(ALL, True)}
    assert verdicts(exported, llama.folder) == passed | untold
    assert verdicts(exported) == passed | untold | {"base": None}
    assert "some/llama" in detail(exported, "base")
    assert f"data {'d' * 12}" in detail(exported, "fingerprints")


def test_files_that_downloads_leave_behind_do_no_harm(exported) -> None:
    (exported / ".cache" / "huggingface").mkdir(parents=True)
    (exported / ".cache" / "huggingface" / "model.json").write_text("{}")
    (exported / "LICENSE").write_text("free")
    assert verdicts(exported)["files"] is True
    assert "LICENSE" in detail(exported, "files")


Damage = Callable[[Path], object]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


FILE_DAMAGES: dict[str, tuple[Damage, str]] = {
    "flipped bit": (lambda f: flip(shard(f, 2), -9), "its sha256"),
    "truncated": (lambda f: truncate(shard(f, 1)), "bytes instead of"),
    "missing shard": (lambda f: (shard(f, 3)).unlink(), "is missing"),
    "missing tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "edited card": (lambda f: (f / "README.md").write_text("x"), "README.md differs"),
    "older weights": (lambda f: (f / "model.safetensors").write_bytes(b"x"), "is not certified"),
    "code": (lambda f: (f / "modeling_llama.py").write_text(""), "modeling_llama.py is not"),
}


@pytest.mark.parametrize("damage", FILE_DAMAGES)
def test_a_damaged_file_is_found_and_named(exported, damage) -> None:
    spoil, told = FILE_DAMAGES[damage]
    spoil(exported)
    assert verdicts(exported)["files"] is False
    assert told in detail(exported, "files")


def rewrite_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spoil_weights(folder: Path) -> None:
    path = shard(folder, 1)
    tensors = {name: tensor * 1.5 for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def spoil_rope(folder: Path) -> None:
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    rope = {**rope, "rope_theta": 7.0}
    rewrite_json(folder / "config.json", rope_theta=7.0, rope_parameters=rope)


def other_tokenizer(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


# name -> what else than the files' hashes finds it
DEEPER_DAMAGES: dict[str, tuple[Damage, set[str]]] = {
    "weights": (spoil_weights, {"weights", "logits"}),
    "rope": (spoil_rope, {"logits"}),
    "untied": (
        lambda f: rewrite_json(f / "config.json", tie_word_embeddings=True),
        {"tied weights"},
    ),
    "vocabulary": (other_tokenizer, {"logits"}),
    "template": (lambda f: (f / "chat_template.jinja").write_text("x"), {"chat template"}),
    "inline template": (
        lambda f: rewrite_json(f / "tokenizer_config.json", chat_template="x"),
        {"chat template"},
    ),
    "stops": (
        lambda f: rewrite_json(f / "generation_config.json", eos_token_id=[1]),
        {"stop tokens"},
    ),
}


@pytest.mark.parametrize("damage", DEEPER_DAMAGES)
def test_what_is_hidden_from_the_hashes_is_found_by_the_check_of_its_own(exported, damage) -> None:
    """As if whoever spoilt it had corrected the files' hashes in the certificate."""
    spoil, finders = DEEPER_DAMAGES[damage]
    spoil(exported)
    path = exported / "certificate.json"
    content = json.loads(path.read_text())
    for name in content["files"]:
        data = (exported / name).read_bytes()
        content["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps(content))
    found = {name for name, passed in verdicts(exported).items() if passed is False}
    assert found == finders


def test_another_base_is_found(exported, tmp_path, llama) -> None:
    other = Path(shutil.copytree(llama.folder, tmp_path / "base"))
    tensors = load_file(other / "model.safetensors")
    tensors[UNCHANGED] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert verdicts(exported, other)["base"] is False
    assert "Is that folder the base of this export (some/llama)?" in detail(exported, "base", other)


def test_a_check_that_had_failed_fails_again(certified, facts) -> None:
    folder = certified(facts=dataclasses.replace(facts, stop_ids=(0, 1))).folder
    assert verdicts(folder)["when written"] is False
    assert "stop tokens: " in detail(folder, "when written")


def test_logits_without_room_or_record_are_not_checked(exported, monkeypatch) -> None:
    monkeypatch.setattr(
        "torchprime.checkpoint.proof.recheck.no_room", lambda *_: "too small a machine"
    )
    assert verdicts(exported)["logits"] is None
    assert detail(exported, "logits") == "too small a machine"


def test_what_was_not_checked_then_says_so_now(certified) -> None:
    folder = certified(trained="it was too large").folder
    assert verdicts(folder)["logits"] is None
    assert "it was too large" in detail(folder, "logits")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "certificate.json").unlink(), "There is no certificate.json in"),
        (lambda f: shutil.rmtree(f), "is not a folder"),
        (lambda f: truncate(f / "certificate.json"), "cannot be read as JSON"),
        (lambda f: (f / "certificate.json").write_text("[]"), "expected a JSON object"),
        (lambda f: rewrite_json(f / "certificate.json", format_version=99), "has format 99"),
        (lambda f: rewrite_json(f / "certificate.json", files={"a": 1}), "not a certificate"),
        (lambda f: rewrite_json(f / "certificate.json", checks=[{}]), "not a certificate"),
    ],
)
def test_without_a_readable_certificate_nothing_is_judged(exported, spoil, message) -> None:
    spoil(exported)
    with pytest.raises(CheckpointError, match=message):
        recheck(exported)


def test_hashes_are_those_of_the_tensors(certified, tuned) -> None:
    assert certified().hashes == {name: tensor_hash(tensor) for name, tensor in tuned.items()}
