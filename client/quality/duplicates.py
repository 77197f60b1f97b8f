"""Records that say what an earlier record says, word for word or nearly so.

Exact: what two records hold, but for patient, place and the spelling of spaces, width and case,
has one BLAKE2 digest. Near: two texts are as alike as ``_is_alike`` asks, which is always checked
on the texts themselves. Who is compared with whom comes from signatures (``signatures.py``) by
locality-sensitive hashing (Indyk, Motwani, STOC 1998): 32 bands of four places each, the texts of
one band in the order of the next one, each with the ``WINDOW`` that follow and share the band.
The order keeps alike texts together in a band that thousands share (the sorted neighbourhood of
Hernández and Stolfo, SIGMOD 1995), so templates cost time in proportion to their number.

In memory remain 54 bytes a record, twice while it is searched; texts, places and signatures are in
files without a name, which are gone when the process is; of the signatures 256 bytes a record are
mapped, which counts as memory while there is enough.
"""

import hashlib
import json
import tempfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from huizhen.client.quality import signatures
from huizhen.client.quality.problems import DEFAULT_RULES, Code, Problem, Rules
from huizhen.client.records.record import Record
from huizhen.protocol.errors import ConfigError, StorageError

MIN_TEXT = 24
# characters without spaces; shorter texts are only compared whole records
SHORT_TEXT = 64
# below, edits are counted: two of them leave 40 characters a Jaccard similarity of 0.5
MIN_SIMILARITY = 0.8
MAX_TEXT = 1 << 15
# characters that are compared; what follows differs or not
WINDOW = 16
_BANDS = 32
# of four places each; they are half of a signature, the other half is for estimates alone
_MARGIN = 0.07
# 2.8 standard deviations of an estimate of 0.8 from 256 places: of pairs at the very limit a few in
# a thousand are missed, those above it are not; a wider margin only costs time
_SURELY_LONG, _LEAST_ESTIMATE = 100, 0.25
# below this many characters texts may be less alike, and their estimates vary more
_BATCH = 1 << 19
# characters hashed at one time
_PAIRS = 1 << 13
# compared at one time
_MAX_UNLIKE = 1 << 18
# pairs remembered, which other bands propose again

_WIDTHS = {0xFF01 + i: 0x21 + i for i in range(94)} | {0x3000: 0x20}
# full-width forms of ASCII, as Chinese keyboards give them

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Cluster:
    """Records that are alike, each to at least one other."""

    numbers: tuple[int, ...]
    # as they were added, from 0; the first is the one to keep
    similarity: float
    # the least that joined two of them; 1 for equal texts
    problems: tuple[Problem, ...]
    # one for each record but the first


