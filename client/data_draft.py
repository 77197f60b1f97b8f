"""A first ``data.toml`` for an export, for people to mend.

Columns are known by their names, in Chinese and English, and by what their first rows look like.
Nothing is decided that a person must decide: purpose, ground and units stay to be filled in, and a
file that still has them is refused.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from huizhen.client.quality.lab_table import LabTable
from huizhen.client.records.export import parts, rows_of_part
from huizhen.client.records.mapping import is_empty
from huizhen.client.records.record import Unreadable
from huizhen.client.records.terms import RESERVED, SourceTerms
from huizhen.protocol.errors import ConfigError

ROWS = 200
# that are looked at
_LONG = 30
# characters from which most values of a column are text
_ROLES: Mapping[str, tuple[str, ...]] = {
    "patient": (
        "patient_id", "patient", "患者id", "病人id", "患者编号", "病人编号", "住院号",
        "病案号", "登记号", "门诊号", "mrn", "subject_id", "person_id", "unique_pid",
    ),
    "encounter": (
        "encounter", "encounter_id", "visit_id", "visit", "hadm_id", "stay_id", "就诊号",
        "就诊流水号", "住院流水号", "就诊id",
    ),
    "time": (
        "time", "date", "datetime", "re_date", "charttime", "admittime", "入院时间", "入院日期",
        "就诊时间", "就诊日期", "检验时间", "检查时间", "报告时间", "记录时间", "采样时间",
        "时间", "日期",
    ),
    "sex": ("sex", "gender", "性别"),
    "birth": ("birth", "birth_date", "birthdate", "dob", "出生日期", "出生年月", "生日"),
    "death": ("death", "death_date", "dod", "死亡日期", "死亡时间"),
    "age": ("age", "年龄", "age_years"),
}  # fmt: skip
_NAMING: Mapping[str, tuple[str, ...]] = {
    "name": ("name", "patient_name", "姓名", "患者姓名", "病人姓名"),
    "id": ("id_number", "ssn", "身份证", "身份证号", "身份证号码", "证件号", "证件号码"),
    "phone": ("phone", "telephone", "mobile", "电话", "联系电话", "手机", "手机号", "手机号码"),
    "mrn": ("住院号", "门诊号", "病案号", "登记号", "mrn"),
    "insurance": ("医保号", "医保卡号", "社保号", "insurance"),
    "address": ("address", "地址", "住址", "家庭住址", "联系地址", "现住址"),
    "email": ("email", "邮箱", "电子邮箱"),
    "relative": ("联系人", "联系人姓名", "家属姓名", "next_of_kin"),
    "employer": ("employer", "工作单位", "单位"),
    "staff": ("医生", "主治医师", "住院医师", "主管医生", "护士", "doctor", "physician"),
}  # fmt: skip


def draft(path: Path, table: LabTable) -> str:
    """Return the text of a ``data.toml`` for a table.

    Args:
        path: CSV, TSV, JSON lines, Excel or Parquet; its name alone goes into the text.
        table: of labs, by whose names columns are known as results.

    Raises:
        ConfigError: it cannot be read, or holds no row.
    """
    rows = _rows(path)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    roles = {role: _find(columns, names) for role, names in _ROLES.items()}
    naming = {kind: found for kind, names in _NAMING.items() if (found := _all(columns, names))}
    taken = {name for name in roles.values() if name} | {
        n for some in naming.values() for n in some
    }
    left = [name for name in columns if name not in taken]
    labs = [name for name in left if table.find_name(name) is not None]
    texts = [name for name in left if name not in labs and _is_text(row.get(name) for row in rows)]
    rest = [name for name in left if name not in labs and name not in texts]
    lines = [
        "# What this export is. docs/data.md explains every key. Fill in what is empty, then run:",
        "#   huizhen site data check data.toml",
        "", "[data]", f"name = {_quoted(path.stem)}",
        "", "[governance]", 'purpose = ""                    # what the records are used for',
        'basis = "waiver"                # consent, waiver, public or made_up',
        'ethics = ""                     # the reference of the ethics committee',
        'ethics_expires = ""             # its last day, such as "2027-12-31"',
        "", "[[sources]]", f"path = {_quoted(path.name)}",
    ]  # fmt: skip
    patient = roles.pop("patient")
    lines.append(f"patient = {_quoted(patient or '')}" + ("" if patient else "  # which column?"))
    lines += [f"{role} = {_quoted(name)}" for role, name in roles.items() if name]
    if patient and _has_gaps(row.get(patient) for row in rows):
        lines.append(f"fill_down = [{_quoted(patient)}]  # filled on a patient's first row only")
    if texts:
        lines.append(f"text = {_list(texts)}")
    if naming:
        lines += [
            "",
            "[sources.identifiers]         # found in all texts of the patient, and replaced",
        ]
        lines += [f"{kind} = {_list(names)}" for kind, names in naming.items()]
    if labs:
        lines += [
            "",
            "[sources.labs]                # column = its unit, as your laboratory gives it",
        ]
        lines += [f'{_quoted(name)} = ""{_hint(name, table)}' for name in labs]
    lines += ["", "[sources.fields]              # what studies may read, by a name of its own"]
    for name in rest:
        own = f"{name}_column" if name in RESERVED else name
        lines.append(f"{_quoted(own)} = {_quoted(name)}")
    return "\n".join(lines) + "\n"


def _rows(path: Path) -> list[dict[str, Any]]:
    [part] = parts([SourceTerms(path=path.name)], path.parent)
    found = islice(rows_of_part(part), ROWS)
    rows = [row[1] for row in found if not isinstance(row, Unreadable)]
    if not rows:
        raise ConfigError(f"{path.name} holds no row that can be read, expected one at least")
    return rows


def _find(columns: Sequence[str], names: Sequence[str]) -> str | None:
    return next(iter(_all(columns, names)), None)


def _all(columns: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the columns of these names, in the order of the names."""
    plain = {_plain(column): column for column in reversed(columns)}
    return [plain[name] for name in map(_plain, names) if name in plain]


def _plain(name: str) -> str:
    return re.sub(r"[\s_()（）-]", "", name).lower()


def _is_text(values: Iterable[Any]) -> bool:
    filled = [value for value in values if not is_empty(value)]
    return bool(filled) and 2 * sum(
        isinstance(value, str) and len(value) >= _LONG for value in filled
    ) > len(filled)


def _has_gaps(values: Iterable[Any]) -> bool:
    cells = list(values)
    return not is_empty(cells[0]) and any(is_empty(cell) for cell in cells)


def _hint(name: str, table: LabTable) -> str:
    entry = table.find_name(name)
    return "" if entry is None or entry.unit == "1" else f"  # such as {_quoted(entry.unit)}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML 1.0, strings


def _list(names: Sequence[str]) -> str:
    return f"[{', '.join(map(_quoted, names))}]"
