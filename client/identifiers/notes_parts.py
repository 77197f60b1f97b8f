"""The invented numbers, dates and addresses of synthetic notes, and their sentences."""

import random
import tomllib
from collections.abc import Callable
from datetime import date, timedelta
from importlib.resources import files
from typing import Any

PARTS: dict[str, Any] = tomllib.loads(
    (files("huizhen.client.identifiers") / "notes.toml").read_text("utf-8")
)
_PLACES: dict[str, list[str]] = PARTS["places"]
_HAN = "〇一二三四五六七八九"
_IDENTITY_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)  # GB 11643-1999, 4.2
# "#" is a digit
_FORMS: dict[str, tuple[str, ...]] = {
    "ssn": ("1##-##-####", "5##-##-####", "7##-##-####"),
    "passport": ("E########", "G########"),
    "lic": ("A#######", "B#######", "D#######", "K#######"),
    "land": ("010-8#######", "021-6#######", "0755-2#######", "0571-8#######", "028-5#######"),
    "acc": ("CT#########", "MR#########", "DR#########", "US#########", "##########"),
    "bank": ("62#################",),
    "email": ("zhang###@163.com", "li.m###@mail.example.org", "k_t###@mail.example.org"),
    "wechat": ("wxid_######", "doc######", "health######"),
    "qq": ("1#######", "3########", "8########"),
    "plate": ("京A#####", "沪B·#####", "粤C#####", "川D·#####"),
    "ip": ("10.13#.#.1##", "10.3#.1##.##"),
    "url": ("https://lab.example.org/r/######",),
    "zip": ("1#####", "3#####", "6#####"),
}
_BY_LANGUAGE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "mrn": (("1#####", "3######", "ZY########", "00######", "M#######"), ("2#####", "H#######")),
    "ins": (("1#########", "5#########"), ("XA#########", "WB#########", "YC#########")),
    "age": (("9#岁", "10#岁"), ("9#-year-old", "10#-year-old")),
}


def value_of(slot: str, rng: random.Random, *, in_chinese: bool) -> str:
    """Return an invented value for a slot of a sentence."""
    if slot in _FORMS:
        return _filled(rng, rng.choice(_FORMS[slot]))
    if slot in _BY_LANGUAGE:
        return _filled(rng, rng.choice(_BY_LANGUAGE[slot][0 if in_chinese else 1]))
    return _MAKERS[slot](rng, in_chinese)


def _filled(rng: random.Random, form: str) -> str:
    return "".join(rng.choice("0123456789") if char == "#" else char for char in form)


def _day(rng: random.Random) -> date:
    return date(2015, 1, 1) + timedelta(days=rng.randrange(3500))


def _identity(rng: random.Random, _: bool) -> str:
    born = date(1940, 1, 1) + timedelta(days=rng.randrange(25000))
    region = rng.choice((110105, 310115, 440103, 510104, 420102))
    number = f"{region}{born:%Y%m%d}{_filled(rng, '###')}"
    total = sum(int(d) * w for d, w in zip(number, _IDENTITY_WEIGHTS, strict=True))
    # one in twenty is mistyped
    return number + ("10X98765432"[total % 11] if rng.random() > 0.05 else _filled(rng, "#"))


def _phone(rng: random.Random, zh: bool) -> str:
    if zh:
        number = f"1{rng.choice('35789')}{_filled(rng, '#########')}"
        form = rng.random()
        if form < 0.1:
            return f"{number[:3]}-{number[3:7]}-{number[7:]}"
        return f"+86 {number}" if form < 0.15 else number
    area, middle, line = rng.randint(201, 989), rng.randint(200, 999), _filled(rng, "####")
    written = rng.choice(("({0}) {1}-{2}", "{0}-{1}-{2}", "{0}.{1}.{2}", "+1 {0} {1} {2}"))
    return written.format(area, middle, line)


def _date(rng: random.Random, zh: bool) -> str:
    d = _day(rng)
    if not zh:
        forms: tuple[str, ...] = (
            "%m/%d/%Y", "{m}/{d}/%y", "%B {d}, %Y", "{d} %b %Y", "%Y-%m-%d", "%d-%b-%Y",
            "%B {d}th, %Y",
        )  # fmt: skip
        return d.strftime(rng.choice(forms).format(m=d.month, d=d.day))
    if rng.random() < 0.05:
        year = "".join(_HAN[int(c)] for c in str(d.year))
        return f"{year}年{_small(d.month)}月{_small(d.day)}日"
    y, m, n = d.year, d.month, d.day
    forms = (
        f"{y}年{m}月{n}日", f"{d:%Y-%m-%d}", f"{y}.{m}.{n}", f"{d:%Y/%m/%d}", f"{y}-{m}-{n}",
        f"{y}年{m:02}月{n:02}日", f"{d:%Y%m%d}",
    )  # fmt: skip
    return rng.choice(forms)


def _small(n: int) -> str:
    tens = "" if n < 10 else "十" if n < 20 else _HAN[n // 10] + "十"
    return tens + (_HAN[n % 10] if n % 10 else "")


def _month_day(rng: random.Random, zh: bool) -> str:
    d = _day(rng)
    return f"{d.month}月{d.day}日" if zh else rng.choice((f"{d.month}/{d.day}", f"{d:%B} {d.day}"))


def _lunar(rng: random.Random, _: bool) -> str:
    return f"农历{rng.choice('二三四五六七八九')}月{rng.choice(('初三', '十五', '廿八', '二十'))}"


def _address(rng: random.Random, zh: bool) -> str:
    if not zh:
        flat = rng.choice(("", f", Apt {rng.randint(1, 40)}"))
        street, town = rng.choice(_PLACES["streets"]), rng.choice(_PLACES["towns"])
        return f"{rng.randint(1, 9999)} {street}{flat}, {town} {rng.randint(10000, 99999)}"
    if rng.random() < 0.2:
        return rng.choice(_PLACES["villages"])
    place, house = rng.choice(_PLACES["districts"]), rng.randint(1, 30)
    flat = f"{rng.randint(1, 29)}0{rng.randint(1, 5)}"
    if rng.random() < 0.5:
        return f"{place}{rng.choice(_PLACES['roads'])}{rng.randint(1, 999)}号{house}栋{flat}室"
    return f"{place}{rng.choice(_PLACES['estates'])}{house}号楼{rng.randint(1, 5)}单元{flat}"


def _employer(rng: random.Random, zh: bool) -> str:
    return rng.choice([name for name in _PLACES["employers"] if name.isascii() is not zh])


_MAKERS: dict[str, Callable[[random.Random, bool], str]] = {
    "id": _identity,
    "phone": _phone,
    "phone2": _phone,
    "date": _date,
    "md": _month_day,
    "lunar": _lunar,
    "addr": _address,
    "employer": _employer,
}
