"""A file is whole or absent, whoever else writes it at the same moment."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huizhen.storage.files import write_whole


def test_two_threads_that_write_one_file_tear_neither(tmp_path, monkeypatch):
    """Each has moved nothing before both have written: with one draft the second would be gone."""
    place, together = tmp_path / "status.json", threading.Barrier(2)
    drafts = []
    honest = Path.replace

    def replace(self, target):
        drafts.append(self.read_bytes())
        together.wait(10)
        return honest(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    written = [b"short", b"longer than short"]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda data: write_whole(place, data), written))
    assert sorted(drafts) == sorted(written)
    assert place.read_bytes() in written
    assert list(tmp_path.iterdir()) == [place]
