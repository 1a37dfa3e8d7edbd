"""Settings and fixtures of the slow tests: pytest -n 2 tests"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from test_flm import folder, one_thread_and_seed  # noqa: E402, F401

class Call:
    """Unpickling it calls function("executed", "w")."""

    def __init__(self, function):
        self.function = function

    def __reduce__(self):
        return self.function, ("executed", "w")
