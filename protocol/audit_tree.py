"""A growing log's Merkle tree with every full subtree kept, so that any proof is a few look-ups.

The trees, roots and proofs are those of ``protocol/merkle.py`` (RFC 6962 §2.1), which states them
word for word and is what tests compare this with. Here the roots of all full subtrees stay in
memory, 64 bytes an entry: the root of the log at any earlier size, and proofs between any two
sizes, then cost the logarithm of its size, squared.
"""

from huizhen.protocol.merkle import EMPTY, node_hash

_BYTES = 32


class Tree:
    """The hashes of a log's entries and of all full subtrees over them."""

    def __init__(self) -> None:
        """Begin with no entry."""
        self._levels: list[bytearray] = [bytearray()]
        # level k holds the roots of the full subtrees of 2^k entries, in order

    @property
    def size(self) -> int:
        """How many entries there are."""
        return len(self._levels[0]) // _BYTES

    def append(self, leaf: bytes) -> None:
        """Take in the hash of the next entry, 32 bytes."""
        joined, count, level = leaf, self.size + 1, 0
        self._levels[0] += joined
        while not count & 1:
            joined = node_hash(self._at(level, count - 2), self._at(level, count - 1))
            count, level = count >> 1, level + 1
            if level == len(self._levels):
                self._levels.append(bytearray())
            self._levels[level] += joined

    def leaf(self, index: int) -> bytes:
        """Return the hash of entry ``index``, 0 the first.

        Raises:
            ValueError: the log has no such entry.
        """
        if not 0 <= index < self.size:
            raise ValueError(f"entry {index} is asked of a log of {self.size}")
        return self._at(0, index)

    def root(self, size: int | None = None) -> bytes:
        """Return the root of the first ``size`` entries; of all if None.

        Raises:
            ValueError: the log was never of that size.
        """
        size = self._known(size)
        return self._range(0, size) if size else EMPTY

    def inclusion(self, index: int, size: int | None = None) -> list[bytes]:
        """Return the proof that entry ``index``, 0 the first, is among the first ``size``.

        Raises:
            ValueError: there is no such entry, or the log was never of that size.
        """
        begin, end = 0, self._known(size)
        if not 0 <= index < end:
            raise ValueError(f"entry {index} is asked of a log of {end}")
        path = []
        while end - begin > 1:
            middle = begin + _split(end - begin)
            if index < middle:
                path.append(self._range(middle, end))
                end = middle
            else:
                path.append(self._range(begin, middle))
                begin = middle
        return path[::-1]

    def consistency(self, earlier: int, size: int | None = None) -> list[bytes]:
        """Return the proof that the log of ``size`` entries only added to the log of ``earlier``.

        Raises:
            ValueError: the log was never of these sizes, or they are not in this order.
        """
        begin, end = 0, self._known(size)
        if not 0 <= earlier <= end:
            raise ValueError(f"size {earlier} is asked of a log of {end}")
        if earlier in (0, end):
            return []
        path = []
        while earlier != end:
            middle = begin + _split(end - begin)
            if earlier <= middle:
                path.append(self._range(middle, end))
                end = middle
            else:
                path.append(self._range(begin, middle))
                begin = middle
        if begin:  # else the subtree is the earlier log itself, whose root the reader has
            path.append(self._range(begin, end))
        return path[::-1]

    def _known(self, size: int | None) -> int:
        if size is None:
            return self.size
        if not 0 <= size <= self.size:
            raise ValueError(f"size {size} is asked of a log of {self.size}")
        return size

    def _at(self, level: int, index: int) -> bytes:
        return bytes(self._levels[level][index * _BYTES : (index + 1) * _BYTES])

    def _range(self, begin: int, end: int) -> bytes:
        """Return the root of a subtree, whose begin its size's own power of two divides."""
        parts, rest = [], end - begin
        while rest:
            level = rest.bit_length() - 1
            parts.append(self._at(level, begin >> level))
            begin += 1 << level
            rest -= 1 << level
        found = parts.pop()
        while parts:
            found = node_hash(parts.pop(), found)
        return found


def _split(size: int) -> int:
    """Return the largest power of two below ``size``, which is over 1."""
    return 1 << ((size - 1).bit_length() - 1)
