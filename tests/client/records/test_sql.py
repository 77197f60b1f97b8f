"""Rows of a database are streamed and never written, and no failure shows a row or a password."""

import contextlib
import os
import pwd
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from huizhen.client.records.omop import read_omop
from huizhen.client.records.record import MAX_ENTRY_BYTES, Lab, Record, Unreadable
from huizhen.client.records.sql import _number, read_sql
from huizhen.protocol.errors import ConfigError, GovernanceError, HuizhenError

PROGRAMS = os.pathsep.join(
    [os.environ.get("PATH", ""), *map(str, Path("/usr/lib/postgresql").glob("*/bin"))]
)


@pytest.fixture(scope="module")
def file():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "his.db"
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute("CREATE TABLE note (id INTEGER, text TEXT, weight REAL, scan BLOB)")
            database.executemany(
                "INSERT INTO note VALUES (?, ?, ?, ?)",
                [(1, "发热 100%: 08:30", 1.5, None), (2, None, None, None), (3, "c", 2.0, b"\xff")],
            )
            database.commit()
        yield path


@pytest.fixture(scope="module")
def server():
    """The URL of a PostgreSQL server on a socket in a temporary folder."""
    initdb, postgres = (shutil.which(p, path=PROGRAMS) for p in ("initdb", "postgres"))
    if initdb is None or postgres is None:
        pytest.skip("PostgreSQL's initdb and postgres are not installed here")
    with tempfile.TemporaryDirectory(prefix="huizhen-", ignore_cleanup_errors=True) as folder:
        user: dict[str, Any] = {}
        if os.getuid() == 0:  # as root PostgreSQL refuses to run
            nobody = pwd.getpwnam("nobody")
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
            user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        data = [initdb, "-D", f"{folder}/data", "-U", "tester", "-A", "trust", "-N", "-E", "UTF8"]
        subprocess.run(data, check=True, capture_output=True, cwd=folder, **user)  # noqa: S603
        process = subprocess.Popen(  # noqa: S603 - a program found above
            [postgres, "-D", f"{folder}/data", f"-k{folder}", "-clisten_addresses="],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder, **user,
        )  # fmt: skip
        with open_server(folder) as connection:
            connection.execute("CREATE SEQUENCE numbers")
            connection.execute("CREATE TABLE note (id int, text text)")
            connection.execute("INSERT INTO note SELECT i, 'n' || i FROM generate_series(1, 999) i")
        yield f"postgresql://tester@/postgres?host={folder}"
        process.send_signal(signal.SIGINT)
        process.wait(30)


def open_server(folder):
    for _ in range(200):
        with contextlib.suppress(psycopg.OperationalError):
            return psycopg.connect(host=folder, user="tester", dbname="postgres", autocommit=True)
        time.sleep(0.05)
    raise RuntimeError("PostgreSQL did not start")


def rows(url, query, **options):
    url = f"sqlite:///{url}" if isinstance(url, Path) else url
    return [fields for _, fields in read_sql(url, query, name="his", **options)]


def test_rows_have_a_place_and_their_columns(file):
    assert list(read_sql(f"sqlite:///{file}", "SELECT id, text, weight FROM note;", name="his"))[
        :2
    ] == [
        ("his:1", {"id": 1, "text": "发热 100%: 08:30", "weight": 1.5}),
        ("his:2", {"id": 2, "text": None, "weight": None}),
    ]


def test_percent_signs_and_colons_of_a_query_mean_themselves(file, server):
    query = "SELECT id FROM note WHERE text LIKE '%100\\%: %' ESCAPE '\\' OR text = ' :name'"
    assert rows(file, query) == [{"id": 1}]
    assert rows(server, "SELECT 5 % 3 AS a, ' :name %s' AS b") == [{"a": 2, "b": " :name %s"}]


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM note", "", "  ", "PRAGMA query_only = OFF", "ATTACH 'x' AS y", "-- SELECT 1",
        "/* SELECT */ UPDATE note SET id = 1", "SELECT 1; DROP TABLE note", "VACUUM",
        "EXPLAIN SELECT 1", "SELECT '\0'", "SELECT '\ud800'", "selection", "SELECT 1;;SELECT 2",
    ],
)  # fmt: skip
def test_what_is_not_one_statement_that_reads_is_refused(file, query):
    with pytest.raises(ConfigError, match=r"^his: query"):
        rows(file, query)


