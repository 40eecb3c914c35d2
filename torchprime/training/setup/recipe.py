"""The parts of the training step that a config defines: model, sharding table, optimizer, plan.

A run, its plan and an ahead-of-time compile (`compile_only`) all take them from here, so that
the plan and the compiled program are those of the training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from torchprime.adapters.axes import adapter_patterns
from torchprime.adapters.lora import A, B
from torchprime.adapters.spec import AdapterSpec
from torchprime.checkpoint.adapter.read import read_adapter
from torchprime.config.checks import refuse
from torchprime.config.schema import TrainConfig
from torchprime.config.sections.adapter import AdapterConfig
from torchprime.data.shared import cache
from torchprime.losses.token_loss import TokenLoss
from torchprime.models.architecture import Architecture
from torchprime.models.decoder import CausalLM, module_names
from torchprime.sharding import ShardingTable, Spec
from torchprime.training.backend import StepOptions
from torchprime.training.optim.adamw_8bit import block_length
from torchprime.training.optim.ema import WithEma
from torchprime.training.optim.groups import Group, freeze_groups, grouped
from torchprime.training.optim.make import make_optimizer
from torchprime.training.optim.muon import MuonSettings
from torchprime.training.optim.optimizer import Optimizer, Parameter
from torchprime.training.regularization.near_base import NAME as KL
from torchprime.training.regularization.near_base import Kl
from torchprime.training.regularization.penalty import Penalty
from torchprime.training.setup.adapter import Adapter, ModelForm
from torchprime.training.setup.datasets import RunData
from torchprime.training.setup.model_files import ModelFiles, find_model
from torchprime.training.setup.plan import (
    Plan,
    StoredParameter,
    count_parameters,
    estimate_memory,
    plan_steps,
    stored_parameters,
)
from torchprime.training.setup.vocabulary import VocabularyRequest
from torchprime.training.spikes import SpikeOptions


def files_of(config: TrainConfig, *, weights: bool) -> ModelFiles:
    """Return the config's model files; with `weights`, those of a checkpoint must be there, too.

    Raises:
        ConfigError: an adapter that could not be loaded over the model; an export of parts that
            the model does not have.
    """
    m = config.model
    found = find_model(
        pretrained_model=m.pretrained_model,
        tokenizer_name=m.tokenizer_name,
        architecture=m.architecture,
        cache_dir=config.dataset.cache_dir,
        weights=weights and m.pretrained_model is not None,
        vocabulary=vocabulary_of(config),
    )
    adapter = adapter_of(config)
    if adapter is not None and adapter.start is not None:
        adapter.start.fit(found.hf_config)
    if config.export.parts == "all" and found.wrapper is None:
        refuse(
            "export.parts",
            "all",
            f"text, since the model ({found.hf_config.get('model_type')}) has no parts but its "
            "text model",
            "Set export.parts=text.",
        )
    parts = config.export.parts
    return replace(found, adapter=adapter, groups=groups_of(config), parts=parts)


def groups_of(config: TrainConfig) -> tuple[Group, ...]:
    """Return the config's groups of parameters."""
    groups = config.task.optimizer.groups
    return tuple(Group(g.pattern, g.lr_factor, g.weight_decay, g.frozen) for g in groups)


def model_of(config: TrainConfig, architecture: Architecture, dtype: torch.dtype) -> CausalLM:
    """Return the config's model without storage: with its adapter, and with frozen groups frozen.

    Raises:
        ConfigError: an adapter that does not fit the model, a group that matches nothing.
    """
    model = ModelForm(architecture, adapter_of(config)).build(dtype)
    freeze_groups(model, groups_of(config))
    return model


