"""`compile_only` through the real entry point: a small model with the TPU's own compiler, and
what is said where that cannot be."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import peft
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from torchprime.compiling.command import other_request, save_module
from torchprime.compiling.hlo.program import Program
from torchprime.compiling.other_compiler import OtherCompiler, compile_with
from torchprime.compiling.report import judge
from torchprime.compiling.sizes import settings, step_sizes
from torchprime.config.compose import compose_config
from torchprime.config.entry import run_main
from torchprime.config.topologies import topology
from torchprime.errors import ConfigError, RuntimeSetupError
from torchprime.models.architecture import architecture_from_hf
from torchprime.torch_xla_models.attention import choose_kernel
from torchprime.torch_xla_models.compile import command as compile_only
from torchprime.torch_xla_models.compile import library as tpu_library
from torchprime.torch_xla_models.compile.library import Library, find_library
from torchprime.torch_xla_models.train import main
from torchprime.training.setup.model_files import find_architecture

# Small, but with dims that a TPU's tiles do not pad.
TINY = [
    "--config-name", "llama-3-8b-sft-w-gsm8k", "run_name=small", "task=train",
    "model=llama-3.2-1b", "model.pretrained_model=null", "model.architecture.num_hidden_layers=3",
    "model.architecture.hidden_size=512", "model.architecture.intermediate_size=1024",
    "model.architecture.num_attention_heads=4", "model.architecture.num_key_value_heads=2",
    "model.architecture.head_dim=128", "model.architecture.vocab_size=2048",
    "model.architecture.rope_scaling=null", "dataset.block_size=512", "task.loss_chunks=4",
    "task.global_batch_size=16", "task.max_steps=1", "mesh=fsdp4", "compile_only=v5e-4",
    "remat=scan_offload",
]  # fmt: skip


@pytest.fixture(scope="session")
def library() -> Library:
    try:
        return find_library()
    except RuntimeSetupError as error:
        pytest.skip(f"the TPU's compiler is not here (make libtpu): {error}")


@pytest.fixture(scope="module")
def compiled(library, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    assert run_main(main, [*TINY, f"output_dir={folder}"]) == 0
    return folder / "small-v5e-4"


@pytest.fixture(scope="module")
def report(compiled: Path) -> dict:
    return json.loads((compiled / "compile_report.json").read_text())


def test_a_small_model_compiles_and_fits(report: dict) -> None:
    assert report["compiles"] and report["fits"]
    memory = report["memory"]
    # bf16 weights, fp32 master weights and two fp32 moments: 14 bytes a parameter on 4 chips.
    assert memory["argument"] == pytest.approx(14 * report["parameters"] / 4, rel=0.1)
    assert memory["limit"] == int(15.75 * 2**30)
    assert report["versions"]["libtpu"] == tpu_library.VERSION


def test_its_products_are_those_of_the_formula(report: dict) -> None:
    assert report["flops"]["ratio"] == pytest.approx(1.0, abs=0.01)
    assert report["loops"] == [3, 3]  # the layers forward, the layers backward


def test_layer_inputs_wait_in_the_hosts_memory(compiled: Path) -> None:
    """Memory space 5 is the host's: the stack of 3 layers' inputs is there, 4 blocks a chip."""
    program = (compiled / "program.txt").read_text()
    assert re.search(r"bf16\[3,4,512,512\]\{[^}]*S\(5\)\}", program)


def test_splash_attention_is_in_it(report: dict) -> None:
    # Three layers; the forward once more in each backward.
    assert report["kernels"] == {"splash_forward": 6, "splash_backward": 3}


def test_it_gathers_weights_and_reduces_gradients_once(report: dict) -> None:
    moved = {kind: numbers["bytes"] for kind, numbers in report["collectives"].items()}
    theory = report["collectives_in_theory"]
    assert 0.75 * theory["all-gather"] < moved["all-gather"] < 1.25 * theory["all-gather"]
    # The compiler joins small gradients into one all-reduce; large ones are reduced and scattered.
    reduced = moved["reduce-scatter"] + moved["all-reduce"]
    assert 0.9 * theory["reduce-scatter"] < reduced < 1.1 * theory["reduce-scatter"]
    # Attention's kernel lies on the mesh as everything around it does.
    assert moved.get("collective-permute", 0) < 0.05 * theory["all-gather"]
    # The embedding's rows and their gradients go to the chips whose tokens they are, nothing else.
    hidden = report["slot_tokens_per_chip"] * 512 * 2
    assert moved.get("all-to-all", 0) <= 2 * hidden


@pytest.mark.slow
def test_the_portable_module_is_the_same_step(library, report: dict, tmp_path) -> None:
    """The module through a file and a second process, by the same compiler."""
    config = compose_config(TINY)
    hf_config = config.to_dict()["model"]["architecture"]
    sizes = step_sizes(config, architecture_from_hf(hf_config))
    module = tmp_path / "module.vhlo"
    compiler = compile_only.compiler_of(library)
    save_module(config, hf_config, compiler, tmp_path, module)
    same = OtherCompiler(Path(sys.executable), "0.7.1", library.version)
    request = other_request(config, compiler, module)
    env = compile_only.other_environment(config, {}) | {"TPU_LIBRARY_PATH": str(library.path)}
    result = compile_with(same, request, env, tmp_path / "other", 600)
    program = Program((tmp_path / "other" / "program.txt").read_text())
    found = judge(program, result["memory"], sizes, topology("v5e-4").chip)
    for part in ("collectives", "flops", "kernels", "loops"):
        assert json.loads(json.dumps(found[part])) == report[part]


@pytest.mark.slow
def test_a_newer_compiler_beside(library, tmp_path) -> None:
    newer = os.environ.get("LIBTPU_NEW", str(Path(sys.prefix) / "libtpu-new"))
    if not Path(newer).is_dir():
        pytest.skip("no newer compiler is here: make libtpu-new")
    argv = [*TINY, f"compile_libtpu={newer}", f"output_dir={tmp_path}"]
    assert run_main(main, argv) == 0
    found = json.loads((tmp_path / "small-v5e-4" / "compile_report.json").read_text())
    other = found["other"]
    assert other["versions"]["libtpu"] != found["versions"]["libtpu"]
    assert other["kernels"] == found["kernels"] and other["loops"] == found["loops"]
    assert other["flops"]["ratio"] == pytest.approx(1.0, abs=0.01)


@pytest.mark.slow
def test_gradients_are_reduce_scattered_over_a_square_of_chips(library, tmp_path) -> None:
    """In two stages: the second reduces a quarter of the first."""
    sizes = ["hidden_size=1024", "intermediate_size=2048", "num_attention_heads=8"]
    larger = [f"model.architecture.{size}" for size in (*sizes, "num_key_value_heads=8")]
    argv = [*TINY, *larger, "remat=scan_full", "compile_only=v6e-16", "ici_mesh.fsdp=16"]
    assert run_main(main, [*argv, f"output_dir={tmp_path}"]) == 0
    found = json.loads((tmp_path / "small-v6e-16" / "compile_report.json").read_text())
    moved, theory = found["collectives"], found["collectives_in_theory"]["reduce-scatter"]
    embedding = 2 * 2048 * 1024  # also the output projection, whose gradient is one sum
    assert moved["reduce-scatter"]["bytes"] == pytest.approx(1.25 * (theory - embedding), rel=0.02)
    assert moved["all-reduce"]["bytes"] == pytest.approx(embedding, rel=0.02)


@pytest.mark.slow
def test_a_quantized_base_is_gathered_as_it_is_stored(library, tmp_path) -> None:
    """Codes of 4 bits and scales travel between chips, and no matrix of the layers in bf16."""
    architecture = compose_config(TINY).to_dict()["model"]["architecture"]
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(architecture))
    argv = [*TINY, "adapter=qlora", f"model.pretrained_model={base}", "model.architecture=null"]
    assert run_main(main, [*argv, f"output_dir={tmp_path}"]) == 0
    folder = tmp_path / "small-v5e-4"
    found = json.loads((folder / "compile_report.json").read_text())
    assert found["flops"]["ratio"] == pytest.approx(1.0, abs=0.02)
    gathers = [
        each
        for each in Program((folder / "program.txt").read_text()).collectives()
        if each.kind == "all-gather"
    ]
    codes = sum(each.runs * each.payload for each in gathers if each.dtype in ("u8", "s8"))
    layer = 512 * (512 + 2 * 256 + 512 + 3 * 1024)
    assert codes == pytest.approx(2 * 3 * (layer / 2 + layer / 64), rel=0.1)
    # In bf16: embedding, output projection and the adapter's matrices, no weight of a layer.
    in_loops = [each for each in gathers if each.runs > 1 and each.dtype == "bf16"]
    assert all(each.payload < 512 * 256 for each in in_loops)


@pytest.fixture(scope="module")
def from_a_folder(tmp_path_factory) -> tuple[list[str], int]:
    """The command line with the folder of an adapter that PEFT made, and what PEFT trains in it."""
    architecture = compose_config(TINY).to_dict()["model"]["architecture"]
    base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    (base / "config.json").write_text(json.dumps(architecture))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=16, use_dora=True, target_modules=["q_proj"]
    )
    adapted = peft.get_peft_model(model, lora)
    adapted.save_pretrained(str(folder))
    given = ["model.architecture=null", f"model.pretrained_model={base}"]
    return [*TINY, *given, f"adapter.pretrained={folder}"], adapted.get_nb_trainable_parameters()[0]


def test_the_step_of_an_adapters_folder_has_its_sizes(from_a_folder) -> None:
    argv, count = from_a_folder
    config = compose_config([*argv, "adapter.dropout=0.1"])
    adapter = settings(config)["adapter"]
    assert (adapter["rank"], adapter["dora"], adapter["targets"]) == (8, True, ["q_proj"])
    assert adapter["dropout"] == 0.1 and adapter["base_dtype"] == "run"
    hf_config, _ = find_architecture(
        pretrained_model=config.model.pretrained_model, architecture=None, cache_dir=None
    )
    sizes = step_sizes(config, architecture_from_hf(hf_config))
    assert sizes.counts()[0] == count and sizes.dora


@pytest.mark.slow
def test_the_step_of_an_adapters_folder_compiles(library, from_a_folder, tmp_path) -> None:
    argv, count = from_a_folder
    assert run_main(main, [*argv, f"output_dir={tmp_path}"]) == 0
    report = json.loads((tmp_path / "small-v5e-4" / "compile_report.json").read_text())
    assert report["trained_parameters"] == count
    assert report["flops"]["ratio"] == pytest.approx(1.0, abs=0.02)


# Bad input ----------------------------------------------------------------------------------------


def test_without_libtpu_the_command_that_installs_it(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(tpu_library, "_candidates", list)
    code = run_main(main, [*TINY, f"output_dir={tmp_path}"])
    assert code == 2
    said = capsys.readouterr().err
    assert "pip install --no-deps libtpu==0.0.21" in said and "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_a_chip_that_libtpu_does_not_know(capsys, tmp_path) -> None:
    given = ["compile_only=v7x-8", "mesh=fsdp8", f"output_dir={tmp_path}"]
    assert run_main(main, [*TINY, *given]) == 2
    said = capsys.readouterr().err
    assert "compile_only=v7x-8: given a slice of v7x chips" in said and "libtpu 0.0.21" in said
    assert "Traceback" not in said and not list(tmp_path.iterdir())


def test_another_libtpu_is_refused(monkeypatch, tmp_path) -> None:
    path = tmp_path / "libtpu" / "libtpu.so"
    path.parent.mkdir()
    path.touch()
    about = tmp_path / "libtpu-0.0.19.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: libtpu\nVersion: 0.0.19\n")
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(path))
    with pytest.raises(
        RuntimeSetupError, match=r"is of version 0.0.19.*goes with 0.0.21.*pip inst"
    ):
        find_library()


def test_an_adapter_of_another_model(monkeypatch, from_a_folder, tmp_path, capsys) -> None:
    argv, _ = from_a_folder
    *_, base = (each.partition("=")[2] for each in argv if "pretrained_model" in each)
    config = json.loads((Path(base) / "config.json").read_text()) | {"hidden_size": 1024}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(compile_only, "find_library", lambda: Library(Path("/x"), "0", ()))
    out = tmp_path / "out"
    argv = [*argv, f"model.pretrained_model={tmp_path}", f"output_dir={out}"]
    assert run_main(main, argv) == 2
    said = capsys.readouterr().err
    assert "does not fit the model; shapes differ: " in said and "Traceback" not in said
    assert not out.exists()


def compilers(folder: Path) -> list[Path]:
    """Processes that compile into a folder."""
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # ended meanwhile
            words = each.read_bytes().decode().split("\0")
            if str(folder) in words and "torchprime.torch_xla_models.compile.worker" in words:
                found.append(each)
    return found


@pytest.mark.slow
def test_the_compiler_ends_with_a_command_that_is_killed(library, tmp_path) -> None:
    """Otherwise it goes on for minutes, for nobody."""
    train = [sys.executable, str(Path(compile_only.__file__).parents[1] / "train.py")]
    folder = tmp_path / "small-v5e-4"
    command = subprocess.Popen([*train, *TINY, f"output_dir={tmp_path}"])
    while not compilers(folder):
        assert command.poll() is None
        time.sleep(0.1)
    command.kill()
    command.wait()
    while compilers(folder):
        time.sleep(0.1)
    assert not (folder / "result.json").exists()  # it did not come to its end


def test_a_block_size_that_the_kernel_cannot_take(monkeypatch) -> None:
    monkeypatch.setenv("PJRT_DEVICE", "TPU")  # as in the compiling process
    with pytest.raises(ConfigError, match="tiles of 128 .*block_size=1000 is not a multiple"):
        choose_kernel("splash", 1000)
    assert choose_kernel("auto", 1000)[0] == "reference"
    assert choose_kernel("auto", 1024)[0] == "splash"


def test_the_environment_tells_of_no_other_tpu() -> None:
    library = Library(Path("/x/libtpu.so"), "0.0.21", ("/x",))
    given = {"TPU_ACCELERATOR_TYPE": "v4-8", "LIBTPU_INIT_ARGS": "--mine=1", "HOME": "/h"}
    found = compile_only.environment(compose_config(TINY), library, given)
    assert "TPU_ACCELERATOR_TYPE" not in found and found["HOME"] == "/h"
    flags = found["LIBTPU_INIT_ARGS"].split()
    assert flags[0] == "--mine=1" and "--xla_enable_async_all_gather=true" in flags
    assert found["CPU_NUM_DEVICES"] == "4" and found["PYTHONPATH"].startswith("/x")


def test_a_setting_turns_asynchronous_collectives_off() -> None:
    library = Library(Path("/x/libtpu.so"), "0.0.21", ())
    off = "--xla_tpu_enable_async_collective_fusion=false"
    for argv, expected in ((TINY, False), ([*TINY, "async_collectives=false"], True)):
        found = compile_only.environment(compose_config(argv), library, {})
        assert (off in found["LIBTPU_INIT_ARGS"].split()) is expected
