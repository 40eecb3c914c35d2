"""The files of experimental/launch/, each read by the tool that it is written for or by its linter.

There is one exception: the JobSet is checked against a schema written by hand (JOBSET below), since
the JobSet project's own CustomResourceDefinition has 750 KB. The Job inside is checked against
Kubernetes' own schema. SkyPilot needs an environment of its own (make sky). No SLURM is needed: a
stand-in for srun and scontrol starts both hosts of a job on this machine.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from torchprime.config.compose import compose_config

REPO = Path(__file__).resolve().parents[2]
LAUNCH = REPO / "experimental" / "launch"
SCRIPTS = ["gpus.sbatch", "xpk.sh", "torchtpu.sh"]
JOBSETS = ["gke-jobset.yaml", "gke-jobset-torchtpu.yaml"]
TASKS = ["v6e8.sky.yaml", "v6e8-torchtpu.sky.yaml"]
# The commands that a file may start, up to the run's own words.
TRAINERS = (
    ["python3", "torchprime/torch_xla_models/train.py"],
    [".venv/bin/python", "torchprime/torch_xla_models/train.py"],
    [".venv/bin/torchprime", "train", "device=tpu"],
    ["experimental/launch/torchtpu.sh"],
)

# A hand-written part of the schema of jobset.x-k8s.io/v1alpha2: the fields that a job like ours may
# use. It is not the project's CustomResourceDefinition, which has 750 KB and is not copied here: a
# cluster may refuse a field that this schema accepts.
NUMBER, STRING, ANY = {"type": "integer", "minimum": 0}, {"type": "string"}, {"type": "object"}


def closed(required: list[str], **fields: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": fields,
        "required": required,
        "additionalProperties": False,
    }


REPLICATED = closed(
    ["name", "template"],
    name={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"},
    replicas=NUMBER,
    groupName=STRING,
    template=closed(["spec"], metadata=ANY, spec=ANY),
)
JOBSET = closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=ANY,
    spec=closed(
        ["replicatedJobs"],
        replicatedJobs={"type": "array", "minItems": 1, "items": REPLICATED},
        failurePolicy=closed(
            [],
            maxRestarts=NUMBER,
            restartStrategy={"enum": ["Recreate", "BlockingRecreate"]},
        ),
        network=closed(
            [],
            enableDNSHostnames={"type": "boolean"},
            publishNotReadyAddresses={"type": "boolean"},
            subdomain=STRING,
        ),
        suspend={"type": "boolean"},
        ttlSecondsAfterFinished=NUMBER,
    ),
)

# Two hosts on this machine: srun starts the command once for each and passes SIGTERM on.
SRUN = """
import os, signal, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    command = command[1:]
hosts = [subprocess.Popen(command, env=os.environ | {"SLURM_NODEID": str(n)}) for n in range(2)]
signal.signal(signal.SIGTERM, lambda *_: [host.terminate() for host in hosts])
sys.exit(max(abs(host.wait()) for host in hosts))
"""
SCONTROL = """
import os, pathlib, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("localhost\\nlocalhost")
else:
    with open("scontrol.log", "a") as log:
        print(*sys.argv[1:], file=log)
"""
JOB_ID = "4711"


def tool(name: str) -> str:
    """Return the path of a linter that came with the extra dev."""
    path = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if path is None:
        pytest.skip(f"{name} is not installed: make setup")
    return path


def run(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_reads_the_script(name: str) -> None:
    run("bash", "-n", LAUNCH / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing(name: str) -> None:
    run(tool("shellcheck"), LAUNCH / name)


@pytest.mark.slow
def test_hadolint_finds_nothing() -> None:
    run(tool("hadolint"), LAUNCH / "Dockerfile")


def own_words(command: list[str]) -> list[str]:
    """Return the run's words of a command that starts a trainer."""
    (trainer,) = (each for each in TRAINERS if command[: len(each)] == each)
    assert all((REPO / word).is_file() for word in trainer if word.endswith((".py", ".sh")))
    return command[len(trainer) :]


@pytest.fixture(params=JOBSETS)
def jobset(request: pytest.FixtureRequest) -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / request.param).read_text())


def jobs(jobset: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the Jobs that the JobSet's controller makes."""
    jsonschema.validate(jobset, JOBSET)
    return [
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": f"{jobset['metadata']['name']}-{part['name']}-0"},
            "spec": part["template"]["spec"],
        }
        for part in jobset["spec"]["replicatedJobs"]
    ]


