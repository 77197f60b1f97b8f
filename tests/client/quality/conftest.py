"""Where real samples lie, when they are there."""

from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"


@pytest.fixture(scope="session")
def samples():
    """The folder of real samples beside the checkout; what needs it is skipped without it."""
    if not DATA.is_dir():
        pytest.skip("the real samples are not beside the checkout (../shared/data)")
    return DATA
