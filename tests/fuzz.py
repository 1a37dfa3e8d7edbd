"""The inputs of test_inputs.py, sought by what they reach in our code: pip install atheris, then

    python tests/fuzz.py checkpoints 60     # seconds; or texts, settings, token_files, tokenizers, pickles, command_lines
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["data", "distill", "flm", "join", "parallel", "prompts", "run", "sources"]):
    import test_inputs

name, seconds = sys.argv[1:] or ("checkpoints", "60")
target = getattr(test_inputs, f"test_{name}").hypothesis.fuzz_one_input
with tempfile.TemporaryDirectory() as folder, test_inputs.playground(Path(folder)):
    atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", "-max_len=4096", "-rss_limit_mb=16384"], target)
    atheris.Fuzz()
