"""Slow proofs: the README's first command, run to its end."""

import json
import subprocess
import sys
from pathlib import Path


HERE = Path(__file__).parent.parent


def test_the_default_command_learns_words_as_promised(tmp_path):
    """At most .63 nats a position held out, Bayes' rule without context having 1.01; 64 steps write words, not noise: of
    their letter sequences a judge fitted on the training words thinks at least twice as well as of one step's."""
    subprocess.run([sys.executable, str(HERE / "flm.py"), "--run-dir", "words"], cwd=tmp_path, check=True, timeout=1500)
    heldout = json.loads((tmp_path / "words/flm.log.jsonl").read_text().splitlines()[-1])["heldout"]
    assert heldout <= 0.63
    table = subprocess.run([sys.executable, str(HERE / "evaluate.py"), "--run-dir", "words", "--num-samples", "300"],
                           cwd=tmp_path, check=True, capture_output=True, text=True, timeout=300).stdout
    print(table)
    perplexity = {line[:12].strip(): float(line[12:].split()[0]) for line in table.splitlines()[1:]}
    assert perplexity["64 steps"] < 2 * perplexity["held out"]
