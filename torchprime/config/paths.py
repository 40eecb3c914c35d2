"""One path type for configs and commands: `~`, relative paths and URLs mean the same everywhere.

    ~/data          the user's home
    runs            relative to the folder in which the command was started
    file:///data    the same as /data
    gs://bucket/x   only for keys whose rule accepts URLs; otherwise the message has the alternative

The schema annotates a key with one of the types below, and load.py applies the rule. Arguments of
commands use `local_path` and `place`. A relative task.export_checkpoint_path is the one exception:
it lies inside the run's folder.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

import fsspec

from torchprime.config.checks import refuse

URL = re.compile(r"([A-Za-z][\w+.-]*(?:::[A-Za-z][\w+.-]*)*)://(.*)", re.DOTALL)
# The remains of a URL that lost a slash: `gs:/bucket`, `s3:bucket`.
TORN_URL = re.compile(r"([A-Za-z][\w+.-]*):(?!:)/?[^/]")
LOCAL_SCHEMES = ("file", "local")
REMOTE_SCHEMES = (
    "gs", "gcs", "s3", "s3a", "az", "abfs", "abfss", "adl", "oss", "hdfs", "hf", "http", "https",
    "memory",
)  # fmt: skip


@dataclass(frozen=True)
class PathRule:
    """A rule for the kinds of path that a key accepts.

    Attributes:
        instead: the alternative for a user who gives a URL; None if URLs are accepted.
        words: the type's description in docs/configuration.md.
    """

    instead: str | None = None
    words: str = "path"


_COPY = "Copy it to a disk first (gcloud storage cp -r URL FOLDER) and give that folder."

PathOrUrl = Annotated[str, PathRule(words="path or URL")]
# A name is no path, but some keys take either.
HubNameOrFolder = Annotated[
    str, PathRule(f"{_COPY} A hub repository is owner/name.", "name or path")
]
RowsNameOrFolder = Annotated[
    str,
    PathRule(
        "For rows at a URL set file_dataset_path. A hub dataset is owner/name.", "name or path"
    ),
]
NameOrFile = Annotated[str, PathRule(_COPY, "name or path")]
LocalFolder = Annotated[str, PathRule("Give a folder on a disk of this machine.")]
RunFolders = Annotated[
    str,
    PathRule(
        "Records are appended line by line, which object stores cannot do. Keep output_dir on a "
        "disk and send what lasts: checkpoint.folder=gs://BUCKET/RUNS "
        "task.export_checkpoint_path=gs://BUCKET/EXPORT."
    ),
]
CompileCache = Annotated[
    str,
    PathRule(
        "torch_xla opens no URLs. Mount the bucket (gcsfuse BUCKET /mnt/cache) and set "
        "compile_cache=/mnt/cache."
    ),
]


def is_url(text: str) -> bool:
    """Return True for a URL that fsspec opens by its scheme; a checked path has no other `://`."""
    return URL.match(text) is not None


def checked_path(key: str, text: str, rule: PathRule) -> str:
    """Return the path with `~` expanded and file:// removed.

    Args:
        key: names the config's key or the command's argument in messages.

    Raises:
        ConfigError: an unknown scheme, a URL that the rule excludes, an unknown user after `~`.
    """
    if "\0" in text:
        refuse(key, text, "a path without a NUL character", "Take it out.")
    if match := URL.fullmatch(text):
        return _checked_url(key, text, match[1].lower(), match[2], rule)
    torn = TORN_URL.match(text)
    if torn and torn[1].lower() in REMOTE_SCHEMES and not os.path.lexists(text):
        whole = f"{torn[1].lower()}://{text.split(':', 1)[1].lstrip('/')}"
        refuse(key, text, "a path or a URL", f"Did you mean {whole}? A local path: ./{text}.")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        user = text.split("/", 1)[0]
        refuse(
            key, text, f"a path; there is no user {user[1:]}", f"A folder of that name: ./{text}"
        )
    return expanded


def _checked_url(key: str, text: str, scheme: str, rest: str, rule: PathRule) -> str:
    if scheme in LOCAL_SCHEMES:
        return rest
    known = {*fsspec.available_protocols(), *REMOTE_SCHEMES}
    for part in scheme.split("::"):
        if part not in known:
            close = difflib.get_close_matches(part, REMOTE_SCHEMES, n=1, cutoff=0.5)
            hint = (
                f"Did you mean {close[0]}://?" if close else "Write gs://, s3://, az:// or hf://."
            )
            refuse(key, text, f"a path or a URL of a known kind, not {part}://", hint)
    if rule.instead is not None:
        refuse(key, text, "a path on this machine, not a URL", rule.instead)
    if not rest.strip("/"):
        refuse(key, text, "a URL with a bucket or folder", f"Write {scheme}://BUCKET/FOLDER.")
    return text


def local_path(key: str, text: str, rule: PathRule | None = None) -> Path:
    """Return a command's argument that is a file or folder of this machine.

    Raises:
        ConfigError: as `checked_path`.
    """
    return Path(checked_path(key, text, rule or PathRule(_COPY)))


def name_or_folder(key: str, text: str) -> str:
    """Return a command's argument that is a hub name or a folder of this machine.

    Raises:
        ConfigError: as `checked_path`.
    """
    return checked_path(key, text, get_args(HubNameOrFolder)[1])


def place(key: str, text: str) -> str:
    """Return a command's argument that is a path or a URL.

    Raises:
        ConfigError: as `checked_path`.
    """
    return checked_path(key, text, PathRule())
