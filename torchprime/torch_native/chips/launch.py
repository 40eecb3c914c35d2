"""The processes of `device=tpu`, one per chip: their variables, their start and their group.

torchrun gives each process its rank. TorchTPU also needs the slice's shape and an address for every
chip, the same on all processes. Its own launcher prints them. On one host the command runs that
launcher and then torchrun; on several the user does.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

from torchprime.errors import ConfigError, RuntimeSetupError

TOPOLOGY, ADDRESSES = "TORCH_TPU_TOPOLOGY", "TORCH_TPU_SLICEBUILDER_ADDRESSES"
LAUNCHER = ["-m", "torch.tpu.distributed"]
BEFORE_TORCHRUN = f'set -a; eval "$(python {" ".join(LAUNCHER)})"; set +a'
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def starts_others(count: int, environment: Mapping[str, str]) -> bool:
    """Return True if this process has to start one for each chip: torchrun did not start it."""
    return count > 1 and "WORLD_SIZE" not in environment


def check_alone(environment: Mapping[str, str]) -> None:
    """Check that torchrun did not start several processes, for the device `tpu_on_cpu`.

    Raises:
        ConfigError: it did.
    """
    world = environment.get("WORLD_SIZE", "1")
    if world != "1":
        raise ConfigError(
            f"device: given tpu_on_cpu in one of {world} processes, expected one process: it has a "
            "virtual device for each place of the mesh. Start without torchrun."
        )


def check_process(count: int, chips: int, environment: Mapping[str, str]) -> None:
    """Check that this process can have a chip, and knows the others.

    Args:
        count: of the mesh's chips.
        chips: of this host.

    Raises:
        RuntimeSetupError: there is no chip, or a variable is missing or wrong.
        ConfigError: the mesh is not that of the processes.
    """
    if not chips:
        raise RuntimeSetupError(
            "device: given tpu on a host without TPU chips (none in /dev/vfio), expected one for "
            "each process. Start on a TPU VM; in a container, mount /dev/vfio (--privileged). "
            "Without a TPU, device=tpu_on_cpu runs the same program on the CPU."
        )
    if starts_others(count, environment):
        return
    world = int(environment.get("WORLD_SIZE", "1"))
    if world != count:
        raise ConfigError(
            f"ici_mesh x dcn_mesh: given {count} chips, but there are {world} processes, expected "
            "one for each chip. Change torchrun's --nnodes and --nproc_per_node, or set "
            f"ici_mesh.fsdp={world}."
        )
    for name in (TOPOLOGY, ADDRESSES):
        if world > 1 and not environment.get(name):
            raise RuntimeSetupError(
                f"{name}: it is not set, expected the same value on all {world} processes. Before "
                f"torchrun, on each host: {BEFORE_TORCHRUN}. On one host, torchprime train without "
                "torchrun does both."
            )
    given = len(environment.get(ADDRESSES, "").split(","))
    if world > 1 and given != world:
        raise RuntimeSetupError(
            f"{ADDRESSES}: given {given} addresses, expected {world}, one for each process. Before "
            f"torchrun, on each host: {BEFORE_TORCHRUN}"
        )


def start_all(count: int, words: Sequence[str], run: Run = subprocess.run) -> int:
    """Start the same command once per chip of this host, by torchrun; return its exit code.

    Args:
        count: of the mesh's chips.
        words: of this command, as in sys.argv.

    Raises:
        RuntimeSetupError: TorchTPU's launcher fails.
        ConfigError: this host has another number of chips than the mesh.
    """
    variables = launcher_variables(run)
    chips = int(variables.pop("WORLD_SIZE", "0"))
    if chips != count:
        raise ConfigError(
            f"ici_mesh x dcn_mesh: given {count} chips on a host with {chips}, expected {chips}, "
            "or one: without torchrun the command uses one host. On several hosts, start torchrun "
            f"on each (docs/tpu.md); on this one, set ici_mesh.fsdp={chips}."
        )
    module = "torchprime.cli.main"
    if words[0].endswith("torch_native/train.py"):
        module = "torchprime.torch_native.train"
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    command = [sys.executable, *torchrun, "-m", module, *words[1:]]
    return run(command, check=False, env={**os.environ, **variables}).returncode


def launcher_variables(run: Run = subprocess.run) -> dict[str, str]:
    """Return the variables that TorchTPU's launcher prints on this host.

    Raises:
        RuntimeSetupError: it fails.
    """
    done = run([sys.executable, *LAUNCHER], check=False, capture_output=True, text=True)
    if done.returncode:
        told = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeSetupError(
            f"python {' '.join(LAUNCHER)}: TorchTPU's launcher failed, expected the variables of "
            f"this host's chips. Look at the chips with torchprime doctor. ({told})"
        )
    return dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', done.stdout, re.MULTILINE))


def join_group() -> None:
    """Join the group of all processes: gloo between the hosts, TorchTPU's between the chips.

    Raises:
        RuntimeSetupError: the group cannot be formed.
    """
    # late: it needs torch, which must not load before the variables are set
    import torch.distributed as dist

    # late: as above
    from torchprime.torch_native.runtime import join

    if not dist.is_initialized():
        join("cpu:gloo,tpu:tpu_dist")


def chip_order(sizes: Sequence[int]) -> list[int]:
    """Return the process of each place of a mesh, so that neighbours along its last axes are
    neighbours on the interconnect."""
    # late: as above
    import torch

    if os.environ.get("WORLD_SIZE", "1") == "1":
        return [0]
    order = torch.tpu.distributed.topology_aware_mesh(tuple(sizes))  # pyright: ignore[reportAttributeAccessIssue]
    return order.flatten().tolist()