@pytest.mark.parametrize(
    "query",
    [
        "-- why\n SELECT 1 AS a", "/* why\n*/ (SELECT 1 AS a) ; ", "VALUES (1)",
        "WITH x(a) AS (VALUES (1)) SELECT a FROM x",
    ],
)  # fmt: skip
def test_comments_and_common_tables_may_begin_a_query(server, query):
    assert [list(row.values()) for row in rows(server, query)] == [[1]]


def test_a_query_that_would_write_fails_and_writes_nothing(file, server):
    writing = "WITH gone AS (DELETE FROM note RETURNING id) SELECT id FROM gone"
    with pytest.raises(ConfigError, match="data-modifying"):
        rows(server, writing)
    with pytest.raises(ConfigError, match=r"his: database refuses"):
        rows(file, "WITH x AS (SELECT 1) DELETE FROM note")
    assert rows(server, "SELECT count(*) AS n FROM note") == [{"n": 999}]
    assert len(rows(file, "SELECT id FROM note")) == 3


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        ("set_config('transaction_read_only', 'off', false)", "read-write mode"),
        ("nextval('numbers')", "read-only transaction"),
        ("id INTO copied FROM note", ""),
    ],
)  # fmt: skip
def test_no_function_of_a_query_can_write(server, call, problem):
    with pytest.raises(ConfigError, match=f"database refuses: .*{problem}"):
        rows(server, f"SELECT {call}")


def test_types_of_postgresql_become_those_of_json(server):
    query = """SELECT 5.00::numeric AS whole, 48.1::numeric AS tenth, 1e17::numeric AS large,
        0.12345678901234567890123::numeric AS long, DATE '2023-05-06' AS day, true AS flag,
        TIMESTAMP '2023-05-06 08:30:15.25' AS moment, TIME '08:30' AS clock,
        TIMESTAMPTZ '2023-05-06 08:30:15+00' AT TIME ZONE 'UTC' AS utc, NULL AS nothing,
        ARRAY[1.5::numeric, NULL] AS many, '{"a": [1]}'::jsonb AS doc"""
    (row,) = rows(server, query)
    assert row == {
        "whole": 5, "tenth": 48.1, "large": 10**17, "long": "0.12345678901234567890123",
        "day": "2023-05-06", "flag": True, "moment": "2023-05-06T08:30:15", "clock": "08:30:00",
        "utc": "2023-05-06T08:30:15", "nothing": None, "many": [1.5, None], "doc": {"a": [1]},
    }  # fmt: skip
    assert type(row["whole"]) is int


def test_a_moment_with_local_mean_time_becomes_utc(server):
    query = "SELECT set_config('timezone', 'Asia/Shanghai', false), TIMESTAMPTZ '1900-01-01Z' AS t"
    (row,) = rows(server, query)
    assert row["t"] in ("1900-01-01T00:00:00+00:00", "1900-01-01T08:05:43+08:05")


@given(st.decimals())
def test_a_decimal_keeps_its_value(value):
    if not value.is_finite():
        with pytest.raises(ValueError, match="finite"):
            _number(value)
    else:
        number = _number(value)
        assert Decimal(repr(number) if isinstance(number, float) else number) == value


