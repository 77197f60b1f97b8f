"""What a hospital's data are, for people and for a release: one page, one statement.

The statement is JSON that a release may cite; the page shows the same, in Chinese and in English,
in one file that asks nothing of any other host. Neither holds a count of fewer than
``smallest_cell`` patients or records, a share of so few, or a value of anybody (DQ-4).
"""

from collections import Counter
from collections.abc import Mapping
from datetime import date
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from huizhen.client.data_desk import Outcome
from huizhen.client.data_profile import MAX_PATIENTS, Profile, suppressed
from huizhen.client.data_terms import Data
from huizhen.client.identifiers.finding import Kind
from huizhen.client.identifiers.recall import Measured, Share

SCHEMA = 1
_ENOUGH_FOR_QUANTILES = 5
# times the smallest cell, in patients; and rounded: the 5th percentile of so many is nobody's
_FATES = (
    "records", "unreadable", "withdrawn", "genomic", "set apart", "left out",
)  # fmt: skip


def statement(data: Data, outcome: Outcome, today: date) -> dict[str, Any]:
    """Return the dataset statement, as JSON has it.

    Args:
        data: the terms.
        outcome: what came of the export.
        today: when it was made.
    """
    made, profile, least = outcome.preparation, outcome.preparation.profile, _least(data)
    terms, manifest = data.governance, outcome.manifest
    counts, problems = _split(made.counts)
    return {
        "schema": SCHEMA,
        "name": data.data.name,
        "description": data.data.description,
        "purpose": terms.purpose,
        "basis": terms.basis,
        "ethics": terms.ethics,
        "ethics_expires": terms.ethics_expires,
        "made": today.isoformat(),
        "snapshot": None if manifest is None else manifest.digest,
        "made_by": None if manifest is None else dict(manifest.made_by),
        "smallest_cell": least,
        "records": _shown(profile.records, least),
        "patients": _shown(profile.patients, least),
        "held_out_patients": _shown(profile.held_out, least),
        "sources": _sources(outcome),
        "fates": _cells(counts, least),
        "problems": _cells(problems, least),
        "identifiers": data.identifiers.method,
        "replaced": _cells(made.replaced, least),
        "recall": _recall(outcome.measured),
        "tables": {
            name: [{"name": cell.name, "count": cell.count} for cell in cells]
            for name, cells in profile.tables().items()
        },
        "missing": {
            name: _share(share, profile.records, least) for name, share in profile.missing().items()
        },
        "labs": _labs(profile, least),
    }


def page(document: Mapping[str, Any]) -> str:
    """Return a statement as one HTML page."""
    environment = Environment(
        loader=PackageLoader("huizhen.client"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("data_report.html.j2").render(
        it=document, words=_WORDS, largest=_largest
    )


def _sources(outcome: Outcome) -> list[dict[str, Any]]:
    """Return one line for each format and encoding; a file's name may be a patient's."""
    made = outcome.preparation
    files = Counter((part.format, made.encodings.get(part.name, "")) for part in made.parts)
    return [
        {"format": name, "encoding": encoding or None, "parts": count}
        for (name, encoding), count in files.items()
    ]


def _least(data: Data) -> int:
    return data.governance.smallest_cell


def _shown(count: int, least: int) -> int | None:
    return None if 0 < count < least else count


def _share(share: float, of: int, least: int) -> float | None:
    """Return a share of records, None where it or what is left is of too few."""
    count = round(share * of)
    if 0 < count < least or 0 < of - count < least:
        return None
    return round(share, 3)


def _split(counts: Counter[str]) -> tuple[Counter[str], Counter[str]]:
    """Return what became of entries, and the problems with what was done about them."""
    fates = Counter({name: counts[name] for name in _FATES})
    problems = Counter({name: n for name, n in sorted(counts.items()) if name not in fates})
    return fates, problems


def _cells(counts: Mapping[str, int], least: int) -> list[dict[str, Any]]:
    return [{"name": cell.name, "count": cell.count} for cell in suppressed(counts, least)]


def _recall(measured: Measured | None) -> dict[str, Any] | None:
    """Return what the gate measured; on made-up notes, so nothing is suppressed."""
    if measured is None:
        return None

    def shares(found: Mapping[Kind, Share]) -> list[dict[str, Any]]:
        return [
            {"name": kind, "hits": share.hits, "of": share.of, "interval": share.interval()}
            for kind, share in sorted(found.items())
        ]

    return {
        "familiar": shares(measured.recall),
        "unfamiliar": shares(measured.held_out),
        "precision": measured.precision.interval(),
        "untouched": measured.untouched.interval(),
    }


def _labs(profile: Profile, least: int) -> list[dict[str, Any]]:
    found = []
    for name, lab in sorted(profile.labs.items()):
        is_enough = len(lab.patients) >= min(_ENOUGH_FOR_QUANTILES * least, MAX_PATIENTS)
        quantiles = [float(f"{one:.3g}") for one in lab.quantiles()] if is_enough else [None] * 3
        low, middle, high = quantiles
        found.append(
            {
                "name": name, "unit": lab.unit, "count": _shown(lab.count, least),
                "low": low, "middle": middle, "high": high,
            }
        )  # fmt: skip
    return found


def _largest(cells: list[Mapping[str, Any]]) -> int:
    return max((cell["count"] or 0 for cell in cells), default=0) or 1


_WORDS: Mapping[str, str] = {
    "records": "可用记录", "unreadable": "无法读取", "withdrawn": "患者已退出",
    "genomic": "基因组文本",
    "set apart": "隔离待查", "left out": "剔除", "kind": "记录类型", "year": "年份",
    "length of text": "文本长度（字符）", "language": "语言", "sex": "性别", "age": "年龄",
    "records of a patient": "每名患者的记录数", "class, training": "类别（训练）",
    "class, held out": "类别（留出）", "name": "姓名", "id": "证件号", "phone": "电话",
    "mrn": "病历号等编号", "insurance": "医保号", "bank": "银行卡", "email": "邮箱",
    "account": "社交账号", "plate": "车牌", "ip": "网络地址", "url": "网址", "date": "日期",
    "address": "地址", "employer": "单位", "female": "女", "male": "男", "other": "其他",
    "(few)": "少数",
}  # fmt: skip
