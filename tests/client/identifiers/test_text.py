"""The engine: nothing known is left, the same gives the same, no input stops it."""

import json
import time
from datetime import date, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from huizhen.client.identifiers.finding import KINDS, Span, merged
from huizhen.client.identifiers.folding import fold, lowered, squeezed
from huizhen.client.identifiers.patterns import has_right_checksum
from huizhen.client.identifiers.surrogates import tag
from huizhen.client.identifiers.text import Deidentifier, Finder
from huizhen.protocol.errors import ConfigError

KEY = b"a key of thirty-two bytes, no less"
NOTE = (
    "患者王建国，身份证11010519491231002X，电话13800138000，住院号00123456，2023年5月6日入院，"
    "5月9日出院，年龄93岁，住址北京市朝阳区建国路88号。王先生服何首乌10g。"
)
KNOWN = {"name": ("王建国",), "phone": ("13800138000",), "mrn": ("00123456",)}

alphabet = st.one_of(
    st.sampled_from(
        "患者王建国先生主任医师签名：，。0123456789Xx-*/. \n年月日岁号路区市省ABDrMs:@"
    ),
    st.characters(),
)
texts = st.text(alphabet, max_size=200)
numbers = st.text("0123456789", min_size=6, max_size=18)
han_names = st.builds(
    "".join, st.tuples(st.sampled_from("王李赵禤亓"), st.text("伟芳明远", min_size=1, max_size=2))
)


def test_each_kind_is_replaced_by_its_like():
    clean = Deidentifier(KEY).clean(NOTE, "7", KNOWN)
    for secret in (
        "王",
        "建国",
        "11010519491231002X",
        "13800138000",
        "00123456",
        "5月6日",
        "93岁",
        "朝阳",
    ):
        assert secret not in clean.text
    assert "北京市" in clean.text
    assert "90岁以上" in clean.text
    assert "何首乌10g" in clean.text
    assert clean.counts == {
        "name": 2,
        "id": 1,
        "phone": 1,
        "mrn": 1,
        "date": 2,
        "age": 1,
        "address": 1,
    }


def test_no_surrogate_is_a_real_persons():
    text = Deidentifier(KEY).clean("身份证11010519491231002X，电话13800138000", "7").text
    number, phone = text.split("身份证")[1][:18], text.split("电话")[1]
    assert number.startswith("99")
    assert not has_right_checksum(number)
    assert phone.startswith("11")
    assert len(phone) == 11


def test_a_patients_surrogates_are_the_same_in_all_records_and_of_another_differ():
    engine = Deidentifier(KEY)
    one, other = (engine.clean("姓名：王建国 电话13800138000", p).text for p in ("7", "8"))
    assert one == engine.clean("姓名：王建国 电话138 0013 8000", "7").text
    assert one != other
    assert one != Deidentifier(KEY[::-1]).clean("姓名：王建国 电话13800138000", "7").text
    surname = one.split("：")[1][0]
    assert engine.clean("王先生诉", "7").text == f"{surname}先生诉"


def test_intervals_between_dates_of_a_text_stay():
    clean = Deidentifier(KEY).clean("2023-05-06入院，2023-05-09出院", "7").text
    first, second = date.fromisoformat(clean[:10]), date.fromisoformat(clean[13:23])
    assert second - first == timedelta(days=3)
    assert first != date(2023, 5, 6)


def test_a_kind_may_be_tagged_or_kept():
    engine = Deidentifier(KEY, actions={"phone": "tag", "date": "keep"})
    clean = engine.clean("电话13800138000，2023年5月6日", "7")
    assert clean.text == "电话[电话]，2023年5月6日"
    assert engine.clean("call 617-555-0123", "7").text == "call [phone]"
    for kind in KINDS:
        assert tag(kind, in_chinese=True) != tag(kind, in_chinese=False)


def test_a_wrong_key_or_action_is_refused():
    with pytest.raises(ConfigError, match="key for surrogates has 5 bytes"):
        Deidentifier(b"short")
    with pytest.raises(ConfigError, match="action of 'phone' is 'blank'"):
        Deidentifier(KEY, actions=json.loads('{"phone": "blank"}'))


def test_what_comes_back_shows_nothing_in_its_repr():
    assert "患者" not in repr(Deidentifier(KEY).clean(NOTE, "7", KNOWN))


