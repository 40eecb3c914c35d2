"""`torchprime COMMAND ...`: training, and the commands before and after it.

Each command has a module named as it is typed, but `inspect`, which is a name of the standard
library: inspect_data.py. It is imported when the command is given. Those of the room `before` need
no backend.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable

from torchprime.cli.shared.completion import FLAGS, complete
from torchprime.config.entry import run_main
from torchprime.config.schema import TrainConfig
from torchprime.text.terminal import print_lines, say


def train(argv: list[str]) -> int:
    """Train on the backend that fits this host, and say which."""
    # late: reading the backends' entry points takes time, and a misspelt command needs none
    from torchprime.cli.train import train_main

    return train_main(argv)


def prepare(config: TrainConfig) -> int:
    """Prepare the run's data now, so that training finds it done."""
    # late: as above
    from torchprime.cli.before.prepare import prepare_data

    return prepare_data(config)


def inspect(config: TrainConfig) -> int:
    """Show real batches as the device gets them: in the terminal and as a page."""
    # late: as above
    from torchprime.cli.before.inspect_data import inspect_data

    return inspect_data(config)


def fisher(argv: list[str]) -> int:
    """Measure the Fisher information of a base, which regularization.ewc needs."""
    # late: as above
    from torchprime.cli.fisher import fisher_main

    return fisher_main(argv)


def lr_range(argv: list[str]) -> int:
    """Find the learning rates at which a config's loss falls, by one short run."""
    # late: as above
    from torchprime.cli.lr_range import lr_range_main

    return lr_range_main(argv)


def plan(argv: list[str]) -> int:
    """Say what a run needs on a device, and values to start from; no weights are read."""
    os.environ["USE_TORCH_XLA"] = "0"  # transformers would start XLA where it is installed
    # late: as above
    from torchprime.cli.before.plan import plan_main

    return plan_main(argv)


def compare(argv: list[str]) -> int:
    """Judge whether runs are the same training, and draw them."""
    # late: as above
    from torchprime.cli.compare import compare_main

    return compare_main(argv)


def resume_check(argv: list[str]) -> int:
    """Report what a run would do when started again, and its changes since the checkpoint."""
    os.environ["USE_TORCH_XLA"] = "0"  # transformers would start XLA where it is installed
    # late: as above, and transformers looks for torch_xla when imported
    from torchprime.cli.resume_check import resume_check_main

    return resume_check_main(argv)


def export(argv: list[str]) -> int:
    """Make a Hugging Face folder of a checkpoint, or merge an adapter; no accelerator needed."""
    os.environ["USE_TORCH_XLA"] = "0"
    # late: as above
    from torchprime.cli.export import export_main

    return export_main(argv)


def average(argv: list[str]) -> int:
    """Average the weights of several checkpoints of a model; no accelerator needed."""
    os.environ["USE_TORCH_XLA"] = "0"
    # late: as above
    from torchprime.cli.weights.average import average_main

    return average_main(argv)


def verify(argv: list[str]) -> int:
    """Check an export by its certificate: files, weights, logits, stop tokens."""
    os.environ["USE_TORCH_XLA"] = "0"
    # late: as above
    from torchprime.cli.verify import verify_main

    return verify_main(argv)


def report(argv: list[str]) -> int:
    """Write a run's report again: report.md and report.html."""
    os.environ["USE_TORCH_XLA"] = "0"
    # late: as above
    from torchprime.cli.report import report_main

    return report_main(argv)


def sweep(argv: list[str]) -> int:
    """Rank several runs in one table with their curves; `train -m` makes such runs."""
    os.environ["USE_TORCH_XLA"] = "0"
    # late: as above
    from torchprime.cli.sweeps.sweep import sweep_main

    return sweep_main(argv)


def watch(argv: list[str]) -> int:
    """Show a run in the terminal while it goes on: loss, rate, ETA, evaluations."""
    # late: as above
    from torchprime.cli.watch import watch_main

    return watch_main(argv)


def chat(argv: list[str]) -> int:
    """Send prompts to a model, and to its base for comparison."""
    os.environ["USE_TORCH_XLA"] = "0"
    # late: as above
    from torchprime.cli.chat import chat_main

    return chat_main(argv)


