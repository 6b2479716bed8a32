"""beta-DPO's running statistics, one process; on several ranks in test_tasks.py."""

import pytest
import torch

from madpo_ray.config import PolicyConfig
from madpo_ray.data.batching import collate
from madpo_ray.training.objectives import PolicyObjective
from support.synthetic import COLUMNS, synthetic


def objective(**settings: object) -> PolicyObjective:
    return PolicyObjective(PolicyConfig(loss_type="beta_dpo", **settings), seed=0)


def statistics(objective: PolicyObjective) -> torch.Tensor:
    return torch.stack(objective.state_dict()["statistics"])


def test_first_step_by_hand() -> None:
    """Statistics are updated before use, in training only."""
    outputs, batch, logratio = synthetic()
    beta_dpo = objective()
    terms = beta_dpo(outputs, batch, training=True)
    mean = 0.1 * logratio.mean()
    std = 0.1 * logratio.std()
    kept = terms.loss > 0
    assert int(kept.sum()) == 3

    beta = 0.1 * (1 + 0.6 * (logratio[kept].mean() - mean))
    effective = terms.metrics["beta/effective"].values
    torch.testing.assert_close(effective, beta.clamp(min=1e-3).expand(4))
    expected = torch.log1p(torch.exp(-beta * logratio[kept])).mean()
    torch.testing.assert_close(terms.loss.mean(), expected)
    torch.testing.assert_close(statistics(beta_dpo), torch.stack([mean, std]))

    evaluated = beta_dpo(outputs, batch, training=False)
    torch.testing.assert_close(evaluated.loss, torch.log1p(torch.exp(-0.1 * logratio)))
    assert "beta/effective" not in evaluated.metrics
    torch.testing.assert_close(statistics(beta_dpo), torch.stack([mean, std]))


def test_paper_variant_counts_by_optimizer_step() -> None:
    """And forgets the gaps of the step before."""
    outputs, batch, logratio = synthetic()
    beta_dpo = objective(beta_dpo_variant="madpo_paper")
    for _ in range(2):
        terms = beta_dpo(outputs, batch, training=True)
        beta = 0.1 * (1 + 0.6 * 0.1 * logratio.mean())
        torch.testing.assert_close(terms.metrics["beta/effective"].values[0], beta)
    beta_dpo.end_step()
    gaps = 0.1 * torch.cat([logratio, logratio])
    expected = torch.stack([0.1 * gaps.mean(), 0.9 + 0.1 * gaps.std()])
    torch.testing.assert_close(statistics(beta_dpo), expected)

    beta_dpo(outputs, batch, training=True)
    beta_dpo.end_step()
    own = 0.1 * logratio
    expected = 0.9 * expected + 0.1 * torch.stack([own.mean(), own.std()])
    torch.testing.assert_close(statistics(beta_dpo), expected)


@pytest.mark.parametrize("variant", ["published", "madpo_paper"])
def test_filler_has_no_loss(variant: str) -> None:
    filler = collate([], packed=True, column_names=COLUMNS)
    outputs = {"logps": torch.zeros(2), "entropy": torch.ones(2)}
    terms = objective(beta_dpo_variant=variant)(outputs, filler, training=True)
    assert terms.loss.tolist() == [0.0]


def test_state_is_restored() -> None:
    """The next draw, too."""
    outputs, batch, _ = synthetic()
    one, other = objective(), objective()
    one(outputs, batch, training=True)
    other.load_state_dict(one.state_dict())
    again = one(outputs, batch, training=True)
    torch.testing.assert_close(other(outputs, batch, training=True).loss, again.loss)


def test_paper_variant_subtracts_the_running_mean() -> None:
    """In the second step, when it is not 0 any more."""
    outputs, batch, logratio = synthetic()
    beta_dpo = objective(beta_dpo_variant="madpo_paper")
    beta_dpo(outputs, batch, training=True)
    beta_dpo.end_step()
    mean = statistics(beta_dpo)[0]
    terms = beta_dpo(outputs, batch, training=True)
    beta = 0.1 * (1 + 0.6 * (0.1 * logratio.mean() - mean))
    torch.testing.assert_close(terms.metrics["beta/effective"].values[0], beta)


def test_one_kept_pair_is_the_mean() -> None:
    outputs, batch, logratio = synthetic()
    terms = objective(beta_dpo_mode_weight=0.7)(outputs, batch, training=True)
    kept = terms.loss > 0
    assert int(kept.sum()) == 1
    beta = terms.metrics["beta/effective"].values[0]
    expected = torch.log1p(torch.exp(-beta * logratio[kept])).mean()
    torch.testing.assert_close(terms.loss.mean(), expected)


def test_restoring_forgets_the_gaps_of_a_skipped_step() -> None:
    outputs, batch, _ = synthetic()
    half = {**outputs, "logps": outputs["logps"] / 2}
    one = objective(beta_dpo_variant="madpo_paper")
    before = one.state_dict()
    one(outputs, batch, training=True)
    one.load_state_dict(before)
    other = objective(beta_dpo_variant="madpo_paper")
    for each in (one, other):
        each(half, batch, training=True)
        each.end_step()
    torch.testing.assert_close(statistics(one), statistics(other))


def test_draws_are_restored() -> None:
    """Twenty of them: a single one could be equal by chance."""
    outputs, batch, _ = synthetic()
    one, other = objective(), objective()
    one(outputs, batch, training=True)
    other.load_state_dict(one.state_dict())
    for _ in range(20):
        losses = [each(outputs, batch, training=True).loss for each in (one, other)]
        torch.testing.assert_close(*losses)
