"""Plans of a tiny model on GPUs of a size that makes the choice."""

import math
from pathlib import Path
from typing import Any

import pytest

from madpo_ray.config import Config, parse_config
from madpo_ray.errors import UserError
from madpo_ray.sizing.footprint import Lengths
from madpo_ray.sizing.gpus import GPU, USABLE, Cluster
from madpo_ray.sizing.passes import PassNeeds
from madpo_ray.sizing.plan import choose_lengths, find_needs
from madpo_ray.sizing.trainings import TrainingNeeds
from support.models import make_model

LENGTHS = Lengths(prompt=16, response=8)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A model of which only config.json is there."""
    make_model("llama").config.save_pretrained(tmp_path / "model")
    raw: dict[str, Any] = {
        "model": {"model_name_or_path": str(tmp_path / "model")},
        "data": {"files": [str(tmp_path / "none.jsonl")]},
        "cluster": {"use_gpu": True},
        "sft": {},
        "train": {"per_device_train_batch_size": 4, "reduce_bucket_size": 1000},
    }
    return parse_config(raw)


def cluster_of(memory: int, nodes: int = 1) -> Cluster:
    return Cluster(GPU(memory, 1e12, 1e11), "test", gpus_per_node=2, nodes=nodes, utilisation=0.5)


def policy_needs(config: Config, memory: int, nodes: int = 1) -> TrainingNeeds:
    return find_needs(config, cluster_of(memory, nodes), LENGTHS).trainings[-1]


def settings_that_fit(needs: TrainingNeeds) -> dict[str, Any]:
    assert needs.fitting is not None
    return dict(needs.fitting.changes)


def test_covers_every_training_and_pass(config: Config) -> None:
    needs = find_needs(config, cluster_of(2**40), LENGTHS)
    assert [one.stage for one in needs.trainings] == ["sft", "reward", "train"]
    assert [one.name for one in needs.passes] == ["margins", "evaluate: sampling"]
    # SFT reads one response of a pair.
    assert [one.footprint.tokens // one.shape.pairs for one in needs.trainings] == [24, 32, 32]


def test_separate_passes_add_up(config: Config) -> None:
    def passes(**scoring: bool) -> list[PassNeeds]:
        changed = config.scoring.model_copy(update=scoring)
        needs = find_needs(
            config.model_copy(update={"scoring": changed}), cluster_of(2**40), LENGTHS
        )
        return needs.passes[:-1]

    (both,) = passes()
    apart = passes(one_model_at_a_time=True)
    assert [one.name for one in apart] == ["margins: reference", "margins: reward"]
    assert both.weights == sum(one.weights for one in apart)
    assert both.activations == max(one.activations for one in apart)
    speeds = [one.pairs_per_second for one in (both, *apart)]
    together, reference, reward = (1 / speed for speed in speeds if speed)
    assert together == pytest.approx(reference + reward)


def test_fastest_settings_that_fit(config: Config) -> None:
    """Less memory: more is sharded, then recomputed, offloaded, and read in smaller parts."""
    dpo = config.train.model_copy(update={"loss_type": "sigmoid"})  # no reward model
    config = config.model_copy(update={"sft": None, "train": dpo})
    roomy = policy_needs(config, 2**40)
    assert settings_that_fit(roomy) == {"zero_stage": 0}
    tighter = policy_needs(config, int(roomy.by_zero_stage[0].peak / USABLE) - 1)
    assert settings_that_fit(tighter) == {"zero_stage": 1}
    assert policy_needs(config, 1000).fitting is None


def test_compiled_layers_are_neither_sharded_nor_recomputed(config: Config) -> None:
    """Such settings would be refused."""
    model = config.model.model_copy(update={"torch_compile": True})
    config = config.model_copy(update={"model": model})
    roomy = policy_needs(config, 2**40)
    memory = min(roomy.by_zero_stage[stage].peak for stage in range(3))
    tighter = policy_needs(config, int(memory / USABLE) - 1)
    assert settings_that_fit(tighter).keys() >= {"per_device_train_batch_size"}
    assert settings_that_fit(tighter).get("zero_stage", 0) < 3
    assert "gradient_checkpointing" not in settings_that_fit(tighter)


def test_budget_of_tokens_is_kept(config: Config) -> None:
    train = config.train.model_copy(update={"max_tokens_per_device": 100})
    needs = policy_needs(config.model_copy(update={"train": train}), 2**40)
    assert needs.shape.pairs == 100 // 32
    assert settings_that_fit(needs) == {"zero_stage": 0, "max_tokens_per_device": 96}


def test_budget_of_rows_that_are_not_packed(config: Config) -> None:
    """The prompt is read with each response."""
    raw = config.model_dump(mode="json")
    raw["model"]["packed_rows"] = "off"
    raw["train"]["max_tokens_per_device"] = 100
    needs = policy_needs(parse_config(raw), 2**40)
    assert needs.shape.pairs == 100 // 48
    assert settings_that_fit(needs) == {"zero_stage": 0, "max_tokens_per_device": 96}


def test_forward_has_no_more_pairs_than_a_step(config: Config) -> None:
    update = {"max_tokens_per_device": 10_000, "global_batch_size": 6}
    train = config.train.model_copy(update=update)
    assert policy_needs(config.model_copy(update={"train": train}), 2**40).shape.pairs == 6


def test_more_nodes_hold_smaller_parts(config: Config) -> None:
    one, two = (policy_needs(config, 2**40, nodes) for nodes in (1, 2))
    assert two.by_zero_stage[3].optimizer < one.by_zero_stage[3].optimizer
    assert two.by_zero_stage[0] == one.by_zero_stage[0]
    assert two.pairs_per_second == pytest.approx(2 * one.pairs_per_second)
    assert two.checkpoint == one.checkpoint


def test_gpus_of_an_actor(config: Config) -> None:
    """Several hold its weights together, one layer at work; of one, several actors have shares."""

    def margins(gpus_per_actor: float | None) -> PassNeeds:
        scoring = config.scoring.model_copy(update={"gpus_per_actor": gpus_per_actor})
        changed = config.model_copy(update={"scoring": scoring})
        return find_needs(changed, cluster_of(2**40), LENGTHS).passes[0]

    one, two, shared = margins(None), margins(2.0), margins(0.3)
    assert two.weights == math.ceil(one.weights / 2)
    assert two.activations == one.activations
    assert one.pairs_per_second == 2 * (two.pairs_per_second or 0)
    assert shared.peak == 3 * one.peak
    assert shared.pairs_per_second == one.pairs_per_second


def test_each_fold_has_a_model_in_every_actor(config: Config) -> None:
    raw = config.model_dump(mode="json")
    weights = []
    for folds in (1, 3):
        raw["reward"]["folds"] = folds
        needs = find_needs(parse_config(raw), cluster_of(2**40), LENGTHS)
        weights.append(needs.passes[0].weights)
    reference = needs.passes[1].weights // 2
    assert weights[1] - reference == 3 * (weights[0] - reference)


def test_lengths_fill_max_length(config: Config) -> None:
    assert choose_lengths(config).tokens_of_pair(1, packed=True) == config.data.max_length
    assert choose_lengths(config, 1000) == (1000, 24)
    assert choose_lengths(config, 1000, 50) == (1000, 50)
    with pytest.raises(UserError, match="1024 leaves no response"):
        choose_lengths(config, 1024)


def test_idle_gpus_take_time(config: Config) -> None:
    """A step of 4 pairs is one micro-batch for two GPUs."""
    speeds = []
    for global_batch_size in (32, 4):
        train = config.train.model_copy(update={"global_batch_size": global_batch_size})
        needs = policy_needs(config.model_copy(update={"train": train}), 2**40)
        speeds.append((needs.pairs_per_second, needs.idle))
    assert speeds[1] == (pytest.approx(speeds[0][0] / 2), 0.5)


def test_wrong_target_of_lora_is_refused(config: Config) -> None:
    changes = {"use_peft": True, "lora_target_modules": ("q_prj",)}
    train = config.train.model_copy(update=changes)
    with pytest.raises(UserError, match="did you mean 'q_proj'"):
        policy_needs(config.model_copy(update={"train": train}), 2**40)


def test_unreadable_model(config: Config, tmp_path: Path) -> None:
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json of .*model cannot be read"):
        find_needs(config, cluster_of(2**40), LENGTHS)
