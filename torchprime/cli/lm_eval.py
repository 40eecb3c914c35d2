"""`torchprime lm-eval EXPORT --tasks gsm8k,...`: standard benchmarks on an export.

EleutherAI's lm-eval harness (an optional extra; its tasks download their data from the hub)
evaluates the model that transformers loads from the folder, with every weight accounted for. The
results are written to lm_eval.json beside the export, with the export's certificate, the settings
and the versions. Inside the export it would be a file that the certificate does not list.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any, TypedDict

from torchprime.checkpoint.adapter.load import load_model, resolve_model
from torchprime.checkpoint.hf.portable import auto_tokenizer
from torchprime.checkpoint.proof.certificate import CERTIFICATE, read_certificate
from torchprime.cli.chat import DEVICES, choose_device
from torchprime.cli.shared.arguments import make_parser, positive, run_command
from torchprime.config.paths import local_path, name_or_folder
from torchprime.data.templates.choose import resolve_template
from torchprime.data.tokenizer.load import load_tokenizer
from torchprime.errors import ConfigError, RuntimeSetupError
from torchprime.files.atomic import write_json
from torchprime.files.hashing import hash_file
from torchprime.installed import installed_versions
from torchprime.text.terminal import print_lines
from torchprime.training.run.folder import versions

RESULT = "lm_eval.json"
FORMAT_VERSION = 1
AUTO, YES, NO = "auto", "yes", "no"
EPILOG = f"""\
Tasks: https://github.com/EleutherAI/lm-evaluation-harness/tree/main/lm_eval/tasks, or your own YAML
files in --include-path. The result goes beside the export as {RESULT}.
"""


def lm_eval_main(argv: list[str]) -> int:
    """Run `lm-eval` with the arguments after it; return the exit code."""
    parser = make_parser("torchprime lm-eval", "Score an export on standard benchmarks.", EPILOG)
    add = parser.add_argument
    add("export", metavar="EXPORT", help="folder or hub name")
    add("--tasks", metavar="A,B", required=True, help="names of tasks, groups or tags")
    add("--limit", type=positive, metavar="N", help="only the first N rows of each task")
    add("--out", metavar="FILE", help=f"default: {RESULT} beside the export")
    add("--num-fewshot", type=int, metavar="N", help="few-shot examples (default: the task's own)")
    add("--batch-size", type=positive, default=8, metavar="N", help="default: 8")
    add(
        "--chat-template",
        choices=(AUTO, YES, NO),
        default=AUTO,
        help="use the folder's chat template; auto: if it has one",
    )
    add("--include-path", metavar="FOLDER", help="folder with YAML files of your own tasks")
    add("--device", choices=DEVICES, default="auto", help="auto: cuda if there is one, else cpu")
    return run_command(parser, argv, _evaluate)


def _evaluate(given: argparse.Namespace) -> int:
    harness = load_harness()
    tasks = [name.strip() for name in given.tasks.split(",") if name.strip()]
    folder = resolve_model(name_or_folder("EXPORT", given.export))
    beside = folder.resolve().parent / RESULT
    out = beside if given.out is None else local_path("--out", given.out)
    _require_new(out)
    manager = _task_manager(tasks, given.include_path)
    chat = _wants_template(given.chat_template, folder)
    device = choose_device(given.device)
    model = load_model(folder).to(device)
    # late: as below; load_harness has checked that it is installed
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    tokenizer = auto_tokenizer(folder)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=given.batch_size)
    settings = {
        "num_fewshot": given.num_fewshot,
        "limit": given.limit,
        "batch_size": given.batch_size,
        "apply_chat_template": chat,
    }
    try:
        found = harness.simple_evaluate(
            model=wrapped, tasks=tasks, task_manager=manager, log_samples=False, **settings
        )
    except (OSError, ValueError) as error:  # no network, a task that needs a consent, ...
        reason = error.__cause__ or error
        raise RuntimeSetupError(
            f"lm-eval could not evaluate {', '.join(tasks)} ({type(reason).__name__}: {reason}). "
            "If it is the task's data: connect to the network (unset HF_HUB_OFFLINE), or copy a "
            "filled cache here and point HF_HOME at it"
        ) from error
    settings |= {"device": device.type, "dtype": str(model.dtype).removeprefix("torch.")}
    record = _record(folder, given.export, found, settings)
    write_json(out, record)
    lines = [*_table(record["results"]), *_note(given.limit), f"wrote {out}"]
    print_lines(lines, "backslashreplace")
    return 0


def load_harness() -> ModuleType:
    """Import and return the harness.

    Raises:
        RuntimeSetupError: it is not installed; the message has the install command.
    """
    try:
        # late: an optional extra
        import lm_eval  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise RuntimeSetupError(
            f"lm-eval is not installed here ({error}). Install the extra: pip install "
            "'torchprime[lm-eval]', or in a checkout: pip install -e '.[lm-eval]'"
        ) from error
    return lm_eval


def _require_new(out: Path) -> None:
    if out.exists():
        raise ConfigError(f"--out: {out} exists already. Give another file, or remove this one")
    if not out.parent.is_dir():
        raise ConfigError(f"--out: there is no folder {out.parent}")


def _task_manager(tasks: list[str], include_path: str | None) -> Any:
    """Return a manager of the harness's own tasks and the user's.

    Raises:
        ConfigError: a name that no task has.
    """
    if include_path is not None:
        include_path = str(local_path("--include-path", include_path))
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"--include-path: {include_path} is not a folder")
    # late: as above
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    manager = TaskManager(include_path=include_path)
    if not tasks:
        raise ConfigError("--tasks: given no name, expected for example gsm8k")
    for name in tasks:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ConfigError(f"--tasks: lm-eval knows no task {name}{hint}")
    return manager


def _wants_template(asked: str, folder: Path) -> bool:
    there = resolve_template(None, load_tokenizer(folder)) is not None
    if asked == YES and not there:
        raise ConfigError(f"--chat-template yes: {folder} has none. Use no")
    return there if asked == AUTO else asked == YES


# The result ---------------------------------------------------------------------------------------


class CertificateIdentity(TypedDict):
    """The certificate of a scored export: the file's sha256 and what it says of the weights."""

    sha256: str
    passed: bool
    base_model: str | None
    step: int | None


