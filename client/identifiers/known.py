"""What is already known to name somebody: the patient's own identifiers, and the list of staff.

Found exactly, spaced, broken over lines, in half or full width, in traditional characters, masked
(王**, 138****8000), with a title (王先生), in either order of a name in Latin letters.

Both searches run over the text without blanks and marks. The patient's few variants are looked
for one by one, which is a memory search each. The thousands of names on a list are looked up in a
table by their first two characters: the time is that of the text and not of the list's length,
as an Aho-Corasick automaton's would be, and Python does most of it in one regular expression.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from huizhen.client.identifiers.finding import Kind, Span
from huizhen.client.identifiers.folding import (
    fold,
    has_han,
    kept_positions,
    lowered,
    squeezed,
)  # fmt: skip
from huizhen.client.identifiers.names import surname_at

_KINDS: dict[str, Kind] = {
    "name": "name", "relative": "name", "staff": "name", "pinyin": "name", "id": "id",
    "phone": "phone", "mrn": "mrn", "insurance": "insurance", "address": "address",
    "email": "email", "employer": "employer",
}  # fmt: skip
_PLACEHOLDERS = frozenset(
    """
    无 空 未知 不详 不祥 不明 未填 待查 同上 如上 本人 患者 家属 其他 其它 退休 离休
    农民 务农 无业 职员 工人 学生 自由职业 个体 父亲 母亲 父母 儿子 女儿 丈夫 妻子 配偶
    夫妻 兄弟 姐妹 子女 朋友 同事 亲属 none unknown nil na n/a null self same patient
    retired farmer student mother father son daughter wife husband spouse brother sister
    friend other test
    """.split()  # noqa: SIM905 - people read it so
)
# what stands in a column for somebody or for nobody: found everywhere, it names no one
LEAST_NUMBER = 4
# a shorter number is in every text: only its label can show it
_SPLIT = re.compile(r"(?<=[省市区县旗镇乡村道路街巷弄号栋幢楼室元]) ?|[,;\n]\s*")
_TITLES = ("先生", "女士", "老先生", "老太", "大爷", "大妈", "阿姨")
_TITLED = re.compile(rf"(?<=.)(?:{'|'.join(_TITLES)})$")
_FREE = 8  # from this length on a number is replaced inside a longer one too


@dataclass(frozen=True, slots=True)
class Literal:
    """A text to look for, folded, squeezed and in lower case."""

    text: str
    kind: Kind
    taken: int  # of its characters, from the first: of 王先生 the surname alone
    is_free: bool  # it may stand inside a longer word or number


class Prepared:
    """One text in the forms in which it is searched, made once for all searches."""

    __slots__ = ("_positions", "folded", "low", "squeezed")

    def __init__(self, text: str) -> None:
        self.folded = fold(text)
        self.low = lowered(self.folded)
        self.squeezed = squeezed(self.low)
        self._positions: list[int] | None = None

    def span(self, start: int, end: int) -> tuple[int, int]:
        """Return where a part of the squeezed text stands in the text."""
        if self._positions is None:
            self._positions = kept_positions(self.low)
        return self._positions[start], self._positions[end - 1] + 1

    def stands_alone(self, start: int, end: int) -> bool:
        """Tell whether neither its first nor its last run of letters or digits goes on."""
        return not (_goes_on(self.low[start - 1 : start + 1]) if start else False) and not (
            _goes_on(self.low[end - 1 : end + 1])
        )


def literals(identifiers: Mapping[str, Iterable[str]]) -> tuple[Literal, ...]:
    """Return what to look for in the texts of a patient, the longest first.

    Args:
        identifiers: as of a record; kinds that are not known are looked for as numbers.
    """
    found: dict[str, Literal] = {}
    for name, values in identifiers.items():
        for value in values:
            plain = fold(value).strip()
            if lowered(plain) in _PLACEHOLDERS:
                continue
            kind = _KINDS.get(name, "name" if has_han(plain) else "mrn")
            for variant, is_free in _variants(kind, plain):
                text = squeezed(lowered(variant))
                if text:
                    titled = kind == "name" and _TITLED.search(text)
                    taken = titled.start() if titled else len(text)
                    found.setdefault(text, Literal(text, kind, taken, is_free))
    return tuple(sorted(found.values(), key=lambda literal: -len(literal.text)))


def known(text: Prepared, wanted: Iterable[Literal]) -> Iterator[Span]:
    """Yield where a patient's own identifiers stand."""
    for literal in wanted:
        begin = text.squeezed.find(literal.text)
        while begin >= 0:
            start, end = text.span(begin, begin + literal.taken)
            if literal.is_free or text.stands_alone(start, end):
                yield Span(start, end, literal.kind, "known")
            begin = text.squeezed.find(literal.text, begin + 1)


