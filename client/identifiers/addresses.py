"""Places where people live, below the level of a city, and ages that few reach.

A Chinese address begins at a province, a city, or the label before it, and goes on in parts that
each end in what they are (区, 镇, 路, 号, 室); one that begins inside is found by its end. A city
alone is no address. Texts are folded (``folding.py``).
"""

import re
from collections.abc import Iterator

from huizhen.client.identifiers.finding import Span
from huizhen.client.identifiers.folding import ends_of, has_han, is_han, lines_of, words

_PLACES = sorted(lines_of("places.txt"), key=len, reverse=True)
_NOT_IN_NAMES = "院科病患医者诊术我在住于至来往去由经到因为和与及或的了有无未已是入出"


def _han_without(stops: str) -> str:
    """Return a character class; ``re`` has no difference of classes, so it is ranges."""
    begin, ranges = 0x4E00, []
    for code in [*sorted(map(ord, stops)), 0xA000]:
        if code > begin:
            ranges.append(f"{chr(begin)}-{chr(code - 1)}")
        begin = code + 1
    return "[" + "".join(ranges) + "]"


_H = _han_without(_NOT_IN_NAMES)
_AREA = "自治区|自治州|自治县|开发区|新区|省|市|区|县|旗|盟|镇|乡|街道|社区|村|屯|庄|寨"
_ROAD = (
    "大道|大街|胡同|小区|花园|家园|公寓|大厦|广场|新村|新城|宿舍|家属楼|"
    "路|街|巷|弄|里|苑|城|湾|坊|府|庭|园"
)
_DOOR = (
    r"(?:[东西南北中]?[甲乙丙]?(?:[A-Za-z]|[一二三四五六七八九十]{1,3}|[0-9 ]{1,6})(?:-[0-9]{1,"
    r"4}){0,3} ?"
    r"(?:号楼|号院|号|栋|幢|座|单元|室|层|楼|弄|巷|组|队|社|户|房|路|街)|-?[0-9]{1,5}(?![0-9岁"
    r"年月日]))"
)
_PART = (
    rf"[ ,]?(?:(?>(?:{_H}(?!{_AREA})){{0,7}}?{_H}(?:{_AREA}))|(?>{_H}{{1,8}}?(?:{_ROAD}))(?:[东"
    rf"西南北中]?[段路侧])?|{_DOOR})"
)
_WHOLE = re.compile(
    rf"(?P<city>(?:{'|'.join(_PLACES)})[省市]?(?:{_H}{{2,5}}?市)?)(?P<rest>(?:{_PART}){{1,12}})"
)
_AFTER_LABEL = re.compile(rf"(?:[\s:()为是在于址]|现|详细|居住){{0,6}}+(?P<v>(?:{_PART}){{2,12}})")
_LABELS = words("address", "labels")
_TAIL = re.compile(
    rf"(?:{_ROAD})(?:[东西南北中]?[段路])?[0-9]{{1,5}}(?:-[0-9]+)?[号弄](?:{_DOOR}){{0,5}}"
    r"|(?:号楼|号院|栋|幢|座|单元)[ ,]?(?:[0-9]{1,3}单元)?[ ,]?[0-9]{1,4}(?:室|号|房)?"
    rf"|[县区旗市]{_H}{{1,6}}?(?:镇|乡|街道){_H}{{1,6}}?(?:村|屯|社区|庄)(?:[0-9一二三四五六七"
    rf"八九十]{{1,3}}[组队号社])?"
    rf"|[镇乡]{_H}{{1,5}}?[村屯](?:[0-9一二三四五六七八九十]{{1,3}}[组队号社户])"
)
_BELOW_CITY = re.compile(r"[区县旗镇乡村屯路街巷弄号栋幢室园苑里楼寨庄道厦]")
_STREET = re.compile(
    r"[0-9](?<![0-9./-].)[0-9]{0,5}(?:-?[A-Z](?![A-Za-z]))? (?:[NSEW]\.? |North |South |East |W"
    r"est )?"
    r"(?:[A-Z][A-Za-z'’-]+\.? |[0-9]{1,3}(?:st|nd|rd|th) ){1,4}?"
    r"(?:Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Way|Place|Pl|Terrace"
    r"|Ter|Circle|Cir|Highway|Hwy|Parkway|Pkwy|Square|Sq|Crescent|Close|Gardens|Row|Trail)(?![A"
    r"-Za-z])\.?"
    r"(?:,?[ \n](?:Apt|Apartment|Suite|Ste|Unit|Flat|Room|Rm|#)\.? ?#?[A-Za-z0-9-]{1,6})?"
    r"(?:,?[ \n](?P<city>[A-Z][A-Za-z.'-]+(?:[ \n][A-Z][a-z]+){0,2},? [A-Z]{2})(?![A-Za-z]))?"
    r"(?:,?[ \n][0-9]{5}(?:-[0-9]{4})?(?![0-9]))?"
)
_STATES = (
    "AL|AK|AZ|AR|CA|CO|CT|DE|DC|FL|GA|HI|ID|IL|IN|IA|KS|KY|LA|ME|MD|MA|MI|MN|MS|MO|MT|NE|NV|NH|NJ|NM|NY"
    "|NC|ND|OH|OK|OR|PA|RI|SC|SD|TN|TX|UT|VT|VA|WA|WV|WI|WY"
)
_ZIP = re.compile(r"[0-9]{5}(?<=[A-Z]{2} .{5})(?<![A-Z]{3} .{5})(?:-[0-9]{4})?(?![0-9])")
_STATE = re.compile(rf"(?<![A-Z])(?:{_STATES}) +$")
_BOX = re.compile(r"P\.? ?O\.? Box [0-9]{1,6}")
_OLD = re.compile(
    r"[19](?<![0-9.].)(?:(?<=9)[0-9]|(?<=1)[0-2][0-9])(?: ?(?:周|余|多)?岁(?!以上|及)"
    r"|[ -]?(?:years?[ -]old|year-old|y/?o(?![A-Za-z])|yrs?(?![A-Za-z])|years of age))"
)
_OLD_HAN = re.compile(
    r"(?:九十[一二三四五六七八九]?|一百[零〇]?[一二三四五六七八九十]?)(?:周|余|多)?岁(?!以上|及)"
)
_AGE = re.compile(
    r"(?:[\s:为是]|已){0,3}(?P<v>9[0-9]|1[0-2][0-9])(?![0-9.%/*-]|[ ]?(?:天|日|月|d))"
)