def adapter_of(config: TrainConfig) -> Adapter | None:
    """Return the config's adapter; None if all weights are trained.

    Raises:
        CheckpointError: `adapter.pretrained` is no PEFT folder, or one of another method.
    """
    a, s = config.adapter, config.sharding
    if not a.enabled:
        return None
    start = None
    if a.pretrained is not None:
        start = read_adapter(a.pretrained, cache_dir=config.dataset.cache_dir)
        a = as_in(a, start.spec)
    assert a.rank is not None
    spec = AdapterSpec(
        rank=a.rank,
        alpha=a.alpha,
        scaling=a.scaling,
        dropout=a.dropout,
        targets=tuple(a.targets),
        layers=None if a.layers is None else tuple(a.layers),
        modules_to_train=tuple(a.modules_to_train),
        init=a.init,
        dora=a.dora,
        base_type=a.base_dtype,
    )
    table = ShardingTable(s.parameters, s.activations)
    return Adapter(spec, table, config.mesh_shape(), config.export.adapter, start)


def as_in(section: AdapterConfig, spec: AdapterSpec) -> AdapterConfig:
    """Return the section with the keys that describe an adapter. How it is trained stays: dropout,
    and the base's type."""
    return replace(
        section,
        rank=spec.rank,
        alpha=spec.alpha,
        scaling=spec.scaling,
        targets=list(spec.targets),
        layers=None if spec.layers is None else list(spec.layers),
        modules_to_train=list(spec.modules_to_train),
        dora=spec.dora,
    )


def with_adapter(config: TrainConfig, files: ModelFiles, say: Callable[[str], None]) -> TrainConfig:
    """Return the config with the description of the adapter that training starts from."""
    adapter = files.adapter
    if adapter is None or adapter.start is None:
        return config
    if note := adapter.start.base_note(config.model.pretrained_model or ""):
        say(f"note: {note}")
    section = as_in(config.adapter, adapter.spec)
    say(f"starting from the adapter {adapter.start.where} (rank {section.rank})")
    return replace(config, adapter=section)


def vocabulary_of(config: TrainConfig) -> VocabularyRequest:
    """Return the config's request for the vocabulary."""
    m, kept_in = config.model, config.dataset.prepared_dir
    prepared = cache.default_folder() if kept_in is None else Path(kept_in)
    return VocabularyRequest(
        tokens=tuple(m.add_special_tokens),
        method=m.new_rows,
        multiple=m.pad_vocab_to_multiple,
        seed=config.seed,
        kept_in=prepared / "tokenizers",
    )


def sharding_table(config: TrainConfig, model: CausalLM) -> ShardingTable:
    """Return the config's table, with patterns for the model's adapter, not yet checked against the
    model."""
    s = config.sharding
    table = ShardingTable(s.parameters, s.activations, s.max_unsharded_params)
    if not config.adapter.enabled:
        return table
    largest = max(p.numel() for name, p in model.named_parameters() if name.endswith((A, B)))
    axes = table.batch_axes() if largest > s.max_unsharded_params else ()
    return replace(table, parameters=adapter_patterns(s.parameters, axes))


