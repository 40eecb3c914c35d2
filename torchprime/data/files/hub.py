"""Rows of a Hugging Face Hub dataset, read with the datasets library and its cache."""

from __future__ import annotations

import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torchprime.data.files.arrow.read import arrow_records, batch_rows
from torchprime.data.files.record import Records
from torchprime.data.files.source import SourceSpec
from torchprime.data.shared.notes import RowNotes
from torchprime.errors import DataError

if TYPE_CHECKING:
    import datasets

HUB_PROBE_SECONDS = 5.0


def read_hub(loaded: datasets.Dataset, label: str, notes: RowNotes | None) -> Records:
    """Stream the rows of a dataset, with ids `label`:n, from its Arrow data as for a file.

    The library's own rows would have all fields of a union schema, filled with nulls.
    """
    size = batch_rows(loaded.data.num_rows, loaded.data.nbytes)
    tables = cast("Iterator[Any]", loaded.with_format("arrow").iter(batch_size=size))
    batches = (batch for table in tables for batch in table.to_batches())
    return arrow_records(label, f"{label}:", loaded.data.schema, batches, notes)


def load_hub(source: SourceSpec) -> datasets.Dataset:
    """Load the source's split of its dataset.

    Raises:
        DataError: the dataset, its configuration or its split can't be loaded.
    """
    # late: it takes more than a second, and a run on a file never needs it
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    name, config = str(source.hf_dataset_name), source.hf_dataset_config_name
    section, split = source.section, source.split
    given = f"{section}.hf_dataset_name={name}"
    try:
        with _no_retries_without_network(name):
            loaded = datasets.load_dataset(
                name, config, split=split, cache_dir=source.cache_dir, streaming=False
            )
    except DatasetNotFoundError as error:
        raise DataError(
            f"{given}: {error} Check the name; a private dataset needs a login (HF_TOKEN)"
        ) from error
    except ConnectionError as error:
        raise DataError(
            f"{given} cannot be loaded: the Hugging Face Hub cannot be reached and the dataset is "
            f"not in the cache. Set {section}.file_dataset_path to a local file "
            f"(and {section}.hf_dataset_name=null), or fix the network{_offline_hint()}"
        ) from error
    except Exception as error:  # a wrong config or split name, a script, a corrupt file
        raise DataError(
            f"{given} (config {config}, split {split}) cannot be "
            f"loaded: {type(error).__name__}: {error}. Check {section}.hf_dataset_config_name and "
            f"{section}.split"
        ) from error
    return cast("datasets.Dataset", loaded)


def _offline_hint() -> str:
    asked = [key for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if os.environ.get(key)]
    return f" ({' and '.join(asked)} is set: unset it to go online)" if asked else ""


@contextmanager
def _no_retries_without_network(name: str) -> Iterator[None]:
    """Check that the hub answers; if it does not, restrict the libraries to their cache.

    Otherwise they retry every request with growing pauses, about 25 seconds on a host without
    network, and give the same result.
    """
    # late: as above
    import datasets.config
    import huggingface_hub.constants

    constants: Any = huggingface_hub.constants
    config: Any = datasets.config
    before = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    local = Path(name).expanduser().is_dir()
    if not local and not any(before) and not _answers(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before


def _answers(endpoint: str) -> bool:
    """Return True for any answer, even an HTTP error; only a failed connection is False."""
    request = urllib.request.Request(endpoint, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=HUB_PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        # The libraries check certificates: they may trust other authorities than Python does.
        return isinstance(error.reason, ssl.SSLError)
    except OSError:
        return False
    return True
