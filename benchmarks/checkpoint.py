"""Measure checkpoints: time to write and read, time that training waits, peak memory.

A model of random weights with its optimizer's state, in the real backend; checkpoints by the run's
own `Saver`, restored as a resumed run does. In the same process, taking turns on the same disk, the
same number of random bytes is written into a plain file with fsync. Loading compares the way
from a Hugging Face folder to placed weights with transformers' from_pretrained on the same files;
as either may map files instead of reading them, every page is touched before the time is taken.
"From the disk" means that the files' pages were dropped from the cache before. Peaks of host memory
are the kernel's high-water mark above what was resident before.

    save                 asynchronous, synchronous, plain file; peak of the synchronous one
    save, 4 processes    the same over gloo, sharded by fsdp: what each process takes
    restore              hashes checked, weights and optimizer state placed
    load                 Hugging Face weights, ours and transformers'

    python benchmarks/checkpoint.py [--shape 25m|1b] [--backend native|xla] [--repeats N]
        [--only NAME;...] [--folder DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

PACKAGES = ("torch", "torch_xla", "transformers", "safetensors")
PIECE = 32 << 20
RANDOM = memoryview(os.urandom(PIECE))  # of zeros a disk may write less


class Shape(NamedTuple):
    """A model, and what its training keeps."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    dtype: str
    optimizer: str

    def hf_config(self) -> dict[str, Any]:
        """As config.json has it."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "torch_dtype": self.dtype,
        }


SHAPES = {
    "25m": Shape(512, 1536, 6, 8, 8, 8192, "float32", "adamw"),
    # Llama 3.2 1B's; bf16 weights with fp32 copies, and an optimizer that fits into 16 GB besides.
    "1b": Shape(2048, 8192, 16, 32, 8, 128256, "bfloat16", "adafactor"),
}
LOADS = {
    "disk": "from the disk",
    "cache": "from the cache",
    "training": "from the cache, until every page was written to",
}
OURS, THEIRS = "load: ours", "load: transformers"
CASES = ("save", "restore", OURS, THEIRS, "save, 4 processes")  # restore reads what save wrote


# One case, in this process -----------------------------------------------------------------------


class Peak:
    """The most memory inside `with`, above what was resident before, in bytes."""

    def __enter__(self) -> Peak:
        Path("/proc/self/clear_refs").write_text("5")  # the mark begins again at what is resident
        self._before = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = _status("VmHWM") - self._before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def timed(action: Callable[[], object]) -> float:
    """Seconds; what others left to be written is written before."""
    os.sync()
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def drop_from_cache(files: Iterable[Path]) -> None:
    """Drop the page cache, so that the next reader reads from the disk."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make_backend(args: argparse.Namespace) -> Any:
    """Return the native backend, sharded over all processes."""
    from torchprime.config.schema import AXES

    none = dict.fromkeys(AXES, 1)
    mesh = none | {"fsdp": int(os.environ.get("WORLD_SIZE", "1"))}
    if args.backend == "xla":
        from torchprime.torch_xla_models.backend import Kernels, XlaBackend

        return XlaBackend(mesh, none, kernels=Kernels(block_size=256))
    from torchprime.torch_native.backend import NativeBackend

    return NativeBackend(mesh, none)


@lru_cache
def shipped_table() -> Any:
    from torchprime.config.compose import compose_config
    from torchprime.sharding import ShardingTable

    shipped = compose_config(["model.pretrained_model=x", "task.max_steps=1"]).sharding
    return ShardingTable(shipped.parameters, shipped.activations, 1 << 40)


def build(shape: Shape) -> Any:
    """Return the model without storage."""
    import torch

    from torchprime.models.architecture import architecture_from_hf
    from torchprime.models.decoder import CausalLM

    with torch.device("meta"):
        return CausalLM(architecture_from_hf(shape.hf_config()))


