"""The real federation, killed twice, ends with the bytes of the engine in one process."""

import pytest

from huizhen.simulations import live_demo


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_federation_that_is_killed_twice_gives_the_adapter_of_the_in_process_engine(
    tmp_path, home, monkeypatch
):
    plain = live_demo.demo_study

    def small(records):
        tables = plain(records)
        tables["base"] = {"name": "tiny"}
        tables["adapter"] = {"rank": 2, "target_modules": ["q_proj", "v_proj"]}
        return tables

    monkeypatch.setattr(live_demo, "demo_study", small)
    told: list[str] = []
    result = live_demo.run_live_demo(tmp_path, home, told.append)
    assert result.is_same
    assert result.rounds == live_demo.ROUNDS
    assert [line for line in told if line.startswith("kill -9")] == [
        "kill -9 of the coordinator, 2 rounds are committed",
        "kill -9 of hospital-a, 4 rounds are committed",
    ]
