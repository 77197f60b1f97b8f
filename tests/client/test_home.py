"""What a hospital's folder holds of a study, also after a power cut."""

import os
from pathlib import Path

import pytest

from huizhen.client.home import Home
from huizhen.protocol.errors import StorageError

S = "5" * 64


@pytest.fixture
def study(tmp_path):
    found = Home(tmp_path / "site").study(S)
    found.keep_approval(b"an approval")
    return found


def test_a_withdrawn_approval_is_gone_and_its_folder_is_on_the_disk(study, monkeypatch):
    synced, fsync = [], os.fsync

    def noted(handle):
        place = Path(f"/proc/self/fd/{handle}").readlink()
        synced.append((place, list(place.iterdir())))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    study.withdraw()
    assert synced == [(study.folder.resolve(), [])]
    assert study.approval() is None
    study.withdraw()  # what is not there needs no other step


def test_an_approval_that_cannot_be_removed_is_said_to_be_there(study):
    (study.folder / "approval.json").unlink()
    (study.folder / "approval.json").mkdir()
    with pytest.raises(StorageError, match="cannot remove"):
        study.withdraw()
