"""The page in a browser: no error, numbers in the document, sorting, filtering, hiding and what a pointer shows."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from allnc.config import DataConfig
from allnc.report.__main__ import main
from tests.report.runs import made_up

BROWSER = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome")) if p), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome that could open the page")

# Collects errors from the first moment on; then does what a reader does and writes down what there was to see.
EARS = "<script>window.faults = []; addEventListener('error', (e) => faults.push(e.message));\
addEventListener('securitypolicyviolation', (e) => faults.push(e.violatedDirective));</script>"
READER = """<script>
const seen = {}, table = document.querySelector("table.sortable"), body = table.tBodies[0];
const column = (number) => [...body.rows].filter((row) => !row.hidden).map((row) => row.cells[number].textContent);
const click = (number) => table.tHead.rows[0].cells[number].querySelector("button").click();
seen.sizes = column(1);
click(1); seen.up = column(1);
click(0); seen.names = column(0);
click(3); seen.accuracy = column(3);
const field = document.querySelector("input[type=search]");
field.value = "GLYPH 3"; field.dispatchEvent(new Event("input")); seen.found = column(0);
const hover = (node) => {
  node.scrollIntoView();
  const box = node.getBoundingClientRect(), at = { clientX: box.x + box.width / 2, clientY: box.y + box.height / 2 };
  node.dispatchEvent(new PointerEvent("pointermove", { ...at, bubbles: true }));
  return document.getElementById("tip").innerText;
};
seen.point = hover(document.querySelector("#classes .line[data-points] circle"));
seen.curve = hover(document.querySelector("#curves svg.chart"));
seen.heat = hover(document.querySelector("#confusions svg.heat image"));
const box = document.querySelector("input[data-run='1']"); box.click();
seen.hidden = [...document.querySelectorAll(".line.run1")].every((line) => getComputedStyle(line).display === "none");
seen.wide = document.documentElement.scrollWidth - innerWidth;
seen.faults = faults;
const result = document.createElement("pre"); result.id = "seen"; result.textContent = JSON.stringify(seen);
document.body.append(result);
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two runs of 40 classes."""
    folder = tmp_path_factory.mktemp("pages")
    counts = np.round(200 * np.exp(-np.arange(40) / 11)).astype(int)
    for name, seed in (("first", 0), ("second", 1)):
        data = DataConfig(name="image_folder", root=str(folder / "gone"), augmentation="none")
        made_up(
            folder / name,
            classes=[f"<b>glyph {c}" for c in range(40)],
            counts=counts,
            per_class=20,
            seed=seed,
            data=data,
        )
    words = [str(folder / "first"), str(folder / "second"), "--stored", "--out", str(folder / "page.html")]
    assert main(words) == 0
    return folder / "page.html"


def browse(path: Path, *words: str) -> str:
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *words, path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout


@pytest.mark.parametrize("width", [1280, 500])
def test_a_reader_sorts_finds_and_points(page: Path, tmp_path: Path, width: int) -> None:
    text = page.read_text()
    (tmp_path / "page.html").write_text(
        text.replace("<title>", EARS + "<title>").replace("</body>", READER + "</body>")
    )
    dom = browse(tmp_path / "page.html", "--dump-dom", f"--window-size={width},900")
    found = re.search(r'<pre id="seen">(.*?)</pre>', dom)
    assert found is not None
    seen = json.loads(html.unescape(found[1]))
    assert seen["faults"] == [] and seen["wide"] <= 0
    sizes = [int(size) for size in seen["sizes"]]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 200
    assert [int(size) for size in seen["up"]] == sizes[::-1]
    assert seen["names"] == [f"<b>glyph {c}" for c in range(40)]  # 2 before 10
    accuracies = [float(value) for value in seen["accuracy"]]
    assert accuracies == sorted(accuracies, reverse=True) and len(set(accuracies)) > 5
    assert sorted(seen["found"]) == sorted(f"<b>glyph {c}" for c in (3, *range(30, 40)))
    told = np.load(page.parent / "first" / "predictions.npz")
    own = 100 * float((told["predicted"] == told["labels"])[told["labels"] == 0].mean())
    assert seen["point"].split("\n")[:3] == ["<b>glyph 0", "training images of the class: 200", f"accuracy, %: {own:g}"]
    assert re.match(r"epoch \d+\nfirst: [\d.]+\nsecond: [\d.]+$", seen["curve"])
    assert re.match(r"<b>glyph \d+ predicted as <b>glyph \d+: [\d.]+ % of its images$", seen["heat"])
    assert seen["hidden"] is True


def test_the_page_is_drawn_light_and_dark(page: Path, tmp_path: Path) -> None:
    from PIL import Image

    grounds = []
    for name, words in (("light", []), ("dark", ["--blink-settings=preferredColorScheme=0"])):
        browse(page, f"--screenshot={tmp_path / name}.png", "--window-size=1280,2000", *words)
        image = Image.open(tmp_path / f"{name}.png").convert("L")
        assert len(np.unique(np.asarray(image))) > 40  # something is on it
        grounds.append(image.getpixel((3, 3)))
    assert grounds[0] > 230 and grounds[1] < 40  # type: ignore[operator]