def training_backend(args: argparse.Namespace, reader: Any = None) -> tuple[Any, Any]:
    """Weights placed and optimizer state made: random, or a checkpoint's; and the optimizer."""
    import torch

    from torchprime.training.backend import ResumedState, StepOptions
    from torchprime.training.optim.make import make_optimizer

    shape = SHAPES[args.shape]
    model, table = build(shape), shipped_table()
    sizes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    optimizer = make_optimizer(shape.optimizer, betas=(0.9, 0.999), eps=None, weight_decay=0.0)
    backend = make_backend(args)
    backend.place(
        model,
        table,
        # Random: equal pages might be stored once.
        (lambda name: torch.rand(sizes[name]))
        if reader is None
        else (lambda name: reader.get(f"model.{name}")),
        getattr(torch, shape.dtype),
    )
    resumed = None if reader is None else ResumedState(reader.get, reader.manifest.step)
    backend.prepare_training(optimizer, StepOptions(), resumed)
    return backend, optimizer


def make_snapshot(backend: Any) -> Any:
    from torchprime.checkpoint.run.manifest import Manifest
    from torchprime.training.run.snapshot import Snapshot

    rest = ("mesh", "config", "versions", "rng", "data_manifest")
    texts = ("backend", "created", "tokenizer_fingerprint")
    empty: dict[str, Any] = {name: {} for name in rest} | dict.fromkeys(texts, "")
    manifest = Manifest(
        processes=backend.processes.count,
        model={"names": 0, "dtype": "", "parameters": 0, "hash": ""},
        optimizer={"name": "", "slots": []},
        scheduler={
            "name": "",
            "peak": 0,
            "warmup_steps": 0,
            "warmup_ratio": None,
            "total_steps": 0,
            "min_lr_ratio": 0,
        },
        global_step=0,
        data_position={"seed": 0, "next_step": 0, "global_batch_size": 1, "num_blocks": 0},
        template_fingerprint=None,
        eval_manifest=None,
        best_metric=None,
        **empty,
    )
    return Snapshot(manifest)


def make_saver(backend: Any, folder: Path, asynchronous: bool) -> Any:
    from torchprime.checkpoint.run.catalog import Catalog
    from torchprime.checkpoint.run.open_storage import open_storage
    from torchprime.training.run.saver import Retention, Saver

    return Saver(
        backend,
        Catalog(open_storage(folder)),
        retention=Retention(1, 0, None),
        asynchronous=asynchronous,
        best=None,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )


def save_once(saver: Any) -> Any:
    """One checkpoint in an empty place; its record, in which the seconds are."""
    if saver.backend.processes.index == 0:
        saver.catalog.storage.remove("step_00000000")
    os.sync()
    saver.backend.processes.gather(None)
    saver.save(make_snapshot(saver.backend), wait=False)
    saver.require()
    return saver.finished()[0]


def write_plain(size: int, path: Path) -> None:
    """Write so many bytes to the disk, with no copy and no hash."""
    with path.open("wb", buffering=0) as file:
        left = size
        while left:
            left -= file.write(RANDOM[: min(left, PIECE)])
        os.fsync(file.fileno())


