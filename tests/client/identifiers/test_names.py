"""Names by context, and the drugs, herbs and eponyms that are none."""

import pytest

from huizhen.client.identifiers.text import Finder


def found(text, **known):
    spans = Finder(staff=known.pop("staff", ())).find(text, known)
    return [text[s.start : s.end] for s in spans if s.kind == "name"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("患者王建国因腹痛入院", "王建国"),
        ("患者王伟今日出院", "王伟"),
        ("姓名：禤明远 性别：男", "禤明远"),  # no surname of the list
        ("签名：张伟/李敏", "李敏"),
        ("联系人：儿子王强 电话", "王强"),
        ("请李主任会诊", "李"),
        ("经欧阳明月主任医师查房", "欧阳明月"),
        ("其子赵铁柱陪同", "赵铁柱"),
        ("责任护士：陈　静", "陈　静"),
        ("姓名：陳國華 性別", "陳國華"),
        ("王某某，女", "王"),
        ("孙女士诉", "孙"),
        ("姓名：阿依古丽·买买提", "阿依古丽·买买提"),
        ("Dr. Smith saw her", "Smith"),
        ("Mr. Wilson has Wilson disease", "Wilson"),
        ("Patient: John Q. Smith, 56", "John Q. Smith"),
        ("told wife Mary to call", "Mary"),
        ("Sarah O'Neil, MD", "Sarah O'Neil"),
        ("Signed: JOHN SMITH", "JOHN SMITH"),
    ],
)
def test_a_name_is_found_by_what_stands_around_it(text, name):
    assert name in found(text)


@pytest.mark.parametrize(
    "text",
    [
        "制何首乌15g，马勃6g，白及10g，杜仲12g",
        "患者何首乌中毒，杜仲片过敏",
        "患者高热3天，白细胞升高，时有头晕",
        "帕金森病，克罗恩病，唐氏筛查，马凡综合征",
        "由于主任医师不在，上级医师查房",
        "家属要求出院，其妻子诉",
        "Bell palsy, Wilson disease, Crohn and Parkinson disease, Down syndrome",
        "Patient Health Questionnaire. Mother: Breast cancer. Father: Hypertension.",
        "Anti-DREBRIN antibody; Guillain-Barre",
    ],
)
def test_a_drug_or_an_eponym_is_no_name(text):
    assert found(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "王建国",
        "王 建 国",
        "王　建\n国",
        "王**",
        "王某",
        "王*国",
        "Wang Jianguo",
        "WANG, JIAN-GUO",
        "J. Wang",
    ],
)
def test_a_known_name_is_found_in_every_form(text):
    assert found(f"昨天{text}来过", name=("王建国", "Wang Jianguo")) == [text]


def test_a_known_name_is_replaced_even_if_it_is_a_drug():
    assert found("服用杜仲后杜仲好转", name=("杜仲",)) == ["杜仲", "杜仲"]


def test_staff_are_found_without_context():
    text = "今晨李晓梅予以换药，Ann Okafor watched"
    assert found(text, staff=["李晓梅", "Ann Okafor"]) == ["李晓梅", "Ann Okafor"]
    assert found("annokafora", staff=["Ann Okafor"]) == []


def test_parts_of_a_known_address_and_padded_numbers_are_found():
    known = {
        "address": ("北京市朝阳区建国路88号",),
        "mrn": ("00123456",),
        "phone": ("138-0013-8000",),
    }
    spans = Finder().find("建国路88号的住户，编123456，打13800138000", known)
    assert [(s.kind, s.source) for s in spans] == [
        ("address", "known"), ("mrn", "known"), ("phone", "known"),
    ]  # fmt: skip
