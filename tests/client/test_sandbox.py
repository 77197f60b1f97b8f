"""What the process that trains can reach: attacks run in its place, behind its own walls.

CODE-4 and CODE-5 of the threat model. Each attack is also run without walls, where it succeeds: a
test that could not fail would prove nothing. Nothing is written outside temporary folders: a file
of the system is opened for writing and closed again.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from huizhen.client import sandbox, worker_trainer
from huizhen.client.frames import CohortRecords, Start
from huizhen.client.governance import SitePolicy
from huizhen.client.sandbox import Walls, check_hidden, command, environment, probe
from huizhen.client.trainer import Code, TrainerError
from huizhen.client.worker_trainer import WorkerTrainer
from huizhen.protocol.errors import ConfigError


def works(*line):
    """Whether a program is here and allowed; asked without our own code, which may be broken."""
    if shutil.which(line[0]) is None:
        return False
    return subprocess.run([*line, "true"], capture_output=True, check=False).returncode == 0  # noqa: S603


needs_full = pytest.mark.skipif(
    not works("bwrap", "--unshare-all", "--ro-bind", "/", "/"),
    reason="bubblewrap is not installed here, or may not make namespaces",
)
needs_network = pytest.mark.skipif(
    not works("unshare", "--net", "--user", "--map-root-user"),
    reason="unshare of util-linux is not installed here, or may not make namespaces",
)

CONNECT = """
import json, socket, sys
tcp, name, is_walled = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "walled"
found = {}
def attempt(what, act):
    try:
        act()
        found[what] = "succeeded"
    except OSError as error:
        found[what] = type(error).__name__
def tcp_to(host, port):
    socket.create_connection((host, port), timeout=2).close()
def unix_to(name):
    socket.socket(socket.AF_UNIX).connect(name)
