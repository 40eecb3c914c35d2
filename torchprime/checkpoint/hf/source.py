"""The source of pretrained files: a local folder, or a snapshot of a hub repository.

A name is resolved to a local folder; all later code works on folders and needs no network. Only
configuration, tokenizer and safetensors files are downloaded: no pickles, no code. Errors (unknown
name, gated repository, no network) are raised at once, with the way to fix them.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from pathlib import Path

import httpx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from torchprime.checkpoint.hf.weight_names import MERGE
from torchprime.errors import CheckpointError
from torchprime.files.json_files import LARGE, read_json
from torchprime.models.unsupported import DEQUANTIZE

# model*.safetensors leaves out second copies in the authors' own layout (consolidated.safetensors).
WEIGHT_PATTERNS = ["model*.safetensors", "model.safetensors.index.json"]
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# Of a model with images: how they are made into numbers.
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
SMALL_PATTERNS = [
    "config.json",
    "adapter_config.json",
    "quantize_config.json",
    "quant_config.json",
    "generation_config.json",
    *TOKENIZER_FILES,
    "additional_chat_templates/*.jinja",
    *PROCESSOR_FILES,
]
ADAPTER_FILE = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
QUANTIZER_FILES = ("quantize_config.json", "quant_config.json")  # of AutoGPTQ and AutoAWQ
PICKLES = ("*.bin", "*.pth", "*.pt")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def resolve_pretrained(name_or_path: str, *, cache_dir: str | None, weights: bool) -> Path:
    """Find or download the folder with a pretrained model's or tokenizer's files.

    Args:
        name_or_path: a local folder, or the name of a hub repository (`owner/name`).
        cache_dir: where hub files are kept; None for the library's own place (HF_HOME).
        weights: whether the weights are needed, too. They must then be safetensors.

    Returns:
        Its real path: if a link on the way is changed later, reads still get the files that were
        checked.

    Raises:
        CheckpointError: no such folder or repository, no access, no network, no safetensors.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        source = f"the folder {folder}"
    elif folder.is_file():
        raise CheckpointError(
            f"{name_or_path} is a file; a checkpoint is a folder. Give {folder.parent} instead."
        )
    elif not HUB_NAME.fullmatch(name_or_path):
        raise CheckpointError(_no_such_folder(name_or_path, folder))
    else:
        source = f"the hub repository {name_or_path}"
        patterns = SMALL_PATTERNS + (WEIGHT_PATTERNS if weights else [])
        folder = _fetch(name_or_path, cache_dir, patterns)
    folder = folder.resolve()
    _require_regular(folder)
    if weights:
        _require_checkpoint(folder, source)
    return folder


def resolve_adapter(name_or_path: str, *, cache_dir: str | None) -> Path:
    """Find or download the folder of a PEFT adapter.

    Args:
        name_or_path: a local folder, or the name of a hub repository (`owner/name`).
        cache_dir: where hub files are kept; None for the library's own place (HF_HOME).

    Raises:
        CheckpointError: no such folder or repository, no access, no network, no adapter in it, or
            its weights are no safetensors.
    """
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        if not HUB_NAME.fullmatch(name_or_path):
            raise CheckpointError(_no_such_folder(name_or_path, folder))
        folder = _fetch(name_or_path, cache_dir, [*SMALL_PATTERNS, ADAPTER_WEIGHTS])
    folder = folder.resolve()
    _require_regular(folder)
    if not os.path.lexists(folder / ADAPTER_FILE):
        inside = folder / "export"  # the folder of a run
        hint = f" Did you mean {inside}?" if (inside / ADAPTER_FILE).is_file() else ""
        raise CheckpointError(
            f"{name_or_path} is no PEFT folder: it has no {ADAPTER_FILE}. Expected a folder with "
            f"{ADAPTER_FILE} and {ADAPTER_WEIGHTS}, as PEFT's save_pretrained writes it.{hint}"
        )
    if not os.path.lexists(folder / ADAPTER_WEIGHTS):
        pickles = sorted(path.name for path in folder.glob("adapter_model.*"))
        found = f"only {', '.join(pickles)}" if pickles else "no weights"
        raise CheckpointError(
            f"There is {found} and no {ADAPTER_WEIGHTS} in {name_or_path}; only safetensors are "
            "read, since pickled weights can run code. Load an adapter that you trust in PEFT and "
            "save it again (save_pretrained with safe_serialization=True)."
        )
    return folder


