"""Settings and fixtures of the slow tests: pytest -n 2 tests"""

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE))

settings.register_profile("repeatable", derandomize=True, database=None, deadline=None,
                          suppress_health_check=list(HealthCheck))
settings.load_profile("repeatable")

TEXT = "".join(f"{word} {i}\n" for i in range(300) for word in ("one", "twenty"))

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder with a small text."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(TEXT)
    yield tmp_path
