"""Names to folders: what a wrong name, a hub without network and a pickle-only folder get."""

from __future__ import annotations

import time

import httpx
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from torchprime.checkpoint.hf import source
from torchprime.checkpoint.hf.source import hub_name, resolve_pretrained
from torchprime.errors import CheckpointError


def hub_error(kind):
    request = httpx.Request("GET", "https://hub.invalid/api")
    return kind("no", response=httpx.Response(403, request=request))


def test_local_folder_is_used_as_is(llama):
    assert resolve_pretrained(str(llama.folder), cache_dir=None, weights=True) == llama.folder


def test_a_local_folder_is_no_name_of_the_hub(tmp_path, monkeypatch):
    """`models/mine` has the form of one, and may be somebody's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    given = ("models/mine", "models/theirs", "gpt2", "./models/theirs", "/a", "a/b/c", None)
    found = [hub_name(name) for name in given]
    assert found == [None, "models/theirs", "gpt2", None, None, None, None]


def test_tokenizer_folder_needs_no_config_or_weights(tokenizer_folder):
    found = resolve_pretrained(str(tokenizer_folder), cache_dir=None, weights=False)
    assert found == tokenizer_folder


def test_missing_folder_names_the_nearest(tmp_path):
    (tmp_path / "llama-3-8b").mkdir()
    with pytest.raises(CheckpointError, match="did you mean .*/llama-3-8b"):
        resolve_pretrained(str(tmp_path / "lama-3-8b"), cache_dir=None, weights=True)


def test_missing_parent_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        resolve_pretrained(str(tmp_path / "nowhere" / "x"), cache_dir=None, weights=True)


def test_file_instead_of_folder(llama):
    with pytest.raises(CheckpointError, match="is a file; .* Give"):
        resolve_pretrained(str(llama.folder / "config.json"), cache_dir=None, weights=True)


@pytest.mark.parametrize("name", ["gs://bucket/model", "./here", "a/b/c", "owner/na me", "../x"])
def test_what_cannot_be_a_hub_name_never_asks_the_hub(name, monkeypatch):
    monkeypatch.setattr(source, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match="There is no local folder"):
        resolve_pretrained(name, cache_dir=None, weights=True)


def test_offline_hub_name_fails_at_once_and_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    start = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        resolve_pretrained("owner/model", cache_dir=str(tmp_path), weights=True)
    assert time.monotonic() - start < 2
    message = str(caught.value)
    assert "owner/model" in message and "local folder" in message and "HF_HOME" in message


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (hub_error(GatedRepoError), "gated.*hf auth login"),
        (hub_error(RepositoryNotFoundError), "knows no repository owner/model.*spelling"),
        (LocalEntryNotFoundError("no net"), "HF_HOME"),
        (httpx.ProxyError("proxy refused"), "ProxyError: proxy refused"),
        (httpx.ConnectTimeout(""), "ConnectTimeout: no text"),
    ],
)
def test_each_hub_failure_is_one_clear_message_after_one_try(error, advice, monkeypatch):
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        raise error

    monkeypatch.setattr(source, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=advice):
        resolve_pretrained("owner/model", cache_dir=None, weights=True)
    assert len(calls) == 1


@pytest.mark.parametrize("weights", [False, True])
def test_only_what_is_needed_is_fetched_and_never_code_or_pickles(llama, monkeypatch, weights):
    from huggingface_hub.utils import filter_repo_objects

    repository = [
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "consolidated.safetensors",
        "original/consolidated.00.pth",
        "pytorch_model.bin",
        "modeling_evil.py",
    ]
    fetched = []

    def record(name, *, cache_dir, allow_patterns):
        fetched.extend(filter_repo_objects(repository, allow_patterns=allow_patterns))
        return str(llama.folder)

    monkeypatch.setattr(source, "snapshot_download", record)
    resolve_pretrained("owner/model", cache_dir="somewhere", weights=weights)
    assert fetched == repository[: 6 if weights else 4]


def test_pickles_only_says_how_to_convert(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"only pytorch_model.bin .*save_pretrained"):
        resolve_pretrained(str(tmp_path), cache_dir=None, weights=True)


def test_folder_without_config(tmp_path):
    with pytest.raises(CheckpointError, match="no config.json.*Give the folder that"):
        resolve_pretrained(str(tmp_path), cache_dir=None, weights=True)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no config.json.*Did you mean .*/export?"):
        resolve_pretrained(str(tmp_path), cache_dir=None, weights=True)
