"""Merkle trees over a log's entries: what a log was at one size, in 32 bytes.

The trees of Certificate Transparency (RFC 6962 §2.1; proofs and their checks as in RFC 9162
§2.1.3 and §2.1.4), with SHA-256:

    leaf  SHA-256(0x00 ‖ entry)          node  SHA-256(0x01 ‖ left ‖ right)

The left part of a tree of n > 1 leaves has the largest power of two below n of them. A *root* with
its size commits to every entry and their order. An inclusion proof shows that an entry stands in
its place, a consistency proof that a later log only added to an earlier one; neither shows any
other entry.
"""

import hashlib
from collections.abc import Sequence

EMPTY = hashlib.sha256(b"").digest()


def leaf_hash(entry: bytes) -> bytes:
    """Return the hash of an entry, 32 bytes."""
    return hashlib.sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return the hash of two subtrees, 32 bytes."""
    return hashlib.sha256(b"\x01" + left + right).digest()


class Frontier:
    """The roots of the full subtrees of a growing log: all that the next root needs.

    A log of n entries has one for each 1 in the binary digits of n, the largest first.
    """

    def __init__(self) -> None:
        """Begin with no entry."""
        self.size = 0
        self._subtrees: list[bytes] = []

    def append(self, leaf: bytes) -> None:
        """Take in the hash of the next entry."""
        rest, joined = self.size, leaf
        while rest & 1:
            joined = node_hash(self._subtrees.pop(), joined)
            rest >>= 1
        self._subtrees.append(joined)
        self.size += 1

    def root(self) -> bytes:
        """Return the root of all entries so far."""
        if not self._subtrees:
            return EMPTY
        found = self._subtrees[-1]
        for subtree in reversed(self._subtrees[:-1]):
            found = node_hash(subtree, found)
        return found


def root_of(leaves: Sequence[bytes]) -> bytes:
    """Return the root of a log, from the hashes of its entries."""
    frontier = Frontier()
    for leaf in leaves:
        frontier.append(leaf)
    return frontier.root()


def inclusion_proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """Return the proof that entry ``index``, 0 the first, is in the log with these leaf hashes.

    Raises:
        ValueError: the log has no such entry.
    """
    if not 0 <= index < len(leaves):
        raise ValueError(f"entry {index} is asked of a log of {len(leaves)}")
    if len(leaves) == 1:
        return []
    middle = _split(len(leaves))
    if index < middle:
        return [*inclusion_proof(leaves[:middle], index), root_of(leaves[middle:])]
    return [*inclusion_proof(leaves[middle:], index - middle), root_of(leaves[:middle])]


def is_included(leaf: bytes, index: int, size: int, root: bytes, proof: Sequence[bytes]) -> bool:
    """Return whether a proof shows that a leaf stands at ``index`` of the log with a root."""
    if not 0 <= index < size:
        return False
    here, last, found = index, size - 1, leaf
    for sibling in proof:
        if last == 0:
            return False
        if here & 1 or here == last:
            found = node_hash(sibling, found)
            while not here & 1 and here:
                here, last = here >> 1, last >> 1
        else:
            found = node_hash(found, sibling)
        here, last = here >> 1, last >> 1
    return last == 0 and found == root


def consistency_proof(leaves: Sequence[bytes], earlier: int) -> list[bytes]:
    """Return the proof that the log's first ``earlier`` entries are those of the log it was then.

    Raises:
        ValueError: the log was never of that size.
    """
    if not 0 <= earlier <= len(leaves):
        raise ValueError(f"size {earlier} is asked of a log of {len(leaves)}")
    return [] if earlier in (0, len(leaves)) else _subproof(leaves, earlier, is_whole=True)


def is_extension(
    earlier: int, earlier_root: bytes, size: int, root: bytes, proof: Sequence[bytes]
) -> bool:
    """Return whether a proof shows that a log only grew from one size and root to another."""
    if not 0 <= earlier <= size:
        return False
    if earlier == 0:
        return not proof and earlier_root == EMPTY
    if earlier == size:
        return not proof and earlier_root == root
    path = list(proof)
    if earlier & (earlier - 1) == 0:  # a full subtree: its root is the earlier one
        path.insert(0, earlier_root)
    if not path:
        return False
    here, last = earlier - 1, size - 1
    while here & 1:
        here, last = here >> 1, last >> 1
    before = after = path[0]
    for sibling in path[1:]:
        if last == 0:
            return False
        if here & 1 or here == last:
            before, after = node_hash(sibling, before), node_hash(sibling, after)
            while not here & 1 and here:
                here, last = here >> 1, last >> 1
        else:
            after = node_hash(after, sibling)
        here, last = here >> 1, last >> 1
    return last == 0 and before == earlier_root and after == root


def _split(size: int) -> int:
    """Return the largest power of two below ``size``, which is over 1."""
    return 1 << ((size - 1).bit_length() - 1)


def _subproof(leaves: Sequence[bytes], earlier: int, *, is_whole: bool) -> list[bytes]:
    """Return SUBPROOF of RFC 9162 §2.1.4.1; ``is_whole`` while the subtree is the earlier log."""
    if earlier == len(leaves):
        return [] if is_whole else [root_of(leaves)]
    middle = _split(len(leaves))
    if earlier <= middle:
        left = _subproof(leaves[:middle], earlier, is_whole=is_whole)
        return [*left, root_of(leaves[middle:])]
    right = _subproof(leaves[middle:], earlier - middle, is_whole=False)
    return [*right, root_of(leaves[:middle])]
