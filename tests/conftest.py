"""How hard the fuzzers look (harder: pytest tests/test_inputs.py --hypothesis-profile hunt), and what they have tried."""

import collections
import datetime

import pytest
from hypothesis import HealthCheck, settings

tally = collections.Counter()

QUIET = dict(deadline=datetime.timedelta(seconds=30), suppress_health_check=list(HealthCheck), database=None)
settings.register_profile("default", max_examples=100, derandomize=True, **QUIET)
settings.register_profile("hunt", max_examples=3000, **QUIET)
settings.load_profile("default")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem != "test_words")  # the longest first, for two workers to end together


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of several processes
        session.config.workeroutput["tally"] = dict(tally)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    tally.update(node.workeroutput["tally"])


def pytest_terminal_summary(terminalreporter):
    for name, count in sorted(tally.items()):
        terminalreporter.write_line(f"{name}: {count}")
