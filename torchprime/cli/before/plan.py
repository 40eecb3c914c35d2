"""`torchprime plan [--device NAME] --config-name NAME [...]`: needs and advice before a run.

Reads the model's config.json and the rows; no weights, no accelerator. With --out the recommended
values become a config that `torchprime train` takes.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import yaml

from torchprime.cli.shared.arguments import make_parser, run_command
from torchprime.config.checks import refuse
from torchprime.config.compose import compose_config
from torchprime.config.paths import local_path
from torchprime.config.schema import TrainConfig
from torchprime.config.topologies import GIB
from torchprime.files.atomic import write_text
from torchprime.text.terminal import print_json, print_lines, say
from torchprime.training.advice.advise import Advised, Outlook, advise, tree_of
from torchprime.training.advice.recommend import Recommendation
from torchprime.training.advice.table import devices_named
from torchprime.training.setup.datasets import prepare_run_data, template_of
from torchprime.training.setup.recipe import files_of

EPILOG = """\
The recommended values are baselines to test: each line has its reason and source. A config whose
mesh has another number of devices than --device is planned with all of them on the fsdp axis.
Memory is an estimate per device; for a TPU the compiler counts exactly:
torchprime train --config-name NAME compile_only=v6e-8. Exit code: 0, or 1 if nothing fits.
"""
ABOUT = {
    "weights": "trained weights",
    "frozen": "frozen weights",
    "masters": "fp32 copies of trained weights",
    "state": "optimizer state",
    "gradients": "gradients",
    "reference": "the base's weights, for regularization",
    "gathered": "weights gathered from all devices",
    "reduced": "gradients while they are summed over devices",
    "activations": "activations",
    "working": "work space of the loss or a layer",
    "cache": "or: keys and values of generated answers",
}


def plan_main(argv: list[str]) -> int:
    """Print needs and advice; return 0, 1 if nothing fits, or 2 for a user error."""
    parser = make_parser(
        "torchprime plan", "Say what a run needs on a device, and values to start from.", EPILOG
    )
    parser.add_argument("--config-name", "-cn", metavar="NAME", required=True)
    parser.add_argument("--config-dir", "-cd", metavar="FOLDER")
    parser.add_argument("--device", metavar="NAME", help="v6e-8, h100-80gb:8, rtx-4090, ...")
    parser.add_argument("--out", metavar="FILE.yaml", help="write the recommended config")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    return run_command(parser, argv, _plan)


def _plan(given: argparse.Namespace) -> int:
    place = [] if given.config_dir is None else ["--config-dir", given.config_dir]
    out = None if given.out is None else _out_file(given.out, given.config_dir)
    devices = None if given.device is None else devices_named(given.device)
    config = compose_config(["--config-name", given.config_name, *place, *given.overrides])
    files = files_of(config, weights=False)
    template = template_of(config.dataset, files.tokenizer)

    def read_rows(config: TrainConfig):
        return prepare_run_data(config, files.tokenizer, template, say)

    found = advise(config, files, devices, read_rows)
    if given.json:
        print_json(found.to_dict())
    else:
        print_lines(_lines(found))
    if out is not None:
        write_text(out, _as_yaml(given.config_name, found.changes))
        command = ["torchprime", "train", "--config-dir", str(out.parent), "--config-name"]
        say(f"wrote {out}; run: {shlex.join([*command, out.stem, *given.overrides])}")
    return 0 if found.advised is not None and found.fits(found.advised) else 1


def _out_file(given: str, config_dir: str | None) -> Path:
    out = local_path("--out", given).resolve()
    if out.suffix != ".yaml":
        refuse("--out", given, "a file that ends in .yaml, as configs do", "Add .yaml.")
    if not out.parent.is_dir():
        refuse("--out", given, f"a file in a folder, but {out.parent} is none", "Make it first.")
    if config_dir is not None and out.parent != local_path("--config-dir", config_dir).resolve():
        refuse(
            "--out",
            given,
            f"a file in {config_dir}, since the config that it changes is there",
            "Write it into the folder of --config-dir.",
        )
    return out


def _as_yaml(config_name: str, changes: Sequence[Recommendation]) -> str:
    """Return a config that changes another one, with the reasons as comments."""
    header = [
        f"# Values that `torchprime plan` recommends for {config_name}: baselines to test.",
        "#",
        *(f"# {each.key}: {_why(each)}" for each in changes),
        "",
    ]
    defaults = {"defaults": [config_name, "_self_"]}
    tree = defaults | tree_of({each.key: each.value for each in changes})
    return "\n".join(header) + yaml.safe_dump(tree, sort_keys=False)


def _lines(found: Advised) -> list[str]:
    p, rows, devices = found.parameters, found.rows, found.devices
    frozen = f": {p.trained:,} trained, {p.frozen:,} frozen" if p.frozen else ""
    lines = [
        f"parameters   {p.total:,}{frozen}",
        f"rows         {rows.examples:,} examples with {rows.real_tokens:,} tokens; the longest "
        f"has {rows.longest:,}, {rows.cut:,} do not fit the blocks",
    ]
    if devices is None:
        lines.append("devices      not given: --device says what fits")
    else:
        lines.append(
            f"devices      {devices.count} x {devices.name} with {devices.memory / GIB:.1f} GiB "
            f"each, of which a plan fills {devices.fill:.0%}"
        )
    lines += ["", "as configured", *_outlook_lines(found, found.configured), ""]
    lines.append("recommended, as baselines to test")
    for each in (*found.changes, *found.kept):
        mark = "  " if each in found.changes else "= "
        lines.append(f"  {mark}{each.key}={_shown(each.value)}")
        lines.append(f"      {_why(each)}")
    lines.append("  (= is as configured)")
    if found.advised is None:
        return [*lines, "", f"not even one block fits: {_hint(found)}"]
    return [*lines, "", "with these values", *_outlook_lines(found, found.advised)]


def _why(each: Recommendation) -> str:
    return f"{each.reason} ({each.source})" if each.source else each.reason


def _hint(found: Advised) -> str:
    need = found.configured.need
    largest = max((kind for kind in ABOUT if kind != "cache"), key=lambda kind: getattr(need, kind))
    advice = {
        "weights": "use more devices, or adapter=lora",
        "frozen": "use more devices, or adapter=qlora",
        "masters": "use more devices, or adapter=lora",
        "state": "use more devices, or adapter=lora",
        "reference": "use more devices, or regularization without them",
        "gradients": "use more devices, or task.gradient_accumulation_steps=1",
        "activations": "set remat=scan_full, or smaller blocks",
        "working": "raise task.gradient_accumulation_steps",
        "gathered": "use larger devices",
        "reduced": "use larger devices",
    }[largest]
    return f"the largest part is {ABOUT[largest]}; {advice}"


def _outlook_lines(found: Advised, outlook: Outlook) -> list[str]:
    steps, need = outlook.steps, outlook.need
    budget = steps.budget
    lines = [
        f"  updates      {steps.total_steps:,}, {budget['steps_per_epoch']:,} per pass, "
        f"{steps.warmup_steps:,} of them warm-up",
        f"  blocks       {budget['blocks']:,} of {budget['block_size']:,} tokens, "
        f"{budget['blocks_per_update']:,} per update",
        f"  tokens       {outlook.tokens_per_update:,} slots per update; "
        f"{outlook.supervised_tokens:,} supervised per pass, "
        f"{budget['supervised_tokens_per_update']['mean']:,.0f} per update",
        f"  memory       {need.total / GIB:.2f} GiB per device{_judged(found, outlook)}",
    ]
    lines += [
        f"    {size / GIB:8.2f}  {ABOUT[kind]}"
        for kind, size in asdict(need).items()
        if size >= 0.005 * GIB
    ]
    return lines


def _judged(found: Advised, outlook: Outlook) -> str:
    if found.devices is None:
        return ""
    room = found.devices.room / GIB
    return f", fits {room:.1f}" if found.fits(outlook) else f", does NOT fit {room:.1f}"


def _shown(value: object) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