class LmEvalRecord(TypedDict):
    """The content of lm_eval.json.

    The harness's own names are those from `task_versions` on, each by task: the numbers of
    few-shot examples and of rows, the direction of each metric, and the results by metric and
    filter.
    """

    format_version: int
    export: str
    certificate: CertificateIdentity | None
    created: str
    settings: Mapping[str, object]
    versions: dict[str, str]
    task_versions: dict[str, object]
    num_fewshot: dict[str, object]
    num_samples: dict[str, object]
    higher_is_better: dict[str, object]
    results: Mapping[str, Mapping[str, Any]]


def _record(
    folder: Path, named: str, found: Mapping[str, Any], settings: Mapping[str, object]
) -> LmEvalRecord:
    return {
        "format_version": FORMAT_VERSION,
        "export": named,
        "certificate": _certificate(folder),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings,
        "versions": versions() | installed_versions(("lm_eval", "datasets")),
        "task_versions": _plain(found["versions"]),
        "num_fewshot": _plain(found["n-shot"]),
        "num_samples": _plain(found["n-samples"]),
        "higher_is_better": _plain(found["higher_is_better"]),
        "results": _plain(found["results"]),
    }


def _certificate(folder: Path) -> CertificateIdentity | None:
    """Return the certificate's identity of an export; None for a folder without a certificate."""
    path = folder / CERTIFICATE
    if not path.is_file():
        return None
    certificate = read_certificate(folder)
    return {
        "sha256": hash_file(path)["sha256"],
        "passed": not certificate.failed,
        "base_model": certificate.base_model,
        "step": certificate.step,
    }


def _plain(value: Any) -> Any:
    """Convert a value to JSON types: numpy's numbers become numbers, unknown types become text."""
    return json.loads(json.dumps(value, default=lambda each: getattr(each, "item", each.__str__)()))


def _table(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a line for each metric: task, metric and filter, value, standard error."""
    rows = []
    for task, metrics in results.items():
        for key, value in metrics.items():
            name, _, filtered = key.partition(",")
            if isinstance(value, str | bool) or name.endswith("_stderr") or not filtered:
                continue
            error = metrics.get(f"{name}_stderr,{filtered}")
            spread = f" ± {error:.4f}" if isinstance(error, float) else ""
            rows.append((task, f"{name} ({filtered})", f"{value:.4f}{spread}"))
    widths = [max((len(row[place]) for row in rows), default=0) for place in range(3)]
    return [
        "  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _note(limit: int | None) -> list[str]:
    return (
        []
        if limit is None
        else [f"note: only the first {limit} rows were used; do not publish this result"]
    )
