"""Exports are judged by transformers: what it loads must be the source, weight for weight."""

from __future__ import annotations

import json
import os
import stat
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from torchprime.checkpoint.export import check_export
from torchprime.checkpoint.hf.read import INDEX, SafetensorsReader, check_names
from torchprime.checkpoint.proof.verify import read_back
from torchprime.errors import CheckpointError

IDS = torch.arange(40).reshape(2, 20) * 7 % 320


def loaded(folder, **more):
    given: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **more
    )
    model, report = given
    assert not any(report.values()), report
    return model.eval()


def test_round_trip_equals_the_source_in_transformers(any_family, export, tmp_path):
    result = export(tmp_path / "out", any_family, max_shard_bytes=30_000)
    assert len(list(result.folder.glob("model-*.safetensors"))) > 1
    read_back(result.folder, result.hashes)
    source, exported = loaded(any_family.folder), loaded(result.folder)
    parameters = dict(exported.named_parameters())
    for name, parameter in source.named_parameters():
        assert torch.equal(parameters.pop(name), parameter), name
    assert not parameters
    with torch.no_grad():
        assert torch.equal(source(IDS).logits, exported(IDS).logits)


def test_real_pretrained_model(stories, export, tmp_path):
    folder = stories.folder
    generation = json.loads((folder / "generation_config.json").read_text())
    result = export(
        tmp_path / "out",
        stories,
        tokenizer_folder=folder,
        eos_token_id=2,
        generation_config=generation,
    )
    assert result.num_parameters == 260_032
    assert (result.folder / "tokenizer.json").read_bytes() == (
        folder / "tokenizer.json"
    ).read_bytes()
    with torch.no_grad():
        assert torch.equal(loaded(folder)(IDS).logits, loaded(result.folder)(IDS).logits)
    stops = json.loads((result.folder / "generation_config.json").read_text())["eos_token_id"]
    assert sorted(stops) == [1, 2]


def test_the_source_files_themselves_equal_ours_byte_for_byte(tied_llama, export, tmp_path):
    """Same tensors through the safetensors library: reading ours with it gives the same."""
    result = export(tmp_path / "out", tied_llama)
    ours = load_file(result.folder / "model.safetensors")
    theirs = load_file(tied_llama.folder / "model.safetensors")
    assert set(ours) == set(theirs) and "lm_head.weight" not in ours
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_small_model_is_one_file_without_index(llama, export, tmp_path):
    folder = export(tmp_path / "out", llama).folder
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert not (folder / INDEX).exists()


def test_shards_are_named_marked_and_within_the_limit(llama, export, tmp_path):
    limit = 30_000
    folder = export(tmp_path / "out", llama, max_shard_bytes=limit).folder
    index = json.loads((folder / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    total = len(files)
    assert total > 2
    assert files == [f"model-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]
    assert files == sorted(path.name for path in folder.glob("*.safetensors"))
    assert index["metadata"]["total_size"] == sum(4 * np.prod(s) for s in llama.spec.values())
    for file in files:
        with safe_open(folder / file, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}
            tensors = [handle.get_tensor(name) for name in handle.keys()]  # noqa: SIM118
        assert sum(t.nbytes for t in tensors) <= limit or len(tensors) == 1
    check_names(llama.spec, SafetensorsReader(folder), tied=False)


def test_weights_may_come_in_any_order(llama, export, tmp_path):
    names = sorted(llama.spec, reverse=True)
    weights = llama.reader.weights(names)
    folder = export(tmp_path / "out", llama, weights=weights, max_shard_bytes=30_000).folder
    reader = SafetensorsReader(folder)
    assert all(torch.equal(reader.get(n), llama.reader.get(n)) for n in names)


def test_bf16_export_is_the_rounded_weight(llama, export, tmp_path):
    folder = export(tmp_path / "out", llama, dtype=torch.bfloat16).folder
    reader = SafetensorsReader(folder)
    for name, tensor in llama.reader.weights(llama.spec):
        assert torch.equal(reader.get(name), tensor.bfloat16())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16


def test_scattered_tensors_are_written_as_they_look(llama, export, tmp_path):
    """Transposed and sliced views have strides: their bytes in memory are not the tensor."""
    weights = (
        (n, t.t().contiguous().t() if t.ndim == 2 else t)
        for n, t in llama.reader.weights(llama.spec)
    )
    folder = export(tmp_path / "out", llama, weights=weights).folder
    reader = SafetensorsReader(folder)
    assert all(torch.equal(reader.get(n), llama.reader.get(n)) for n in llama.spec)


@pytest.mark.parametrize(("umask", "file"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o644)])
def test_files_are_readable_as_the_umask_says(llama, export, tmp_path, umask, file):
    """And writable by nobody else, whatever it says."""
    previous = os.umask(umask)
    try:
        folder = export(tmp_path / "out", llama, max_shard_bytes=30_000).folder
    finally:
        os.umask(previous)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in folder.rglob("*") if p.is_file()}
    assert set(modes.values()) == {file}, modes
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755 & ~umask


def test_export_never_mixes_with_an_older_one(llama, export, tmp_path):
    out = tmp_path / "out"
    export(out, llama, max_shard_bytes=30_000)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(CheckpointError, match="already holds"):
        export(out, llama)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_failure_in_the_middle_leaves_nothing(llama, export, tmp_path):
    def breaks():
        for count, item in enumerate(llama.reader.weights(llama.spec)):
            if count == 5:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "out", llama, weights=breaks())
    assert list(tmp_path.iterdir()) == []


