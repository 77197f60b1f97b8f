"""Chinese names in context: after 患者, 签名, 其子, before 主任, 医生, 先生.

A word that is shaped like a name is none by itself: something beside it must say that a person
follows. A label with a colon is believed whatever the surname; a word such as 患者 needs a surname
of the list, no word of ``not_names.txt``, and after the name something that may follow one.
Texts are folded (``folding.py``).
"""

import re
from collections.abc import Iterator
from itertools import chain

from huizhen.client.identifiers.finding import Span
from huizhen.client.identifiers.folding import ends_of, is_han, lines_of, words

SURNAMES = frozenset(lines_of("surnames.txt"))
_WORDS = frozenset(lines_of("not_names.txt"))
_LENGTHS = sorted({len(word) for word in _WORDS})
_RARE = frozenset("时应向和全步来化问居满国花原初位官单占计支习连皮管权干容师冷水母包解游项")
# surnames that are as often the beginning of a word: they need a plain end of the name
_NEVER = frozenset("的了在因诉述今昨已曾仍未不无没又也就都及与或等被将把可能会应需要时后前入出"
                   "住院病患诊现目既"
                   "呈示伴感觉查见做予给拟为是于从至到由经即则且但而且若如其此该各每某这那我你他她它们么吗呢吧啊"
                   "疼痛热咳血压糖尿便症炎癌瘤疾药剂片针液肿胀麻")  # fmt: skip
_MAYBE = frozenset("来自为和有行可平然之以能国子现")
_NOT_GIVEN = _NEVER - _MAYBE
_NAMES_END = re.compile(
    r"$|[\s\d，。,.;:!?、()（）\[\]【】<>/|\"'“”；：！？—~-]|[A-Za-z]|先生|女士|医[师生]|主任|主治|住院医|护士|教授|同志|"
    r"老师|大夫|技师|药师|院长|男|女|于|在|因|诉|自|今|昨|明日|现|目前|系|为|是|主诉|来|入|出|转|由|经|已|曾|仍|未|不|无|"
    r"一般|神志|精神|病情|既往|体温|生命|术|诊断|确诊|要求|拒绝|同意|表示|签|陪|送|代|电话|手机|联系|身份|住|年龄|性别|"
    r"的|等|及|与|和|同|对|被|将|可|需|述|称|反映|发现|发生|突|复|随|行|做|予|给|接|到|至|从|有|并|且|以|向|说|问|请|"
    r"告知|知情|交|完成|负责|记录|审核|报告|操作|查房|会诊|评估|协助|家属|患者|本人|照|护送|急|再|又|尿|咳|胸|腹|头|发热|感|"
    r"沟|谈|商|讨|打|汇|邀|陈|补|提|供|否|允|委|取|领|缴|讲|解释|核|执|遵|嘱|值|书|写|录|阅|检|采|抽|姓名|上|下|前|后|近|当|服|饮|睡|食|大便|小便|主|申|病|手|平|晨|夜|凌|每|坚|办|带|口|静|心|血|测|双|左|右|全|其|此|该"
)
_PLAIN_END = re.compile(
    r"$|[\s\d，。,.;:!?、()（）\[\]/|；：-]|先生|女士|医[师生]|主任|护士|男[,，。 ]|女[,，。 ]|因"
)
_RELATIVE = (
    "儿子|女儿|丈夫|妻子|爱人|配偶|母亲|父亲|妈妈|爸爸|哥哥|弟弟|姐姐|妹妹|女婿|儿媳|侄子|侄女|外甥|孙子|孙女|外孙|"
    "祖母|祖父|奶奶|爷爷|姑姑|叔叔|舅舅|老伴|家属|亲属|亲戚|朋友|同事|邻居|父|母|子|女|夫|妻|兄|弟|姐|妹"
)
_GAP = re.compile(
    rf"(?P<skip>(?:[\s(（\"“]|姓名|名叫|叫|名字|签名|签字|本人|{_RELATIVE})*(?P<colon>[:=]|为|是|系|名叫|叫)?"
    rf"[\s(（\"“_]{{0,4}}(?:(?:{_RELATIVE})[\s:,，(（]{{0,2}})?)(?=[一-鿿㐀-䶿])"
)
_STRONG = words("names", "strong")
_WEAK = words("names", "weak")
_TITLE = re.compile(  # each alternative begins with a letter: others would be tried everywhere
    r"副主任(?!委)|主任(?!委)|主治|住院医师|副教授|教授|医[师生](?!院)|大夫|护士|护师|技师|药师|院长|"
    r"先生|女士|小姐|老师|师傅|阿姨|大爷|大妈|大叔|叔叔|奶奶|爷爷|同志|博士|之[母子女父妻夫兄弟姐妹]|"
    r"\((?=患者?之?[长次儿女妻丈父母之哥姐弟妹]|其|系)|某某?|\*\*?|××?|○○?|xx(?![A-Za-z])|XX(?![A-Za-z])"
)
_BEFORE = re.compile(
    r"(?:^|[\s，。,.;:；：、()（）/\[\]“\"和与由请经向嘱及跟邀随同遵按示据]|我[院科]|本[院科]|上级|患者|病人|家属|[省市医]院|科)$"
)