@pytest.mark.slow
def test_kubernetes_accepts_the_jobs_of_the_jobset(jobset: dict[str, Any]) -> None:
    kubernetes = pytest.importorskip("kubernetes_validate", reason="make setup installs it")
    (job,) = jobs(jobset)
    kubernetes.validate(job, "1.37", strict=True)
    for damage in ({"parallelism": "four"}, {"paralelism": 4}):
        with pytest.raises(kubernetes.ValidationError):
            kubernetes.validate({**job, "spec": {**job["spec"], **damage}}, "1.37", strict=True)
    jobset["spec"]["failurePolicy"]["maxRestart"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jobs(jobset)


def test_the_jobset_trains_on_all_chips_of_its_slice(jobset: dict[str, Any]) -> None:
    (job,) = jobs(jobset)
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = spec["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    assert chips == int(rows) * int(columns) and spec["completions"] == spec["parallelism"]
    assert compose_config(own_words(container["command"])).device_count == chips
    for variable in container["env"]:
        if variable["name"] == "TORCH_TPU_TOPOLOGY":
            assert variable["value"] == f"{rows},{columns},1"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def sky_python() -> str:
    path = Path(os.environ.get("TORCHPRIME_SKY_PYTHON", REPO / ".venv-sky" / "bin" / "python"))
    if not path.is_file():
        pytest.skip("SkyPilot has an environment of its own: make sky")
    return str(path)


SKY = """
import json, sys, sky
task = sky.Task.from_yaml(sys.argv[1])
(resources,) = task.resources
print(json.dumps([resources.accelerators, resources.use_spot, sorted(task.envs), task.run]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_skypilot_reads_its_task(name: str, tmp_path: Path) -> None:
    python, path = sky_python(), LAUNCH / name
    lines = run(python, "-c", SKY, path).splitlines()
    accelerators, spot, envs, command = json.loads(lines[-1])
    assert accelerators == {"tpu-v6e-8": 1} and spot is True and envs == ["BUCKET", "HF_TOKEN"]
    argv = own_words(shlex.split(command.replace("\\\n", " ")))
    assert compose_config(argv).device_count == 8
    typo = tmp_path / "typo.sky.yaml"
    typo.write_text(path.read_text().replace("use_spot", "use_spott"))
    assert subprocess.run([python, "-c", SKY, str(typo)], capture_output=True).returncode


# TorchTPU on several hosts -----------------------------------------------------------------------

# In the place of python: TorchTPU's launcher on the second of two hosts, and torchrun.
HOST = """#!/bin/sh
case "$2" in
torch.tpu.distributed) cat <<EOF
TORCH_TPU_TOPOLOGY="2,4,1"
TORCH_TPU_SLICEBUILDER_ADDRESSES="a:1,a:2,a:3,a:4,b:1,b:2,b:3,b:4"
WORLD_SIZE=8
NODE_RANK="1"
NNODES="2"
MASTER_ADDR="a"
MASTER_PORT="29500"
EOF
;;
*) echo "$TORCH_TPU_SLICEBUILDER_ADDRESSES $@" ;;
esac
"""


def test_torchtpu_starts_a_process_per_chip_of_its_host(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(HOST)
    python.chmod(0o755)
    host = {"PYTHON": str(python), "PATH": os.environ["PATH"]}
    slice_of = {"TPU_WORKER_HOSTNAMES": "a,b", "TORCH_TPU_TOPOLOGY": "2,4,1"}
    command = ["bash", str(LAUNCH / "torchtpu.sh"), "--config-name", "quickstart"]
    done = subprocess.run(command, env=host | slice_of, capture_output=True, text=True, check=True)
    addresses, *words = done.stdout.split()
    assert addresses.split(",")[4] == "b:1"
    wanted = ["--nnodes=2", "--node_rank=1", "--nproc_per_node=4", "--master_addr=a"]
    assert words[2:6] == wanted and words[-3:] == ["device=tpu", "--config-name", "quickstart"]
    for missing in slice_of:
        rest = {name: value for name, value in slice_of.items() if name != missing}
        done = subprocess.run(command, env=host | rest, capture_output=True, text=True)
        assert done.returncode and missing in done.stderr


# SLURM -------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a job's batch shell, whose current folder is the submitted one."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, code in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(f"#!{sys.executable}{code}")
    torchrun = tmp_path / ".venv" / "bin" / "torchrun"
    torchrun.parent.mkdir(parents=True)
    torchrun.write_text(f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    for path in (torchrun, *commands.iterdir()):
        path.chmod(0o755)
    return os.environ | {
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPO),
        "USE_TORCH_XLA": "0",
        "GLOO_SOCKET_IFNAME": "lo",
        "CONFIG": "default",
        "SLURM_JOB_ID": JOB_ID,
        "SLURM_JOB_NODELIST": "host[0-1]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }


ARGV = [
    "model=quickstart", "dataset=quickstart", "dataset.block_size=64",
    "dataset.max_rejected_fraction=1.0", "eval=none", "task.global_batch_size=4",
    "task.loss_chunks=2", "task.export_checkpoint_path=null", "logging_steps=1",
    "isolation_probe=false", "checkpoint.every_minutes=60", "output_dir=outputs", "run_name=job",
]  # fmt: skip


def start(cluster: dict[str, str], *argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(LAUNCH / "gpus.sbatch"), *ARGV, *argv],
        env=cluster, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def steps(folder: Path) -> list[int]:
    path = folder / "outputs" / "job" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return [record["step"] for record in records if record["kind"] == "train"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_slurm_job_is_requeued_and_goes_on(cluster: dict[str, str], tmp_path: Path) -> None:
    job = start(cluster, "task.max_steps=2000")
    try:
        while len(steps(tmp_path)) < 3:
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.2)
        job.send_signal(signal.SIGUSR1)  # as SLURM does before the time limit
        said, _ = job.communicate(timeout=300)
    finally:
        job.kill()
    assert job.returncode != 0 and "stopped: SIGTERM after step" in said, said
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {JOB_ID}\n"
    done = steps(tmp_path)[-1]
    facts = json.loads((tmp_path / "outputs" / "job" / "run.json").read_text())
    assert facts["processes"] == 2 and facts["mesh"]["fsdp"] == 2

    allowed = "resume.allow_changes=[task.max_steps,task.lr_scheduler]"
    again = start(cluster, f"task.max_steps={done + 2}", allowed)
    said, _ = again.communicate(timeout=600)
    assert again.returncode == 0, said
    assert f"resuming from outputs/job/checkpoints/step_{done:08d}" in said
    assert steps(tmp_path) == list(range(1, done + 3))
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {JOB_ID}\n"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_slurm_job_that_fails_is_not_requeued(cluster: dict[str, str], tmp_path: Path) -> None:
    job = start(cluster, "task.max_steps=2", "dataset.block_siz=3")
    said, _ = job.communicate(timeout=500)
    assert job.returncode != 0 and "dataset.block_siz" in said
    assert not (tmp_path / "scontrol.log").exists()
