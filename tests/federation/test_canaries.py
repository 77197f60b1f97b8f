"""EG-2 and AU-4: no string of a record is in a byte that left its hospital, or that anybody kept.

Three real sites train a private study on records full of canaries, one of them on records that
cannot be used, so that errors are made too. Everything is searched: what the sites' processes hand
to TLS and to gRPC, in clear; both parties' folders, logs, stores and exports; what the pages for
machines and the command line print. The records themselves lie outside all of it.
"""

import base64
import json
import subprocess
import sys
import urllib.request

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from tests.federation.conftest import SITES, study_text

from huizhen.simulations.live import Live, environment

pytestmark = pytest.mark.slow
CANARIES = {
    "patient": "PT-QUAGGA-31337",
    "name": "欧阳娜娜测试",
    "text": "thylacine cough wombat",
    "note": "急性白血病复查记录",
    "id": "11010119900307447X",
}
TEXTS = tuple(CANARIES.values())
# Tees what a process hands to TLS, and what gRPC is given to send, into a file of its own.
TEE = """
import os, ssl, sys

FOLDER = os.environ.get("HUIZHEN_TEST_TEE", "")


def tee(data):
    descriptor = os.open(f"{FOLDER}/{os.getpid()}", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, bytes(data))
    os.close(descriptor)


if FOLDER and "site" in sys.orig_argv:
    send = ssl.SSLSocket.send

    def spy(self, data, *rest):
        tee(data)
        return send(self, data, *rest)

    ssl.SSLSocket.send = spy
    import grpc._common

    serialize = grpc._common.serialize

    def spy_on_grpc(message, serializer):
        data = serialize(message, serializer)
        tee(data or b"")
        return data

    grpc._common.serialize = spy_on_grpc
"""


def spellings(text):
    """Return the bytes by which a string may show in a file."""
    found = {json.dumps(text)[1:-1].encode()}  # with escapes
    for codec in ("utf-8", "gbk", "utf-16-le", "utf-16-be"):
        found |= writings(text.encode(codec))
    return {one for one in found if len(one) >= 8}