def addresses(text: str, low: str) -> Iterator[Span]:
    """Yield each address below a city.

    Args:
        text: folded.
        low: the same in lower case.
    """
    if has_han(text):
        for match in _WHOLE.finditer(text):
            if _BELOW_CITY.search(match["rest"]):
                yield Span(match.start(), match.end(), "address", "pattern")
        for end in ends_of(text, *_LABELS):
            if (found := _AFTER_LABEL.match(text, end)) and _BELOW_CITY.search(found["v"]):
                yield Span(*found.span("v"), "address", "context")
        for match in _TAIL.finditer(text):
            yield Span(_begin(text, match.start()), match.end(), "address", "pattern")
    if " " in text:
        for match in _STREET.finditer(text):
            yield Span(match.start(), match.end(), "address", "pattern")
        for match in _ZIP.finditer(text):
            if _STATE.search(text, match.start() - 5, match.start()):
                yield Span(match.start(), match.end(), "address", "pattern")
        if " box " in low:
            for match in _BOX.finditer(text):
                yield Span(match.start(), match.end(), "address", "pattern")


def ages(text: str, low: str) -> Iterator[Span]:
    """Yield each age of 90 or above, with its unit if any (HIPAA, 164.514(b)(2)(i)(C))."""
    for form in (_OLD, _OLD_HAN):
        for match in form.finditer(text):
            yield Span(match.start(), match.end(), "age", "pattern")
    for end in ends_of(low, "年龄", "age", "aged"):
        if found := _AGE.match(low, end):
            yield Span(*found.span("v"), "age", "context")


def city_of(address: str) -> str:
    """Return the part of an address down to its city, or nothing."""
    if found := _WHOLE.match(address):
        return found["city"]
    found = _STREET.match(address)
    return (found["city"] or "") if found else ""


def _begin(text: str, at: int) -> int:
    """Return where the name before a road, a house or a village begins, at most eight back."""
    begin = at
    while begin > max(0, at - 8):
        char = text[begin - 1]
        if not (is_han(char) or char.isdigit()) or char in _NOT_IN_NAMES:
            break
        begin -= 1
    return begin
