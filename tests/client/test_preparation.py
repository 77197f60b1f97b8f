"""From an export to what training may use: nothing dropped in silence, nobody named."""

import csv
import json
import tomllib
from datetime import date

import pytest

from huizhen.client.data_key import DataKey, Pseudonyms
from huizhen.client.data_terms import parse_data
from huizhen.client.gate import Reason
from huizhen.client.preparation import Preparation
from huizhen.client.quality.lab_table import shipped_table
from huizhen.client.quality.problems import Code, Problem
from huizhen.client.records.record import Unreadable
from huizhen.client.snapshot import Snapshots, read_parquet
from huizhen.protocol.errors import ConfigError, GovernanceError

KEY = DataKey(bytes(range(32)))
TODAY = date(2026, 6, 1)
TEXT = """
[data]
name = "test"
[governance]
purpose = "a test"
basis = "waiver"
ethics = "2024-017"
ethics_expires = "2026-06-01"
minimum_patients = 2
[split]
held_out = 0.25
label = "诊断"
[[sources]]
path = "notes.csv"
kind = "note"
patient = "住院号"
encounter = "就诊号"
time = "时间"
sex = "性别"
birth = "出生"
text = ["病程"]
[sources.identifiers]
name = "姓名"
phone = "电话"
[sources.labs]
"葡萄糖" = "mg/dL"
[sources.fields]
"诊断" = "诊断"
"""
COMPLAINTS = (
    "咳嗽咳痰三天伴低热,听诊双肺呼吸音粗",
    "右下腹持续疼痛半日,麦氏点压痛阳性",
    "头晕视物旋转两小时,伴恶心呕吐一次",
    "双下肢水肿一月,晨轻暮重,尿中有泡沫",
    "反复胸闷气短两年,活动后加重,夜间不能平卧",
    "左侧肢体无力六小时,言语含糊,口角歪斜",
    "血糖升高十年,近来口渴多饮,体重下降",
    "膝关节肿痛一周,活动受限,局部皮温升高",
)


def row(number, **values):
    return {
        "住院号": f"Z{number:05d}", "就诊号": f"V{number}", "时间": "2023-05-06", "性别": "男",
        "出生": "1960-01-02", "姓名": "王建国", "电话": f"138{number:08d}",
        "病程": f"患者王建国,电话138{number:08d},{COMPLAINTS[number % 8]}。",
        "葡萄糖": "100", "诊断": "A" if number % 2 else "B", **values,
    }  # fmt: skip


