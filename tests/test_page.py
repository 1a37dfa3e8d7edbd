"""The page of --html, in a real browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from nursery import Child
from test_flm import TINY

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVE = """<script>
addEventListener("load", async () => {
  const texts = () => [...document.querySelectorAll("li")].map(row => row.textContent), seen = {}, time = get("time");
  const press = key => document.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
  seen.first = texts();
  time.value = 1; time.dispatchEvent(new Event("input"));
  seen.slid = texts(); seen.ink = +spans[0].style.opacity; seen.tau = get("tau").textContent;
  press("ArrowRight"); seen.right = +time.value;
  press("Home"); seen.noise = texts();
  press("End"); seen.end = +time.value;
  get("play").click(); seen.rewound = +time.value;
  await new Promise(done => setInterval(() => +time.value === +time.max && done(), 50));
  seen.played = texts(); seen.button = get("play").textContent;
  spans[1].dispatchEvent(new PointerEvent("pointerover", {bubbles: true})); seen.top = get("top").textContent;
  press(" "); seen.playing = get("play").textContent; press(" ");
  seen.fits = document.documentElement.scrollWidth <= innerWidth;
  seen.ground = getComputedStyle(document.body).backgroundColor;
  parent.postMessage(JSON.stringify(seen), "*");
});
</script></html>"""
PHONE = """<iframe src="PAGE" style="width: 360px; height: 640px; border: 0"></iframe><script>
onmessage = event => { const out = document.createElement("pre"); out.id = "seen"; out.textContent = event.data;
                       document.body.append(out); };
</script>"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A map and a flow of letters, and a flow of word pieces, all of few steps, with their samples and pages."""
    folder = tmp_path_factory.mktemp("page")
    text = "".join(f"caf\u00e9 \u4f60\u597d </script> & <b>\\{i}</b> {i ** 3}\n" for i in range(900))
    Path(folder, "a.txt").write_text(text, encoding="utf-8")
    for program, line in (
            ("flm.py", f"--run-dir chars --dataset a.txt --tokenizer chars --no-packing --seq-len 48 --max-steps 60 {TINY}"),
            ("distill.py", "--run-dir chars --max-steps 2 --no-bf16"),
            ("flm.py", f"--run-dir bpe --dataset a.txt --vocab-size 400 --packing --seq-len 32 --max-steps 60 {TINY}"),
            ("flm.py", "--sample --run-dir chars --sample-steps 9 --html c.html --out c.txt"),
            ("flm.py", "--sample --run-dir bpe --html b.html --out b.txt"),
            ("distill.py", "--sample --run-dir chars --html m.html --out m.txt")):
        child = Child(program, line, folder)
        assert child.status() == 0, child.err
    return folder


def drive(page: Path, *flags: str) -> dict:
    """What a browser shows, on the width of a phone, while it is played with."""
    driven, phone = page.with_suffix(".driven.html"), page.with_suffix(".phone.html")
    driven.write_text(page.read_text(encoding="utf-8").replace("</html>", DRIVE), encoding="utf-8")
    phone.write_text(PHONE.replace("PAGE", driven.name))
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=30000", *flags,
                           "--dump-dom", phone.as_uri()], capture_output=True, text=True, timeout=120)
    seen = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
    assert seen, done.stderr[-2000:]
    return json.loads(seen[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.mark.skipif(not CHROMIUM, reason="no browser")
@pytest.mark.parametrize("name, frames", (("c", 9), ("b", 32), ("m", 1)))
def test_texts_denoise_in_a_browser_and_end_as_the_samples(folder, name, frames):
    seen = drive(folder / f"{name}.html")
    lines = (folder / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 16 and seen["first"] == seen["played"] == lines
    assert set("".join(seen["noise"])) == {"\u00b7"} and seen["tau"] == "tau 0.00"
    assert seen["slid"] != seen["noise"] and (seen["slid"] != lines or frames == 1)
    assert 0.16 < seen["ink"] < 1 and seen["end"] == frames and seen["right"] == min(2, frames)
    assert seen["rewound"] == 0 and seen["button"] == "play" and seen["playing"] == "pause"
    assert re.match(r".+ \d+ %     .+ \d+ %     .+ \d+ %$", seen["top"], re.S)
    assert seen["fits"]


@pytest.mark.skipif(not CHROMIUM, reason="no browser")
def test_a_page_is_dark_where_the_reader_likes_it_dark(folder):
    light, dark = drive(folder / "c.html"), drive(folder / "c.html", "--blink-settings=preferredColorScheme=0")
    assert light["ground"] != dark["ground"]


def test_a_page_is_small_and_needs_nothing_else(folder):
    """At most 300 KiB for 16 samples of 32 tokens in 64 steps; not one address in it."""
    page = (folder / "b.html").read_text(encoding="utf-8")
    assert len(page.encode()) <= 300 * 1024 and not re.search(r"https?:|src=|@import|url\(", page.split('id="content"')[0])