_ADJUNCTS = frozenset(words("names", "before_title"))
_PREPOSITIONS = frozenset(
    [
        "由于",
        "关于",
        "对于",
        "至于",
        "等于",
        "位于",
        "属于",
        "鉴于",
        "在于",
        "基于",
        "处于",
        "出于",
        "便于",
    ]
)


_GIVEN = "".join(lines_of("given.txt"))
_ONE = "".join(sorted(name for name in SURNAMES if len(name) == 1))
_LONG = "|".join(sorted(SURNAMES - set(_ONE)))
_SHAPED = (re.compile(f"[{_ONE}][{_GIVEN}]{{1,2}}"), re.compile(f"(?:{_LONG})[{_GIVEN}]{{1,2}}"))
# apart: an alternative of characters and words would be tried at every position
_EDGE = re.compile(r"[\s，。,.;:；：、()（）/\[\]“\"]$")


def names(text: str) -> Iterator[Span]:
    """Yield the Chinese names that their surroundings show."""
    for end in ends_of(text, *_STRONG):
        if gap := _GAP.match(text, end):
            yield from _list(text, gap.end(), strong=gap["colon"] in (":", "="))
    for end in ends_of(text, "者", "人", "员", "意见"):
        gap = _GAP.match(text, end)
        if gap and (gap["colon"] or "(" in gap["skip"]):
            yield from _list(text, gap.end(), strong=False)
    for end in ends_of(text, *_WEAK):
        if stop := _read(text, end, strong=False):
            yield Span(end, stop, "name", "context")
    for end in ends_of(text, ":", ": ", "("):
        if (stop := _read(text, end, strong=False)) and _PLAIN_END.match(text, stop):
            yield Span(end, stop, "name", "context")
    for match in _TITLE.finditer(text):
        yield from _before(text, match)
    yield from _by_shape(text)


def _by_shape(text: str) -> Iterator[Span]:
    """Yield what consists of the characters that names have, between plain edges.

    With a given name of two such characters, one edge may be a word; with one, none.
    """
    for match in chain.from_iterable(form.finditer(text) for form in _SHAPED):
        at, end = match.span()
        size = surname_at(text, at)
        has_edge = at == 0 or _EDGE.match(text, at - 1)
        if end - at - size == 1:
            if not (has_edge and _PLAIN_END.match(text, end)) or text[at] in _RARE:
                continue
        elif not _NAMES_END.match(text, end) or (text[at] in _RARE and not has_edge):
            continue
        if not is_word(text, at) and not (at and is_word(text, at - 1)):
            yield Span(at, end, "name", "context")


