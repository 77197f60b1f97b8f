"""Dates as they are written in notes: found, and moved by a number of days in the same form.

Years alone, times of day and "yesterday" stay. A date without a year is moved in the year that the
caller names; one that does not exist (February 30th) is taken as the last day of its month.
Lunar dates are moved as if each month had 30 days: right to a day or two.
"""

import re
from calendar import monthrange
from collections.abc import Iterator
from datetime import date, timedelta

from huizhen.client.identifiers.finding import Span

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH = (
    r"(?P<mon>Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?"
    r"|Sept?(?:ember)?|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?|JAN(?:UARY)?|FEB(?:RUARY)?"
    r"|MAR(?:CH)?|APR(?:IL)?|MAY|JUNE?|JULY?|AUG(?:UST)?|SEPT?(?:EMBER)?|OCT(?:OBER)?"
    r"|NOV(?:EMBER)?|DEC(?:EMBER)?)(?![a-z])\.?"
)
_HAN = "〇零○一二三四五六七八九"
_DAY = rf"(?:初[一二三四五六七八九十]|[二三]?十[{_HAN}]?|廿[{_HAN}]?|[{_HAN}])"
_M, _D = r"(?P<m>1[0-2]|0?[1-9])", r"(?P<d>3[01]|[12][0-9]|0?[1-9])"
_NO_UNIT = (
    r"(?! ?(?:mg|ml|g\b|mcg|tab|%|units?|[0-9./]*[0-9] ?mg|days?|week|month|year|hour|级|分|片|"
    r"粒|支|次|mm))"
)
_FORMS = tuple(
    re.compile(form)
    for form in (
        r"(?P<y>[12][09][0-9]{2})(?:(?<![0-9.A-Za-z]....)|(?=\s?年))\s?(?P<s>[-/.年])\s?(?P<m>["
        r"01]?[0-9])"
        r"\s?(?:(?P=s)|月)\s?(?P<d>[0-3]?[0-9])(?![0-9])(?:\s?[日号])?(?:[-~至、](?P<e>[0-3]?[0"
        r"-9])[日号])?",
        rf"(?P<y>[12][09][0-9]{{2}})\s?年\s?{_M}\s?月(?:份)?",
        rf"(?P<y>[12][09][0-9]{{2}})(?<![0-9.A-Za-z/-]....)[-/]{_M}(?![0-9/.-])",
        r"(?P<y>[12][09][0-9]{2})(?<![0-9.A-Za-z]....)(?P<m>0[1-9]|1[0-2])(?P<d>0[1-9]|[12][0-9"
        r"]|3[01])"
        r"(?:[0-2][0-9][0-5][0-9](?:[0-5][0-9])?)?(?![0-9A-Za-z.])(?! ?(?:IU|iu|copies|拷贝))",
        r"(?P<y>[0-9]{2})(?<![0-9.A-Za-z]..)\s?年\s?(?P<m>[01]?[0-9])\s?月\s?(?P<d>[0-3]?[0-9])"
        r"\s?[日号]",
        r"(?P<y>[12][0-9])(?<![0-9.A-Za-z/-]..)-(?P<m>0[1-9]|1[0-2])-(?P<d>0[1-9]|[12][0-9]|3[0"
        r"1])(?![0-9-])",
        r"(?P<m>[0-9](?<![0-9.].)[0-9]?)\s?月\s?(?P<d>[0-3]?[0-9])(?:[-~至、](?P<e>[0-3]?[0-9])"
        r")?\s?[日号]",
        r"(?P<m>[0-9](?<![0-9./-].)[0-9]?)(?P<s>[/.-])(?P<d>[0-3]?[0-9])(?P=s)(?P<y>[12][09][0-"
        r"9]{2})(?![0-9])",
        r"(?P<m>[0-9](?<![0-9./-].)[0-9]?)/(?P<d>[0-3]?[0-9])/(?P<y>[0-9]{2})(?![0-9/])",
        rf"{_MONTH}\s{{0,2}}(?P<d>3[01]|[12][0-9]|0?[1-9])(?![0-9:]|\.[0-9])(?:st|nd|rd|th)"
        rf"?{_NO_UNIT}"
        r"(?:\s?,?\s?(?P<y>[12][09][0-9]{2})(?![0-9]))?",
        rf"(?P<d>[0-9](?<![0-9.].)[0-9]?)(?:st|nd|rd|th)?(?:\sof)?[\s-]?{_MONTH}"
        r"(?:[\s,-]{0,2}(?P<y>[12][09][0-9]{2}|(?<=-)[0-9]{2})(?![0-9]))?",
        rf"{_MONTH}(?:\sof)?,?[\s-](?P<y>[12][09][0-9]{{2}})(?![0-9])",
    )
)
_DIGIT = re.compile("[0-9]")
_SHORT = re.compile(rf"{_M}[/-]{_D}(?![0-9/%-]|\.[0-9]){_NO_UNIT}")
_BEFORE_SHORT = re.compile(
    r"(?:[于自从在]|截至|日期:?|复诊:?|\b(?:on|since|dated|until|from|by|of|seen|dob|date):?)\s?$"
)
_AFTER_SHORT = re.compile(
    r"\s?(?:入院|出院|复[查诊]|行|查|起|因|手术|开始|[0-2]?[0-9]:[0-5][0-9]|our\b|visit)"
)
_HAN_FORMS = tuple(
    re.compile(form)
    for form in (
        rf"(?P<y>[{_HAN}]{{4}})年(?P<m>[一二三四五六七八九十]{{1,2}})月(?:(?P<d>{_DAY})[日号]?)?",
        rf"(?P<m>[正冬腊一二三四五六七八九十]{{1,2}})月(?P<d>初[一二三四五六七八九十]|廿"
        rf"[{_HAN}]?|{_DAY}(?=[日号]))[日号]?",
        rf"(?:农历|阴历|旧历|夏历)\s?(?:[{_HAN}0-9]{{4}}年)?闰?(?P<m>[正冬腊一二三四五六七八九"
        rf"十]{{1,2}}|1[0-2]|[1-9])月"
        rf"(?P<d>{_DAY}|3[01]|[12][0-9]|[1-9])[日号]?",
    )
)


