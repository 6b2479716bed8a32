"""Packed rows on a GPU: the model's own numbers, and the kernel against float32."""

import importlib.util
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from madpo_ray.config import ForwardOptions, ModelConfig
from madpo_ray.data.batching import collate
from madpo_ray.models.attention import has_flash_kernel, packed_attention
from madpo_ray.models.loading import load_policy
from madpo_ray.models.logprobs import ResponseLogps
from madpo_ray.models.reading import find_reading
from madpo_ray.scoring.scorers import PolicyLogps, TrainedReward
from support.forwards import PAIRS, separate_logps
from support.models import make_model, make_reward_model

CUDA = torch.device("cuda")
# Largest difference of a response's log-prob, in nats. TF32 is off.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 1.0}


# The compiler reads what warns, and recommends TF32.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.parametrize("torch_compile", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral", "gemma3_text", "gpt2"])
def test_rows_are_packed_and_give_the_models_log_probs(
    model_type: str, dtype: torch.dtype, torch_compile: bool
) -> None:
    torch.compiler.reset()
    model = make_model(model_type)
    with torch.no_grad():
        expected = separate_logps(model)
        module = ResponseLogps(model.to(CUDA, dtype))
        settings = ModelConfig(model_name_or_path="x", torch_compile=torch_compile)
        reading = find_reading(module, CUDA, settings)
        assert reading.packed
        logps = module(collate(PAIRS, packed=True).to(CUDA))["logps"]
    torch.testing.assert_close(logps.cpu(), expected, rtol=0, atol=TOLERANCES[dtype])


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("heads", "key_heads", "channels"), [(4, 4, 64), (8, 2, 128)])
def test_flash_kernel_equals_segments(
    heads: int, key_heads: int, channels: int, window: int | None
) -> None:
    """Outputs and gradients in bfloat16, against float32."""
    batch = collate(PAIRS, packed=True).to(CUDA)
    row = batch.packed_row
    shapes = [
        (1, count, batch.input_ids.shape[1], channels) for count in (heads, key_heads, key_heads)
    ]
    exact = [torch.randn(*shape, device=CUDA, requires_grad=True) for shape in shapes]
    rounded = [states.detach().bfloat16().requires_grad_() for states in exact]
    assert has_flash_kernel(rounded[0], rounded[2])
    assert not has_flash_kernel(exact[0], exact[2])

    results = []
    for states in (rounded, exact):
        output, _ = packed_attention(None, *states, None, packed_row=row, sliding_window=window)
        grads = torch.autograd.grad(output.float().square().sum(), states)
        results.append([output, *grads])
    for ours, theirs in zip(*results, strict=True):
        assert (ours.float() - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_models_over_two_gpus_give_the_same_scores(tmp_path: Path) -> None:
    """In float32, in packed rows; the settings' kernels of one GPU are not used."""
    policy, judge = make_model("llama"), make_reward_model()
    policy.save_pretrained(tmp_path / "policy")
    judge.save_pretrained(tmp_path / "judge")
    rows = pa.Table.from_pylist(PAIRS)
    for scorer_class, folder in ((PolicyLogps, "policy"), (TrainedReward, "judge")):
        scores = []
        for device, over_gpus in ((torch.device("cpu"), False), (CUDA, True)):
            scorer = scorer_class(
                tmp_path / folder,
                ModelConfig(model_name_or_path="x", torch_compile=over_gpus),
                columns=("chosen", "rejected"),
                forward=ForwardOptions(2, over_gpus=over_gpus),
            )
            scorer.load(device)
            scores.append(scorer(rows))
        devices = {weight.device for weight in scorer._module.parameters()}
        assert devices == {torch.device("cuda", 0), torch.device("cuda", 1)}
        np.testing.assert_allclose(scores[1], scores[0], rtol=0, atol=1e-3)


@pytest.mark.skipif(not importlib.util.find_spec("liger_kernel"), reason="needs liger-kernel")
def test_liger_gives_the_models_log_probs(tmp_path: Path) -> None:
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    settings = ModelConfig(model_name_or_path=str(tmp_path), use_liger_kernel=True)
    with torch.no_grad():
        expected = separate_logps(model)
        module = ResponseLogps(load_policy(tmp_path, settings).to(CUDA))
        assert find_reading(module, CUDA, settings).packed
        logps = module(collate(PAIRS, packed=True).to(CUDA))["logps"]
    torch.testing.assert_close(logps.cpu(), expected, rtol=0, atol=TOLERANCES[torch.float32])