def run_save(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the three ways in turn, and the memory of a synchronous save, in each process."""
    backend, _ = training_backend(args)
    saver = make_saver(backend, args.folder / "synchronous", False)
    tensors = [sum(chunk.nbytes for chunk in each.read()) for each in backend.checkpoint_tensors()]
    found: dict[str, list[float]] = {key: [] for key in ("plain", "synchronous", "stall", "total")}
    peaks = []
    size = save_once(saver).bytes
    other = None
    if backend.processes.count == 1 and available_memory() > 2.5 * size:  # the copy has room
        other = make_saver(backend, args.folder / "asynchronous", True)
        other.reserve()
        time.sleep(size / 0.3e9)  # a run's first steps, which mostly compile
        found["first_stall"] = [save_once(other).stall_seconds]
    plain = args.folder / "plain.bin"
    for _ in range(args.repeats):
        if backend.processes.count == 1:
            found["plain"].append(timed(lambda: write_plain(size, plain)))
            plain.unlink()
        with Peak() as peak:
            found["synchronous"].append(save_once(saver).write_seconds)
        peaks.append(peak.bytes)
        if other is not None:
            record = save_once(other)
            found["stall"].append(record.stall_seconds)
            found["total"].append(record.write_seconds)
    if other is not None:
        other.catalog.storage.remove("step_00000000")
    return {
        "all_seconds": found,
        "bytes": size,
        "processes": backend.processes.count,
        "peak_bytes": max(peaks),
        "largest_tensor_bytes": max(tensors),
        "held_bytes": sum(tensors),
        **{f"{key}_seconds": statistics.median(v) for key, v in found.items() if v},
    }


def available_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def run_restore(args: argparse.Namespace) -> dict[str, Any]:
    """As a resumed run: every file hashed, then the tensors placed one by one."""
    from torchprime.checkpoint.run.catalog import Catalog
    from torchprime.checkpoint.run.open_storage import open_storage
    from torchprime.checkpoint.run.reader import CheckpointReader

    storage = open_storage(args.folder / "synchronous")
    files = [p for p in (args.folder / "synchronous").rglob("*") if p.is_file()]
    make_backend(args)  # starts what has to be started once
    shipped_table()
    drop_from_cache(files)
    checked = timed(lambda: Catalog(storage).check("step_00000000"))
    drop_from_cache(files)
    with CheckpointReader(storage, "step_00000000") as reader:
        placed = timed(lambda: training_backend(args, reader)[0].progress())
    return {
        "check_seconds": checked,
        "seconds": placed,
        "bytes": sum(path.stat().st_size for path in files),
    }


def run_load(args: argparse.Namespace) -> dict[str, Any]:
    """From a Hugging Face folder to weights that can be used: from the disk, from the cache, and
    from there with every page written to, as the first update does."""
    load = partial(load_ours, make_backend(args)) if args.work == OURS else load_theirs
    folder = args.folder / "hf"
    files = sorted(folder.glob("*.safetensors"))
    found: dict[str, list[float]] = {where: [] for where in LOADS}
    load(args, folder, to_train=False)  # imports, and whatever else happens once
    for _ in range(args.repeats):
        for where, seconds in found.items():
            gc.collect()  # of a file that is still mapped no page can be dropped
            if where == "disk":
                drop_from_cache(files)
            seconds.append(timed(lambda where=where: load(args, folder, where == "training")))
    return {
        "all_seconds": found,
        "bytes": sum(path.stat().st_size for path in files),
        **{f"{where}_seconds": statistics.median(v) for where, v in found.items()},
    }


def load_ours(backend: Any, args: argparse.Namespace, folder: Path, to_train: bool) -> None:
    """As a run does, without its tokenizer."""
    import torch

    from torchprime.checkpoint.hf.read import SafetensorsReader, check_names

    shape = SHAPES[args.shape]
    model = build(shape)
    reader = SafetensorsReader(folder)
    check_names({n: tuple(p.shape) for n, p in model.named_parameters()}, reader, tied=True)
    backend.place(model, shipped_table(), reader.get, getattr(torch, shape.dtype))
    if args.backend == "native":
        from torchprime.torch_native.placement import local

        touch((local(p) for p in model.parameters()), to_train)
        backend.model = backend.root = None


def load_theirs(args: argparse.Namespace, folder: Path, to_train: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, SHAPES[args.shape].dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    touch(model.parameters(), to_train)


def touch(tensors: Iterable[Any], write: bool) -> None:
    """Read, or write as an update does, one value of each page: what is mapped is fetched now, or
    copied into memory of the model's own."""
    for tensor in tensors:
        flat = tensor.detach().view(-1)
        one_a_page = flat[:: 4096 // flat.element_size()]
        _ = one_a_page.mul_(1) if write else one_a_page.sum()


def write_hf(args: argparse.Namespace) -> dict[str, Any]:
    """Write with transformers the files that both sides load."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = SHAPES[args.shape]
    config = AutoConfig.for_model(**shape.hf_config())
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, shape.dtype))
    model.save_pretrained(args.folder / "hf")
    return {}


def work(args: argparse.Namespace) -> dict[str, Any]:
    """One case, in this process."""
    if args.backend == "xla":
        from torchprime.torch_xla_models.runtime import prepare_environment

        prepare_environment(1)
    runs = {"hf": write_hf, "restore": run_restore, OURS: run_load, THEIRS: run_load}
    return runs.get(args.work, run_save)(args)


# All cases ---------------------------------------------------------------------------------------


def run_case(name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run a case in processes of its own; of several, return the largest figures."""
    print(f"running: {name}", file=sys.stderr, flush=True)
    count = 4 if name.endswith("4 processes") else 1
    started = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(count):
        own = {"USE_TORCH_XLA": "1" if args.backend == "xla" else "0", "HF_HUB_OFFLINE": "1"}
        if count > 1:
            own |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{count}"}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--work", name, "--folder", str(folder)]
        command += ["--shape", args.shape, "--backend", args.backend]
        command += ["--repeats", str(args.repeats)]
        environment = {**os.environ, **own}
        started.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        )
    printed = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit(f"{name}: failed")
    found = [json.loads(text.splitlines()[-1]) for text in printed]
    if count == 1:
        return found[0]
    largest = ("peak_bytes", "largest_tensor_bytes", "held_bytes")
    return {**found[0], **{key: max(each[key] for each in found) for key in largest}}