def writings(raw):
    """Return bytes as they are, in hex and in base64."""
    found = {raw, raw.hex().encode(), raw.hex().upper().encode()}
    for shift in range(3):  # base64 of anything that has it at this place
        whole = base64.b64encode(b"\0" * shift + raw)
        end = len(whole) - (4 if (shift + len(raw)) % 3 else 0)  # what follows changes the rest
        found.add(whole[(shift * 8 + 5) // 6 : end])
    return found


def private_keys(folder):
    """Return the secret numbers of all keys under a folder, and Flower's secret."""
    found = []
    for place in folder.rglob("keys/*"):
        data = place.read_bytes()
        if not data.startswith(b"-----BEGIN"):
            found.append(data)
            continue
        key = load_pem_private_key(data, None)
        if isinstance(key, Ed25519PrivateKey):
            found.append(key.private_bytes_raw())
        elif isinstance(key, EllipticCurvePrivateKey):
            numbers = key.private_numbers()
            found.append(numbers.private_value.to_bytes((key.key_size + 7) // 8, "big"))
    return found


def find(folder, texts=TEXTS):
    """Return the files under a folder that hold one of the strings, and how many were read."""
    return search(folder, {one for text in texts for one in spellings(text)})


def search(folder, wanted, *, leave=()):
    """Return the files under a folder that hold one of the byte strings, and how many were read."""
    hits, count = [], 0
    for place in sorted(folder.rglob("*")):
        if not place.is_file() or place.is_symlink() or place.parent.name in leave:
            continue
        count += 1
        data = str(place).encode() + b"\0" + place.read_bytes()
        hits += [(place.relative_to(folder).as_posix(), one) for one in wanted if one in data]
    return hits, count


def record(site, number):
    label = "AB"[number % 2]
    values = {
        "patient": f"{CANARIES['patient']}-{site}-{number}",
        "name": CANARIES["name"],
        "id": CANARIES["id"],
        "text": f"{CANARIES['text']} {CANARIES['note']} {'fever' if label == 'A' else 'rash'}",
        "label": label,
    }
    return json.dumps(values, ensure_ascii=False)


@pytest.fixture(scope="module")
def searched(tmp_path_factory, home):
    """Run the study and return the folder with everything that is searched."""
    records = tmp_path_factory.mktemp("records")
    folder = tmp_path_factory.mktemp("canaries")
    tee, hook, printed = folder / "tee", tmp_path_factory.mktemp("hook"), folder / "printed"
    tee.mkdir()
    printed.mkdir()
    (hook / "sitecustomize.py").write_text(TEE, "utf-8")

    def keep(name, *command):
        done = subprocess.run(  # noqa: S603 - our own command
            [sys.executable, "-m", "huizhen.cli.main", *command],
            env=environment(), capture_output=True, check=False,
        )  # fmt: skip
        (printed / name).write_bytes(done.stdout + done.stderr)

    with pytest.MonkeyPatch.context() as patch, Live(folder, bases=home) as live:
        patch.setenv("PYTHONPATH", str(hook))
        patch.setenv("HUIZHEN_TEST_TEE", str(tee))
        live.found()
        for site in SITES:
            place = records / f"{site}.jsonl"
            lines = [record(site, number) for number in range(40)]
            if site == "East":
                lines[7] = record(site, 7)[:-9]  # no JSON: the error is full of the record
            place.write_text("\n".join(lines) + "\n", "utf-8")
            live.add_site(site, place, unit="patient", min_sites=2)
            live.start_site(site)
        text = study_text("canaries", rounds=3, quorum=2, minutes=0.3)
        study = live.offer(text.replace('text = "{text}"', 'text = "{name} {id} {text}"'))
        live.wait_until_finished(study, seconds=240)
        for name in ("metrics", "health"):
            address = f"http://127.0.0.1:{live.port + 3}/{name}"
            with urllib.request.urlopen(address) as answer:
                (printed / name).write_bytes(answer.read())
        main = str(folder / "coordinator-home")
        keep("runs", "coordinator", "runs", study, "--home", main)
        keep("status", "coordinator", "status", "--home", main)
        for site in SITES:
            own = str(live.home_of(site))
            key = str(live.home_of(site) / "site" / "keys" / "identity.pem")
            log = str(live.home_of(site) / "site" / "audit.sqlite")
            keep(f"{site} status", "site", "status", "--home", own)
            keep(f"{site} doctor", "site", "doctor", "--home", own)
            keep(f"{site} ledger", "site", "ledger", "show", "--home", own)
            keep(f"{site} show", "audit", "show", "--log", log)
            keep(
                f"{site} export", "audit", "export", "--log", log, "--key", key,
                "--out", str(printed / f"{site}.json"),
            )  # fmt: skip
        with live.store() as store:
            refusals = [one for n in (1, 2, 3) for one in store.updates.refusals(study, n)]
            codes = {one.code for one in refusals if one.site == "East"}
    return folder, codes


def test_eg_2_no_canary_is_in_any_byte_that_was_sent_logged_stored_or_exported(searched):
    folder, _ = searched
    hits, count = find(folder)
    assert hits == []
    assert count > 100  # and that was not because nothing was there


def test_id_6_no_private_key_is_in_any_byte_outside_of_its_folder(searched):
    folder, _ = searched
    keys = private_keys(folder)
    assert len(keys) >= 3 * 3 + 4  # three at a site; identity, board, authority, server, Flower's
    wanted = {one for key in keys for one in writings(key)}
    hits, count = search(folder, wanted, leave={"keys"})
    assert hits == []
    assert count > 100
    assert len(search(folder, wanted)[0]) >= 1  # it finds Flower's secret where it lies


def test_eg_3_the_site_that_could_not_train_said_a_code(searched):
    _, codes = searched
    assert codes
    assert codes <= {"cannot_train", "no_answer"}
    assert "cannot_train" in codes


def test_what_was_sent_was_seen_in_clear(searched):
    """The recording works: Flower's paths, the signed documents and the names of the parties."""
    folder, _ = searched
    sent = b"".join(place.read_bytes() for place in (folder / "tee").iterdir())
    for word in (b"POST /v1/fleet/push-object", b"application/vnd.huizhen.update+json", b"idle"):
        assert word in sent
    assert len(sent) > 100_000


def test_what_is_searched_has_what_both_parties_keep(searched):
    folder, _ = searched
    for name in (
        "coordinator-home/coordinator/store.sqlite",
        "site-North/site/audit.sqlite",
        "site-North/site/ledger.sqlite",
        "printed/North.json",
        "printed/metrics",
    ):
        assert (folder / name).stat().st_size > 100
    assert any((folder / "coordinator-home" / "coordinator" / "objects").rglob("??/??/*"))
    assert "site-North" not in (folder / "printed" / "metrics").read_text("utf-8")


@pytest.mark.parametrize("name", CANARIES)
def test_the_search_finds_a_canary_however_it_is_written(tmp_path, name):
    """The search can fail: each spelling is planted, at each of three places of a base64."""
    text = CANARIES[name]
    planted = []
    for codec in ("utf-8", "gbk", "utf-16-le", "utf-16-be"):
        raw = text.encode(codec)
        planted += [raw, raw.hex().encode(), raw.hex().upper().encode()]
        planted += [base64.b64encode(b"abc"[:shift] + raw + b"xyz") for shift in range(3)]
    planted.append(json.dumps({"x": text}).encode())
    for number, data in enumerate(planted):
        place = tmp_path / f"{number}"
        place.write_bytes(b"\x00around " + data + b"\xff")
        hits, _ = find(tmp_path, [text])
        assert hits, (number, data)
        place.unlink()
    (tmp_path / text).write_bytes(b"")  # as a file's name
    assert find(tmp_path, [text])[0]
