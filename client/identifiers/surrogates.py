"""What stands in an identifier's place: alike, the same for one patient, of no real person.

Each is drawn by HMAC-SHA256 from the site's key, the patient and what is replaced, so that the
same name stays one name through all records of a patient, and is another one in the next
patient's. Whoever lacks the key can neither undo nor repeat it. Numbers are of kinds that nobody
has: mobile numbers that begin with 11, identity numbers of a region 99 and with a wrong checksum,
555-01xx, social security numbers of area 000, hosts under ``.invalid`` (RFC 2606), addresses of
the documentation network 192.0.2.0/24 (RFC 5737), number plates with an O.
"""

import hashlib
import hmac
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date, timedelta

from huizhen.client.identifiers.addresses import city_of
from huizhen.client.identifiers.dates import moved
from huizhen.client.identifiers.finding import Kind
from huizhen.client.identifiers.folding import as_wide_as, fold, has_han
from huizhen.client.identifiers.names import surname_at
from huizhen.client.identifiers.patterns import check_character, passes_luhn
from huizhen.protocol.errors import ConfigError

KEY_BYTES = 32
MOST_DAYS = 365
_SURNAMES = "沐柘楷枫栎樨槿栀桉椴榕樟"
_LONG_SURNAMES = ("云山", "青川", "白石", "长汀")
_GIVEN = "岚汐屿泓溪澄清晨朗煦霁昕暄晗昀砚墨笙筠竹禾穗稷松榆杉桐"
_FAMILY = (
    "Alderwick",
    "Brackenby",
    "Cresmoor",
    "Dunleath",
    "Elmsworth",
    "Farrowgate",
    "Hollinby",
    "Marwick",
)
_FIRST = ("Arlen", "Bryn", "Corin", "Darby", "Ellis", "Fenn", "Harlow", "Jory", "Kerrin", "Lowen")
_TAGS: dict[Kind, tuple[str, str]] = {
    "name": ("[姓名]", "[name]"), "id": ("[证件号]", "[id]"), "phone": ("[电话]", "[phone]"),
    "mrn": ("[编号]", "[number]"), "insurance": ("[医保号]", "[insurance]"),
    "bank": ("[银行卡]", "[bank]"), "email": ("[邮箱]", "[email]"),
    "account": ("[账号]", "[account]"),
    "plate": ("[车牌]", "[plate]"), "ip": ("[网络地址]", "[ip]"), "url": ("[网址]", "[url]"),
    "date": ("[日期]", "[date]"), "age": ("[高龄]", "[age]"), "address": ("[地址]", "[address]"),
    "employer": ("[单位]", "[employer]"),
}  # fmt: skip


def tag(kind: Kind, *, in_chinese: bool) -> str:
    """Return the word in brackets that says what was taken out."""
    return _TAGS[kind][0 if in_chinese else 1]


def shift_days(key: bytes, patient: str) -> int:
    """Return by how many days the times of a patient are moved: 1 to 365, back or forth.

    Raises:
        ConfigError: the key is too short to keep anything.
    """
    number = int.from_bytes(_mac(key, patient, "days", "")[:8], "big")
    days = number // 2 % MOST_DAYS + 1
    return days if number % 2 else -days


def shifted_time(time: str, days: int) -> str:
    """Return a time in the one form (``records/times.py``) moved by some days; a year stays.

    A month is moved by its 15th. A time at the calendar's very end stays in its year alone.
    """
    if len(time) < 7:
        return time
    try:
        new = date.fromisoformat(time[:10] if len(time) >= 10 else time[:7] + "-15")
        return (new + timedelta(days=days)).isoformat()[: len(time[:10])] + time[10:]
    except (ValueError, OverflowError):
        return time[:4]


