"""Each record is in exactly one batch, and batches waste little."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from huizhen.learning.batching import shuffled_batches, sorted_batches

lengths = st.lists(st.integers(1, 400), max_size=200)


@given(lengths, st.integers(1, 40), st.integers(0, 99))
def test_a_pass_covers_each_record_once(sizes, batch_size, seed):
    batches = shuffled_batches(sizes, batch_size, np.random.default_rng(seed))
    assert sorted(i for batch in batches for i in batch) == list(range(len(sizes)))
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert len(batches) == -(-len(sizes) // batch_size)


@given(lengths, st.integers(1, 2000))
def test_sorted_batches_cover_each_record_once_within_the_bound(sizes, most):
    batches = sorted_batches(sizes, most)
    assert sorted(i for batch in batches for i in batch) == list(range(len(sizes)))
    for batch in batches:
        padded = len(batch) * max(sizes[i] for i in batch)
        assert padded <= most or len(batch) == 1
    for batch, after in itertools.pairwise(batches):
        assert max(sizes[i] for i in batch) <= min(sizes[i] for i in after)
        # and none is smaller than need be
        assert (len(batch) + 1) * sizes[after[0]] > most


def test_a_pass_is_a_function_of_its_generator_alone():
    sizes = [5, 3, 8, 1, 9, 2, 7] * 20
    first, again, other = (
        [batch.tolist() for batch in shuffled_batches(sizes, 4, np.random.default_rng(seed))]
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_batches_of_a_pass_come_in_random_order():
    sizes = list(range(1, 161))
    order = [sizes[b[0]] for b in shuffled_batches(sizes, 10, np.random.default_rng(0))]
    assert order not in (sorted(order), sorted(order, reverse=True))


def test_records_of_like_length_stand_together():
    generator = np.random.default_rng(3)
    sizes = generator.integers(1, 400, 512)
    batches = shuffled_batches(sizes.tolist(), 32, generator)
    padded = sum(len(batch) * sizes[batch].max() for batch in batches)
    # 7 % here; batches in random order would pad by 95 %
    assert padded < 1.15 * sizes.sum()
