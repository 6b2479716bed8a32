"""Micro-batches as rows of a table."""

import dataclasses

from madpo_ray.data.micro_batches import NUMBER, MicroBatchReader, decode_micro_batch
from madpo_ray.data.order import Order
from support.ranks import MakeJob


def test_several_at_once_are_the_same_as_one_by_one(policy_job: MakeJob) -> None:
    order = Order(policy_job("chunks").order_spec(3))
    reader = MicroBatchReader(order)
    numbers = range(1, order.num_micro_batches, 3)
    names = order.spec.token_columns
    together = reader.read(numbers)
    assert together[NUMBER].to_pylist() == list(numbers)
    for row, number in enumerate(numbers):
        alone = reader.read([number])
        assert decode_micro_batch(together.slice(row, 1), names) == decode_micro_batch(alone, names)


def test_empty_micro_batch_fills_up(policy_job: MakeJob) -> None:
    """It has its place, and no pairs."""
    spec = dataclasses.replace(policy_job("fill").order_spec(3), global_batch_size=2)
    order = Order(spec)
    row = MicroBatchReader(order).read([2])
    pairs, place = decode_micro_batch(row, spec.token_columns)
    assert pairs == []
    assert place.step == 0
    assert place.pairs_in_step == 2
    assert place.is_last
