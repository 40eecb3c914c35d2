"""Serve an export with vLLM, or ask it and its base the same and print both answers.

    python deploy.py --model EXPORT [--base BASE] [--prompts FILE] [--tensor-parallel-size N]
    python deploy.py --model EXPORT --serve [--port PORT]

This runs in vLLM's environment, on a TPU, GPU or CPU host, from a checkout of torchprime: what it
imports of that needs neither torch_xla nor Hydra. README.md says how to install vLLM.

First the export is checked by its certificate (torchprime/checkpoint/proof/recheck.py): files,
weights, logits in this environment's transformers, chat template, stop tokens, tokenizer. Links to
it are followed once, before that, and a folder that changed meanwhile is not served. Then engine.py
runs vLLM in a process of its own. A folder with a chat template is asked in it, as vLLM's server
would; one without goes on from plain text. The server listens on 127.0.0.1 alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
sys.path.insert(0, str(REPO))
os.environ["USE_TORCH_XLA"] = "0"  # transformers would start XLA where it is installed

from torchprime.checkpoint.hf.source import resolve_pretrained  # noqa: E402
from torchprime.checkpoint.proof.certificate import (  # noqa: E402
    CERTIFICATE,
    read_certificate,
    tally,
    trained_options,
)
from torchprime.checkpoint.proof.recheck import recheck  # noqa: E402
from torchprime.cli.shared.arguments import make_parser, run_command  # noqa: E402
from torchprime.cli.shared.columns import answers_lines  # noqa: E402
from torchprime.config.paths import local_path, name_or_folder  # noqa: E402
from torchprime.errors import CheckpointError, ConfigError, RuntimeSetupError  # noqa: E402
from torchprime.files.json_files import read_json  # noqa: E402
from torchprime.files.template_files import DEFAULT, own_templates  # noqa: E402
from torchprime.generation.prompts import as_question, read_prompts  # noqa: E402
from torchprime.generation.vllm_process import (  # noqa: E402
    INSTALL,
    engine_environment,
    last_error,
)
from torchprime.text.terminal import print_json, print_lines, say  # noqa: E402

HOST = "127.0.0.1"
BASE, TUNED = "base", "model"
QUESTIONS = [
    "A shop sells 12 pencils in a box. How many pencils are in 7 boxes?",
    "Explain in one sentence why the sky is blue.",
    "Write a friendly greeting for a new colleague.",
]
EPILOG = """\
Exit code: 0; 2 for a mistake, a certificate that does not hold, or an engine that fails.
"""


def main(argv: list[str]) -> int:
    """Run with these arguments; the exit code."""
    parser = make_parser("deploy.py", "Serve an export with vLLM, or ask it.", EPILOG)
    add = parser.add_argument
    add("--model", metavar="EXPORT", required=True, help="an export's folder, or hub name")
    add("--base", metavar="BASE", help="the base's folder or hub name: its answers are shown, too")
    add("--prompts", metavar="FILE", help='a line each; .jsonl: "prompt" or "question" of each')
    add("--as-question", action="store_true", help="worded as rows of question and answer are")
    add("--system", metavar="TEXT", help="the system's message, for folders with a chat template")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    add("--temperature", type=float, default=0.0, metavar="T", help="default: 0, greedy")
    add("--seed", type=int, default=0, metavar="N", help="seed of sampling (default: 0)")
    add("--json", action="store_true", help="print one JSON object for each prompt, with token ids")
    add("--serve", action="store_true", help=f"serve the OpenAI API on {HOST}")
    add("--port", type=int, default=8000, metavar="N", help="default: 8000")
    add("--name", metavar="NAME", help="what clients call the model (default: its folder's name)")
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help="chips (default: 1)")
    add("--dtype", metavar="DTYPE", help="default: the folder's own, which is what is certified")
    add("--max-model-len", type=int, metavar="N", help="a shorter context than the model's")
    add("--allow-uncertified", action="store_true", help="for models that torchprime did not make")
    return run_command(parser, argv, deploy)


def deploy(given: argparse.Namespace) -> int:
    """Check everything that can be checked cheaply, then the certificate, then run vLLM."""
    check_numbers(given)
    prompts = QUESTIONS
    if given.prompts is not None:
        prompts = read_prompts(local_path("--prompts", given.prompts))
    if given.serve:
        check_port(given.port)
    names = {} if given.base is None else {BASE: name_or_folder("--base", given.base)}
    names[TUNED] = name_or_folder("--model", given.model)
    folders = {
        title: resolve_pretrained(name, cache_dir=None, weights=True)
        for title, name in names.items()
    }
    before = {folder: stamps_of(folder) for folder in folders.values()}
    certified = has_certificate(folders[TUNED], given.allow_uncertified)
    check_vllm()
    if certified:
        check_certificate(folders[TUNED])
    require_same(before)
    if given.base is not None or given.prompts is not None or not given.serve:
        show_answers(given, folders, prompts)
        require_same(before)
    return serve(given, folders[TUNED]) if given.serve else 0


# Checks -------------------------------------------------------------------------------------------


def check_numbers(given: argparse.Namespace) -> None:
    """Numbers that vLLM would refuse minutes later."""
    for flag in ("max_new_tokens", "tensor_parallel_size", "max_model_len"):
        value = getattr(given, flag)
        if value is not None and value < 1:
            raise ConfigError(f"--{flag.replace('_', '-')}: given {value}, expected 1 or more")
    if not given.temperature >= 0:
        raise ConfigError(f"--temperature: given {given.temperature}, expected 0 (greedy) or more")


def check_port(port: int) -> None:
    """Raise if nothing could listen there."""
    if not 0 < port < 65536:
        raise ConfigError(f"--port: given {port}, expected 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise RuntimeSetupError(
                f"--port: {HOST}:{port} cannot be listened on ({error.strerror}). Give another "
                f"--port, or end what uses it (ss -ltnp 'sport = :{port}' shows it)"
            ) from error


def check_vllm() -> None:
    """Raise, with what to install, if this Python has no vLLM."""
    if importlib.util.find_spec("vllm") is None:
        raise RuntimeSetupError(
            f"{sys.executable} has no vLLM. {INSTALL}\nand run this script with that environment's "
            f"python. {HERE / 'README.md'} has more."
        )


def has_certificate(folder: Path, allow_uncertified: bool) -> bool:
    """Return True if the export has a certificate; raise if that certificate says "failed"."""
    if allow_uncertified and not (folder / CERTIFICATE).is_file():
        say(f"note: {folder} has no {CERTIFICATE}: nothing is known of its weights")
        return False
    try:
        read_certificate(folder).require(folder)
    except CheckpointError as error:
        if (folder / CERTIFICATE).is_file():
            raise
        raise CheckpointError(
            f"{error} For a model that torchprime did not make: --allow-uncertified"
        ) from None
    return True


def check_certificate(folder: Path) -> None:
    """Make the certificate's checks again, here."""
    _, checks = recheck(folder)
    failed = [check for check in checks if check.passed is False]
    if failed:
        told = "".join(f"\n  {check.name}: {check.detail}" for check in failed)
        raise CheckpointError(
            f"{folder} is not what its certificate says, and is not served:{told}\n"
            f"Copy or export it again. `torchprime verify {folder}` makes all checks."
        )
    say(f"certificate of {folder}: verified: {tally(checks)}")


