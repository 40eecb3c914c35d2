"""Averages of checkpoints and exports against torch's own mean, and inputs that do not fit."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from saved_checkpoints import facts_of, hf_folder, trained

from torchprime.adapters.spec import AdapterSpec
from torchprime.checkpoint.export import export_hf
from torchprime.checkpoint.hf.read import SafetensorsReader
from torchprime.checkpoint.proof.recheck import recheck
from torchprime.checkpoint.proof.verify import load_transformers
from torchprime.checkpoint.run.open_storage import open_storage
from torchprime.checkpoint.run.reader import CheckpointReader
from torchprime.cli.weights.average import average_main

Weights = dict[str, torch.Tensor]


def moved(weights: Weights, seed: int) -> Weights:
    torch.manual_seed(seed)
    return {name: w + 0.01 * torch.randn_like(w) for name, w in weights.items()}


@pytest.fixture
def three(tied_llama, save, tmp_path) -> list[Weights]:
    """Checkpoints of steps 7, 8 and 9 of one run."""
    storage = open_storage(tmp_path / "run" / "checkpoints")
    found = [moved(trained(tied_llama), seed) for seed in range(3)]
    for step, weights in zip((7, 8, 9), found, strict=True):
        save(storage, tied_llama, weights, name=f"step_{step:08d}")
    return found


def checkpoint(tmp_path: Path, step: int) -> str:
    return str(tmp_path / "run" / "checkpoints" / f"step_{step:08d}")


def mean(sources: list[Weights], shares: list[float]) -> Weights:
    share = torch.tensor(shares, dtype=torch.float64)
    return {
        name: torch.tensordot(share, torch.stack([w[name].double() for w in sources]), 1).float()
        for name in sources[0]
    }


def assert_holds(out: Path, wanted: Weights) -> None:
    reader = SafetensorsReader(out)
    assert reader.names().keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(reader.get(name), weight, rtol=1e-6, atol=1e-8)


def test_by_weights_and_the_last(three, tmp_path, capsys) -> None:
    out = tmp_path / "weighted"
    inputs = [checkpoint(tmp_path, step) for step in (7, 8, 9)]
    assert average_main([*inputs, "--weights", "0.5,0.3,0.2", "--out", str(out)]) == 0
    assert "averaged 3 inputs" in capsys.readouterr().out
    wanted = mean(three, [0.5, 0.3, 0.2])
    assert_holds(out, wanted)
    certificate, checks = recheck(out)
    assert not [check for check in checks if check.passed is False]
    assert certificate.check("logits").passed and certificate.step is None
    assert "0.5 x" in certificate.origin and "step_00000008" in certificate.origin
    assert "The weights are the mean of: 0.5 x" in (out / "README.md").read_text()
    last = tmp_path / "last"
    assert average_main(["--last", "2", str(tmp_path / "run"), "--out", str(last)]) == 0
    assert_holds(last, mean(three[1:], [0.5, 0.5]))
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        ours = load_transformers(out)(ids).logits
        theirs = load_transformers(last)
        theirs.load_state_dict(wanted, strict=False)
        torch.testing.assert_close(theirs(ids).logits, ours)


def test_exports_are_averaged_too(three, tmp_path) -> None:
    """The mean of an export and a checkpoint; an export is a mean itself."""
    pair, out = tmp_path / "pair", tmp_path / "out"
    inputs = [checkpoint(tmp_path, step) for step in (7, 8)]
    assert average_main([*inputs, "--out", str(pair)]) == 0
    argv = [str(pair), checkpoint(tmp_path, 9), "--weights", "0.75,0.25", "--out", str(out)]
    assert average_main(argv) == 0
    assert_holds(out, mean(three, [0.375, 0.375, 0.25]))


def test_bf16_is_averaged_from_master_weights(llama, save, tmp_path) -> None:
    storage = open_storage(tmp_path / "run" / "checkpoints")
    masters = [moved(trained(llama), seed) for seed in range(2)]
    facts = facts_of(llama, dtype=torch.bfloat16)
    for step, weights in zip((7, 8), masters, strict=True):
        coarse = {name: w.bfloat16() for name, w in weights.items()}
        more = {f"master.{name}": w for name, w in weights.items()}
        save(storage, llama, coarse, name=f"step_{step:08d}", facts=facts, more=more)
    out = tmp_path / "out"
    assert average_main(["--last", "2", str(tmp_path / "run"), "--out", str(out)]) == 0
    wanted = mean(masters, [0.5, 0.5])
    reader = SafetensorsReader(out)
    assert all(torch.equal(reader.get(name), w.bfloat16()) for name, w in wanted.items())
    exact = tmp_path / "fp32"
    argv = ["--last", "2", str(tmp_path / "run"), "--dtype", "fp32", "--out", str(exact)]
    assert average_main(argv) == 0
    assert_holds(exact, wanted)


def test_one_tensor_of_each_input_is_in_memory(three, tmp_path, monkeypatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most, get = 0, CheckpointReader.get

    def watched(reader: CheckpointReader, name: str) -> torch.Tensor:
        nonlocal most
        tensor = get(reader, name)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(CheckpointReader, "get", watched)
    monkeypatch.setattr(
        "torchprime.checkpoint.from_checkpoint.decoder_logits_of", lambda *args: "left out here"
    )
    inputs = [checkpoint(tmp_path, step) for step in (7, 8, 9)]
    assert average_main([*inputs, "--out", str(tmp_path / "out")]) == 0
    assert len(alive) == 3 * len(three[0]) and most <= 3


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{7}"], "CHECKPOINT: given one, expected at least two"),
        (["{7}", "{8}", "--weights", "0.5,0.6"], "numbers above 0 that add up to 1"),
        (["{7}", "{8}", "--weights", "1"], "expected 2 numbers"),
        (["{7}", "{8}", "--weights", "a,b"], "given 'a,b'"),
        (["{7}", "{8}", "--weights", "1.5,-0.5"], "numbers above 0"),
        (["{run}", "--last", "5"], "--last: given 5, but"),
        (["{7}", "{8}", "--last", "2"], "expected the folder of one run"),
        (["{7}", "{none}"], "There is no whole checkpoint"),
    ],
)
def test_wrong_arguments(three, tmp_path, capsys, arguments: list[str], told: str) -> None:
    places = {"{7}": checkpoint(tmp_path, 7), "{8}": checkpoint(tmp_path, 8)}
    places |= {"{run}": str(tmp_path / "run"), "{none}": str(tmp_path / "absent")}
    argv = [places.get(each, each) for each in arguments]
    assert average_main([*argv, "--out", str(tmp_path / "out")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], other: Path | str) -> str:
    out = tmp_path / "out"
    assert average_main([checkpoint(tmp_path, 7), str(other), "--out", str(out)]) == 2
    assert not out.exists()
    return capsys.readouterr().err


def test_inputs_that_do_not_fit(
    three, tied_llama, llama, save, tmp_path, capsys, tokenizer_folder
) -> None:
    storage = open_storage(tmp_path / "other" / "checkpoints")
    other = tmp_path / "other" / "checkpoints"
    save(storage, llama, trained(llama), name="step_00000001")
    assert "weights, the first is " in refused(tmp_path, capsys, other / "step_00000001")
    save(
        storage, tied_llama, three[0], name="step_00000002", facts=facts_of(tied_llama), keep=theta
    )
    told = refused(tmp_path, capsys, other / "step_00000002")
    assert "differ in rms_norm_eps of config.json" in told
    changed = facts_of(tied_llama, stop_ids=(0, 1))
    save(storage, tied_llama, three[0], name="step_00000003", facts=changed)
    assert "stop tokens: (0,) and (0, 1)" in refused(tmp_path, capsys, other / "step_00000003")
    spec = AdapterSpec(rank=2, alpha=4, targets=("q_proj",), layers=None)
    adapted = replace(facts_of(tied_llama), adapter=spec)
    save(storage, tied_llama, three[0], name="step_00000004", facts=adapted)
    told = refused(tmp_path, capsys, other / "step_00000004")
    assert "is not the mean of their products BA" in told and "--merge" in told
    plain = tmp_path / "plain"
    folder = hf_folder(tied_llama, facts_of(tied_llama), tokenizer_folder)
    export_hf(plain, folder, card="", weights=three[0].items())
    assert "has no certificate.json" in refused(tmp_path, capsys, plain)


def theta(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": ', '"rms_norm_eps": 1'))


def test_a_used_target_is_refused(three, tmp_path, capsys) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    inputs = [checkpoint(tmp_path, step) for step in (7, 8)]
    assert average_main([*inputs, "--out", str(tmp_path / "out")]) == 2
    assert (tmp_path / "out" / "mine").read_text() == "x"
