"""The documentation keeps its word: pages' Python runs, tutorials run, the site builds and shows in a browser."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from test_readme import CACHED
from test_report_browser import CHROMIUM

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(str(page.relative_to(DOCS)) for page in DOCS.glob("*/*.md") if "```python" in page.read_text())
TUTORIALS = sorted(script.name for script in (DOCS / "tutorials").glob("*.py"))
QUICK = ("howto/masks.md", "howto/losses.md", "07_write_a_claim.py")
"""A process of its own each, which compiles everything again: the others run nightly."""


def mostly_nightly(names: list[str]) -> list:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", mostly_nightly(PAGES))
def test_the_python_of_a_page_runs_from_top_to_bottom(name, tmp_path):
    program = "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=CACHED, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "nan" not in done.stdout


@pytest.mark.parametrize("name", mostly_nightly(TUTORIALS))
def test_a_tutorial_runs(name, tmp_path):
    command, environment = [sys.executable, str(DOCS / "tutorials" / name)], CACHED | {"MPLBACKEND": "Agg"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "nan" not in done.stdout


def test_every_claim_and_every_name_of_the_front_door_has_its_place():
    import attnlab as al
    from attnlab.claims import load_claims

    written = "\n".join(page.read_text() for page in DOCS.glob("*/*.md"))
    listed = {name for line in re.findall(r"```\{claims\} (.*)", written) for name in line.split()}
    assert listed == {claim.measure.__module__.rpartition(".")[2] for claim in load_claims().values()}
    assert set(re.findall(r"```\{front-door\} (.*)", written)) == set(al.TOPICS)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site. What the tutorials gave is taken from the last build, where they have not changed."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "-q", str(DOCS), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, env=CACHED)
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.slow
def test_links_and_anchors_resolve_and_nothing_is_fetched(site):
    pages = {page: page.read_text() for page in site.rglob("*.html") if page.parent.name != "explorers"}
    assert len(pages) > 30
    for page, text in pages.items():
        for link in re.findall(r'(?:href|src)="([^"]+)"', text):
            address, _, anchor = link.partition("#")
            if re.match(r"https?:", address):
                assert not re.search(rf'(?:src|<link[^>]*href)="{re.escape(link)}"', text), link
                continue
            if address.startswith(("data:", "mailto:")):
                continue
            target = (page.parent / address.partition("?")[0]).resolve() if address else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor and target in pages:
                assert f'id="{anchor}"' in pages[target], f"{page.name}: {link}"


LOOKED_AT = ["index", "learn/index", "theory/attention", "reference/front_door", "findings/gallery"]
LOOK = """
<iframe id="frame" style="width: WIDTHpx; height: 900px; border: 0" src="PAGE"></iframe>
<script>
const problems = [];
frame.onload = () => {
  const inner = frame.contentDocument, root = inner.documentElement;
  const found = {
    wide: root.scrollWidth - root.clientWidth, formulas: inner.querySelectorAll("math").length,
    broken: [...inner.images].filter((i) => i.loading != "lazy" && !i.naturalWidth).map((i) => i.src),
    fetched: frame.contentWindow.performance.getEntriesByType("resource").map((e) => e.name)
      .filter((name) => !name.startsWith("file:")),
  };
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify(found);
  document.body.append(result);
};
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize("page", LOOKED_AT)
def test_a_page_fits_its_screen_and_fetches_nothing(site, tmp_path, page, width):
    look = tmp_path / "look.html"
    look.write_text(LOOK.replace("WIDTH", str(width)).replace("PAGE", (site / f"{page}.html").as_uri()))
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    flags += " --allow-file-access-from-files --enable-logging=stderr --virtual-time-budget=20000"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", look.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = json.loads(re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)[1])
    assert found["wide"] == 0
    assert found["broken"] == found["fetched"] == []
    assert found["formulas"] > 0 or not page.startswith("theory")
    assert "CONSOLE" not in done.stderr, done.stderr


def test_the_site_is_made_by_one_command():
    assert "\ndocs:" in (DOCS.parent / "Makefile").read_text()
    assert shutil.which("sphinx-build", path=Path(sys.executable).parent)