def test_a_hospitals_own_model_is_asked_too():
    class Always:
        def spans(self, text):
            return [
                Span(0, 2, "name", "model"),
                Span(5, 99, "name", "model"),
                Span(-1, 1, "id", "model"),
            ]

    spans = Finder(model=Always()).find("甲乙丙丁")
    assert spans == (Span(0, 2, "name", "model"),)


@given(texts, texts)
def test_any_text_gives_disjoint_spans_in_order_and_no_error(text, name):
    spans = Finder(staff=[name]).find(text, {"name": (name,), "other": (name,)})
    assert all(0 <= s.start < s.end <= len(text) for s in spans)
    assert all(a.end <= b.start for a, b in pairwise(spans))
    engine = Deidentifier(KEY)
    assert engine.clean(text, "7", {"name": (name,)}) == engine.clean(text, "7", {"name": (name,)})


@given(st.text("ab，。甲乙 ", max_size=30), han_names, numbers, st.text("ab，。甲乙 ", max_size=30))
def test_a_planted_identifier_is_never_left(before, name, number, after):
    text = f"{before}{name}{after}、{number}{before}"
    clean = Deidentifier(KEY).clean(text, "7", {"name": (name,), "mrn": (number,)}).text
    assert name not in clean
    assert number not in clean


@given(texts)
def test_folding_keeps_every_position(text):
    assert len(fold(text)) == len(text) == len(lowered(text))
    assert squeezed(text) == "".join(c for c in text if squeezed(c))


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9), st.sampled_from(KINDS)), max_size=12)
)
def test_merging_loses_no_character(some):
    spans = [Span(start, start + length, kind, "pattern") for start, length, kind in some]
    one = merged(spans)
    assert {i for s in spans for i in range(s.start, s.end)} == {
        i for s in one for i in range(s.start, s.end)
    }
    assert merged(one) == one
    assert sum(s.end - s.start for s in one) == len({i for s in one for i in range(s.start, s.end)})


def test_the_longest_of_overlapping_spans_names_the_whole():
    spans = [Span(0, 4, "mrn", "context"), Span(2, 9, "id", "pattern"), Span(2, 9, "mrn", "known")]
    assert merged(spans) == (Span(0, 9, "mrn", "known"),)


HOSTILE = {
    "digits": "1" * 10**6,
    "spaced digits": "1 " * 500_000,
    "dashes": "1-" * 500_000,
    "dots": "1." * 500_000,
    "areas": "省市区" * 110_000,
    "city": "北京市" + "甲" * 350_000,
    "road": "路1" * 500_000,
    "doors": "1栋" * 250_000,
    "letters": "a" * 10**6 + "@",
    "at": "a@" * 500_000,
    "capitals": "Aa " * 300_000,
    "titles": "Dr. " * 250_000,
    "labels": "姓名：" * 110_000,
    "surnames": "王" * 350_000,
    "blanks": " " * 10**6,
    "brackets": "(" * 10**6,
    "mrn": "mrn" * 300_000,
    "dea": "dea" * 300_000,
    "stars": "1*" * 500_000,
    "years": "2023年" * 150_000,
    "months": "月" * 350_000,
    "underscores": "姓名" + "_" * 10**6,
    "relatives": "姓名" + "父母" * 150_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_megabyte_takes_seconds(text):
    begin = time.process_time()
    Finder(staff=["王伟"]).find(text, KNOWN)
    assert time.process_time() - begin < 12


@pytest.mark.parametrize(
    ("identifiers", "text"),
    [
        ({"employer": ("无",)}, "无发热,无咳嗽,无药物过敏史"),
        ({"employer": ("退休",), "address": ("不详",)}, "退休工人,发病时间不详"),
        ({"relative": ("母亲", "本人")}, "患者母亲有高血压,由本人签字"),
        ({"name": ("未知",), "other": ("none",)}, "病因未知 with none of these"),
    ],
)
def test_what_stands_for_nobody_is_not_looked_for(identifiers, text):
    assert Deidentifier(KEY).clean(text, "7", identifiers).text == text


def test_names_of_staff_in_a_column_are_known():
    text = "以上情况已与李晓梅、王芳沟通"
    cleaned = Deidentifier(KEY).clean(text, "7", {"staff": ("李晓梅",), "other": ("王芳",)}).text
    assert "李晓梅" not in cleaned
    assert "王芳" not in cleaned


def test_an_address_of_mail_takes_nothing_before_it_along():
    text = "既往胆囊切除,请发送至wangjg@163.com"
    assert Deidentifier(KEY).clean(text, "7").text.startswith("既往胆囊切除,请发送至")