def ratios(found: dict[str, dict[str, Any]]) -> dict[str, tuple[float, str]]:
    """Return measured and wanted values of the cases that ran."""
    ratio: dict[str, tuple[float, str]] = {}
    save = found.get("save", {})
    if "stall_seconds" in save:
        stall = save["stall_seconds"] / save["synchronous_seconds"]
        ratio["stall of an asynchronous save / synchronous save"] = stall, "at most 0.10"
        first = save["first_stall_seconds"] / save["synchronous_seconds"]
        ratio["the same of the first one of a run"] = first, "at most 0.10"
        speed = save["plain_seconds"] / save["total_seconds"]
        ratio["bytes/s of an asynchronous save / of a plain file"] = speed, ""
    if save:
        speed = save["plain_seconds"] / save["synchronous_seconds"]
        ratio["bytes/s of a synchronous save / of a plain file"] = speed, "at least 0.80"
    if OURS in found and THEIRS in found:
        for where, what in LOADS.items():
            speed = found[THEIRS][f"{where}_seconds"] / found[OURS][f"{where}_seconds"]
            ratio[f"load speed / from_pretrained's, {what}"] = speed, "at least 1.0"
    return ratio


def show(found: dict[str, dict[str, Any]]) -> None:
    """Markdown tables."""
    print("| what | GB | s | GB/s |\n|---|---|---|---|")
    for name, r in found.items():
        keys = [key for key in r if key.endswith("seconds") and key != "all_seconds"]
        for key in keys:
            what = name if key == "seconds" else f"{name}: {key.removesuffix('_seconds')}"
            size = r["bytes"] / 1e9
            print(f"| {what} | {size:.2f} | {r[key]:.2f} | {size / r[key]:.2f} |")
    print("\n| memory while saving | peak above, MB | largest tensor here, MB | all, MB |")
    print("|---|---|---|---|")
    for name, r in found.items():
        if "peak_bytes" in r:
            sizes = (r["peak_bytes"], r["largest_tensor_bytes"], r["held_bytes"])
            print(f"| {name} | {' | '.join(f'{size / 1e6:,.1f}' for size in sizes)} |")
    print("\n| ratio | measured | wanted |\n|---|---|---|")
    for what, (value, wanted) in ratios(found).items():
        print(f"| {what} | {value:.2f} | {wanted} |")


def main() -> None:
    """Run the cases one after the other and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="25m")
    parser.add_argument("--backend", choices=("native", "xla"), default="native")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help="names of cases, separated by semicolons")
    parser.add_argument("--folder", type=Path, help="where to write: on the disk that is meant")
    parser.add_argument("--work", help=argparse.SUPPRESS)  # a case's name: run it here
    args = parser.parse_args()
    if args.work:
        print("\n" + json.dumps(work(args)))
        return
    wanted = args.only.split(";") if args.only else CASES
    names = [name for name in CASES if name in wanted]
    if args.backend == "xla":  # several processes would need several hosts
        names = [name for name in names if "processes" not in name]
    if not names:
        sys.exit(f"--only {args.only}: no such case, expected one of {'; '.join(CASES)}")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        if {OURS, THEIRS} & set(names):
            run_case("hf", args, folder)
        if "restore" in names and "save" not in names:
            sys.exit("--only restore: it reads what save wrote; add save")
        found = {name: run_case(name, args, folder) for name in names}
    report = {
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "load before": load},
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "shape": {**SHAPES[args.shape]._asdict(), "backend": args.backend},
        "cases": found,
        "ratios": {what: value for what, (value, _) in ratios(found).items()},
    }
    print(", ".join(f"{name} {text}" for name, text in report["versions"].items()), end="\n\n")
    show(found)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