def evaluate(argv: list[str]) -> int:
    """Measure a model's held-out loss and grade its answers, as a run of the config does."""
    # late: as above
    from torchprime.cli.answers.evaluate import evaluate_main

    return evaluate_main(argv)


def sample(argv: list[str]) -> int:
    """Sample answers to a config's rows and keep the right ones as training rows."""
    # late: as above
    from torchprime.cli.answers.sample import sample_main

    return sample_main(argv)


def lm_eval(argv: list[str]) -> int:
    """Score an export on standard benchmarks, by EleutherAI's lm-eval harness."""
    os.environ["USE_TORCH_XLA"] = "0"
    # late: as above
    from torchprime.cli.lm_eval import lm_eval_main

    return lm_eval_main(argv)


def doctor(argv: list[str]) -> int:
    """Say what this host can do: TPU, GPU, virtual devices, the TPU's compiler, versions."""
    os.environ["USE_TORCH_XLA"] = "0"
    # late: as above
    from torchprime.cli.before.doctor import doctor_main

    return doctor_main(argv)


# These take a run's config, with the flags and overrides of the training job.
CONFIG_COMMANDS: dict[str, Callable[[TrainConfig], int]] = {"prepare": prepare, "inspect": inspect}
# These take their own arguments.
OTHER_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "fisher": fisher,
    "plan": plan,
    "lr-range": lr_range,
    "compare": compare,
    "resume-check": resume_check,
    "export": export,
    "average": average,
    "verify": verify,
    "report": report,
    "sweep": sweep,
    "watch": watch,
    "chat": chat,
    "evaluate": evaluate,
    "sample": sample,
    "lm-eval": lm_eval,
    "doctor": doctor,
}
# Groups of commands in the order in which they are used, and the arguments of each.
GROUPS: dict[str, dict[str, str]] = {
    "before a run": {
        "doctor": "[--quick] [--json]",
        "plan": "[--device NAME] --config-name NAME [key=value ...]",
        "lr-range": "[--from R] [--to R] [--steps N] --config-name NAME [key=value ...]",
        "inspect": "--config-name NAME [key=value ...]",
        "prepare": "--config-name NAME [key=value ...]",
        "fisher": "--out DIR [--examples N] --config-name NAME [key=value ...]",
    },
    "run": {
        "train": "[--backend xla|native] [-m] --config-name NAME [key=value[,value] ...]",
        "watch": "RUN [--once]",
    },
    "after a run": {
        "compare": "RUN RUN [RUN ...]",
        "report": "RUN [--out DIR]",
        "sweep": "report DIR [DIR ...] [--out FOLDER]",
        "chat": "--model DIR [--base DIR]",
        "verify": "DIR",
        "export": "CHECKPOINT --out DIR, or --adapter DIR --merge --out DIR",
        "average": "CHECKPOINT CHECKPOINT [...] --out DIR, or --last K RUN --out DIR",
        "evaluate": "MODEL --out DIR [--engine NAME] --config-name NAME [key=value ...]",
        "sample": "MODEL --out DIR [--answers K] [--keep N] --config-name NAME [key=value ...]",
        "lm-eval": "DIR --tasks NAME[,NAME ...]",
        "resume-check": "RUN [--config-name NAME] [key=value ...]",
    },
}


def usage() -> str:
    """Return the commands by group, each with its arguments and its purpose."""
    about = {
        name: command.__doc__ for name, command in {**CONFIG_COMMANDS, **OTHER_COMMANDS}.items()
    }
    lines = ["usage: torchprime COMMAND [arguments]; torchprime COMMAND --help shows its options"]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:"]
        for name, arguments in commands.items():
            lines += [f"  {name} {arguments}", f"      {(about[name] or '').strip()}"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print_lines([usage()])
        return 0
    name, *rest = argv
    if name in FLAGS:
        return complete(
            argv,
            [*CONFIG_COMMANDS, *OTHER_COMMANDS],
            ["train", "fisher", "lr-range", "evaluate", "sample", *CONFIG_COMMANDS],
        )
    if name in CONFIG_COMMANDS:
        return run_main(CONFIG_COMMANDS[name], rest)
    if name in OTHER_COMMANDS:
        return OTHER_COMMANDS[name](rest)
    close = difflib.get_close_matches(name, [*CONFIG_COMMANDS, *OTHER_COMMANDS], n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    say(f"error: there is no command {name!r}.{hint}\n{usage()}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
