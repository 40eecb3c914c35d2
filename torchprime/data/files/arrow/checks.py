"""Checks of a record batch from a file, before a value of it is read.

Arrow's readers take offsets, sizes and indices as the file has them: a damaged one leads out of the
batch's memory, and ends the process.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa


def check_batch(batch: Any) -> None:
    """Raise pyarrow.ArrowInvalid for a batch with a value that lies outside of it.

    Text that is not UTF-8 is let through: it costs one row later, not the file.
    """
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid:
        for column in batch.columns:
            _check_column(column)


def _check_column(array: Any) -> None:
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        stored = array.storage if isinstance(array, pa.ExtensionArray) else array
        stored.view(_without_text(stored.type)).validate(full=True)


def _without_text(kind: Any) -> Any:
    """Return the type of the same memory with bytes instead of text; unions keep theirs."""
    is_ = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _without_text(kind.storage_type)
    if is_.is_string(kind):
        return pa.binary()
    if is_.is_large_string(kind):
        return pa.large_binary()
    if is_.is_struct(kind):
        return pa.struct([_field(kind.field(i)) for i in range(kind.num_fields)])
    if is_.is_map(kind):
        return pa.map_(_field(kind.key_field), _field(kind.item_field))
    if is_.is_fixed_size_list(kind):
        return pa.list_(_field(kind.value_field), kind.list_size)
    if is_.is_list(kind):
        return pa.list_(_field(kind.value_field))
    if is_.is_large_list(kind):
        return pa.large_list(_field(kind.value_field))
    if is_.is_dictionary(kind):
        return pa.dictionary(kind.index_type, _without_text(kind.value_type))
    return kind


def _field(field: Any) -> Any:
    return field.with_type(_without_text(field.type))
