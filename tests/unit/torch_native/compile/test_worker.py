"""The step that the compiling process traces: no chip, no storage, TorchTPU not needed."""

from __future__ import annotations

from torchprime.config.compose import compose_config
from torchprime.losses.chunks import CHUNK_BYTES, tpu_chunk_bytes
from torchprime.torch_native.chips.backend import chunk_bytes
from torchprime.torch_native.compile.worker import trace

HF = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def test_the_step_is_that_of_the_training_backend() -> None:
    argv = ["model.pretrained_model=x", "task.max_steps=1", "mesh=fsdp8", "compile_only=v6e-8"]
    argv += ["torch_dtype=bfloat16", "dataset.block_size=256", "task.global_batch_size=32"]
    argv += ["task.gradient_accumulation_steps=2", "remat=scan_full"]
    step = trace(compose_config(argv), HF)
    shapes = {each.name: each.shape for each in step.inputs}
    assert shapes["model.model.embed_tokens.weight"] == (512, 32)
    assert shapes["field.0"] == (2, 2, 256)  # micro-batches, a chip's rows, tokens
    name = "model.layers.*.mlp.up_proj.weight"
    kept = [each.name for each in step.inputs if each.donated and each.name.endswith(name)]
    kinds = ["model", "optimizer.exp_avg", "optimizer.exp_avg_sq", "master"]
    assert kept == [f"{kind}.{name}" for kind in kinds]
    assert shapes[f"master.{name}"] == (2, 512, 32)


def test_a_chip_has_larger_chunks_of_the_loss_than_the_cpu() -> None:
    assert chunk_bytes("CPU") == CHUNK_BYTES < chunk_bytes("v5e") < chunk_bytes("v6e")
    assert chunk_bytes("a chip of later days") == tpu_chunk_bytes(None)