class Duplicates:
    """Takes in records, then tells which are duplicates; a context manager."""

    def __init__(self, folder: Path | None = None) -> None:
        """Begin with no record.

        Args:
            folder: where the files are; about 1.5 times as large as the texts.

        Raises:
            ConfigError: no file can be made there.
        """
        try:
            self._spool = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - __exit__ closes all three
            self._signed = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
            self._banded = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        except OSError as error:
            raise ConfigError(f"cannot write in {str(folder)!r}: {error.strerror}") from error
        self._at, self._places, self._sizes = array("Q", [0]), array("H"), array("I")
        self._patients, self._contents, self._texts = array("Q"), array("Q"), array("Q")
        self._batches: list[int] = []
        self._waiting: list[str] = []
        self._waiting_size = 0

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the files, whereby they are gone."""
        self._spool.close()
        self._signed.close()
        self._banded.close()

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._places)

    def add(self, record: Record) -> None:
        """Take in a record.

        Raises:
            StorageError: the disk is full.
        """
        text = plain_text(record.text)
        place = record.place.encode("utf-8", "replace")[:65_535]
        self._patients.extend(_digest(record.patient.encode("utf-8", "surrogatepass"))[:1])
        self._contents.extend(_digest(_content(record, text, len(self))))
        self._texts.extend(_digest(text.encode("utf-8", "surrogatepass")))
        text = text[:MAX_TEXT]  # what is compared further; equal is what is equal to its end
        data = text.encode("utf-8", "surrogatepass")
        try:
            self._spool.write(place + data)
            self._waiting.append(text)
            self._waiting_size += len(text)
            if self._waiting_size >= _BATCH or len(self._waiting) >= _BATCH >> 8:
                self._sign()
        except OSError as error:
            raise StorageError(f"cannot keep texts to compare: {error.strerror}") from error
        self._at.append(self._at[-1] + len(place) + len(data))
        self._places.append(len(place))
        self._sizes.append(len(text))

    def find(self, rules: Rules | None = None) -> Iterator[Cluster]:
        """Yield the clusters, in the order of their first records; meanwhile none may be added.

        Raises:
            GovernanceError: a problem that the rules refuse.
            StorageError: the disk is full or fails.
        """
        rules = rules or DEFAULT_RULES
        try:
            self._sign()
            self._spool.flush()
            self._signed.flush()
            self._banded.flush()
        except OSError as error:
            raise StorageError(f"cannot keep texts to compare: {error.strerror}") from error
        if not len(self):
            return
        contents, texts = _first_of(self._contents), _first_of(self._texts)
        search = _Search(len(self))
        search.join_all(contents)
        numbers = np.arange(len(self))
        is_long = np.frombuffer(self._sizes, np.uint32) >= MIN_TEXT
        search.join_all(np.where(is_long, texts, numbers))
        try:
            self._join_alike(search, np.flatnonzero(is_long & (texts == numbers)))
        except OSError as error:
            raise StorageError(f"cannot read texts to compare: {error.strerror}") from error
        for members, similarity in search.clusters():
            yield Cluster(
                tuple(members), similarity, tuple(self._problems(members, contents, rules))
            )

    def _sign(self) -> None:
        """Write the signatures of what waits: all places in 8 bits, the bands' in 16."""
        if self._waiting:
            signed = signatures.signatures(self._waiting)
            bands = np.ascontiguousarray(signed[:, : 4 * _BANDS]).view(np.uint64)
            self._signed.write(signed.astype(np.uint8).tobytes())
            self._banded.write(np.ascontiguousarray(bands.T).tobytes())
            self._batches.append(len(self._waiting))
        self._waiting, self._waiting_size = [], 0

    def _band(self, band: int) -> signatures.Hashes:
        """Return one band of every record, read batch by batch: of all it would fill the memory."""
        parts, begin = [], 0
        for count in self._batches:
            self._banded.seek(8 * (begin * _BANDS + (band % _BANDS) * count))
            parts.append(self._banded.read(8 * count))
            begin += count
        return np.frombuffer(b"".join(parts), np.uint64)

    def _read(self, number: int) -> tuple[str, str]:
        """Return a record's place and text."""
        begin, end = self._at[number], self._at[number + 1]
        self._spool.seek(begin)
        data = self._spool.read(end - begin)
        size = self._places[number]
        return data[:size].decode(), data[size:].decode("utf-8", "surrogatepass")

    def _join_alike(self, search: "_Search", numbers: Numbers) -> None:
        """Join what is alike of these texts, no two of which are equal."""
        if len(numbers) < 2:
            return
        signed: Any = np.memmap(self._signed, np.uint8, "r", shape=(len(self), signatures.PLACES))
        sizes = np.frombuffer(self._sizes, np.uint32)
        unlike: set[int] = set()
        remembered = lru_cache(maxsize=256)(self._shingled)
        for band in range(_BANDS):
            keys = self._band(band)[numbers]
            order = np.lexsort((self._band(band + 1)[numbers], keys))
            for one, other in _neighbours(keys[order], numbers[order]):
                apart = search.roots(one) != search.roots(other)
                one, other = one[apart], other[apart]
                long = np.maximum(sizes[one], sizes[other]) >= _SURELY_LONG
                least = np.where(long, MIN_SIMILARITY - _MARGIN, _LEAST_ESTIMATE)
                near = signatures.estimates(signed[one], signed[other]) >= least
                for pair in zip(one[near].tolist(), other[near].tolist(), strict=True):
                    i, j = min(pair), max(pair)
                    pair_number = i * len(self) + j
                    if pair_number in unlike or search.root(i) == search.root(j):
                        continue
                    alike = _is_alike(remembered(i), remembered(j))
                    if alike:
                        search.join(i, j, alike)
                    elif len(unlike) < _MAX_UNLIKE:
                        unlike.add(pair_number)

    def _shingled(self, number: int) -> tuple[str, signatures.Hashes]:
        _, text = self._read(number)
        return text, signatures.shingles(text)

    def _problems(self, members: list[int], contents: Numbers, rules: Rules) -> Iterator[Problem]:
        """Yield what each record of a cluster is, but the first."""
        of_patient: dict[int, int] = {}
        seen: dict[int, int] = {}
        seen_of: dict[tuple[int, int], int] = {}
        for number in members:
            patient, content = self._patients[number], int(contents[number])
            exact = seen_of.setdefault((patient, content), number)
            same = of_patient.setdefault(patient, number)
            elsewhere = seen.setdefault(content, number)
            if exact != number:
                code, earlier = Code.EXACT_DUPLICATE, exact
            elif same != number:
                code, earlier = Code.NEAR_DUPLICATE, same
            elif elsewhere != number:
                code, earlier = Code.EXACT_ACROSS_PATIENTS, elsewhere
            elif number != members[0]:
                code, earlier = Code.NEAR_ACROSS_PATIENTS, members[0]
            else:
                continue
            yield rules.settle(code, self._read(number)[0], self._read(earlier)[0])