attempt("loopback", lambda: tcp_to("127.0.0.1", tcp))
attempt("abstract socket", lambda: unix_to(chr(0) + name))
if is_walled:  # else they would leave this machine
    for lan in ("10.0.0.1", "172.16.0.1", "192.168.0.1", "169.254.169.254", "8.8.8.8"):
        attempt(lan, lambda: tcp_to(lan, 80))
        attempt("udp " + lan, lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", (lan, 53)))
    attempt("DNS", lambda: socket.getaddrinfo("example.org", 443))
found["interfaces"] = [name for _, name in socket.if_nameindex()]
sys.stderr.write(json.dumps(found))
"""

READ_AND_WRITE = """
import glob, json, os, signal, sys
secrets, places, agent = json.loads(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
found = {"read": [], "wrote": [], "opened": []}
for path in secrets:
    try:
        open(path, "rb").read(1)
        found["read"].append(path)
    except OSError:
        pass
for folder in places:
    try:
        os.close(os.open(folder + "/attack", os.O_WRONLY | os.O_CREAT, 0o600))
        os.unlink(folder + "/attack")
        found["wrote"].append(folder)
    except OSError:
        pass
for path in ["/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/self/mem",
             *glob.glob("/proc/sys/vm/*"), *glob.glob("/etc/*"), sys.executable]:
    try:
        os.close(os.open(path, os.O_WRONLY))
        found["opened"].append(path)
    except OSError:
        pass
try:
    os.kill(agent, 0)
    found["agent"] = "can be signalled"
except OSError:
    found["agent"] = "is not there"
found["environment"] = dict(os.environ)
found["files"] = sorted(map(int, os.listdir("/proc/self/fd")))[:-1]  # the last one lists the folder
found["processes"] = [int(name) for name in os.listdir("/proc") if name.isdigit()]
sys.stderr.write(json.dumps(found))
"""


@pytest.fixture
def site_folder(tmp_path):
    """What a hospital's agent keeps, in the clear as far as this test goes."""
    folder = tmp_path / "site"
    folder.mkdir()
    for name in ("ledger.sqlite", "identity.key", "audit.sqlite", "other-cohort.jsonl"):
        (folder / name).write_bytes(b"secret")
    return folder


@pytest.fixture
def attack(make_study, tiny, home, site_folder, monkeypatch):
    """Run a program in the worker's place, by the agent's own way, and return what it found."""
    study = make_study(base={"digests": dict(tiny.digests)})

    def attack(level, program, *arguments):
        def replaced(level, line, *, readable):
            assert line[1:] == ["-m", "huizhen.client.worker"]
            return command(level, [line[0], "-I", "-c", program, *arguments], readable=readable)

        monkeypatch.setattr(worker_trainer, "command", replaced)
        start = Start(
            site="A", home=str(home), base="tiny", patient="id", policy=SitePolicy(site="A")
        )
        log = site_folder / "worker.log"
        trainer = WorkerTrainer(
            study,
            start,
            lambda: CohortRecords(train=b"{}"),
            log=log,
            hidden=[site_folder],
            walls=Walls(level, "as asked"),
        )
        with trainer, pytest.raises(TrainerError) as caught:
            trainer.ready()
        assert caught.value.code is Code.CRASHED
        return json.loads(log.read_text())

    return attack


@pytest.fixture
def listeners():
    """A TCP listener on loopback and a Unix one without a file, both of this process."""
    name = f"huizhen-test-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(f"\0{name}")
        unix.listen()
        yield str(tcp.getsockname()[1]), name


@pytest.mark.parametrize(
    "level",
    [pytest.param("full", marks=needs_full), pytest.param("network", marks=needs_network)],
)
def test_code_4_the_trainer_connects_neither_to_loopback_nor_lan_nor_dns(attack, listeners, level):
    found = attack(level, CONNECT, *listeners, "walled")
    assert found.pop("interfaces") == ["lo"]
    assert len(found) == 13
    assert "succeeded" not in found.values()


def test_code_4_without_walls_the_same_attack_succeeds(attack, listeners):
    found = attack("none", CONNECT, *listeners, "open")
    assert (found["loopback"], found["abstract socket"]) == ("succeeded", "succeeded")


def places(home, site_folder):
    """Return where the attack tries to write; only the last is the process's own."""
    mine = Path(sandbox.__file__).parent
    plain = ["/", "/dev", "/dev/shm", "/etc", "/usr", "/usr/lib", "/var", "/root", "/home"]  # noqa: S108
    return [*plain, str(home / "bases"), str(site_folder), sys.prefix, sys.base_prefix, str(mine),
            "/tmp"]  # fmt: skip  # noqa: S108


@needs_full
def test_code_5_the_trainer_reads_nothing_of_the_site_and_writes_only_its_own_folder(
    attack, site_folder, home, monkeypatch
):
    monkeypatch.setenv("HUIZHEN_TOKEN", "secret")
    secrets = [str(path) for path in site_folder.iterdir()]
    secrets += [f"/proc/{os.getpid()}/{name}" for name in ("environ", "mem", "maps", "cwd")]
    secrets += ["/etc/shadow", "/etc/passwd", "/root/.ssh", str(Path(__file__))]
    with (site_folder / "identity.key").open("rb") as key:
        os.set_inheritable(key.fileno(), True)
        found = attack(
            "full",
            READ_AND_WRITE,
            json.dumps(secrets),
            json.dumps(places(home, site_folder)),
            str(os.getpid()),
        )
    assert found["read"] == []
    assert found["wrote"] == ["/tmp"]  # noqa: S108  # in memory, and its own
    assert found["opened"] == []
    assert found["agent"] == "is not there"
    assert "HUIZHEN_TOKEN" not in found["environment"]
    assert set(found["environment"]) <= {*environment(1), "PWD", "LC_CTYPE"}
    assert found["files"] == [0, 1, 2]
    assert len(found["processes"]) <= 2  # bubblewrap's own, and itself


def test_code_5_without_walls_the_same_attack_succeeds(attack, site_folder, home, monkeypatch):
    monkeypatch.setenv("HUIZHEN_TOKEN", "secret")
    secrets = [str(path) for path in site_folder.iterdir()]
    own = [str(site_folder)]
    found = attack("none", READ_AND_WRITE, json.dumps(secrets), json.dumps(own), str(os.getpid()))
    assert (found["read"], found["wrote"]) == (secrets, own)
    assert found["agent"] == "can be signalled"
    assert "HUIZHEN_TOKEN" not in found["environment"]  # at every level


@needs_full
def test_what_the_process_wrote_is_gone_with_it(attack, site_folder):
    write = "import pathlib, sys; pathlib.Path('/tmp/left').write_text('x'); sys.stderr.write('1')"
    read = "import os, sys; sys.stderr.write(str(int(os.path.exists('/tmp/left'))))"
    assert attack("full", write) == 1
    assert attack("full", read) == 0
    assert not Path("/tmp/left").exists()  # noqa: S108


def test_a_site_folder_inside_what_is_shown_is_refused(tmp_path):
    shown = tmp_path / "shown"
    (shown / "site").mkdir(parents=True)
    (tmp_path / "link").symlink_to(shown / "site")
    for hidden in (shown, shown / "site", tmp_path / "link", Path("/usr/local/site")):
        with pytest.raises(ConfigError, match="may read: move it elsewhere"):
            check_hidden([shown], [hidden])
    check_hidden([shown], [tmp_path, tmp_path / "other", tmp_path / "shown-too"])


def test_the_command_line_shows_and_hides_what_it_must():
    line = command("full", ["program", "--option"], readable=[Path("/a"), Path("/b c")])
    assert line[0] == "bwrap"
    assert {"--unshare-all", "--die-with-parent"} <= set(line)
    assert line[-3:] == ["--", "program", "--option"]
    text = " ".join(line)
    assert "--ro-bind-try /a /a --ro-bind-try /b c /b c --remount-ro" in text
    assert "--bind " not in text
    assert "--dev-bind" not in text
    assert "--share-net" not in text
    binds = [line[i + 1] for i, word in enumerate(line) if word == "--ro-bind-try"]
    assert not {"/", "/etc", "/home", "/root", "/var", "/proc", "/run"} & set(binds)
    # what is mounted first is covered by what comes later
    assert text.index("--tmpfs /tmp") < text.index("--ro-bind-try /a")
    assert command("none", ["program"], readable=[]) == ["program"]
    assert command("network", ["program"], readable=[])[:2] == ["unshare", "--net"]


@needs_full
def test_the_probe_finds_full_walls_where_bubblewrap_works():
    found = probe()
    assert found.level == "full"
    assert "without network" in found.sentence


def test_the_probe_believes_only_what_it_tried(monkeypatch):
    """Programs that do nothing, fail or hang are no walls; what is missing is said plainly."""

    def with_lines(full, network):
        lines = {"full": full, "network": network}
        monkeypatch.setattr(
            sandbox, "command", lambda level, program, readable: [*lines[level], *program]
        )
        return probe()

    monkeypatch.setattr(sandbox, "_PROBE_SECONDS", 0.2)
    for useless in (
        ["env"],
        ["false"],
        ["no-such-program"],
        ["sh", "-c", "exec sleep 5"],
        ["echo"],
    ):
        found = with_lines(useless, useless)
        assert found.level == "none"
        assert "can use the network" in found.sentence


@needs_network
def test_the_probe_takes_a_namespace_without_bubblewrap_for_what_it_is(monkeypatch):
    """Bubblewrap is missing, or is a program that walls off the network alone."""
    real = command
    network = real("network", [], readable=[])
    for bubblewrap in (["no-such-program"], network):

        def without(level, program, *, readable, bubblewrap=bubblewrap):
            first = bubblewrap if level == "full" else network
            return [*first, *program]

        monkeypatch.setattr(sandbox, "command", without)
        found = probe()
        assert found.level == "network"
        assert "the ledger, the keys and the audit log too" in found.sentence


@needs_full
def test_the_numbers_inside_come_from_the_same_instructions_as_outside():
    """Another capability of the processor would give other last bits."""
    program = (
        "import torch; print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())"
    )
    said = [
        subprocess.run(  # noqa: S603  # our own command
            command(level, [sys.executable, "-c", program], readable=sandbox.python_folders()),
            env=environment(2),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for level in ("full", "none")
    ]
    assert said[0] == said[1]
    assert said[0].endswith(" 2\n")
