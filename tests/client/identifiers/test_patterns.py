"""Identifiers that show by form or label, and the numbers beside them that are none."""

import pytest

from huizhen.client.identifiers.patterns import check_character, has_right_checksum, passes_luhn
from huizhen.client.identifiers.text import Finder


def found(text, kind=None):
    return [text[s.start : s.end] for s in Finder().find(text) if kind in (None, s.kind)]


@pytest.mark.parametrize(
    ("text", "kind", "what"),
    [
        ("身份证11010519491231002X。", "id", "11010519491231002X"),  # the standard's own example
        ("号110105 19491231 002X", "id", "110105 19491231 002X"),
        (
            "身份证号１１０１０５１９４９１２３１００２Ｘ",
            "id",
            "１１０１０５１９４９１２３１００２Ｘ",
        ),
        ("老身份证110105491231002", "id", "110105491231002"),
        ("电话13800138000复诊", "phone", "13800138000"),
        ("电话138-0013-8000", "phone", "138-0013-8000"),
        ("打1380013\n8000", "phone", "1380013\n8000"),
        ("电话：010-88886666转123", "phone", "010-88886666转123"),
        ("+852 2345 6789", "phone", "+852 2345 6789"),
        ("138****8000", "phone", "138****8000"),
        ("call (617) 555-0123", "phone", "(617) 555-0123"),
        ("SSN 123-45-6789", "id", "123-45-6789"),
        ("护照E12345678", "id", "E12345678"),
        ("回乡证H1234567890", "id", "H1234567890"),
        ("卡6222021234567890128", "bank", "6222021234567890128"),
        ("a.b@163.com", "email", "a.b@163.com"),
        ("微信：zhang_wei88", "account", "zhang_wei88"),
        ("QQ 12345678", "account", "12345678"),
        ("粤B·D12345", "plate", "粤B·D12345"),
        ("from 192.168.1.20.", "ip", "192.168.1.20"),
        ("见 https://x.org/a?b=1。", "url", "https://x.org/a?b=1"),
        ("住院号ZY20230011", "mrn", "ZY20230011"),
        ("病案号：12 3456", "mrn", "12 3456"),
        ("MRN:00123456", "mrn", "00123456"),
        ("accession no. A-1234", "mrn", "a-1234".upper()),
        ("医保号：1234567890", "insurance", "1234567890"),
        ("邮编100000", "address", "100000"),
        ("他今年98岁", "age", "98岁"),
        ("a 103-year-old woman", "age", "103-year-old"),
        ("年龄：九十三岁", "age", "九十三岁"),
    ],
)
def test_an_identifier_is_found_whole(text, kind, what):
    assert what in found(text, kind)


@pytest.mark.parametrize(
    "text",
    [
        "血压120/80mmHg，P 78次/分",
        "5-10 mg, 2-3 weeks",
        "WBC 12.5×10^9/L，PLT 210×10^9/L",
        "HBV-DNA 1250000000 IU/ml",
        "I25.103，M51.202，E11.9",
        "EGFR L858R，rs1799853，HP:0001250，NCT01234567",
        "见3.2.1.4节",
        "肌力5/6级，1/2片",
        "血钾低于5.6，年龄56岁，89岁",
        "NT 1.2mm，CT值35HU，5.2×4.1×3.8cm",
        "on 2 L, white cell 12000/uL",
        "2023年",
    ],
)
def test_a_measurement_is_no_identifier(text):
    assert found(text) == []


def test_a_wrong_checksum_makes_a_suspect_not_a_free_number():
    [right] = Finder().find("编11010519491231002X")
    [wrong] = Finder().find("编110105194912310021")
    assert (right.source, wrong.source) == ("pattern", "suspect")
    assert right.kind == wrong.kind == "id"


def test_the_standards_own_numbers_check():
    assert check_character("11010519491231002") == "X"
    assert has_right_checksum("440524188001010014")  # GB 11643-1999, the second example
    assert not has_right_checksum("440524188001010015")
    assert passes_luhn("4111111111111111")
    assert not passes_luhn("4111111111111112")