def checked_table(config: TrainConfig, model: CausalLM) -> tuple[ShardingTable, dict[str, Spec]]:
    """Return the table, and its spec of each parameter on the config's mesh.

    Args:
        model: may be without storage.

    Raises:
        ConfigError: names or shapes that the table does not fit, a scan over layers that differ.
    """
    table = sharding_table(config, model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    specs = table.parameter_specs(shapes, config.mesh_shape())
    table.check_activations(module_names(model))
    stored = stored_parameters(model)
    if config.remat.scan_layers:
        _check_layers(stored)
    _check_blocks(config, stored, specs)
    return table, specs


def _check_layers(stored: Mapping[str, StoredParameter]) -> None:
    """Check that a parameter is trained in all layers of a scan, or frozen in all."""
    trained: dict[str, bool] = {}
    for name, p in stored.items():
        layer, _, part = name.removeprefix("model.layers.").partition(".")
        if layer.isdecimal() and trained.setdefault(part, p.trained) != p.trained:
            refuse(
                "remat.scan_layers",
                True,
                f"false, since {part} is trained in some layers and frozen in others",
                "Set remat.scan_layers=false, or write `*` for the layer in each pattern of "
                "task.optimizer.groups.",
            )


def _check_blocks(
    config: TrainConfig, stored: Mapping[str, StoredParameter], specs: Mapping[str, Spec]
) -> None:
    """Check that the tensor axis cuts no block of an 8-bit state, which is of one process."""
    size = config.mesh_shape()["tensor"]
    if config.task.optimizer.name != "adamw_8bit" or size == 1:
        return
    for name, p in stored.items():
        block = block_length(Parameter((name,), p.shape, p.dtype)) if p.trained else None
        if block and "tensor" in specs[name][-1] and p.shape[-1] // size % block:
            refuse(
                "task.optimizer.name",
                "adamw_8bit",
                f"another one on this mesh: ici_mesh.tensor={size} cuts the rows of {name} "
                f"{list(p.shape)} within a block of {block} values, which share a scale",
                "Set task.optimizer.name=adamw, or ici_mesh.tensor=1 and use the fsdp axis.",
            )


def optimizer_of(config: TrainConfig) -> Optimizer:
    """Return the optimizer with its settings; the learning rate enters each step as data."""
    o, decay = config.task.optimizer, config.task.ema_decay
    made = make_optimizer(
        o.name,
        betas=o.betas,
        eps=o.eps,
        weight_decay=o.weight_decay,
        momentum=o.momentum,
        nesterov=o.nesterov,
        muon=MuonSettings(o.muon.adjust_lr, o.muon.adamw_lr_factor, o.muon.steps),
    )
    optimizer = grouped(made, groups_of(config))
    return optimizer if decay is None else WithEma(optimizer, decay)


def step_options(config: TrainConfig, num_sources: int) -> StepOptions:
    """Return the options of the step besides model and optimizer."""
    task, loss, near = config.task, config.task.loss, config.regularization
    token_loss = TokenLoss(loss.label_smoothing, loss.z_loss, loss.dft)
    penalty, kl = near.penalty, near.kl
    return StepOptions(
        gradient_accumulation_steps=task.gradient_accumulation_steps,
        loss_chunks=task.loss_chunks,
        max_grad_norm=task.max_grad_norm,
        max_grad_value=task.max_grad_value,
        master_weights=task.optimizer.master_weights,
        num_sources=num_sources,
        token_loss=token_loss,
        loss_terms=(*token_loss.terms, *([] if kl.coefficient is None else [KL])),
        step_terms=() if penalty is None else (penalty[0],),
        penalty=None if penalty is None else Penalty(*penalty),
        kl=None if kl.coefficient is None else Kl(kl.coefficient, kl.on),
        random_seed=_random_seed(config),
        noise_alpha=task.neftune_noise_alpha or 0.0,
        spikes=spike_options(config),
    )


def spike_options(config: TrainConfig) -> SpikeOptions | None:
    """Return the options of the watch for spikes; None if it is off."""
    spike = config.task.spike
    if spike.window is None:
        return None
    skip = spike.action == "skip"
    return SpikeOptions(spike.window, spike.deviations, skip, config.logging_steps)


def _random_seed(config: TrainConfig) -> int | None:
    """Return the run's seed in 32 bits with a sign; None without dropout and noise."""
    dropout = config.adapter.enabled and config.adapter.dropout
    if not dropout and config.task.neftune_noise_alpha is None:
        return None
    folded = (config.seed ^ config.seed >> 32) & 0xFFFFFFFF
    return folded - (1 << 32 if folded >= 1 << 31 else 0)


def plan_run(
    config: TrainConfig,
    files: ModelFiles,
    rows: RunData,
    optimizer: Optimizer,
) -> tuple[ShardingTable, Plan]:
    """Return the plan of a config's run, with the table by which it is sharded.

    Raises:
        ConfigError: names or shapes that the sharding table does not fit, a scan over layers that
            differ.
    """
    model = files.build(getattr(torch, config.torch_dtype))
    table, specs = checked_table(config, model)
    form = ModelForm(files.architecture, files.adapter)
    stored, held_out = stored_parameters(model), rows.heldout
    plan = Plan(
        **plan_steps(config, rows.train)._asdict(),
        eval_budget=held_out and {"examples": held_out.num_examples, "blocks": held_out.num_blocks},
        parameters=count_parameters(stored, files.shapes),
        mesh=config.mesh_shape(),
        memory=estimate_memory(config, form, stored, specs, optimizer),
    )
    return table, plan