class Roster:
    """The names of a hospital's staff, thousands of them."""

    def __init__(self, names: Iterable[str]) -> None:
        self._by_two: dict[str, tuple[str, ...]] = {}
        for name in names:
            for variant, _ in _variants("name", fold(name).strip()):
                word = squeezed(lowered(variant))
                if len(word) >= 2 and not (word.isascii() and len(word) < 5):
                    begun = self._by_two.get(word[:2], ())
                    if word not in begun:
                        self._by_two[word[:2]] = (*begun, word)
        first = "".join(map(re.escape, sorted({two[0] for two in self._by_two})))
        self._first = re.compile(f"[{first}]") if first else None

    def find(self, text: Prepared) -> Iterator[Span]:
        """Yield where one of the names stands."""
        if not self._first:
            return
        whole = text.squeezed
        for match in self._first.finditer(whole):
            at = match.start()
            for word in self._by_two.get(whole[at : at + 2], ()):
                if whole.startswith(word, at):
                    start, end = text.span(at, at + len(word))
                    if not word.isascii() or text.stands_alone(start, end):
                        yield Span(start, end, "name", "staff")


def _goes_on(two: str) -> bool:
    return len(two) == 2 and two.isascii() and (two.isdigit() or two.isalpha())


def _variants(kind: Kind, value: str) -> Iterator[tuple[str, bool]]:
    if kind == "name":
        yield from _han_names(value) if has_han(value) else _latin_names(value)
    elif kind in ("address", "employer"):
        yield from _addresses(value)
    elif kind == "email":
        yield value, True
    elif sum(map(str.isalnum, value)) >= LEAST_NUMBER:
        yield from _numbers(kind, value)


def _han_names(name: str) -> Iterator[tuple[str, bool]]:
    size = surname_at(name, 0) or 1
    if len(name) < 2:
        return
    yield name, True
    surname = name[:size]
    for title in ("某某", "某", "**", "*", "××", "xx", *_TITLES):
        yield surname + title, True
    if len(name) - size == 2:
        for mask in "*×x":
            yield surname + mask + name[-1], True


def _latin_names(name: str) -> Iterator[tuple[str, bool]]:
    family_first = "," in name
    words = [word for word in re.split(r"[\s,.]+", name) if word]
    if family_first:
        words = [*words[1:], words[0]]
    if len("".join(words)) < 3:
        return
    yield "".join(words), False
    if len(words) < 2:
        return
    long = [word for word in words if len(word) > 1]
    if len(long) >= 2:
        first, last = long[0], long[-1]
        for one, two in ((first, last), (last, first)):
            yield one + two, False
        yield last + "".join(words[:-1]), False
        yield "".join(words[1:]) + words[0], False
        if len(last) >= 3:
            yield first[0] + last, False
        if len(first) >= 3:
            yield last[0] + first, False
        for one, two in ((last, first), (first, last)):
            if len(one) >= 4:
                yield one + two[0], False


def _addresses(value: str) -> Iterator[tuple[str, bool]]:
    if has_han(value) and len(value) < 4:
        return  # part of too many words
    yield value, len(value) >= 4
    parts = [part for part in _SPLIT.split(value) if part]
    for i in range(1, len(parts)):
        rest = "".join(parts[i:])
        if len(rest) >= 5:
            yield rest, has_han(rest)
    if len(parts) > 1 and not has_han(value) and any(map(str.isdigit, parts[0])):
        yield parts[0], False


def _numbers(kind: Kind, value: str) -> Iterator[tuple[str, bool]]:
    bare = re.sub(r"[^0-9A-Za-z\u4e00-\u9fff]", "", value)
    yield value, len(bare) >= _FREE
    if bare != value:
        yield bare, len(bare) >= _FREE
    short = bare.lstrip("0")
    if len(short) >= 5 and short != bare:
        yield short, len(short) >= _FREE
    if kind == "phone" and len(bare) >= 10:
        national = (
            bare[-11:]
            if bare.startswith("86")
            else bare.removeprefix("1")
            if len(bare) == 11 and bare[1] in "23456789" and bare[0] == "1" and not value.isdigit()
            else bare
        )
        yield national, True
        for mask in ("****", "xxxx", "××××"):
            yield national[:3] + mask + national[-4:], True
    if kind == "id" and len(bare) in (15, 18):
        for some in (4, 6):
            yield bare[:some] + "*" * (len(bare) - some - 4) + bare[-4:], True
