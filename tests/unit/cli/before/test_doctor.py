"""`torchprime doctor`: what does not fit is said with the command that mends it."""

from __future__ import annotations

import json
from importlib import metadata

import pytest

from torchprime import __version__
from torchprime.cli.before import doctor
from torchprime.cli.main import main
from torchprime.torch_xla_models.compile import library as tpu_library

XLA = doctor.EXTRAS[doctor.XLA]
ASKED = [
    "numpy>=1.26",
    "missing-one>=2",
    'jax==0.7.1; python_version >= "3.0" and extra == "xla"',
    'jax==0.6.2; python_version < "3.0" and extra == "xla"',
    'accelerate>=1.0; extra == "gpu"',
    'ruff>=99; extra == "dev"',
]


def test_versions_that_do_not_fit() -> None:
    there = {"numpy": "1.20", "jax": "0.9.0", "ruff": "0.1"}
    assert doctor.misfits(ASKED, there.get, XLA) == [
        "jax is 0.9.0, ==0.7.1 is needed",
        "missing-one is missing, >=2 is needed",
        "numpy is 1.20, >=1.26 is needed",
    ]
    fitting = {"numpy": "2.0", "jax": "0.7.1", "missing-one": "2.1"}
    assert doctor.misfits(ASKED, fitting.get, XLA) == []


@pytest.mark.parametrize(
    ("there", "state", "words"),
    [
        ({}, "none", "neither torch_xla"),
        ({"torch_xla": "2.9.0", "torch": "2.9.1"}, "ok", "torch_xla 2.9.0"),
        ({"torch-tpu": "0.2.0", "torch": "2.13.0"}, "ok", "never run on a TPU"),
        ({"torch-tpu": "0.3.1", "torch": "2.13.0"}, "PROBLEM", "torch-tpu: given 0.3.1"),
        ({"torch-tpu": "0.2.0", "torch": "2.14.1"}, "PROBLEM", "torch: given 2.14.1"),
        (
            {"torch-tpu": "0.2.0", "torch": "2.13.0", "torch_xla": "2.9.0"},
            "PROBLEM",
            "torch_xla: given 2.9.0 beside torch-tpu",
        ),
    ],
)
def test_the_runtime_for_tpus(monkeypatch, there: dict[str, str], state: str, words: str) -> None:
    monkeypatch.setattr(doctor, "installed_version", there.get)
    (found,) = doctor.runtime()
    assert found.state == state and words in found.detail
    assert state != "PROBLEM" or "make setup-torchtpu" in found.detail


def test_this_host_quickly(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--quick"]) == 0
    said = capsys.readouterr().out
    assert "all versions are compatible" in said and "no chips on this host" in said
    assert "virtual devices" not in said


def test_json_is_all_that_is_printed(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = doctor.gpu

    def noisy():
        print("a library's greeting")
        yield from real()

    monkeypatch.setattr(doctor, "gpu", noisy)
    assert main(["doctor", "--quick", "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert "greeting" in said.err
    assert found["torchprime"] == __version__ and found["python"].startswith("3.")
    assert (
        found["packages"]["torch"] == metadata.version("torch") and found["devices"]["cuda"] == []
    )
    checks = {check["what"]: check["state"] for check in found["checks"]}
    expected = {"python": "ok", "versions": "ok", "runtime": "ok", "TPU": "none", "GPU": "none"}
    assert checks == expected

    monkeypatch.setattr(doctor, "tpu_chips", lambda: ["/dev/accel0"])
    assert main(["doctor", "--quick", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["devices"]["tpu_chips"] == 1
    (problem,) = [check for check in found["checks"] if check["state"] == "PROBLEM"]
    assert problem["what"] == "TPU" and "pip install" in problem["detail"]


@pytest.mark.slow
def test_virtual_devices_compute(monkeypatch, capsys) -> None:
    (found,) = doctor.virtual_devices()
    assert found.state == doctor.OK, found.detail
    monkeypatch.setattr(doctor, "VIRTUAL", "raise RuntimeError('no XLA today')")
    (found,) = doctor.virtual_devices()
    assert found.state == doctor.PROBLEM and "no XLA today" in found.detail


def test_a_problem_shows_in_the_exit_code(monkeypatch, capsys) -> None:
    monkeypatch.setattr(doctor, "tpu_chips", lambda: ["/dev/accel0"])
    monkeypatch.setattr(doctor, "installed_version", {"torch": "1.0"}.get)
    assert main(["doctor", "--quick"]) == 1
    said = capsys.readouterr()
    assert "PROBLEM  TPU" in said.out and "pip install 'torchprime[tpu]'" in said.out
    assert "torch is 1.0" in said.out and "problems found" in said.err


def test_without_libtpu_the_compiler_is_none(monkeypatch) -> None:
    monkeypatch.setattr(tpu_library, "_candidates", list)
    (found,) = doctor.compiler()
    assert found.state == doctor.NONE and "pip install --no-deps libtpu" in found.detail