def test_one_tensor_in_memory_at_a_time(llama, export, tmp_path):
    former: list[weakref.ref] = []

    def fresh():
        for name, shape in llama.spec.items():
            alive = [reference for reference in former if reference() is not None]
            assert not alive, f"a former tensor is still held when {name} is made"
            tensor = torch.ones(shape)
            former.append(weakref.ref(tensor))
            item = (name, tensor)
            del tensor
            yield item
            del item

    export(tmp_path / "out", llama, weights=fresh(), max_shard_bytes=30_000)
    assert len(former) == len(llama.spec)


def with_change(checkpoint, name, value):
    for key, tensor in checkpoint.reader.weights(checkpoint.spec):
        yield (key, value if key == name else tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(llama, export, tmp_path, value, dtype):
    for place in (0, 3, 31):
        bad = torch.linspace(-3e38, 3e38, 32)
        bad[place] = value
        weights = with_change(llama, "model.norm.weight", bad)
        with pytest.raises(CheckpointError, match="model.norm.weight holds NaN or infinite"):
            export(tmp_path / "out", llama, weights=weights, dtype=dtype)
        assert list(tmp_path.iterdir()) == []


def test_large_weights_are_finite(llama, export, tmp_path):
    large = torch.full((32,), 3e38)
    export(tmp_path / "out", llama, weights=with_change(llama, "model.norm.weight", large))


def test_missing_weights_are_listed(llama, export, tmp_path):
    names = [n for n in llama.spec if n not in ("model.norm.weight", "lm_head.weight")]
    with pytest.raises(CheckpointError, match="(?s)2 of .*model.norm.weight") as caught:
        export(tmp_path / "out", llama, weights=llama.reader.weights(names))
    assert "lm_head.weight" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_wrong_shape_strange_and_doubled_weights_are_named(llama, export, tmp_path):
    reshaped = with_change(llama, "model.norm.weight", torch.ones(33))
    with pytest.raises(CheckpointError, match=r"norm.weight has shape \[33\]; \[32\]"):
        export(tmp_path / "out", llama, weights=reshaped)
    with pytest.raises(CheckpointError, match="strange is not part"):
        export(tmp_path / "out", llama, weights=[("strange", torch.ones(1))])
    norm = ("model.norm.weight", torch.ones(32))
    with pytest.raises(CheckpointError, match="norm.weight came twice"):
        export(tmp_path / "out", llama, weights=[norm, norm])


def test_head_in_a_tied_export_is_refused(tied_llama, export, tmp_path):
    spec = {**tied_llama.spec, "lm_head.weight": (320, 32)}
    with pytest.raises(CheckpointError, match="a tied model has none"):
        export(tmp_path / "out", tied_llama, spec=spec)


def test_full_disk_is_said_before_anything_is_written(llama, export, tmp_path, monkeypatch):
    from torchprime.checkpoint import room as module

    usage = module.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"the export .* and 0.00 MB are free"):
        export(tmp_path / "deep" / "out", llama)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(max_shard_bytes=0), "max_shard_size_gb"),
        (dict(eos_token_id=9999), "9999 is not in"),
        (dict(dtype=torch.float32), None),
    ],
)
def test_reasons_to_refuse_are_known_before_training(
    llama, make_hf_folder, tmp_path, change, message
):
    def check() -> None:
        folder = make_hf_folder(llama, **{"dtype": torch.bfloat16, **change})
        check_export(tmp_path / "out", folder)

    if message is None:
        check()
    else:
        with pytest.raises(CheckpointError, match=message):
            check()
    assert list(tmp_path.iterdir()) == []


def test_foreign_tokenizer_on_qwen2_is_refused_before_training(tmp_path, make_hf_folder, llama):
    """AutoTokenizer (and so vLLM) replaces its pre-tokenizer: digits would merge."""
    config = {**llama.config, "model_type": "qwen2", "rope_parameters": {"rope_theta": 1e4}}
    with pytest.raises(CheckpointError, match="read wrongly by transformers' AutoTokenizer"):
        check_export(tmp_path / "out", make_hf_folder(llama, config=config))
