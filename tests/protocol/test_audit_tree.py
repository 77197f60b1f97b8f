"""The kept subtrees give the roots and proofs that ``protocol/merkle.py`` computes afresh."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from huizhen.protocol.audit_tree import Tree
from huizhen.protocol.merkle import (
    EMPTY,
    consistency_proof,
    inclusion_proof,
    is_extension,
    is_included,
    leaf_hash,
    root_of,
)


def leaves_of(size):
    return [leaf_hash(b"%d" % i) for i in range(size)]


def tree_of(leaves):
    tree = Tree()
    for leaf in leaves:
        tree.append(leaf)
    return tree


@given(st.integers(0, 70), st.data())
def test_every_root_and_proof_is_that_of_the_plain_tree(size, data):
    leaves = leaves_of(size)
    tree = tree_of(leaves)
    then = data.draw(st.integers(0, size))
    earlier = data.draw(st.integers(0, then))
    assert tree.size == size
    assert tree.root() == root_of(leaves)
    assert tree.root(then) == root_of(leaves[:then])
    assert tree.consistency(earlier, then) == consistency_proof(leaves[:then], earlier)
    if then:
        index = data.draw(st.integers(0, then - 1))
        assert tree.leaf(index) == leaves[index]
        assert tree.inclusion(index, then) == inclusion_proof(leaves[:then], index)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 1000])
def test_proofs_of_all_entries_are_accepted(size):
    tree = tree_of(leaves_of(size))
    root = tree.root()
    for n in range(0, size, max(1, size // 50)):
        assert is_included(tree.leaf(n), n, size, root, tree.inclusion(n))
        assert is_extension(n, tree.root(n), size, root, tree.consistency(n))


def test_what_is_not_there_is_refused():
    tree = tree_of(leaves_of(5))
    assert Tree().root() == EMPTY
    for ask in (
        lambda: tree.root(6),
        lambda: tree.root(-1),
        lambda: tree.leaf(5),
        lambda: tree.leaf(-1),
        lambda: tree.inclusion(3, 3),
        lambda: tree.inclusion(-1),
        lambda: tree.consistency(4, 3),
        lambda: tree.consistency(-1),
        lambda: tree.consistency(2, 6),
    ):
        with pytest.raises(ValueError, match="is asked of a log of"):
            ask()
