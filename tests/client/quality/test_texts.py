"""Texts in the wrong encoding, empty ones, and what every text says."""

import time

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from huizhen.client.quality.problems import Code, Rules
from huizhen.client.quality.texts import Templates, check_text, undo_mojibake
from huizhen.client.records.record import Record

NOTE = (
    "患者因反复咳嗽3天入院，体温38.5℃。查体：双肺呼吸音粗，未闻及啰音。\n"
    "诊断：社区获得性肺炎；2型糖尿病。Glucose 5.6 mmol/L（空腹）·α-羟丁酸±×°µ\n"
)


def note(text, kind="note", **fields):
    return Record("p1", fields, "n.jsonl:3", kind=kind, text=text)


def check(text, rules=None, kind="note"):
    record, problems = check_text(note(text, kind), rules)
    return record.text, [(problem.code, problem.action) for problem in problems]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("鏂囨湰", "文本"),
        ("鎮ｈ€呯敺", "患者男"),  # Windows reads byte 80 as the euro sign
        ("æ–‡æœ¬", "文本"),
        ("æ\x96\x87æ\x9c¬", "文本"),
        ("ÎÄ±¾", "文本"),
        ("»¼ÕßÄÐÐÔ", "患者男性"),
        ("cafÃ© dÃ©jÃ\xa0 vu â€“ naÃ¯ve", "café déjà vu – naïve"),
        ("Temp 38 Â°C", "Temp 38 °C"),
    ],
)
def test_mojibake_is_read_again(wrong, right):
    assert check(wrong) == (right, [(Code.MOJIBAKE, "fix")])
    assert check(wrong, Rules(mojibake="keep"))[0] == wrong


@pytest.mark.parametrize(
    ("wrong", "right"), [("latin-1", "utf-8"), ("latin-1", "gb18030"), ("latin-1", "gbk")]
)
def test_a_whole_note_is_read_again(wrong, right):
    text = NOTE if right != "gbk" else NOTE.replace("µ", "")
    assert undo_mojibake(text.encode(right).decode(wrong)) == text


def test_one_garbled_line_among_good_ones_is_read_again():
    line = "诊断：肺炎"
    garbled = line.encode().decode("latin-1")
    text, problems = check(f"{NOTE}{garbled}\n{NOTE}")
    assert text == f"{NOTE}{line}\n{NOTE}"
    assert problems == [(Code.MOJIBAKE, "fix")]


@pytest.mark.parametrize(
    "text",
    [
        NOTE,
        "患者男性，65岁。",
        "Müller, Ångström, naïve façade, Crohn’s, Sjögren–Larsson, Ménière",
        "ÀÉÎÕÜ",  # five accented letters in a row
        "銀行與醫院：開闊、閱讀、關節、閃電、間質性肺炎",
        "涓涓细流汇成江河，患者张宸、李瑕、王璇琛均已出院，浜北社区随访。",
        "体温：３８．５℃　脉搏：８０次／分",
        "α β γ Δ ≤ ≥ → ± × ÷ µ ° € £ ¥ §",
        "Ã",
        "家属：👨‍👩‍👧 zero-width joiners stay",
    ],
)
def test_what_was_read_rightly_stays(text):
    assert check(text) == (text, [])


@pytest.mark.parametrize(
    "text",
    [
        "血压\ufffd120",
        "锟斤拷锟斤拷",
        "烫烫烫烫",
        "half \ud83d of a pair",
        "鎮ｈ?呯敺鎬э紝鍜冲椊3澶?",  # a byte of each odd run became a question mark
    ],
)
def test_what_is_lost_is_told_and_left(text):
    assert check(text) == (text, [(Code.LOST_CHARACTERS, "quarantine")])


def test_control_characters_are_left_out():
    assert check("a\x00b\u202ec\u200bd\ufeff\te\r\n　f") == (
        "abcd\te\r\n　f",
        [(Code.CONTROL_CHARACTERS, "fix")],
    )
    assert check("a\x00b", Rules(control_characters="keep"))[0] == "a\x00b"