def dates(text: str) -> Iterator[Span]:
    """Yield each date.

    Args:
        text: folded.
    """
    if _DIGIT.search(text):
        for form in _FORMS:
            for match in form.finditer(text):
                if _is_date(match):
                    yield Span(match.start(), match.end(), "date", "pattern")
        if "/" in text or "-" in text:
            yield from _short(text)
    if "月" in text:
        for form in _HAN_FORMS:
            for match in form.finditer(text):
                yield Span(match.start(), match.end(), "date", "pattern")


def moved(raw: str, days: int, year: int) -> str | None:
    """Return a date moved by some days, in its own form.

    Args:
        raw: what a span of ``dates`` covers, folded.
        days: how far, either way.
        year: in which a date without one lies.

    Returns:
        None: it is no date that can be moved, such as the 13th month.
    """
    for form in (*_FORMS, *_HAN_FORMS, _SHORT):
        if match := form.fullmatch(raw):
            return _moved(match, days, year)
    return None


def year_of(raw: str) -> int | None:
    """Return the year that a date names in four digits."""
    found = re.search(r"(?:19|20)[0-9]{2}", raw)
    return int(found[0]) if found else None


def _short(text: str) -> Iterator[Span]:
    """Yield dates such as 5/6, which are fractions unless words around them say otherwise."""
    for match in re.finditer(r"[/-]", text):
        digits = re.search(
            r"(?<![0-9./-])[0-9]{1,2}$", text[max(0, match.start() - 3) : match.start()]
        )
        if not digits:
            continue
        start = match.start() - len(digits[0])
        if (found := _SHORT.match(text, start)) and (
            _BEFORE_SHORT.search(text, max(0, start - 8), start)
            or _AFTER_SHORT.match(text, found.end())
        ):
            yield Span(start, found.end(), "date", "context")


