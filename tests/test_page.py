"""The animated page, in headless Chromium."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import distill
import flm
from extras import page
from test_flm import TINY, run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
         "--disable-background-networking --disable-component-update --virtual-time-budget=30000")
DRIVE = """<script type="module">
time.value = 1; time.dispatchEvent(new Event("input"));
const seen = {percent: spans[0].map(row => row.map(x => +x.style.getPropertyValue("--p")))};
play.click();
await new Promise(done => setInterval(() => timer || done(), 50));
seen.texts = spans.map(rows => rows.map(row => row.map(x => x.textContent).join("")));
document.body.innerText = JSON.stringify(seen);
</script>"""

def shown(path):
    """The percentages after the flow's first evaluation, and the texts when the page stops."""
    path.write_text(path.read_text() + DRIVE)
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={path.parent}/profile", "--dump-dom"]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120)
    return json.loads(re.search("<body.*?>(.*)</body>", html.unescape(done.stdout), re.S)[1])

def test_the_page_shows_the_texts_of_sample(folder, capsys):
    """Percentages are rounded: they differ from 100 p by 0.5, and by 0.01 for float32."""
    Path("a.txt").write_text("".join(f"a <b> {i}\n" for i in range(900)))
    run(flm, f"{TINY} --run-dir r --max-steps 40")
    run(distill, "--run-dir r --max-steps 4 --device cpu")
    run(page, "--run-dir r --out page.html --sample-steps 8 --map-steps 2")
    assert not re.search(r"https?:|src=|@import|url\(", Path("page.html").read_text())
    if not CHROMIUM:
        pytest.skip("needs chromium")
    seen = shown(folder / "page.html")
    for program, steps, column in zip((flm, distill), (8, 2), seen["texts"], strict=True):
        capsys.readouterr()
        run(program, f"--sample --run-dir r --num-samples 16 --sample-steps {steps} --device cpu")
        texts = [text.replace("\u2009·", "") for text in column]  # an empty position is a dot
        assert texts == capsys.readouterr().out.splitlines()
    flow = flm.load(folder / "r/flm.pt")
    state = flow.noise(16, torch.Generator().manual_seed(0))
    probs = flow(state, torch.zeros(16)).softmax(-1)
    ids = flm.most_probable(flow, probs, torch.full((16, 12), -1))
    p = probs.gather(-1, ids[..., None])[..., 0]
    assert (torch.tensor(seen["percent"]) - 100 * p).abs().max() < 0.51
