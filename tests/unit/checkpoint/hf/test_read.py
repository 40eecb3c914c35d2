"""Reading checkpoints: layouts that exist in the wild, damaged files, names that do not fit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from torchprime.checkpoint.hf.read import INDEX, SafetensorsReader, check_names
from torchprime.errors import CheckpointError


def write_index(folder, weight_map, **more):
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map, **more}))


def test_every_tensor_equals_what_transformers_holds(any_family):
    model = transformers.AutoModelForCausalLM.from_pretrained(any_family.folder, dtype="auto")
    parameters = dict(model.named_parameters())
    names = any_family.reader.names()
    assert set(names) == set(parameters)
    for name, parameter in parameters.items():
        assert names[name] == (tuple(parameter.shape), parameter.dtype)
        assert torch.equal(any_family.reader.get(name), parameter)


def test_listing_reads_no_tensor(llama, monkeypatch):
    class HeaderOnly:
        def __init__(self, handle):
            self.handle = handle

        def __getattr__(self, key):
            assert key != "get_tensor", "a tensor was read for the listing"
            return getattr(self.handle, key)

    from torchprime.checkpoint.hf import read as hf_read

    real = hf_read.open_checked
    monkeypatch.setattr(hf_read, "open_checked", lambda path: HeaderOnly(real(path)))
    reader = SafetensorsReader(llama.folder)
    check_names(llama.spec, reader, tied=False)


def test_shards_written_by_transformers(tied_llama, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(tied_llama.folder)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    reader = SafetensorsReader(tmp_path)
    check_names(tied_llama.spec, reader, tied=True)
    for name, tensor in tied_llama.reader.weights(tied_llama.spec):
        assert torch.equal(reader.get(name), tensor)


def test_first_shard_named_like_a_whole_checkpoint_is_a_shard(llama, tmp_path):
    weights = load_file(llama.folder / "model.safetensors")
    names = sorted(weights)
    half = len(names) // 2
    save_file({n: weights[n] for n in names[:half]}, tmp_path / "model.safetensors")
    save_file({n: weights[n] for n in names[half:]}, tmp_path / "model_2.safetensors")
    files = {n: "model.safetensors" if n in names[:half] else "model_2.safetensors" for n in names}
    write_index(tmp_path, files)
    reader = SafetensorsReader(tmp_path)
    assert set(reader.names()) == set(names)
    check_names(llama.spec, reader, tied=False)


def test_old_checkpoint_beside_a_new_index_is_refused(llama, tmp_path):
    shutil.copy(llama.folder / "model.safetensors", tmp_path / "model.safetensors")
    shutil.copy(llama.folder / "model.safetensors", tmp_path / "model-00001-of-00001.safetensors")
    write_index(tmp_path, {n: "model-00001-of-00001.safetensors" for n in llama.spec})
    with pytest.raises(CheckpointError, match="two checkpoints"):
        SafetensorsReader(tmp_path)


def test_one_file_of_another_name(llama, tmp_path):
    shutil.copy(llama.folder / "model.safetensors", tmp_path / "pytorch_model.safetensors")
    check_names(llama.spec, SafetensorsReader(tmp_path), tied=False)


def test_shards_without_index_are_refused(llama, tmp_path):
    for number in (1, 2):
        name = f"model-0000{number}-of-00002.safetensors"
        shutil.copy(llama.folder / "model.safetensors", tmp_path / name)
    with pytest.raises(
        CheckpointError, match=r"2 \*.safetensors files and no model.safetensors.index"
    ):
        SafetensorsReader(tmp_path)


def test_bare_decoder_names_get_their_prefix(tied_llama, tmp_path):
    model = transformers.AutoModel.from_pretrained(tied_llama.folder)
    model.save_pretrained(tmp_path)
    assert "layers.0.mlp.up_proj.weight" in load_file(tmp_path / "model.safetensors")
    reader = SafetensorsReader(tmp_path)
    check_names(tied_llama.spec, reader, tied=True)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(reader.get(name), tied_llama.reader.get(name))


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_file_is_named(llama, tmp_path, keep):
    content = (llama.folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match="model.safetensors .*not a whole safetensors file"):
        SafetensorsReader(tmp_path)


def test_lfs_pointer_is_named(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises(CheckpointError, match="git-lfs pointer"):
        SafetensorsReader(tmp_path)


def test_index_naming_missing_files_lists_them(llama, tmp_path):
    shutil.copy(llama.folder / "model.safetensors", tmp_path / "a.safetensors")
    names = list(llama.spec)
    files = {n: "a.safetensors" for n in names}
    write_index(tmp_path, {**files, names[0]: "b.safetensors", names[1]: "c.safetensors"})
    with pytest.raises(CheckpointError, match="b.safetensors, c.safetensors"):
        SafetensorsReader(tmp_path)


def test_index_that_disagrees_with_its_files(llama, tmp_path):
    shutil.copy(llama.folder / "model.safetensors", tmp_path / "a.safetensors")
    files = {n: "a.safetensors" for n in llama.spec if n != "model.norm.weight"}
    write_index(tmp_path, {**files, "model.ghost": "a.safetensors"})
    with pytest.raises(CheckpointError) as caught:
        SafetensorsReader(tmp_path)
    assert "model.ghost" in str(caught.value) and "model.norm.weight" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "holds a list"),
        ('{"metadata": {}}', "is not an index"),
        ('{"weight_map": 3}', "is not an index"),
    ],
)
def test_broken_index(tmp_path, text, message):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsReader(tmp_path)


def test_index_cannot_reach_out_of_the_folder(llama, tmp_path):
    write_index(tmp_path, {n: str(llama.folder / "model.safetensors") for n in llama.spec})
    with pytest.raises(CheckpointError, match="names a file .*, and it is a path"):
        SafetensorsReader(tmp_path)


def test_all_misfits_are_listed_at_once(llama, tmp_path):
    weights = load_file(llama.folder / "model.safetensors")
    del weights["model.norm.weight"], weights["lm_head.weight"]
    weights["model.layers.9.what"] = torch.zeros(2)
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 31)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        check_names(llama.spec, SafetensorsReader(tmp_path), tied=False)
    message = str(caught.value)
    assert "Missing from the files (2):" in message
    assert "model.norm.weight" in message and "lm_head.weight" in message
    assert "Not known to the model (1):\n  model.layers.9.what" in message
    assert "up_proj.weight: [48, 31] in the file, [48, 32] in the model" in message


def test_rotary_buffers_of_old_checkpoints_are_tolerated(llama, tmp_path):
    weights = load_file(llama.folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(weights, tmp_path / "model.safetensors")
    check_names(llama.spec, SafetensorsReader(tmp_path), tied=False)


@pytest.mark.parametrize("change", [0.0, 1e-3])
def test_head_of_a_tied_model_must_equal_the_embedding(tied_llama, tmp_path, change):
    weights = load_file(tied_llama.folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + change
    save_file(weights, tmp_path / "model.safetensors")
    reader = SafetensorsReader(tmp_path)
    if change == 0.0:
        check_names(tied_llama.spec, reader, tied=True)
    else:
        with pytest.raises(CheckpointError, match="differs from model.embed_tokens.weight"):
            check_names(tied_llama.spec, reader, tied=True)


def test_untied_model_without_head_is_refused(tied_llama):
    spec = {**tied_llama.spec, "lm_head.weight": (320, 32)}
    with pytest.raises(CheckpointError, match=r"Missing from the files \(1\):\n  lm_head.weight"):
        check_names(spec, tied_llama.reader, tied=False)