@pytest.mark.parametrize("text", ["", "  \n", "无", "N/A", "null", "见附件"])
def test_a_note_without_text_is_told_and_other_kinds_need_none(text):
    assert check(text) == (text, [(Code.MISSING_TEXT, "keep")])
    assert check(text, kind="labs") == (text, [])


def test_fields_are_mended_too_and_named():
    record, problems = check_text(note(NOTE, chief="ÎÄ±¾", age=7, other="好"))
    assert record.fields == {"chief": "文本", "age": 7, "other": "好"}
    assert [(p.code, p.subject, p.place) for p in problems] == [
        (Code.MOJIBAKE, "chief", "n.jsonl:3")
    ]
    same = note(NOTE, other="好")
    assert check_text(same)[0] is same


@given(st.text(max_size=60))
@example("\x08Â\xa0")
def test_any_text_is_checked(text):
    record, problems = check_text(note(text))
    again, more = check_text(record)
    assert {p.code for p in more} <= {p.code for p in problems} | {Code.MISSING_TEXT}
    assert again.text == record.text or Code.MOJIBAKE in {p.code for p in more}


@given(st.text("患者咳嗽发热入院诊断肺炎治疗好转出院，。0123456789 abc", min_size=4))
@example("000院")
@example("000转")
def test_what_was_read_wrongly_comes_back_as_it_was_or_stays(text):
    for right, wrong in (("utf-8", "latin-1"), ("gbk", "latin-1"), ("utf-8", "gbk")):
        try:
            garbled = text.encode(right).decode(wrong)
        except UnicodeError:
            continue
        assert undo_mojibake(garbled) in (text, garbled)


@pytest.mark.parametrize("piece", ["Ã", "鏂", "锟", "æ–‡", "\x00", "。\n", "Ä"])
def test_a_long_hostile_text_takes_no_long_time(piece):
    begin = time.process_time()
    check(piece * (1_000_000 // len(piece)))
    assert time.process_time() - begin < 5


def template_records(count=200):
    draw = np.random.default_rng(5)
    head = (
        "系统检查：发育正常，营养良好，神志清楚，查体合作。\n"
        "皮肤黏膜无黄染及出血点；浅表淋巴结未触及肿大。\n"
    )
    own = [chr(0x4E00 + n) for n in range(900)]
    for number in range(count):
        text = "".join(draw.choice(own, 60))
        yield note(head + (text if number % 4 else "") + ("\n" + text[:20]) * 3)


def test_lines_that_most_records_have_are_template():
    templates = Templates(share=0.3)
    records = list(template_records())
    for record in records:
        templates.add(record.text)
    assert templates.is_exact
    head = "系统检查：发育正常，营养良好，神志清楚，查体合作。"
    assert templates.ratio(head) == 1
    assert templates.ratio("这一行只有这一份病历里才会有，别处没有") == 0
    assert templates.ratio("") == 0
    assert 0.2 < templates.ratio(records[1].text) < 0.4
    assert templates.check(note(head)) != []
    assert [p.code for p in templates.check(note(head))] == [Code.TEMPLATE_TEXT]
    assert templates.check(records[1]) == []


def test_a_line_counts_once_a_record():
    templates = Templates(share=0.5)
    templates.add("同一行写了很多很多遍\n" * 50)
    for number in range(9):
        templates.add(f"别的病历第{number}份，完全不同的一行")
    assert templates.ratio("同一行写了很多很多遍") == 0


def test_memory_stays_bounded_and_no_template_is_missed():
    templates = Templates(share=0.2, capacity=200)
    for record in template_records(1000):
        templates.add(record.text)
    assert len(templates._counts) <= 200
    assert not templates.is_exact
    assert templates.ratio("皮肤黏膜无黄染及出血点") == 1


@pytest.mark.parametrize(("share", "capacity"), [(0, 10), (1.1, 10), (0.5, 0)])
def test_a_share_or_capacity_that_means_nothing_is_refused(share, capacity):
    with pytest.raises(ValueError, match="0 < share <= 1"):
        Templates(share, capacity)