def plain_text(text: str) -> str:
    """Return what of a text is compared: no spaces, one width, one case; 10⁹ is not 109."""
    if not text.isascii():
        text = text.translate(_WIDTHS)
    return "".join(text.casefold().split())


class _Search:
    """Which records are one cluster: a forest whose roots are the first records (Tarjan 1975)."""

    def __init__(self, count: int) -> None:
        self._parents = np.arange(count)
        self._least: dict[int, float] = {}

    def root(self, number: int) -> int:
        """Return the first record of a cluster."""
        parents = self._parents
        root = number
        while (above := int(parents[root])) != root:
            root = above
        parents[number] = root
        return root

    def roots(self, numbers: Numbers) -> Numbers:
        """Return the first record of each one's cluster."""
        found = self._parents[numbers]
        while not np.array_equal(above := self._parents[found], found):
            found = above
        self._parents[numbers] = found
        return found

    def join(self, one: int, other: int, similarity: float) -> None:
        """Make one cluster of two."""
        one, other = self.root(one), self.root(other)
        first, second = min(one, other), max(one, other)
        self._parents[second] = first
        least = min(similarity, self._least.get(first, 1.0), self._least.pop(second, 1.0))
        if least < 1:
            self._least[first] = least

    def join_all(self, firsts: Numbers) -> None:
        """Join each record with the one given, which is equal to it."""
        for number in np.flatnonzero(firsts != np.arange(len(firsts))).tolist():
            self.join(number, int(firsts[number]), 1.0)

    def clusters(self) -> Iterator[tuple[list[int], float]]:
        """Yield the members of each cluster of two or more, and what the least alike are."""
        roots = self.roots(np.arange(len(self._parents)))
        order = np.argsort(roots, kind="stable")
        edges = np.flatnonzero(np.diff(roots[order])) + 1
        begins, ends = [0, *edges.tolist()], [*edges.tolist(), len(order)]
        for begin, end in zip(begins, ends, strict=True):
            if end - begin > 1:
                members = order[begin:end].tolist()
                yield members, self._least.get(members[0], 1.0)


def _is_alike(one: tuple[str, signatures.Hashes], other: tuple[str, signatures.Hashes]) -> float:
    """Return how alike two texts are if they are duplicates; otherwise 0.

    Up to 64 characters, one edit for each 16 is allowed. From there the Jaccard similarity must be
    0.8, or what two edits leave of so short a text: each changes five shingles of n.
    """
    size = max(len(one[0]), len(other[0]))
    if size < SHORT_TEXT:
        most = size // 16
        count = signatures.edits(one[0], other[0], most)
        return 0.0 if count > most else 1 - count / size
    similarity = signatures.jaccard(one[1], other[1])
    n = size - signatures.SHINGLE + 1
    return similarity if similarity >= min(MIN_SIMILARITY, (n - 10) / (n + 10)) else 0.0


def _neighbours(keys: signatures.Hashes, numbers: Numbers) -> Iterator[tuple[Numbers, Numbers]]:
    """Yield pairs that share a key, some thousands at a time, of sorted keys and their owners."""
    for distance in range(1, min(WINDOW, len(keys) - 1) + 1):
        shared = np.flatnonzero(keys[distance:] == keys[:-distance])
        if not len(shared):
            return
        for begin in range(0, len(shared), _PAIRS):
            part = shared[begin : begin + _PAIRS]
            yield numbers[part], numbers[part + distance]


def _first_of(digests: "array[int]") -> Numbers:
    """Return for each record the first one of the same digest, two numbers each."""
    pairs = np.frombuffer(digests, np.uint64).reshape(-1, 2)
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    is_new = np.ones(len(order), bool)
    is_new[1:] = (pairs[order[1:]] != pairs[order[:-1]]).any(axis=1)
    firsts = np.empty(len(order), np.int64)
    firsts[order] = order[is_new][np.cumsum(is_new) - 1]
    return firsts


def _digest(data: bytes) -> "array[int]":
    return array("Q", hashlib.blake2b(data, digest_size=16).digest())


def _content(record: Record, text: str, number: int) -> bytes:
    """Return what a record holds, as bytes; a record that holds nothing is like no other."""
    parts = (record.findings, record.labs, record.images)
    if not (text or record.fields or any(parts)):
        return b"nothing %d" % number
    values = [[[getattr(item, name) for name in item.__slots__] for item in part] for part in parts]
    head = [record.kind, record.encounter, record.time, record.sex, record.birth, record.death]
    holds = [head, text, dict(record.fields), values]
    try:
        return json.dumps(holds, sort_keys=True, default=repr).encode()
    except (TypeError, ValueError, RecursionError):  # such as keys of two types
        return repr(holds).encode("utf-8", "backslashreplace")