def test_bytes_are_refused_with_the_name_of_their_column(file, server):
    with pytest.raises(GovernanceError, match=r"^his:3: column 'scan' holds bytes"):
        rows(file, "SELECT scan FROM note")
    with pytest.raises(GovernanceError, match=r"^his:1: column 'b' holds bytes"):
        rows(server, "SELECT '\\xff'::bytea AS b")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("'NaN'::float", "no finite number"), ("'Infinity'::numeric", "no finite number"),
        ("DATE '1066-10-14'", "year outside"), ("INTERVAL '1 day'", "timedelta"),
        ("DATE 'infinity'", "cannot be read"), ("1 / (id - 1)", "cannot be read .22012."),
        ("('secret' || id)::int", "cannot be read .22P02."),
    ],
)  # fmt: skip
def test_a_row_that_is_none_is_refused_and_not_shown(server, value, problem):
    with pytest.raises(GovernanceError, match=problem) as caught:
        rows(server, f"SELECT {value} AS x FROM note WHERE id < 3")  # noqa: S608
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_text_that_is_not_utf_8_is_refused_and_not_shown(file):
    with pytest.raises(GovernanceError, match=r"^his:\d: row holds what cannot be read") as caught:
        rows(file, "SELECT CAST(x'736563726574ff' AS TEXT) AS t")
    assert "secret" not in str(caught.value)


def test_a_row_that_is_too_large_is_refused(file):
    with pytest.raises(GovernanceError, match="his:1: row has over"):
        rows(file, f"SELECT printf('%.{MAX_ENTRY_BYTES + 1}c', 'x') AS t")


def test_two_columns_of_one_name_are_refused(file):
    with pytest.raises(ConfigError, match="two of one name"):
        rows(file, "SELECT id, id FROM note")


def test_what_the_database_says_of_the_query_is_told(file, server):
    with pytest.raises(ConfigError, match=r"^his: database refuses: no such table: notes"):
        rows(file, "SELECT * FROM notes")
    with pytest.raises(ConfigError, match=r'^his: database refuses: relation "notes" does not'):
        rows(server, "SELECT * FROM notes")


def test_a_query_that_takes_too_long_is_stopped(server):
    with pytest.raises(ConfigError, match="timeout"):
        rows(server, "SELECT pg_sleep(60)", timeout_seconds=0.1)


def test_a_large_table_is_not_held(file):
    query = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"
    reading = read_sql(f"sqlite:///{file}", query, name="his")  # without end
    assert [next(reading)[1]["i"] for _ in range(1000)] == list(range(1, 1001))
    del reading  # closes the cursor before its end


def test_postgresql_streams_through_a_cursor_of_the_server(server):
    query = "SELECT repeat('x', 100000) AS t FROM generate_series(1, 100000)"  # 10 GB
    reading = read_sql(server, query, name="his")
    assert len(next(reading)[1]["t"]) == 100000
    del reading  # closes the cursor before its end


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("", "is no URL"), ("his.db", "is no URL"), ("sqlite://", "no SQLite file"),
        ("sqlite:///:memory:", "no SQLite file"), ("sqlite:////no/such.db", "no SQLite file"),
        ("mysql+pymysql://u:secret@h/db", "install python package 'pymysql'"),
        ("oracle+oracledb://u:secret@h/db", "install python package 'oracledb'"),
        ("dbase://u:secret@h/db", "install its driver"), ("x://h:secret/", "is no URL"),
        ("postgresql+psycopg2://u:secret@h/db", "no driver for 'postgresql\\+psycopg2'|install"),
        ("postgresql://u@h/db?password=secret", "among its options"),
        ("postgresql://u:secret@/db?host=/no/such/folder", "cannot connect to .*u:\\*\\*\\*@"),
        ("postgresql://u:secret@localhost:1/db?nonsense=1", "cannot connect|cannot be used"),
    ],
)  # fmt: skip
def test_a_database_that_cannot_be_reached_is_named_without_its_password(url, problem):
    with pytest.raises(ConfigError, match=problem) as caught:
        rows(url, "SELECT 1 AS a")
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_file_that_is_no_database_is_refused(tmp_path):
    path = tmp_path / "his.db"
    path.write_bytes(b"id,text\n" * 1000)
    with pytest.raises(ConfigError, match="not a database"):
        rows(path, "SELECT * FROM note")


