"""TRL's DPOTrainer on the same rows: tokens, masks, loss, metrics and gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch

from madpo_ray.config import DataConfig, PolicyConfig
from madpo_ray.data.batching import collate
from madpo_ray.data.formats import parse_pair
from madpo_ray.data.tokens import tokenize_pair
from madpo_ray.models.logprobs import ResponseLogps
from madpo_ray.training.metrics import Meter
from madpo_ray.training.objectives import PolicyObjective
from support.models import make_model
from support.pairs import make_rows

# Some responses are cut: of texts, and of messages, whose template has tokens of its own.
MAX_LENGTH = {False: 16, True: 33}
COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


def trl_trainer(
    rows: list[dict[str, Any]], tokenizer: Any, folder: Path, max_length: int, **options: Any
) -> Any:
    """A DPOTrainer of a policy whose reference is another model."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(
        output_dir=str(folder),
        max_length=max_length,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    return DPOTrainer(
        model=make_model(seed=1),
        ref_model=make_model(seed=0),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def our_rows(rows: list[dict[str, Any]], tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    """Tokenised pairs with the reference's log-probs."""
    data = DataConfig(files=("x",))
    pairs: list[dict[str, Any]] = [
        tokenize_pair(parse_pair(row, data), tokenizer, max_length).as_columns() for row in rows
    ]
    with torch.no_grad():
        reference = ResponseLogps(make_model(seed=0))(collate(pairs, packed=True))["logps"]
    for pair, chosen, rejected in zip(pairs, *reference.chunk(2), strict=True):
        pair |= dict(zip(COLUMNS, (float(chosen), float(rejected)), strict=True))
    return pairs


def six_rows(conversational: bool) -> list[dict[str, Any]]:
    rows = make_rows(6, conversational=conversational)
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]


@pytest.mark.filterwarnings("ignore")  # TRL's own
@pytest.mark.parametrize("conversational", [False, True], ids=["texts", "messages"])
def test_tokens_and_masks(conversational: bool, tokenizer: Any, tmp_path: Path) -> None:
    rows = six_rows(conversational)
    max_length = MAX_LENGTH[conversational]
    trainer = trl_trainer(rows, tokenizer, tmp_path, max_length)
    theirs = trainer.data_collator(list(trainer.train_dataset))
    ours = collate(our_rows(rows, tokenizer, max_length), packed=False)

    is_response = theirs["completion_mask"] > 0
    assert int(is_response.sum(1).min()) > 0
    assert ours.target_ids.tolist() == theirs["input_ids"][is_response].tolist()
    assert ours.response_lengths.tolist() == is_response.sum(1).tolist()
    for our, their, mask in zip(
        ours.input_ids, theirs["input_ids"], theirs["attention_mask"], strict=True
    ):
        length = int(mask.sum())
        assert our[:length].tolist() == their[:length].tolist()
        assert length <= max_length
    assert ours.attention_mask.sum(1).tolist() == theirs["attention_mask"].sum(1).tolist()


@pytest.mark.filterwarnings("ignore")  # TRL's own
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_loss_metrics_and_gradients(
    loss_type: str, packed: bool, tokenizer: Any, tmp_path: Path
) -> None:
    rows = six_rows(conversational=False)
    trainer = trl_trainer(rows, tokenizer, tmp_path, 16, loss_type=[loss_type], beta=0.3)
    trainer.model.train()
    their_loss = trainer.compute_loss(trainer.model, trainer.data_collator(trainer.train_dataset))
    their_loss.backward()
    their_metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}

    policy = make_model(seed=1)
    batch = collate(our_rows(rows, tokenizer, 16), packed=packed, column_names=COLUMNS)
    settings = PolicyConfig(loss_type=loss_type, beta=0.3)
    terms = PolicyObjective(settings, 0)(ResponseLogps(policy)(batch), batch, training=True)
    terms.loss.mean().backward()
    torch.testing.assert_close(terms.loss.mean(), their_loss, rtol=1e-5, atol=1e-6)

    meter = Meter()
    meter.add(terms.metrics, batch.valid)
    our_metrics = meter.reduce()
    shown = {"logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected"}
    shown |= {"rewards/accuracies", "rewards/margins"}
    for name in shown:
        assert our_metrics[name] == pytest.approx(their_metrics[name], rel=1e-5, abs=1e-5), name

    theirs = dict(trainer.model.named_parameters())
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-5)