def write(folder, rows):
    with (folder / "notes.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(row(0)))
        writer.writeheader()
        writer.writerows(rows)


def prepare(folder, rows, *, change="", today=TODAY, before=None, key=KEY):
    """Return the preparation, what was noted, and the clean records."""
    write(folder, rows)
    noted: list[object] = []
    preparation = Preparation(
        parse_data(tomllib.loads(TEXT + change), "data.toml"),
        folder, key=key, today=today, table=shipped_table(), before=before, note=noted.append,
    )  # fmt: skip
    preparation.look()
    return preparation, noted, list(preparation.records())


def people(count):
    return [row(number) for number in range(count)]


def test_a_record_comes_out_without_names_and_with_its_results(tmp_path):
    preparation, noted, clean = prepare(tmp_path, people(8))
    whole = repr([json.dumps(one.row(), ensure_ascii=False) for one in clean])
    for word in ("王建国", "13800000", "Z0000", "V1", "1960-01-02", "2023-05-06"):
        assert word not in whole
    first = clean[0]
    assert COMPLAINTS[0] in first.text
    assert first.patient == Pseudonyms(KEY).patient("Z00000")
    assert (first.sex, first.age, first.kind, first.place) == ("male", 63.3, "note", "1:2")
    assert first.fields == {"诊断": "B"}
    [lab] = first.labs
    assert (lab.code, lab.unit) == ("glucose", "mmol/L")
    assert lab.value == pytest.approx(100 / 18.016, rel=1e-3)
    assert preparation.counts["records"] == 8
    assert preparation.replaced["name"] == 8
    assert preparation.replaced["phone"] == 8
    assert {one.code for one in noted} == {Code.CONVERTED_UNIT}  # each change is told


def test_dq_2_the_same_export_gives_the_same_snapshot(tmp_path):
    _, _, first = prepare(tmp_path, people(8))
    _, _, again = prepare(tmp_path, people(8))
    snapshots = Snapshots(tmp_path / "s", KEY.derived("seal"), cohort="all")
    digest = snapshots.write(first, {}).digest
    assert snapshots.write(again, {}).digest == digest
    assert list(read_parquet(snapshots.parquet())) == first
    _, _, other = prepare(tmp_path, people(8), key=DataKey(bytes(32)))
    assert not {one.patient for one in other} & {one.patient for one in first}


def test_dq_3_a_patient_is_on_one_side_and_stays_there(tmp_path):
    twice = [{**one, "病程": f"{one['病程']}第{i}次"} for one in people(8) for i in (1, 2)]
    preparation, _, clean = prepare(tmp_path, twice)
    sides: dict[str, bool] = {}
    for one in clean:
        assert sides.setdefault(one.patient, one.is_held_out) == one.is_held_out
    assert sum(sides.values()) == 2  # one of each class
    labels = {one.fields["诊断"] for one in clean if one.is_held_out}
    assert labels == {"A", "B"}
    _, _, more = prepare(tmp_path, people(16), before=preparation.sides)
    for one in more:
        assert sides.get(one.patient, one.is_held_out) == one.is_held_out


def test_a_patient_who_has_withdrawn_is_left_out_by_number_or_pseudonym(tmp_path):
    pseudonym = Pseudonyms(KEY).patient("Z00002")
    (tmp_path / "gone.txt").write_text(f"# since May\nZ00001\n{pseudonym}\n\n")
    text = TEXT.replace('purpose = "a test"', 'purpose = "a test"\nexcluded = "gone.txt"')
    write(tmp_path, people(8))
    noted: list[object] = []
    preparation = Preparation(
        parse_data(tomllib.loads(text), "data.toml"), tmp_path,
        key=KEY, today=TODAY, table=shipped_table(), note=noted.append,
    )  # fmt: skip
    preparation.look()
    clean = list(preparation.records())
    assert [one.place for one in clean] == [
        "1:2",
        *(f"1:{n}" for n in range(5, 10)),
    ]
    assert (Reason.WITHDRAWN, "notes.csv:3") in noted
    assert (Reason.WITHDRAWN, "notes.csv:4") in noted


@pytest.mark.parametrize(
    "text",
    [
        "测序: " + "ACGTTGCA" * 12,
        "##fileformat=VCFv4.2\n#CHROM\tPOS\tID",
        "chr1\t12345\trs123\tA\tG\t50",
        "基因型 " + ", ".join(f"rs{i} AG" for i in range(10_000, 10_025)),
        "; ".join(f"NC_000001.11:g.{i}A>G" for i in range(12_000, 12_025)),
        "ORIGIN 1 " + " ".join(["acgtacgtac"] * 6) + " 61 ",
    ],
)
def test_text_of_a_genome_is_left_out(tmp_path, text):
    _, noted, clean = prepare(tmp_path, [*people(8), row(9, 病程=text)])
    assert len(clean) == 8
    [(reason, place)] = [one for one in noted if isinstance(one, tuple)]
    assert (reason, place.partition(":")[0]) == (Reason.GENOMIC, "notes.csv")


def test_genes_and_single_variants_are_not_text_of_a_genome(tmp_path):
    text = "BRCA1 c.68_69delAG,rs80357914 杂合;引物 ACGTTGCAAGCTTGCA"
    _, _, clean = prepare(tmp_path, [*people(8), row(9, 病程=text)])
    assert len(clean) == 9


def test_what_is_wrong_is_mended_set_apart_or_left_out_and_always_told(tmp_path):
    rows = [
        *people(8),
        row(3),  # word for word again
        row(9, 出生="2024-01-01"),  # after the event
        row(10, 葡萄糖="-5"),
        row(11, 病程="鎮ｈ€呭挸鍡戒笁澶╋紝浼翠綆鐑�"),
        row(12, 时间="2031-01-01"),
        row(13, 性别="?"),
        row(14), row(14, 就诊号="V15", 性别="女"),
    ]  # fmt: skip
    nobody = {Pseudonyms(KEY).patient(one["住院号"]): False for one in rows}  # is held out
    preparation, noted, clean = prepare(tmp_path, rows, before=nobody)
    told = (Code.CONVERTED_UNIT, Code.NEAR_ACROSS_PATIENTS, Code.NEAR_DUPLICATE)
    codes = {
        one.place: (one.code, one.action)
        for one in noted
        if isinstance(one, Problem) and one.code not in told
    }
    assert codes["notes.csv:10"] == (Code.EXACT_DUPLICATE, "fix")
    assert codes["notes.csv:11"] == (Code.BEFORE_BIRTH, "quarantine")
    assert codes["notes.csv:12"] == (Code.IMPOSSIBLE_VALUE, "fix")
    assert codes["notes.csv:13"] == (Code.LOST_CHARACTERS, "quarantine")
    assert codes["notes.csv:14"] == (Code.IN_FUTURE, "quarantine")
    assert codes["notes.csv:17"][0] == Code.TWO_SEXES
    assert (Reason.DOUBTFUL, "notes.csv:16") in noted  # the other record of that patient
    [unreadable] = [one for one in noted if isinstance(one, Unreadable)]
    assert unreadable.place == "notes.csv:15"
    kept = {int(one.place.partition(":")[2]) for one in clean}
    assert kept == {*range(2, 10), 12}  # of the patient with two sexes nothing
    counts = preparation.counts
    assert counts["records"] == 9
    assert (counts["left out"], counts["set apart"], counts["unreadable"]) == (1, 5, 1)
    assert sum(counts[name] for name in ("records", "left out", "set apart", "unreadable")) == 16


def test_a_rule_may_refuse(tmp_path):
    change = '\n[quality]\nunreadable = "refuse"\n'
    with pytest.raises(GovernanceError, match=r"^notes\.csv:3: record has unreadable"):
        prepare(tmp_path, [row(1), row(2, 性别="?")], change=change)


def test_a_held_out_record_like_one_to_train_on_is_set_apart(tmp_path):
    """Two patients, one note: measured on would be what was learned by heart."""
    rows = people(8)
    before = {Pseudonyms(KEY).patient(f"Z{i:05d}"): i in (0, 1) for i in range(8)}
    rows[5]["病程"] = rows[0]["病程"]
    preparation, noted, clean = prepare(tmp_path, rows, before=before)
    assert (Reason.LIKE_TRAINING, "notes.csv:2") in noted
    assert preparation.counts["set apart"] == 1
    assert [one.place for one in clean if one.is_held_out] == ["1:3"]


def test_too_few_patients_and_an_ended_reference_are_refused(tmp_path):
    with pytest.raises(GovernanceError, match="1 patients are left to train on"):
        prepare(tmp_path, people(1))
    with pytest.raises(
        GovernanceError, match="'2024-017' ended on 2026-06-01, today is 2026-06-02"
    ):
        prepare(tmp_path, people(8), today=date(2026, 6, 2))


def test_an_export_that_changes_between_the_passes_is_refused(tmp_path):
    preparation, _, _ = prepare(tmp_path, people(8))
    for rows in ([*people(7), row(7, 病程="另一回事")], people(7), people(9)):
        write(tmp_path, rows)
        with pytest.raises(GovernanceError, match="was changed while it was read"):
            list(preparation.records())


def test_what_changes_between_the_passes_is_seen_in_any_column(tmp_path):
    for column in ("姓名", "性别", "诊断", "葡萄糖", "就诊号", "出生", "住院号"):
        preparation, _, _ = prepare(tmp_path, people(8))
        changed = people(8)
        changed[4][column] = {"性别": "女", "出生": "1961-01-01"}.get(column, "Z00099")
        write(tmp_path, changed)
        with pytest.raises(GovernanceError, match="was changed while it was read"):
            list(preparation.records())


def test_a_second_go_over_the_records_counts_them_once(tmp_path):
    preparation, _, clean = prepare(tmp_path, [*people(8), row(3)])
    before = dict(preparation.counts)
    assert list(preparation.records()) == clean
    assert dict(preparation.counts) == before


def test_the_numbers_of_patient_and_stay_are_found_in_texts(tmp_path):
    rows = [row(i, 病程=f"{COMPLAINTS[i]},标本Z{i:05d}已归档,单号V88{i}21。") for i in range(8)]
    for i, one in enumerate(rows):
        one["就诊号"] = f"V88{i}21"
    _, _, clean = prepare(tmp_path, rows)
    assert not [one for one in clean if "Z0000" in one.text or "V88" in one.text]


def test_a_file_s_name_is_told_to_the_hospital_alone(tmp_path):
    name = "王建国_110101196503071234.csv"
    write(tmp_path, people(8))
    (tmp_path / "notes.csv").rename(tmp_path / name)
    data = parse_data(tomllib.loads(TEXT.replace("notes.csv", "*.csv")), "data.toml")
    preparation = Preparation(data, tmp_path, key=KEY, today=TODAY, table=shipped_table())
    preparation.look()
    clean = list(preparation.records())
    assert [one.place for one in clean] == [f"1:{number}" for number in range(2, 10)]


def test_patients_who_are_lost_in_the_second_pass_do_not_count(tmp_path):
    lost = [row(i, 病程=f"{i}\ufffd\ufffd{COMPLAINTS[i % 8]}") for i in range(2, 20)]
    with pytest.raises(GovernanceError, match="1 patients are left to train on"):
        prepare(tmp_path, [row(0), *lost], before={Pseudonyms(KEY).patient("Z00000"): False})


def test_a_label_that_no_record_has_is_refused(tmp_path):
    write(tmp_path, people(8))
    data = parse_data(tomllib.loads(TEXT.replace('label = "诊断"', 'label = "结局"')), "data.toml")
    preparation = Preparation(data, tmp_path, key=KEY, today=TODAY, table=shipped_table())
    with pytest.raises(ConfigError, match="label is '结局', no record has that field"):
        preparation.look()


def test_names_of_staff_are_replaced(tmp_path):
    (tmp_path / "staff.txt").write_text("慕容晓晓\n", "utf-8")
    rows = [row(i, 病程=f"{COMPLAINTS[i]},慕容晓晓已阅") for i in range(8)]
    change = '\n[identifiers]\nstaff = "staff.txt"\nstyle = "tag"\n'
    _, _, clean = prepare(tmp_path, rows, change=change)
    assert all("慕容" not in one.text and "[姓名]" in one.text for one in clean)
    (tmp_path / "staff.txt").unlink()
    with pytest.raises(ConfigError, match=r"cannot read 'staff\.txt'"):
        prepare(tmp_path, rows, change=change)