def test_a_name_of_a_file_is_not_read_as_options(file, tmp_path):
    path = tmp_path / "a?mode=rwc&b#c.db"
    shutil.copy(file, path)
    assert len(rows(f"sqlite:///{tmp_path}/a%3Fmode=rwc&b#c.db", "SELECT id FROM note")) == 3


def test_the_password_may_be_in_a_file(tmp_path, server):
    secret = tmp_path / "password"
    secret.write_text("secret\n")
    assert rows(server, "SELECT 1 AS a", password_file=secret) == [{"a": 1}]
    with pytest.raises(ConfigError, match="keep one"):
        rows("postgresql://u:secret@h/db", "SELECT 1", password_file=secret)
    with pytest.raises(ConfigError, match="cannot read password_file"):
        rows(server, "SELECT 1", password_file=tmp_path / "none")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text() | st.text().map(lambda t: f"SELECT {t}"))
@example("SELECT char(0)")
@example("SELECT 1e999")
@example("SELECT x''")
def test_any_query_gives_rows_or_a_clean_refusal(file, query):
    with contextlib.suppress(HuizhenError):
        rows(file, query)


@given(st.text().map(lambda t: f"{t}://") | st.text())
@example("postgresql+psycopg://h:99999999999999999999/x?pass=1")
@example("sqlite+x:///a")
@example("sqlite:///\0")
def test_any_url_that_names_no_database_is_refused(url):
    with pytest.raises(ConfigError):
        rows(url, "SELECT 1 AS a")


def test_the_tables_of_omop_are_read_from_a_schema(server):
    with psycopg.connect(server.replace("+psycopg", ""), autocommit=True) as connection:
        for statement in (
            "CREATE SCHEMA cdm",
            "CREATE TABLE cdm.person (person_id int, gender_concept_id int, year_of_birth int)",
            "INSERT INTO cdm.person VALUES (2, 8532, 1980), (1, 8507, 1970)",
            "CREATE TABLE cdm.concept (concept_id int, concept_name text, vocabulary_id text, "
            "concept_code text)",
            "INSERT INTO cdm.concept VALUES (3, 'HbA1c', 'LOINC', '4548-4'), (4, 'x', 'y', 'z')",
            "CREATE TABLE cdm.measurement (measurement_id bigint, person_id bigint, "
            "measurement_concept_id int, measurement_date date, measurement_datetime timestamp, "
            "value_as_number numeric, visit_occurrence_id bigint)",
            "INSERT INTO cdm.measurement VALUES (8, 1, 3, '2020-01-02', '2020-01-02 08:30', 6.5, 7)"
            ", (9, 3, 3, '2020-01-02', '2020-01-02', 'NaN', 7), (7, 1, 3, '1020-01-02', null, 1, 7)"
            ", (6, 3, 3, '2020-01-02', null, 1, 7)",
        ):
            connection.execute(statement)
    entries = list(read_omop(server, name="his", schema="cdm"))
    first, second, *others = entries
    assert first == Record("1", {}, "his/person:1", kind="patient", sex="male", birth="1970")
    assert second == Record("2", {}, "his/person:2", kind="patient", sex="female", birth="1980")
    assert [e.place for e in others] == [f"his/measurement:{row}" for row in (1, 2, 4, 3)]
    assert [e.problem[:41] for e in others if isinstance(e, Unreadable)] == [
        "person_id is of no row of PERSON that can",
        "column 'measurement_date' has a year outs",
        "column 'value_as_number' holds no finite ",
    ]
    lab = Lab(code="4548-4", system="loinc", name="HbA1c", value=6.5, time="2020-01-02T08:30:00")
    assert others[3] == Record(
        "1", {}, "his/measurement:3", kind="labs", encounter="7", time="2020-01-02T08:30:00",
        sex="male", birth="1970", labs=(lab,),
    )  # fmt: skip
