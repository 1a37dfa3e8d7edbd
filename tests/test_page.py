"""The animated page, in headless Chromium at the width of a phone."""

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
from data import UserError
from extras import page
from test_flm import TINY, run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
         "--disable-background-networking --disable-component-update --virtual-time-budget=30000")
DRIVE = """<script>
addEventListener("load", async () => {
  const columns = () => spans.map(rows => rows.map(row => row.map(x => x.textContent).join("")));
  const press = key => document.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
  const seen = {autoplay: play.textContent}; stop();
  time.value = 1; time.dispatchEvent(new Event("input"));
  seen.percent = spans[0].map(row => row.map(span => +span.style.getPropertyValue("--p")));
  press("ArrowRight"); seen.right = +time.value;
  press("ArrowLeft"); press("ArrowLeft"); press("ArrowLeft"); seen.left = +time.value;
  seen.noise = columns().flat().join("");
  press(" "); seen.playing = play.textContent;
  await new Promise(done => setInterval(() => timer || done(), 50));
  seen.end = columns(); seen.stopped = play.textContent;
  seen.fits = document.documentElement.scrollWidth <= innerWidth;
  seen.ground = getComputedStyle(document.body).backgroundColor;
  parent.postMessage(JSON.stringify(seen), "*");
});
</script>"""
PHONE = """<iframe src="driven.html" style="width: 390px; height: 844px"></iframe><script>
onmessage = event => { document.body.innerText = `<pre>${event.data}</pre>`; };
</script>"""

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A flow and its map after a few steps on a small text, and their page."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("a.txt").write_text("".join(f"a <b> {i}\n" for i in range(900)))
        run(flm, f"{TINY} --run-dir r --max-steps 40")
        run(distill, "--run-dir r --max-steps 4 --device cpu")
        run(page, "--run-dir r --out page.html --sample-steps 8 --map-steps 2")
    return folder

def drive(folder, *flags):
    if not CHROMIUM:
        pytest.skip("needs chromium")
    (folder / "driven.html").write_text((folder / "page.html").read_text() + DRIVE)
    (folder / "phone.html").write_text(PHONE)
    done = subprocess.run([CHROMIUM, *FLAGS.split(), *flags, f"--user-data-dir={folder}/profile",
                           "--dump-dom", (folder / "phone.html").as_uri()],
                          capture_output=True, text=True, timeout=120)
    return json.loads(re.search("<pre>(.*)</pre>", html.unescape(done.stdout), re.S)[1])

def test_page_animates_the_samples(folder):
    seen = drive(folder)
    flow, flow_map = flm.load(folder / "r/flm.pt"), flm.load(folder / "r/fmlm.pt")
    tokens = flm.sample(flow, 16, 8, 0), distill.sample(flow_map, 16, 2, 0)
    texts = [[re.sub("\u2009·", "", text) for text in column] for column in seen["end"]]
    assert texts == [flm.to_lines(flow, ids) for ids in tokens]
    state = flow.noise(16, torch.Generator().manual_seed(0))
    probs = flow(state, torch.zeros(16)).softmax(-1)
    ids = flm.most_probable(flow, probs, torch.full((16, 12), -1))
    probs = probs.gather(-1, ids[..., None])[..., 0]
    assert (torch.tensor(seen["percent"]) - 100 * probs).abs().max() < 0.51
    assert set(seen["noise"]) == {"\u2009", "·"} and (seen["right"], seen["left"]) == (2, 0)
    assert (seen["autoplay"], seen["playing"], seen["stopped"]) == ("Pause", "Pause", "Play")
    assert seen["fits"]

def test_dark_mode_and_reduced_motion(folder):
    flags = "--blink-settings=preferredColorScheme=0", "--force-prefers-reduced-motion"
    dark, light = drive(folder, *flags), drive(folder)
    assert dark["ground"] == "rgb(20, 21, 24)" and light["ground"] == "rgb(252, 251, 248)"
    assert dark["autoplay"] == "Play"  # starts only if asked to

def test_page_is_small_and_needs_no_network(folder):
    text = (folder / "page.html").read_text()
    assert len(text.encode()) <= 300 * 1024 and not re.search(r"https?:|src=|@import|url\(", text)

def test_a_page_that_cannot_be_written_is_one_line(folder, monkeypatch):
    """A file and a folder are in the way. The earlier page remains."""
    monkeypatch.chdir(folder)
    before = (folder / "page.html").read_text()
    for out in ("a.txt/page.html", "r"):
        with pytest.raises(UserError, match=f"--out {out}: .*; use another path") as error:
            run(page, f"--run-dir r --out {out} --num-samples 1")
        assert "\n" not in str(error.value) and not Path(f"{out}.part").exists()
    assert (folder / "page.html").read_text() == before

def test_a_page_of_a_flow_alone(folder, monkeypatch):
    monkeypatch.chdir(folder)
    Path("alone").mkdir()
    shutil.copy("r/flm.pt", "alone")
    run(page, "--run-dir alone --out new/page.html --num-samples 2 --sample-steps 1")
    content = re.search("= ({.*});", Path("new/page.html").read_text())[1]
    (model,) = json.loads(content)["models"]
    tokens = flm.sample(flm.load("r/flm.pt"), 2, 1, 0)
    assert (model["name"], model["ids"]) == ("Flow", [tokens.tolist()])