def _require_regular(folder: Path) -> None:
    """Refuse pipes, devices and oversized files, which a library would read without end."""
    patterns = {*SMALL_PATTERNS, *WEIGHT_PATTERNS, "*.json", "*.safetensors"}
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        try:
            facts = path.stat()
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read ({error.strerror}). Fetch it again."
            ) from error
        if not stat.S_ISREG(facts.st_mode):
            raise CheckpointError(
                f"{path} is not a regular file. Do not use this folder before you know who wrote "
                "that, or fetch it again."
            )
        if path.suffix != ".safetensors" and facts.st_size > LARGE:
            raise CheckpointError(
                f"{path} has {facts.st_size:,} bytes, expected at most {LARGE:,}. Fetch the "
                "folder again."
            )


def hub_name(name_or_path: str | None) -> str | None:
    """Return the name of the hub repository that this names; None for a local folder or file."""
    if name_or_path is None or Path(name_or_path).expanduser().exists():
        return None
    return name_or_path if HUB_NAME.fullmatch(name_or_path) else None


def _fetch(name: str, cache_dir: str | None, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(name, cache_dir=cache_dir, allow_patterns=patterns))
    except GatedRepoError as error:
        raise CheckpointError(
            f"The hub repository {name} is gated: ask for access on its page, then log in with "
            "`hf auth login` (or set HF_TOKEN). Or give a local folder that holds its files."
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"The hub knows no repository {name}, or it is private and you are not logged in. "
            "Check the spelling; log in with `hf auth login` (or set HF_TOKEN); or give a local "
            "folder. " + _no_such_folder(name, Path(name))
        ) from error
    except HFValidationError as error:
        raise CheckpointError(_no_such_folder(name, Path(name))) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, httpx.HTTPError, OSError) as error:
        reason = error.__cause__ or error
        first_line = (str(reason).splitlines() or ["no text"])[0]
        raise CheckpointError(
            f"The files of the hub repository {name} are not in the cache and could not be fetched "
            f"({type(reason).__name__}: {first_line}). Give a local folder; or copy a filled cache "
            "here and point HF_HOME at it; or connect to the network (unset HF_HUB_OFFLINE). "
            + _no_such_folder(name, Path(name))
        ) from error


def _no_such_folder(name: str, folder: Path) -> str:
    """Return the error for a missing local folder, with the most similar existing name."""
    message = f"There is no local folder {name}"
    if not folder.parent.is_dir():
        return message + (f": {folder.parent} does not exist." if "/" in name else ".")
    siblings = [entry.name for entry in folder.parent.iterdir() if entry.is_dir()]
    nearest = difflib.get_close_matches(folder.name, siblings, n=1)
    return message + (f"; did you mean {folder.parent / nearest[0]}?" if nearest else ".")


def _refuse_foreign(folder: Path, source: str) -> None:
    """Raise an error if the folder holds a PEFT adapter or weights of an old quantizer."""
    if os.path.lexists(folder / ADAPTER_FILE):
        base = read_json(folder / ADAPTER_FILE).get("base_model_name_or_path")
        beside = any(folder.glob("model*.safetensors"))
        what = "a model with a PEFT adapter beside it, which transformers would apply to it;"
        if not beside:
            raise CheckpointError(
                f"There is a PEFT adapter of {base!r:.200}, not a model; see {ADAPTER_FILE} in "
                f"{source}. Merge it into its base: torchprime export --adapter DIR --merge --out "
                "NEW. Or train it further: adapter.pretrained=DIR and model.pretrained_model=BASE."
            )
        raise CheckpointError(
            f"There is {what} see {ADAPTER_FILE} in {source}. Merge it: {MERGE}. Or remove "
            f"{ADAPTER_FILE} to train the model alone."
        )
    for name in QUANTIZER_FILES:
        if os.path.lexists(folder / name):
            raise CheckpointError(
                f"There is a quantized model in {source} ({name}), which cannot be trained: "
                f"{DEQUANTIZE}."
            )


def _require_checkpoint(folder: Path, source: str) -> None:
    if not os.path.lexists(folder / "config.json"):
        _refuse_foreign(folder, source)
        inside = folder / "export"  # the folder of a run
        hint = "Give the folder that holds them."
        raise CheckpointError(
            f"There is no config.json in {source}; a checkpoint folder holds config.json and "
            f"*.safetensors. "
            + (f"Did you mean {inside}?" if (inside / "config.json").is_file() else hint)
        )
    _refuse_foreign(folder, source)
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    found = f"only {', '.join(pickles[:3])}" if pickles else "no weights"
    raise CheckpointError(
        f"There is {found} and no *.safetensors in {source}; only safetensors are read, since "
        'pickled weights can run code. Convert a checkpoint that you trust: python -c "from '
        "transformers import AutoModelForCausalLM as M; M.from_pretrained('OLD', dtype='auto')"
        ".save_pretrained('NEW')\", then copy its tokenizer files to NEW."
    )
