"""Roots are those of Certificate Transparency's own test log, and proofs prove what they say."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from huizhen.protocol.merkle import (
    EMPTY,
    Frontier,
    consistency_proof,
    inclusion_proof,
    is_extension,
    is_included,
    leaf_hash,
    node_hash,
    root_of,
)

# The eight entries and the roots after each that Certificate Transparency's implementations share.
ENTRIES = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
LEAVES = [leaf_hash(entry) for entry in ENTRIES]
sizes = st.integers(1, 40)


def leaves_of(size):
    return [leaf_hash(b"%d" % i) for i in range(size)]


def plain_root(leaves):
    """MTH of RFC 6962 §2.1, word for word."""
    if not leaves:
        return hashlib.sha256().digest()
    if len(leaves) == 1:
        return leaves[0]
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return node_hash(plain_root(leaves[:k]), plain_root(leaves[k:]))


@pytest.mark.parametrize("size", range(1, 9))
def test_roots_are_those_of_the_shared_test_log(size):
    assert root_of(LEAVES[:size]).hex() == ROOTS[size - 1]


def test_no_entry_has_the_hash_of_nothing():
    assert root_of([]) == EMPTY == hashlib.sha256().digest()


@given(sizes)
def test_a_root_that_grew_is_the_root_of_all(size):
    frontier = Frontier()
    for n, leaf in enumerate(leaves_of(size), 1):
        frontier.append(leaf)
        assert frontier.size == n
    assert frontier.root() == plain_root(leaves_of(size))


def test_known_proofs_of_the_shared_test_log():
    assert [h.hex() for h in inclusion_proof(LEAVES, 0)] == [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ]
    assert [h.hex() for h in consistency_proof(LEAVES, 6)] == [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ]


@given(sizes, st.data())
def test_an_entry_is_proven_in_its_place_and_in_no_other(size, data):
    leaves = leaves_of(size)
    root = root_of(leaves)
    index = data.draw(st.integers(0, size - 1))
    proof = inclusion_proof(leaves, index)
    assert is_included(leaves[index], index, size, root, proof)
    assert not is_included(leaf_hash(b"other"), index, size, root, proof)
    assert not is_included(leaves[index], index, size, leaf_hash(b"other"), proof)
    assert not is_included(leaves[index], index, size, root, [*proof, root])
    for other in range(size + 2):
        if other != index:
            assert not is_included(leaves[index], other, size, root, proof)
    for n in range(len(proof)):
        assert not is_included(leaves[index], index, size, root, proof[:n] + proof[n + 1 :])
        assert not is_included(
            leaves[index], index, size, root, [*proof[:n], root, *proof[n + 1 :]]
        )


@given(sizes, st.data())
def test_a_log_that_only_grew_is_proven_and_a_changed_one_is_not(size, data):
    leaves = leaves_of(size)
    root = root_of(leaves)
    earlier = data.draw(st.integers(0, size))
    before = root_of(leaves[:earlier])
    proof = consistency_proof(leaves, earlier)
    assert is_extension(earlier, before, size, root, proof)
    if 0 < earlier < size:
        changed = [*leaves[: earlier - 1], leaf_hash(b"changed"), *leaves[earlier:]]
        assert not is_extension(
            earlier, before, size, root_of(changed), consistency_proof(changed, earlier)
        )
        assert not is_extension(earlier, root_of(changed[:earlier]), size, root, proof)
        for n in range(len(proof)):
            assert not is_extension(earlier, before, size, root, proof[:n] + proof[n + 1 :])
    assert not is_extension(earlier, before, size, root, [*proof, root])
    assert not is_extension(earlier, leaf_hash(b"other"), size, root, proof)
    assert not is_extension(size + 1, before, size, root, proof)


@given(sizes, st.data())
def test_a_truncated_log_has_no_proof_of_the_longer_one(size, data):
    leaves = leaves_of(size + 1)
    shorter = data.draw(st.integers(1, size))
    root = root_of(leaves[:shorter])
    for proof in ([], consistency_proof(leaves[:shorter], max(1, shorter - 1)), [root]):
        assert not is_extension(size + 1, root_of(leaves), shorter, root, proof)


@pytest.mark.parametrize("index", [-1, 8])
def test_what_is_not_there_has_no_proof(index):
    with pytest.raises(ValueError, match="is asked of a log of 8"):
        inclusion_proof(LEAVES, index)
    with pytest.raises(ValueError, match="is asked of a log of 8"):
        consistency_proof(LEAVES, 9 if index > 0 else -1)


def test_a_leaf_cannot_pass_for_a_node():
    """The second preimage that the prefixes are there for."""
    pair = LEAVES[0] + LEAVES[1]
    assert leaf_hash(pair) != node_hash(LEAVES[0], LEAVES[1])
    assert root_of([leaf_hash(pair)]) != root_of(LEAVES[:2])