def stamps_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return facts that change if the folder or a file in it is replaced or edited; reads none."""
    paths = [folder, *(path for path in sorted(folder.rglob("*")) if path.is_file())]
    found = {path.relative_to(folder).as_posix(): path.stat() for path in paths}
    return {
        name: (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
        for name, s in found.items()
    }


def require_same(before: Mapping[Path, Mapping[str, tuple[int, ...]]]) -> None:
    """Raise if a folder is not the one that was checked, or not as it was then."""
    for folder, stamps in before.items():
        try:
            now = stamps_of(folder)
        except OSError:
            now = {}
        changed = [name for name in {**stamps, **now} if stamps.get(name) != now.get(name)]
        if changed:
            raise CheckpointError(
                f"{folder} changed while it was checked ({', '.join(sorted(changed)[:3])}), and is "
                "not served. Give a folder that nobody else writes, or run this again."
            )


# Running vLLM -------------------------------------------------------------------------------------


def engine_arguments(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """For LLM and, spelled as flags, for `vllm serve`.

    Left to itself vLLM would take float16 for an export in float32.
    """
    config = read_json(folder / "config.json")
    arguments: dict[str, Any] = {
        "dtype": given.dtype or config.get("dtype") or config.get("torch_dtype") or "auto",
        "tensor_parallel_size": given.tensor_parallel_size,
    }
    if given.max_model_len is not None:
        arguments["max_model_len"] = given.max_model_len
    return arguments


def has_template(folder: Path) -> bool:
    """Return True if vLLM would find a chat template."""
    path = folder / "tokenizer_config.json"
    return DEFAULT in own_templates(folder, read_json(path) if path.is_file() else {})


def show_answers(
    given: argparse.Namespace, folders: Mapping[str, Path], prompts: list[str]
) -> None:
    """Ask every model everything, then print prompt by prompt."""
    worded = [as_question(prompt) for prompt in prompts] if given.as_question else prompts
    if given.system is not None and not any(map(has_template, folders.values())):
        raise ConfigError("--system: no folder has a chat template to put it into. Leave it out")
    found = {}
    for title, folder in folders.items():
        chat = has_template(folder)
        how = "chat template" if chat else "plain text, it has no chat template"
        how += ", --system does not reach it" if given.system is not None and not chat else ""
        say(f"{title:<5} {folder}: {how}")
        request = {
            "engine": {"model": str(folder), "seed": given.seed, **engine_arguments(given, folder)},
            "prompts": worded,
            "chat": chat,
            "system": given.system,
            "template_options": trained_options(folder),
            "max_new_tokens": given.max_new_tokens,
            "temperature": given.temperature,
            "seed": given.seed,
        }
        found[title] = ask(request, title)
    terminal = shutil.get_terminal_size().columns
    for number, prompt in enumerate(worded):
        answers = {title: told[number] for title, told in found.items()}
        if given.json:
            print_json({"prompt": prompt, **answers})
        else:
            texts = [(title, _marked(told, given)) for title, told in answers.items()]
            print_lines([f"> {prompt}", *answers_lines(texts, terminal), ""], "replace")


def _marked(told: Mapping[str, Any], given: argparse.Namespace) -> str:
    cut = told["ended"] != "stop"
    return f"{told['text']} [cut off after {len(told['ids'])} tokens]" if cut else told["text"]


def ask(request: dict[str, Any], title: str) -> list[dict[str, Any]]:
    """Return one model's answers, from a process of its own whose output goes to a log file."""
    with tempfile.TemporaryDirectory(prefix="torchprime-vllm-") as place:
        paths = [Path(place) / "request.json", Path(place) / "answers.json"]
        paths[0].write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, str(HERE / "engine.py"), "answer", *map(str, paths)]
        handle, log = tempfile.mkstemp(prefix=f"vllm-{title}-", suffix=".log")
        with os.fdopen(handle, "wb") as file:
            ended = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=engine_environment("WARNING")
            )
        if ended.returncode or not paths[1].is_file():
            raise RuntimeSetupError(
                f"vLLM could not answer for the {title}, {request['engine']['model']} (exit code "
                f"{ended.returncode}): {last_error(Path(log))}\nAll it said is in {log}"
            )
        content = json.loads(paths[1].read_text(encoding="utf-8"))
    os.unlink(log)
    if "refused" in content:
        raise ConfigError(f"--prompts: {title}: {content['refused']}. Shorten it")
    say(f"{title:<5} answered by {content['version']}")
    return content["answers"]


def serve(given: argparse.Namespace, folder: Path) -> int:
    """Become the server: this process ends with it, and signals reach it."""
    name = given.name or folder.resolve().name
    arguments = {**engine_arguments(given, folder), "host": HOST, "port": given.port}
    arguments |= {"served_model_name": name, "seed": given.seed}
    if options := trained_options(folder):  # what a request does not say, it takes from here
        arguments["default_chat_template_kwargs"] = json.dumps(options)
    flags = [
        part for key, value in arguments.items() for part in (f"--{key.replace('_', '-')}", value)
    ]
    check_port(given.port)  # asking models took a while
    say(f"serving {folder} as {name!r} on http://{HOST}:{given.port}/v1 (Ctrl-C ends it)")
    command = [sys.executable, str(HERE / "engine.py"), "serve", str(folder), *map(str, flags)]
    sys.stdout.flush()
    os.execve(sys.executable, command, engine_environment("INFO"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
