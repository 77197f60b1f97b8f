"""How alike two texts are: exactly, and estimated from 512 bytes of each.

A text is the set of its runs of five characters (shingles; Broder, SEQUENCES 1997), and two texts
are as alike as |A ∩ B| / |A ∪ B|, the Jaccard similarity. A signature estimates it by the share of
places in which two are equal:

    one permutation hashing      each shingle's hash falls into one of 256 bins, the least of each
                                 bin is kept (Li, Owen, Zhang, NIPS 2012)
    optimal densification        an empty bin borrows from another, drawn by its number only
                                 (Shrivastava, ICML 2017, Algorithm 1)
    b-bit minwise hashing        of each least hash 16 bits are kept (Li, König, WWW 2010); the
                                 2^-16 by which they agree by chance is left uncorrected

So a text is hashed once, not 256 times. Departure: the borrowing bins' draws are a table of
pseudo-random numbers, not a hash function.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

SHINGLE = 5
# characters
PLACES = 256
_ATTEMPTS = 320
# With 20 bins filled of 256 an empty one draws in vain once in 10¹¹.
_EMPTY = np.uint64(2**64 - 1)
_STEP = np.uint64(0x9E3779B97F4A7C15)

Hashes = npt.NDArray[np.uint64]
Signatures = npt.NDArray[np.uint16]
_DRAWS = np.random.default_rng(20170806).integers(0, PLACES, (_ATTEMPTS, PLACES))


def shingles(text: str) -> Hashes:
    """Return the hashes of a text's shingles, each once, in order."""
    return np.unique(_hashes(_codes(text)))


def jaccard(one: Hashes, other: Hashes) -> float:
    """Return the exact Jaccard similarity of two sets of shingles; 0 where one is empty."""
    if not len(one) or not len(other):
        return 0.0
    both = np.concatenate((one, other))
    both.sort()
    shared = int((both[1:] == both[:-1]).sum())
    return shared / (len(both) - shared)


def signatures(texts: Sequence[str]) -> Signatures:
    """Return a signature of each text, shape (len(texts), 256); of a text too short, zeros."""
    codes = [_codes(text) for text in texts]
    lengths = np.array([len(part) for part in codes], dtype=np.int64)
    hashes = _hashes(np.concatenate(codes)) if codes else np.empty(0, np.uint64)
    least = np.full(len(texts) * PLACES, _EMPTY)
    if len(hashes):
        owner = np.repeat(np.arange(len(texts)), lengths)
        is_whole = owner[: len(hashes)] == owner[SHINGLE - 1 :]  # of one text, not across two
        hashes = hashes[is_whole]
        bins = owner[: len(is_whole)][is_whole] * PLACES + (hashes >> np.uint64(56)).astype(
            np.int64
        )
        np.minimum.at(least, bins, hashes)
    return _densified(least.reshape(len(texts), PLACES)).astype(np.uint16)


def estimates(
    one: npt.NDArray[np.unsignedinteger], other: npt.NDArray[np.unsignedinteger]
) -> npt.NDArray[np.float64]:
    """Return the estimated similarity of each pair of rows, whole or cut to their low bits."""
    alike: npt.NDArray[np.float64] = (one == other).mean(axis=-1)
    return alike


def edits(one: str, other: str, most: int) -> int:
    """Return the Levenshtein distance, or ``most + 1`` where it is larger.

    Only the cells within ``most`` of the diagonal count (Ukkonen, Information and Control 1985).
    """
    if abs(len(one) - len(other)) > most:
        return most + 1
    row = {j: j for j in range(min(most, len(other)) + 1)}
    for i, a in enumerate(one, 1):
        below: dict[int, int] = {}
        for j in range(max(0, i - most), min(len(other), i + most) + 1):
            if j == 0:
                below[j] = i
                continue
            change = row.get(j - 1, most + 1) + (a != other[j - 1])
            below[j] = min(change, row.get(j, most + 1) + 1, below.get(j - 1, most + 1) + 1)
        row = below
        if min(row.values()) > most:
            return most + 1
    return min(row[len(other)], most + 1)


def _codes(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _hashes(codes: npt.NDArray[np.uint32]) -> Hashes:
    """Return a hash of every run of five characters: a polynomial, then mixed.

    The mixing is the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
    """
    count = len(codes) - SHINGLE + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    wide = codes.astype(np.uint64)
    mixed = wide[:count].copy()
    for k in range(1, SHINGLE):
        mixed *= _STEP
        mixed += wide[k : count + k]
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def _densified(least: Hashes) -> Hashes:
    """Fill the empty bins of each row, shape (texts, 256), that has a filled one."""
    is_filled = least != _EMPTY
    rows, bins = np.nonzero(~is_filled & is_filled.any(axis=1, keepdims=True))
    for draws in _DRAWS:
        if not len(rows):
            break
        donors = draws[bins]
        found = is_filled[rows, donors]
        least[rows[found], bins[found]] = least[rows[found], donors[found]]
        rows, bins = rows[~found], bins[~found]
    least[least == _EMPTY] = 0
    return least
