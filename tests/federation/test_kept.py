"""A strategy whose sites remember something, over real ports: SCAFFOLD, its updates in int8."""

import pytest
from tests.federation.conftest import records

from huizhen.simulations.live import Live

pytestmark = pytest.mark.slow
SITES = ("North", "South")
STUDY = """
[study]
name = "kept"
[base]
name = "tiny"
[adapter]
rank = 2
target_modules = ["q_proj"]
[task]
kind = "classification"
text = "{text}"
label = "label"
labels = ["A", "B"]
max_tokens = 16
[privacy]
unit = "none"
[strategy]
name = "scaffold"
[rounds]
count = 5
quorum = 2
batch_size = 16
length = "steps"
local_steps = 3
optimizer = "sgd"
momentum = 0.0
update_dtype = "int8"
deadline_minutes = 1
[sites.North]
patients_public = 30
[sites.South]
patients_public = 30
"""


def test_scaffold_with_updates_in_int8_finishes_and_each_hospital_keeps_one_control_variate(
    tmp_path, home
):
    with Live(tmp_path, bases=home) as live:
        live.found()
        for site in SITES:
            place = tmp_path / f"{site}.jsonl"
            place.write_text(records(site, 30), "utf-8")
            live.add_site(site, place, unit="none", min_sites=2)
            live.start_site(site)
        digest = live.offer(STUDY)
        live.wait_for(digest, 5, seconds=240)
        assert live.round_of(digest)[0] == 5
        for site in SITES:
            assert len(list(live.home_of(site).rglob("*.own"))) == 1
        assert not list((tmp_path / "coordinator-home").rglob("*.own"))