def _list(text: str, at: int, *, strong: bool) -> Iterator[Span]:
    """Yield the names of a list such as 签名：张伟/李敏."""
    while stop := _read(text, at, strong=strong):
        yield Span(at, stop, "name", "context")
        at = stop + 1
        strong = strong and text[stop : stop + 1] in ("/", "、")
        if text[stop : stop + 1] not in ("/", "、", ",", " ") or not text[at : at + 1]:
            return
        if not is_han(text[at]) or surname_at(text, at) == 0:
            return


def surname_at(text: str, at: int) -> int:
    """Return the length of the surname that begins there, 0 if none does."""
    two = text[at : at + 2]
    if len(two) == 2 and two in SURNAMES:
        return 2
    return int(text[at : at + 1] in SURNAMES)


def is_word(text: str, at: int) -> bool:
    """Tell whether a word that is no name begins there."""
    return any(text[at : at + length] in _WORDS for length in _LENGTHS)


def _read(text: str, at: int, *, strong: bool) -> int:
    """Return where the name that begins there ends, 0 if none does."""
    size = surname_at(text, at)
    if dotted := _DOTTED.match(text, at):
        return dotted.end()
    if not size:
        return _unlisted(text, at) if strong else 0
    given = at + size
    if not strong and is_word(text, at):
        return 0
    if strong and text[given : given + 1] == " " and text[given + 1 : given + 2]:
        one = given + 1
        if is_han(text[one]) and _PLAIN_END.match(text, one + 1):
            return one + 1
    ends_well = _PLAIN_END if not strong and text[at] in _RARE and size == 1 else _NAMES_END
    best = longest = 0
    for stop in (given + 1, given + 2):
        letters = text[given:stop]
        if len(letters) < stop - given or not all(map(is_han, letters)):
            break
        if not _NOT_GIVEN.isdisjoint(letters) and not (strong and ends_well.match(text, stop)):
            break
        longest = stop
        if ends_well.match(text, stop):
            best = stop  # the longer one, if both may be: it covers the other
    if best or not strong:
        return best
    return longest or _unlisted(text, at)


_DOTTED = re.compile(r"[一-鿿]{2,6}·[一-鿿]{1,4}(?:古丽|拉提|买提|[一-鿿]{0,2}(?![一-鿿]))?")
_ANY = re.compile(r"[一-鿿㐀-䶿]{2,4}(?![一-鿿㐀-䶿])")
_NO_PERSON = re.compile(
    r"[一-鿿]{0,3}(?:无|不详|未|同上|见|如|已|待|请|术|诊断|检查|时间|日期|科|院|室|房|医|护|患|病|主任|电话|本人|自己|良好|清|稳|平|知情|行|嘱)"
)


def _unlisted(text: str, at: int) -> int:
    """Return where a name ends that a label announces and whose surname is not in the list."""
    found = _ANY.match(text, at)
    if not found or _NO_PERSON.match(found[0]) or is_word(text, at):
        return 0
    return found.end()


def _before(text: str, title: re.Match[str]) -> Iterator[Span]:
    """Yield the name before a title, which may be a surname alone."""
    end = title.start()
    end -= text[end - 1 : end] == " " and title[0] not in ("某", "某某")
    begins = re.search(r"[一-鿿㐀-䶿]{1,4}$", text[max(0, end - 4) : end])
    if not begins:
        return
    for length in range(len(begins[0]), 0, -1):
        at = end - length
        size = surname_at(text, at)
        if not size or length - size > 2 or is_word(text, at):
            continue
        given = text[at + size : end]
        alone = not given
        if text[end - 2 : end] in _ADJUNCTS:
            return
        if given and (not _NOT_GIVEN.isdisjoint(given) or _TITLE.match(text, at + size)):
            continue
        before = _BEFORE.search(text, max(0, at - 4), at)
        if alone and text[at - 1 : end] in _PREPOSITIONS:
            continue
        if (alone or text[at] in _RARE) and not before:
            continue
        if (
            length == 4 - (size == 1)
            or before
            or not any(surname_at(text, later) for later in range(at + 1, end))
        ):
            yield Span(at, end, "name", "context")
            return
