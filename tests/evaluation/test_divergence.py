"""Exact divergences, by hand and by sampling."""

import pyarrow as pa
import pytest
import torch

from madpo_ray.errors import UserError
from madpo_ray.evaluation.divergence import describe_divergence, token_divergence
from madpo_ray.evaluation.sample_sets import SampleSet

# Probabilities of three tokens.
POLICY = torch.tensor([[0.5, 0.25, 0.25]]).log()
REFERENCE = torch.tensor([[0.25, 0.25, 0.5]]).log()


def test_by_hand() -> None:
    """0.5 ln 2 + 0 - 0.25 ln 2; the first token's log-ratio is ln 2."""
    found = token_divergence(POLICY, REFERENCE, torch.tensor([0]), 1.0)
    ln2 = torch.tensor(2.0).log()
    torch.testing.assert_close(found[:, 0], torch.stack([0.25 * ln2, ln2]))


def test_token_without_probability_adds_nothing() -> None:
    """As of a vocabulary that is masked; at a low temperature the lowest number becomes -inf."""
    for least, temperature in ((-torch.inf, 1.0), (torch.finfo(torch.float32).min, 0.5)):
        policy = torch.tensor([[0.0, 0.0, least]])
        reference = torch.tensor([[0.0, 0.0, 0.0]])
        found = token_divergence(policy, reference, torch.tensor([0]), temperature)
        expected = torch.tensor(1.5).log()
        torch.testing.assert_close(found[:, 0], torch.stack([expected, expected]))


def test_policy_equal_to_reference_has_none() -> None:
    assert token_divergence(POLICY, POLICY, torch.tensor([2]), 1.0).abs().max() == 0


def test_temperature_sharpens_the_policy_only() -> None:
    """At 0.5 its probabilities are squared: 4/6, 1/6, 1/6."""
    sharp = torch.tensor([[4 / 6, 1 / 6, 1 / 6]]).log()
    found = token_divergence(POLICY, REFERENCE, torch.tensor([1]), 0.5)
    torch.testing.assert_close(found, token_divergence(sharp, REFERENCE, torch.tensor([1]), 1.0))


def test_greedy_is_the_limit_of_low_temperatures() -> None:
    greedy = token_divergence(POLICY, REFERENCE, torch.tensor([0]), 0.0)
    cold = token_divergence(POLICY, REFERENCE, torch.tensor([0]), 0.01)
    torch.testing.assert_close(greedy, cold)
    torch.testing.assert_close(greedy, -REFERENCE[:, 0].expand(2, 1))


def test_mean_of_log_ratios_is_the_divergence() -> None:
    """Over the policy's own samples, with more noise."""
    generator = torch.Generator().manual_seed(0)
    logits, reference = torch.randn(2, 1, 50, generator=generator)
    tokens = logits.softmax(-1).multinomial(20_000, replacement=True, generator=generator)[0]
    many = torch.Size([20_000, 50])
    found = token_divergence(logits.expand(many), reference.expand(many), tokens, 1.0)
    exact, ratios = found
    assert exact.std() == pytest.approx(0, abs=1e-6)
    assert ratios.mean() == pytest.approx(float(exact[0]), abs=4 * float(ratios.std()) / 141)


def test_other_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match="logits for 3 tokens and the reference for 2"):
        token_divergence(POLICY, REFERENCE[:, :2], torch.tensor([0]), 1.0)


def test_means_with_standard_errors() -> None:
    one = SampleSet("policy", 1.0)
    table = pa.table({one.kl: [1.0, 2.0, 3.0], one.logratio: [0.0, 2.0, 4.0]})
    found = describe_divergence(table, one, num_prompts=3)
    assert (found["kl"], found["logratio"]) == (2.0, 2.0)
    assert found["kl_standard_error"] == pytest.approx(1 / 3**0.5)
    assert found["logratio_standard_error"] == pytest.approx(2 / 3**0.5)


def test_samples_of_a_prompt_make_nothing_more_certain() -> None:
    """Greedy samples are all the same."""
    one = SampleSet("policy", 0.0)
    table = pa.table({one.kl: [1.0, 2.0, 3.0] * 2, one.logratio: [0.0] * 6})
    assert describe_divergence(table, one, num_prompts=3)["kl_standard_error"] == pytest.approx(
        1 / 3**0.5
    )
    single = describe_divergence(table.slice(0, 1), one, num_prompts=1)
    assert single["kl_standard_error"] is None