@dataclass(frozen=True, slots=True)
class Surrogates:
    """What replaces what, for one patient."""

    key: bytes = field(repr=False)
    patient: str = field(repr=False)
    days: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "days", shift_days(self.key, self.patient))

    def of(self, kind: Kind, raw: str, *, year: int, in_chinese: bool, attempt: int = 0) -> str:
        """Return what stands in the place of ``raw``.

        Args:
            kind: what it is.
            raw: as the text has it.
            year: in which a date without a year lies.
            in_chinese: the language of the text around it.
            attempt: another one for each number, should the first be what must not be shown.
        """
        plain = fold(raw)
        match kind:
            case "date":
                new = moved(plain.strip(), self.days, year)
                return as_wide_as(new, raw) if new else tag(kind, in_chinese=in_chinese)
            case "age":
                return _age(plain)
            case "address":
                return city_of(plain) or ("某地" if in_chinese else "an address")
            case "name":
                return self._name(plain, attempt)
            case "employer":
                return "某单位" if in_chinese else "an employer"
            case _:
                return as_wide_as(self._number(kind, plain, attempt), raw)

    def _draw(self, kind: str, value: str, attempt: int) -> "_Draw":
        return _Draw(_mac(self.key, self.patient, kind, f"{attempt}/{value}"))

    def _name(self, raw: str, attempt: int) -> str:
        """Return a name; its parts are drawn apart, so that 王先生 and 王建国 stay one person."""
        if not has_han(raw):
            return self._latin_name(raw, attempt)
        plain = re.sub(r"[\s·]", "", raw)
        size = surname_at(plain, 0) or 1
        surname, given = plain[:size], plain[size:]
        pool = _LONG_SURNAMES if size == 2 else _SURNAMES
        new = self._draw("surname", surname, attempt).choice(pool)
        if re.fullmatch(r"某某?|[*×○xX]+|\W+", given):
            return new + given
        draw = self._draw("given", given, attempt)
        return new + "".join(draw.choice(_GIVEN) for _ in given[:2])

    def _latin_name(self, raw: str, attempt: int) -> str:
        words = re.findall(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", raw)
        if not words:
            return _FAMILY[0]
        last = words[0] if "," in raw else words[-1]

        def new(match: re.Match[str]) -> str:
            word = match[0]
            if len(word) == 1:
                return word if len(words) > 2 else self._draw("initial", word, attempt).letter()
            pool = _FAMILY if word == last else _FIRST
            name = self._draw("name", word.lower(), attempt).choice(pool)
            return name.upper() if word.isupper() else name.lower() if word.islower() else name

        return re.sub(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", new, raw)

    def _number(self, kind: Kind, raw: str, attempt: int) -> str:
        bare = re.sub(r"[^0-9A-Za-z]", "", raw).lower()
        draw = self._draw(kind, bare, attempt)
        match kind:
            case "email":
                return f"user{draw.digits(4)}@example.invalid"
            case "url":
                return f"https://example.invalid/{draw.digits(4)}"
            case "ip":
                return f"192.0.2.{1 + int(draw.digits(3)) % 254}"
            case "phone":
                return _phone(raw, draw)
            case "plate":
                return raw[:1] + "O" + draw.digits(5) if has_han(raw) else "O" + draw.digits(5)
            case "id" if re.fullmatch(r"[0-9]{17}[0-9x]", bare):
                return self._resident(bare, draw)
            case "id" if re.fullmatch(r"[0-9]{15}", bare):
                return "990000" + draw.digits(9)
            case "id" if re.fullmatch(r"[0-9]{3}-[0-9]{2}-[0-9]{4}", raw):
                return f"000-{draw.digits(2)}-{draw.digits(4)}"
            case "bank" if bare.isdigit():
                new = draw.digits(len(bare))
                return new[:-1] + str((int(new[-1]) + 1) % 10) if passes_luhn(new) else new
            case _:
                return _alike(raw, draw)

    def _resident(self, number: str, draw: "_Draw") -> str:
        """Return an identity number of no region, with the birthday moved as all dates are."""
        born = moved(number[6:14], self.days, int(number[6:10])) or "19000101"
        seventeen = "990000" + born + draw.digits(3)
        right = "10X98765432".index(check_character(seventeen))
        return seventeen + "10X98765432"[(right + 1) % 11]


class _Draw:
    """Letters and digits from one HMAC, as many as are wanted."""

    def __init__(self, seed: bytes) -> None:
        self._number = int.from_bytes(seed, "big")
        self._seed = seed

    def _below(self, n: int) -> int:
        if self._number < 1 << 32:
            self._seed = hashlib.sha256(self._seed).digest()
            self._number = int.from_bytes(self._seed, "big")
        self._number, drawn = divmod(self._number, n)
        return drawn

    def choice(self, pool: tuple[str, ...] | str) -> str:
        return pool[self._below(len(pool))]

    def digits(self, n: int) -> str:
        return "".join(str(self._below(10)) for _ in range(n))

    def letter(self) -> str:
        return chr(ord("A") + self._below(26))


def _mac(key: bytes, patient: str, kind: str, value: str) -> bytes:
    if len(key) < KEY_BYTES:
        raise ConfigError(
            f"key for surrogates has {len(key)} bytes, expected at least {KEY_BYTES}: "
            "make a new one"
        )
    parts = (part.encode("utf-8", "surrogatepass") for part in (kind, patient, value))
    framed = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    return hmac.digest(key, framed, "sha256")


def _age(plain: str) -> str:
    if "岁" in plain:
        return "90岁以上"
    return "90+" if plain.isdigit() else "90+ years old"


def _phone(raw: str, draw: _Draw) -> str:
    digits = re.sub(r"[^0-9]", "", raw)
    if "*" in raw or "x" in raw.lower():
        return "11" + draw.digits(1) + "****" + draw.digits(4)
    if len(digits) >= 11 and re.fullmatch(r"(?:0{0,2}86)?1[3-9][0-9]{9}", digits):
        return "11" + draw.digits(9)
    if raw.startswith("0"):
        return re.match(r"0[0-9]{2,3}|0", raw)[0] + "-1" + draw.digits(7)  # type: ignore[index]
    if len(digits) in (10, 11) and "+" not in raw[1:]:
        return f"{draw.digits(3)}-555-01{draw.digits(2)}"
    return _alike(raw, draw)


def _alike(raw: str, draw: _Draw) -> str:
    """Return letters for letters and digits for digits; no blanks that noise put in."""
    maker: Callable[[str], str] = lambda c: (  # noqa: E731 - it is used once, beside
        draw.digits(1) if c.isdigit() else draw.letter() if c.isupper() else draw.letter().lower()
    )
    return "".join(maker(c) if c.isascii() and c.isalnum() else c for c in raw if c not in " \n")
