"""The sections: strict, frozen, with bounds, and checks across them."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from madpo_ray.config import (
    SEARCH_SPACES,
    ClusterConfig,
    Config,
    LossType,
    PolicyConfig,
    RewardConfig,
    SFTConfig,
    TrainingConfig,
    parse_config,
)
from madpo_ray.config.inputs import RunConfig
from madpo_ray.data.batching import collate
from madpo_ray.errors import UserError
from madpo_ray.search.space import corners, settings_of
from madpo_ray.training.objectives import PolicyObjective, RewardObjective, SFTObjective
from madpo_ray.training.protocols import Terms
from support.pairs import Edit
from support.synthetic import synthetic

CHOSEN = ("chosen_ids",)


def set_in(section: str, key: str, value: Any) -> Edit:
    return lambda raw: raw.setdefault(section, {}).update({key: value})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_in("train", "learning_rat", 1.0), "train.learning_rat; did you mean 'learning_rate'?"),
        (set_in("train", "max_length", 1), "train.max_length; did you mean data.max_length?"),
        (set_in("run", "lora_r", 1), "did you mean sft.lora_r or reward.lora_r or train.lora_r?"),
        (set_in("train", "batch_size", 1), "did you mean 'global_batch_size'?"),
        (set_in("trian", "beta", 1.0), "unknown key trian; did you mean 'train'?"),
        (set_in("sft", "lora_rr", 1), "unknown key sft.lora_rr; did you mean 'lora_r'?"),
        (
            set_in(
                "tune", "search_space", {"train.beta": {"type": "uniform", "mini": 1, "max": 2}}
            ),
            "mean 'min'?",
        ),
        (set_in("tune", "search_space", {"train.beta": {"type": "normal"}}), "loguniform"),
        (set_in("train", "c_min", 1.0), "MADPO is DPO"),
        (set_in("train", "c_min", 0.0), "strictly between 0 and 1"),
        (set_in("train", "c_max", 1.0), "MADPO is DPO"),
        (set_in("train", "tau", 0.0), "must be above 0"),
        (set_in("train", "beta", "0.1"), "train.beta: Input should be a valid number"),
        (set_in("train", "loss_type", "madop"), "'madpo'"),
        (set_in("train", "tau", float("inf")), "finite"),
        (set_in("train", "max_steps", 0), "train.max_steps: should be 1 or more, or -1"),
        (set_in("train", "label_smoothing", 0.1), "belongs to loss_type sigmoid"),
        (set_in("train", "label_smoothing", 0.5), "less than 0.5"),
        (set_in("evaluate", "chosen_score_column", None), "go together"),
        (set_in("data", "files", []), "at least 1 item"),
        (set_in("data", "validation_fraction", 0.8), "must be below 1"),
        (set_in("data", "keep_columns", ["margin"]), "give it another: margin as my_score"),
        (set_in("data", "keep_columns", ["x as split"]), "split: reserved name"),
        (set_in("data", "keep_columns", ["a as b", "b"]), "listed twice"),
        (set_in("data", "keep_columns", ["a as "]), "a column has no name"),
        (set_in("data", "keep_columns", ["a", "a"]), "listed twice"),
        (set_in("data", "rejected_column", "chosen"), "and rejected_column are both 'chosen'"),
        (set_in("run", "seed", 2**32), "less than 4294967296"),
        (set_in("run", "storage_path", "s3://bucket/runs"), "is a URI"),
        (set_in("run", "name", "../x"), "String should match"),
        (set_in("reward", "lora_layers_to_transform", [1]), "by name"),
        (set_in("train", "lora_target_modules", ["all-linear", "q_proj"]), "give it alone"),
        (set_in("model", "attn_implementation", "flash_attention_2"), "trains on GPUs only"),
        (set_in("model", "use_liger_kernel", True), "use_liger_kernel needs cluster.use_gpu"),
        (set_in("train", "weight_column", "w"), "add it to data.keep_columns"),
    ],
)
def test_bad_values_name_key_and_fix(raw_config: dict[str, Any], edit: Edit, message: str) -> None:
    edit(raw_config)
    with pytest.raises(UserError) as error:
        parse_config(raw_config)
    assert message in str(error.value)


def test_streamed_margins_need_all_models_at_once(raw_config: dict[str, Any]) -> None:
    raw_config["scoring"] = {"one_model_at_a_time": True}
    parse_config(raw_config)
    raw_config["margins"] = {"mode": "stream"}
    with pytest.raises(UserError, match=r"needs margins\.mode: stored"):
        parse_config(raw_config)


@pytest.mark.parametrize(("key", "value"), [("zero_stage", 3), ("gradient_checkpointing", True)])
def test_torch_compile_refuses_zero_3_and_checkpointing(
    raw_config: dict[str, Any], key: str, value: Any
) -> None:
    raw_config["model"]["torch_compile"] = True
    parse_config(raw_config)
    raw_config["train"][key] = value
    with pytest.raises(UserError, match=rf"torch_compile does not work with train\.{key}"):
        parse_config(raw_config)


def test_defaults() -> None:
    """Those of the MADPO authors' best setting, and TRL's."""
    settings = PolicyConfig()
    assert (settings.c_min, settings.c_max, settings.lmbda, settings.tau) == (0.25, 4.0, 1.0, 7.0)
    assert (settings.beta, settings.loss_type, settings.label_smoothing) == (0.1, "madpo", 0.0)
    assert (settings.adam_beta1, settings.adam_beta2) == (0.9, 0.95)
    assert (settings.weight_decay, settings.max_grad_norm) == (0.01, 1.0)
    assert (settings.warmup_steps, settings.lr_scheduler_type) == (0.03, "cosine")
    assert (settings.learning_rate, settings.global_batch_size) == (1e-5, 32)


@pytest.mark.parametrize("section", [name for name in Config.model_fields if name != "sft"])
def test_every_key_is_described(section: str, config: Config) -> None:
    fields = type(getattr(config, section)).model_fields
    assert [name for name, field in fields.items() if not field.description] == []


def test_is_frozen(config: Config) -> None:
    with pytest.raises(ValueError, match="frozen"):
        config.train.beta = 1.0  # type: ignore[misc]


def test_best_metric(raw_config: dict[str, Any]) -> None:
    raw_config["train"] |= {
        "early_stopping_patience": 2,
        "metric_for_best_model": "rewards/accuracies",
    }
    with pytest.raises(UserError, match="early_stopping_patience needs metric_for_best_model"):
        parse_config(raw_config)
    raw_config["train"]["eval_steps"] = 5
    assert parse_config(raw_config).train.best_metric == ("eval_rewards/accuracies", True)
    raw_config["train"]["metric_for_best_model"] = "eval_loss"
    assert parse_config(raw_config).train.best_metric == ("eval_loss", False)
    raw_config["train"]["metric_for_best_model"] = "accuracy"
    with pytest.raises(UserError, match="no 'accuracy' is measured; did you mean 'rewards/acc"):
        parse_config(raw_config)


def test_operational_keys_are_not_fingerprinted() -> None:
    """Until evaluations choose the result."""
    base = PolicyConfig()
    for key, value in {"logging_steps": 3, "save_steps": 7, "eval_steps": 3}.items():
        assert base.model_copy(update={key: value}).fingerprinted() == base.fingerprinted()
    assert base.model_copy(update={"beta": 0.3}).fingerprinted() != base.fingerprinted()

    best = base.model_copy(update={"metric_for_best_model": "eval_loss"})
    often = best.model_copy(update={"eval_steps": 3})
    assert often.fingerprinted() != best.fingerprinted()


@pytest.mark.parametrize(
    ("stage", "key", "needed"), [(1, "offload_optimizer", 2), (2, "offload_param", 3)]
)
def test_offloading_needs_shards(
    stage: int, key: str, needed: int, raw_config: dict[str, Any]
) -> None:
    raw_config["train"] |= {"zero_stage": stage, key: True}
    with pytest.raises(UserError, match=f"{key} needs zero_stage"):
        parse_config(raw_config)
    raw_config["train"]["zero_stage"] = needed
    assert getattr(parse_config(raw_config).train, key)


def test_four_bits_need_an_adapter_on_gpus(raw_config: dict[str, Any]) -> None:
    raw_config["model"]["load_in_4bit"] = True
    with pytest.raises(UserError, match=r"load_in_4bit needs cluster\.use_gpu, train\.use_peft"):
        parse_config(raw_config)
    del raw_config["sft"]
    raw_config["train"]["use_peft"] = raw_config["cluster"]["use_gpu"] = True
    assert parse_config(raw_config).model.numerics()["load_in_4bit"]


@pytest.mark.parametrize("loss_type", get_args(LossType))
def test_search_space_follows_the_loss(loss_type: LossType, raw_config: dict[str, Any]) -> None:
    """No key that the loss does not read."""
    raw_config["train"]["loss_type"] = loss_type
    space = parse_config(raw_config).search_space
    assert space == SEARCH_SPACES[loss_type]
    assert ("train.c_min" in space) is (loss_type == "madpo")
    own = {"train.tau": {"type": "uniform", "min": 0.1, "max": 0.2}}
    raw_config["tune"] = {"search_space": own}
    assert list(parse_config(raw_config).search_space) == ["train.tau"]


def without_texts(node: Any) -> Any:
    if isinstance(node, dict):
        dropped = {"description", "title", "properties", "additionalProperties"}
        return {key: without_texts(value) for key, value in node.items() if key not in dropped}
    return [without_texts(value) for value in node] if isinstance(node, list) else node


def test_keys_defaults_and_bounds() -> None:
    """They are the interface: whoever changes one changes keys.json, and says so in CHANGELOG."""
    sections = Config.model_json_schema()["$defs"]
    found = {
        name: {key: without_texts(value) for key, value in section["properties"].items()}
        for name, section in sections.items()
        if "properties" in section
    }
    assert found == json.loads((Path(__file__).parent / "keys.json").read_text())


@pytest.mark.parametrize("loss_type", get_args(LossType))
def test_search_spaces_are_valid_at_their_ends(loss_type: LossType) -> None:
    ends = corners(SEARCH_SPACES[loss_type])
    assert len(ends) > 1
    for values in ends:
        settings, _ = settings_of(values)
        PolicyConfig(loss_type=loss_type, **settings)


def test_metrics_that_a_config_may_name_are_measured() -> None:
    outputs, batch, _ = synthetic()
    rewards = {"rewards": outputs["logps"]}
    single = collate([{"prompt_ids": [1], "chosen_ids": [2]}], packed=False, responses=CHOSEN)
    one = {"logps": torch.zeros(1), "entropy": torch.zeros(1)}
    policy = PolicyObjective(PolicyConfig(loss_type="sigmoid"), 0)
    measured: dict[type[TrainingConfig], Terms] = {
        PolicyConfig: policy(outputs, batch, training=False),
        RewardConfig: RewardObjective(RewardConfig())(rewards, batch, training=False),
        SFTConfig: SFTObjective()(one, single, training=False),
    }
    for section, terms in measured.items():
        named = section.metrics - {"loss"}
        assert "loss" in section.metrics
        assert named <= terms.metrics.keys()
    assert {"rewards/accuracies", "rewards/margins"} <= PolicyConfig.metrics


def test_deadline_and_threads() -> None:
    assert RunConfig(max_wall_time=10.0).deadline(100.0) == 110.0
    assert RunConfig().deadline(100.0) is None
    threads = [ClusterConfig(cpus_per_worker=cpus).num_threads for cpus in (0.5, 1.0, 2.7)]
    assert threads == [1, 1, 2]


FOUR_BITS = {
    "model": {"load_in_4bit": True},
    "cluster": {"use_gpu": True},
    "train": {"use_peft": True, "zero_stage": 2},
}


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("cluster", {"use_gpu": False}),
        ("train", {"use_peft": False}),
        ("train", {"zero_stage": 3}),
        ("train", {"merge_adapter": True}),
        ("sft", {"max_steps": 2}),
    ],
)
def test_four_bits_need_all_of_it(
    section: str, changes: dict[str, Any], raw_config: dict[str, Any]
) -> None:
    del raw_config["sft"]
    for name, values in FOUR_BITS.items():
        raw_config[name] |= values
    assert parse_config(raw_config).model.load_in_4bit
    raw_config.setdefault(section, {}).update(changes)
    with pytest.raises(UserError, match="load_in_4bit needs"):
        parse_config(raw_config)


def test_flash_attention_is_for_bfloat16_on_gpus(raw_config: dict[str, Any]) -> None:
    raw_config["model"]["attn_implementation"] = "flash_attention_2"
    with pytest.raises(UserError, match="trains on GPUs only"):
        parse_config(raw_config)
    raw_config["cluster"]["use_gpu"] = True
    assert parse_config(raw_config).model.attn_implementation == "flash_attention_2"
    raw_config["model"]["dtype"] = "float32"
    with pytest.raises(UserError, match="flash_attention_2 computes in bfloat16 only"):
        parse_config(raw_config)


def test_dtype_follows_the_device(raw_config: dict[str, Any]) -> None:
    """bfloat16 on GPUs, unless the config says otherwise."""
    assert parse_config(raw_config).model.dtype == "float32"
    raw_config["cluster"]["use_gpu"] = True
    assert parse_config(raw_config).model.dtype == "bfloat16"
    raw_config["model"]["dtype"] = "float32"
    assert parse_config(raw_config).model.dtype == "float32"


def test_actors_follow_the_workers(raw_config: dict[str, Any]) -> None:
    """Unless section scoring says otherwise."""
    raw_config["cluster"] = {"num_workers": 3, "cpus_per_worker": 2.0}
    assert parse_config(raw_config).actors == (3, 3, 2.0, 0.0)
    raw_config["scoring"] = {"max_actors": 2}
    assert parse_config(raw_config).actors == (2, 2, 2.0, 0.0)
    raw_config["scoring"] = {"min_actors": 1, "max_actors": 8, "gpus_per_actor": 0.25}
    with pytest.raises(UserError, match=r"scoring\.gpus_per_actor needs cluster\.use_gpu"):
        parse_config(raw_config)
    raw_config["cluster"]["use_gpu"] = True
    assert parse_config(raw_config).actors == (1, 8, 2.0, 0.25)
    raw_config["scoring"] = {"cpus_per_actor": 1.5}
    assert parse_config(raw_config).actors == (3, 3, 1.5, 1.0)


def test_actors_of_several_gpus(raw_config: dict[str, Any]) -> None:
    """No more of them than the workers' GPUs suffice for."""
    raw_config["cluster"] = {"num_workers": 8, "use_gpu": True}
    for gpus, actors, over_gpus in ((1, 8, False), (2, 4, True), (3, 2, True), (16, 1, True)):
        raw_config["scoring"] = {"gpus_per_actor": float(gpus)}
        config = parse_config(raw_config)
        assert config.actors == (actors, actors, 1.0, gpus)
        assert config.scoring.forward.over_gpus == over_gpus
    raw_config["scoring"] = {"gpus_per_actor": 1.5}
    with pytest.raises(UserError, match="a share of one GPU, or a whole number"):
        parse_config(raw_config)


def test_more_actors_to_start_with_than_allowed(raw_config: dict[str, Any]) -> None:
    raw_config["scoring"] = {"min_actors": 3, "max_actors": 2}
    with pytest.raises(UserError, match="min_actors is more than max_actors"):
        parse_config(raw_config)
