"""Spelling suggestions."""

from madpo_ray.errors import did_you_mean


def test_names_the_closest_key() -> None:
    assert did_you_mean("bta", ["alpha", "beta"]) == "; did you mean 'beta'?"


def test_lists_all_keys_if_none_is_close() -> None:
    assert did_you_mean("xyz", {"beta", "alpha"}) == "; choose from alpha, beta"