def _is_date(match: re.Match[str]) -> bool:
    found = match.groupdict()
    if found.get("mon") or found.get("s") == "年" or "月" in match[0]:
        return True
    month, day = int(found["m"]), int(found.get("d") or 1)
    return min(month, day) >= 1 and max(month, day) <= 31 and min(month, day) <= 12


def _moved(match: re.Match[str], days: int, year: int) -> str | None:
    found = {name: part for name, part in match.groupdict().items() if part}
    in_words = any(char in match[0] for char in "年月")
    month_first = in_words or not {"m", "d"} <= found.keys() or _number(found["m"]) <= 12
    if not month_first:
        found["m"], found["d"] = found["d"], found["m"]
    month = _MONTHS.index(found["mon"][:3].lower()) + 1 if "mon" in found else _number(found["m"])
    if "y" in found:
        year = _number(found["y"])
        year += 0 if len(found["y"]) > 2 else 2000 if year <= 40 else 1900
    written: dict[str, str] = {}
    for name in ("e", "d") if "d" in found else ("middle",):
        if name not in found and name != "middle":
            continue
        day = _number(found[name]) if name in found else 15
        if not (1 <= month <= 12 and 1 <= day <= 31):
            return None
        try:
            new = date(year, month, min(day, monthrange(year, month)[1])) + timedelta(days=days)
        except (ValueError, OverflowError):
            return None
        written |= {name: str(new.day), "m": str(new.month), "y": f"{new.year:04d}"}
        written["mon"] = _MONTHS[new.month - 1]
    return _rewritten(match, found, written, month_first)


def _rewritten(
    match: re.Match[str], found: dict[str, str], written: dict[str, str], month_first: bool
) -> str:
    raw, places = match[0], {"m": "m", "d": "d", "y": "y", "e": "e", "mon": "mon"}
    if not month_first:
        places["m"], places["d"] = "d", "m"
    parts = [found[name] for name in ("m", "d", "e") if name in found]
    padded = any(part[0] == "0" for part in parts) or (
        all(len(part) == 2 for part in parts) and "年" not in raw and "月" not in raw
    )
    spans = sorted((match.span(places[name]), name) for name in found if name in places)
    for (start, end), name in reversed(spans):
        old, new = raw[start - match.start() : end - match.start()], written[name]
        if name == "mon":
            new = _like(old, int(written["m"]) - 1)
        elif not old[-1].isascii():
            new = _in_han(new, is_year=name == "y", lunar=old[0] in "初廿正冬腊")
        elif name == "y":
            new = new[-len(old) :]
        elif padded:
            new = new.zfill(2)
        raw = raw[: start - match.start()] + new + raw[end - match.start() :]
    return raw


_FULL = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip


def _like(old: str, month: int) -> str:
    new = _FULL[month] if len(old) > 4 or old.lower() in ("june", "july") else _FULL[month][:3]
    return new.upper() if old.isupper() else new


def _number(text: str) -> int:
    if text.isdigit() and text.isascii():
        return int(text)
    if text in "正冬腊":
        return {"正": 1, "冬": 11, "腊": 12}[text]
    text = text.removeprefix("初").replace("廿", "二十")
    if "十" in text:
        tens, _, ones = text.partition("十")
        return 10 * (_digit(tens) if tens else 1) + (_digit(ones) if ones else 0)
    return int("".join(str(_digit(char)) for char in text))


def _digit(char: str) -> int:
    return max(0, "〇一二三四五六七八九".find(char[0]))


def _in_han(number: str, *, is_year: bool, lunar: bool) -> str:
    digits = "〇一二三四五六七八九"
    if is_year:
        return "".join(digits[int(d)] for d in number)
    n = int(number)
    tens = "" if n < 10 else "十" if n < 20 else digits[n // 10] + "十"
    text = tens + (digits[n % 10] if n % 10 else "")
    return "初" + text if lunar and n <= 10 else text
