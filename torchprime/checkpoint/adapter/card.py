"""The model card (README.md) of an adapter: its base, training and use with PEFT and vLLM."""

from __future__ import annotations

import math
import shlex

from torchprime.adapters.spec import AdapterSpec
from torchprime.checkpoint.adapter.parts import AdapterParts
from torchprime.checkpoint.hf.card import auto_class, command_section, hub_names, table_section
from torchprime.checkpoint.hf.export_facts import ExportFacts
from torchprime.checkpoint.hf.source import hub_name
from torchprime.text.markdown_text import block, code, inline

# Values of vLLM's --max-lora-rank (MaxLoRARanks in its config/lora.py). It also has 1; 8 serves
# that rank too.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
UNNAMED = "adapter"
STORED = {
    "int8": "int8, a scale for each output",
    "nf4": "NF4 in blocks of 64, double quantization",
}


def adapter_card(facts: ExportFacts, spec: AdapterSpec, parts: AdapterParts, base: str) -> str:
    """Return the card's text.

    Args:
        facts: of the run; unknown ones are left out.
        base: name or folder of the base, as adapter_config.json has it.
    """
    name = facts.card.name or UNNAMED
    count = sum(math.prod(shape) for shape in parts.shapes.values())
    rows = {
        "base model": base,
        "dataset": facts.card.dataset,
        "method": "DoRA" if spec.dora else "LoRA",
        "rank": spec.rank,
        "alpha": spec.alpha,
        "scaling": "alpha / sqrt(rank) (rslora)" if spec.scaling == "rslora" else "alpha / rank",
        "dropout": spec.dropout,
        "adapted layers": len(parts.targets),
        "trained whole": ", ".join(parts.whole) or None,
        "trained parameters": count,
        "frozen weights": STORED.get(spec.base_type),
        "steps": facts.step,
        "dtype": facts.dtype_name,
    }
    sections = [
        _front_matter(facts, base),
        f"# {inline(name)}\n\n{_summary(facts, spec, base)}",
        table_section("Training", {key: value for key, value in rows.items() if value is not None}),
        table_section("Final metrics", facts.metrics),
        command_section(facts.card.command),
        table_section("Versions", facts.card.versions),
        _usage(facts, spec, parts, base),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(facts: ExportFacts, base: str) -> str:
    """Return the YAML front matter, which hubs read. It names only models and datasets from the
    hub: a local folder would be a broken link there."""
    lines = ["---", "library_name: peft", "pipeline_tag: text-generation"]
    lines += [
        f"base_model: {name}" for name in hub_names([facts.card.hub_model or hub_name(base) or ""])
    ]
    if names := hub_names(facts.card.hub_datasets):
        lines += ["datasets:", *(f"- {name}" for name in names)]
    return "\n".join([*lines, "tags:", "- lora", "- torchprime", "---"])


def _summary(facts: ExportFacts, spec: AdapterSpec, base: str) -> str:
    data = f", trained on {code(facts.card.dataset)}" if facts.card.dataset else ""
    kind = "A DoRA" if spec.dora else "A LoRA"
    inside = ""
    if facts.card.wrapper is not None:
        inside = (
            f" It adapts the text model of the base, whose `model_type` is "
            f"{code(facts.card.wrapper)}, and is loaded over the whole base; the other parts, such "
            "as those for images, stay the base's."
        )
    return (
        f"{kind} adapter of {code(base)}{data} with torchprime (PyTorch/XLA).{inside} The checks "
        "that were made on these files are in certificate.json; `torchprime verify .` makes them "
        "again."
    )


def _usage(facts: ExportFacts, spec: AdapterSpec, parts: AdapterParts, base: str) -> str:
    auto = auto_class(whole_wrapper=facts.card.wrapper is not None)
    python = f"""\
from peft import PeftModel
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
base = {auto}.from_pretrained({base!r}, dtype="auto")
model = PeftModel.from_pretrained(base, ".")"""
    merge = f"torchprime export --adapter . --base {shlex.quote(base)} --merge --out MERGED"
    served = _served(facts, spec, base)
    return "\n".join(
        [
            "## Use\n\nWith PEFT, in this folder:\n",
            *block(python, "python"),
            "\nMerged into its base, as a plain model:\n",
            *block(merge, "bash"),
            *(_refused(facts, spec, parts) or ["\nWith vLLM:\n", *block(served, "bash")]),
        ]
    )


def _served(facts: ExportFacts, spec: AdapterSpec, base: str) -> str:
    """Return vLLM's command line. The template and the stop tokens are the adapter's, not the
    base's; the dtype is the run's, since vLLM would take 16 bits for a base in float32."""
    name = facts.card.name or UNNAMED
    rank = next((rank for rank in VLLM_RANKS if rank >= spec.rank), VLLM_RANKS[-1])
    template = " --chat-template chat_template.jinja" if facts.card.chat else ""
    return (
        f"vllm serve {shlex.quote(base)} --host 127.0.0.1 --enable-lora --max-lora-rank {rank} \\\n"
        f"  --lora-modules {shlex.quote(f'{name}=.')} --tokenizer .{template} \\\n"
        f"  --generation-config . --dtype {facts.dtype_name}"
    )


def _refused(facts: ExportFacts, spec: AdapterSpec, parts: AdapterParts) -> list[str]:
    """Return the sentence that says why vLLM does not serve this adapter; none if it does."""
    reasons = ["DoRA"] if spec.dora else []
    reasons += ["modules that were trained whole (modules_to_save)"] if parts.whole else []
    reasons += ["a rank above 512"] if spec.rank > VLLM_RANKS[-1] else []
    # vLLM knows the fused projections of Phi-3 by their names, and those of GLM-4 by their parts.
    parted = any(name.endswith(".q_proj.weight") for name in facts.spec)
    fused = any(name.endswith(".gate_up_proj") for name in parts.targets)
    reasons += ["an adapter of this family's gate_up_proj"] if fused and parted else []
    if not reasons:
        return []
    told = " and ".join(reasons)
    return [f"\nvLLM's `--enable-lora` does not serve {told}: serve the merged model."]
