"""The report in a real browser (headless Chromium, where there is one): glyphs, console, narrow screens."""

import html
import json
import re
import shutil
import subprocess

import pytest

from attnlab.claims import load_claims
from test_report import figure, page, row

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]

# Each character is drawn in the font that the page gives it, beside one of the private area that no font has.
LOOK = """
<iframe id="frame" style="width: WIDTHpx; height: 800px; border: 0"></iframe>
<script id="page" type="application/json">PAGE</script>
<script>
const frame = document.getElementById("frame");
const drawing = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
function picture(font, character) {
  drawing.canvas.width = drawing.canvas.height = 40;
  drawing.font = font;
  drawing.fillText(character, 8, 28);
  return drawing.getImageData(0, 0, 40, 40).data.join();
}
frame.onload = async () => {
  const inner = frame.contentDocument;
  await inner.fonts.ready;
  for (const face of inner.fonts) document.fonts.add(await face.load());
  const walk = inner.createTreeWalker(inner.body, NodeFilter.SHOW_TEXT);
  const pairs = new Set(), missing = new Set();
  while (walk.nextNode()) {
    const shown = getComputedStyle(walk.currentNode.parentElement);
    const font = `20px ${shown.fontFamily}`;
    for (const c of walk.currentNode.data.replace(/\\s/g, "")) pairs.add(JSON.stringify([font, c]));
  }
  for (const pair of pairs) {
    const [font, character] = JSON.parse(pair);
    if (picture(font, character) === picture(font, "\\u{F0F00}")) missing.add(character);
  }
  const root = inner.documentElement;
  const found = {
    characters: pairs.size, missing: [...missing].join(""), wide: root.scrollWidth - root.clientWidth,
    faces: [...inner.fonts].map((face) => face.status),
    images: [...inner.images].map((image) => image.naturalWidth),
    beyond: [...inner.querySelectorAll("body *")].filter((e) => e.getBoundingClientRect().right > root.clientWidth)
      .map((e) => `${e.tagName} ${e.textContent.slice(0, 40)}`).slice(0, 10),
    // A long formula may scroll within its own cell; nothing else may be cut.
    cut: [...inner.querySelectorAll("tr:not(.statement) td, p, h3")].filter((e) => e.scrollWidth > e.clientWidth + 1)
      .map((e) => e.textContent.slice(0, 60)),
    scrolling: [...inner.querySelectorAll("tr.statement td")].filter((e) => e.scrollWidth > e.clientWidth + 1).length,
  };
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify(found);
  document.body.append(result);
};
frame.srcdoc = JSON.parse(document.getElementById("page").textContent);
</script>
"""


def look(tmp_path, text, width):
    """What the browser found in the page in a window of this width, and what it wrote to the console."""
    wrapper = tmp_path / f"look-{width}.html"
    quoted = json.dumps(text).replace("<", "\\u003c")
    wrapper.write_text(
        "<!DOCTYPE html><meta charset=utf-8>" + LOOK.replace("WIDTH", str(width)).replace("PAGE", quoted)
    )
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=20000")
    command = [CHROMIUM, *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", wrapper.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    (result,) = re.findall('<pre id="result">(.*?)</pre>', done.stdout)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(result)), console


@pytest.fixture
def every_claim(tmp_path):
    figure(tmp_path / "figures", "icl-depth", sources={})
    problem = {"passed": False, "error": None, "reason": "ValueError: " + "it broke " * 20}
    claims = load_claims().values()
    rows = [
        row(claim=c.name, statement=c.statement, source=c.source, because=c.because, seed=s)
        for c in claims
        for s in (1, 2)
    ]
    return page(tmp_path, *rows, row(claim="fails", **problem))


@pytest.mark.parametrize("width", [360, 1280])
def test_the_browser_shows_the_whole_page(tmp_path, every_claim, width):
    found, console = look(tmp_path, every_claim, width)
    assert console == []
    assert found["characters"] > 150
    assert found["missing"] == ""
    assert found["faces"] == ["loaded"]
    assert found["images"] == [720]
    assert found["wide"] <= 0, f"the page scrolls sideways because of {found['beyond']}"
    assert found["cut"] == []
    assert found["scrolling"] <= (0.1 * len(load_claims()) if width < 500 else 0)


def test_what_is_missing_is_seen(tmp_path):
    broken = '<!DOCTYPE html><p style="width: 2000px">\U000f0f01</p><script>missing()</script>'
    found, console = look(tmp_path, broken, 360)
    assert found["missing"] == "\U000f0f01"
    assert found["wide"] > 0
    assert any("missing is not defined" in line for line in console)
