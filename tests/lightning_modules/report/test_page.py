"""The page of results and a run: what it says, that names stay text, how a browser shows it."""

import base64
import html
import json
import re
import shutil
import subprocess
import tempfile
from html.parser import HTMLParser

import pytest
from PIL import Image

from lightning_modules.cli.main import main
from lightning_modules.report.page import write_report
from mobileone.bench.results import Result
from mobileone.export.manifest import Manifest, TrainingState
from mobileone.export.spec import ExportSpec, Metadata
from tests.helpers.command import error_of

EVIL = '<script>alert(1)</script>"><img src=x onerror=alert(2)>'
NAMES = ("cat", "dog & $5", EVIL)
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


@pytest.fixture
def run(tmp_path):
    """A run folder with everything that a fit and a test leave, and names to beware of."""
    folder = tmp_path / "runs" / "mine" / "20260101-000000"
    metrics = folder / "metrics" / "version_0"
    metrics.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"wandb_id": "mine"}))
    (folder / "config.yaml").write_text(f"model:\n  # {EVIL}\n  model: mobileone_s0\n")
    (metrics / "metrics.csv").write_text(
        "step,epoch,train/loss,val/acc1,val/loss,lr\n1,0,2.0,,,0.1\n2,0,,0.5,1.5,\n"
        "3,1,1.0,,,0.05\n4,1,,0.75,0.9,\n"
    )
    artifact = folder / "checkpoints" / "best"
    artifact.mkdir(parents=True)
    entry = {
        "path": "model.pt",
        "bytes": 4_000_000,
        "files": {},
        "parity": {"status": "measured", "max_relative_error": 2e-7, "tolerance": 1e-3,
                   "top1_agreement": 1.0, "images": 8},
    }  # fmt: skip
    Manifest(
        ExportSpec("mobileone_s0", NAMES, (3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0),
        TrainingState(epoch=1, step=4, metrics={"val/acc1": 0.75, "val/macro_f1": 0.7}),
        Metadata(),
        parameters=2_078_504,
        channel_order="RGB",
        formats={"torchscript": entry},
        images="given",
        rejected={"coreml": f"relative error 0.3 is above 0.25 {EVIL}"},
    ).save(artifact)
    report = folder / "report"
    report.mkdir()
    cells = [[3, 1, 0], [0, 4, 0], [2, 0, 0]]
    rows = [
        ",".join([json_cell(name), *map(str, row)]) for name, row in zip(NAMES, cells, strict=True)
    ]
    head = ",".join(["true", *map(json_cell, NAMES)])
    (report / "confusion_matrix.csv").write_text("\n".join([head, *rows]) + "\n")
    Image.new("RGB", (16, 16)).save(report / "worst_test.png")
    return folder


def json_cell(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


@pytest.fixture
def results(tmp_path):
    """A folder with a profile, a latency with long names, and a result that is broken."""
    folder = tmp_path / "results"
    profile = [
        {"model": "mobileone_s0", "level": "model", "parameters": 2_078_504, "macs": 275_000_000},
        {"model": "mobileone_s0", "level": "layer", "name": "stem", "parameters": 1, "macs": 2},
    ]
    Result.new("profile", {"macs": "fvcore"}, profile).save(folder / "profile.json")
    latency = [
        {"model": model, "runtime": "eager", "min_ms": ms, "median_ms": 2 * ms, "threads": 1,
         "failure": None}
        for model, ms in (("mobileone_s0", 12.3456), ("a" * 80, 3.0), (EVIL, 4.0))
    ]  # fmt: skip
    how = {"statistic": "min_ms", "threads": 1, "runs": 5}
    Result.new("latency", how, latency).save(folder / "sub" / "latency.json")
    broken = {"format": "mobileone-result-1", "kind": EVIL, "rows": []}
    (folder / "broken.json").write_text(json.dumps(broken))
    (folder / "other.json").write_text("[1]")
    return folder


class Page(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(html)
        self.text = " ".join(self.texts)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_has_it_all_and_needs_nothing(results, run):
    path = write_report(results, run)
    assert path == results / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert (
        page.texts.index("Training")
        < page.texts.index("Artifacts")
        < page.texts.index("The family")
    )
    for words in (
        "mobileone_mu0", "top-1 (%), paper", "12.35",  # family, and what was measured
        "75.0 %", "2.08 M", "4.00\u00a0MB", "2.0e-07", "validation images",  # head and artifact
        "val/macro_f1 0.7", "coreml: left out: relative error 0.3 is above 0.25 <script>",
        "7 of 10 images right, 70.0%", "most frequent confusions",
        "Of the test, as the network saw them",
        "No artifact of the last checkpoint", "1 more rows are in the file",
        "is not a complete result",
    ):  # fmt: skip
        assert words in page.text, words
    # every picture inside, nothing fetched, nothing run
    sources = [value for _, name, value in page.attributes if name in ("src", "srcset")]
    assert len(sources) >= 3 + 1 + 1 + 1
    for source in sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG")
    links = {value for _, name, value in page.attributes if name == "href"}
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not {"script", "iframe", "object", "embed"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "script>alert(1)" in page.text  # shown, not run
    assert not re.search(r"url\(|@import|http", "".join(page.texts[:8]))


def test_a_run_folder_alone_is_enough(run, tmp_path):
    page = Page(write_report(run, output=tmp_path / "out").read_text())
    assert "Nothing was counted here" in page.text
    assert "No latency was measured here" in page.text
    assert "The folder has no results" in page.text


def test_what_a_run_lacks_is_said(run, results):
    for part in ("report", "checkpoints", "metrics"):
        shutil.rmtree(run / part)
    (run / "config.yaml").unlink()
    text = Page(write_report(results, run).read_text()).text
    for words in (
        "There is no confusion matrix",
        "There are no images of highest loss",
        "No curves",
        "No artifact of the best checkpoint",
        "No config.yaml",
    ):
        assert words in text, words
    assert "mobileone test --ckpt_path" in text
    assert "No run is shown" in Page(write_report(results).read_text()).text


def test_damaged_files_are_said(run, results):
    (run / "report" / "confusion_matrix.csv").write_text("true,a,b\na,1,2\n")
    (run / "checkpoints" / "best" / "manifest.json").write_text("{}")
    other = json.loads((results / "profile.json").read_text())
    (results / "undated.json").write_text(json.dumps({**other, "date": "yesterday"}))
    (results / "narrow.json").write_text(json.dumps({**other, "rows": [{"model": "x"}]}))
    text = Page(write_report(results, run).read_text()).text
    assert "undated.json is not a complete result" in text
    assert "(='yesterday') must be ISO 8601" in text
    assert "narrow.json is not a complete result: a row has no level, parameters, macs" in text
    assert "confusion_matrix.csv cannot be read" in text
    assert "is not a readable manifest" in text


def test_unverified_numbers_of_the_paper_are_marked(tmp_path):
    rows = [
        {"name": "sure", "paper_table": 2, "paper_ms": 1.53, "paper_verified": True},
        {"name": "unsure", "paper_table": 3, "paper_ms": 2.62, "paper_verified": False},
    ]
    Result.new("bottlenecks", {}, rows).save(tmp_path / "bottlenecks.json")
    page = Page(write_report(tmp_path).read_text())
    assert "2.62 (unverified)" in page.texts
    assert "1.53" in page.texts


def test_wrong_folders_are_named(results, run, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="`folder`"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not a run folder"):
        write_report(results, results)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither results nor a run"):
        write_report(tmp_path / "empty")
    said = error_of(capsys, "report", tmp_path / "nowhere")
    assert "mobileone report: error: `folder`" in said
    main(["report", str(results), "--run", str(run), "--output", str(tmp_path / "sent")])
    assert (tmp_path / "sent" / "report.html").is_file()
    assert "report.html" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"a\.html'\) must be a folder"):
        write_report(results, run, "a.html")


def browse(path):
    """What Chromium makes of a page: its tree at the end, and what it says on the console."""
    if BROWSER is None:
        pytest.skip("needs chromium, for example `apt-get install chromium`")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        done = subprocess.run(
            [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--disable-dev-shm-usage", "--disable-background-networking",
             "--enable-logging=stderr", f"--user-data-dir={profile}",
             "--virtual-time-budget=10000", "--dump-dom", path.as_uri()],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


# the page in a frame of a screen's width, without its policy, which forbids scripts to look at it
LOOK = """<!doctype html><iframe style="width: %dpx; height: 900px; border: 0"></iframe><script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument, view = frame.contentWindow;
  const all = [...page.querySelectorAll("body *:not(.wide *)")];
  const texts = [...page.querySelectorAll("p, td, th, figcaption, h2")];
  document.title = JSON.stringify({
    images: [...page.images].map(i => i.naturalWidth),
    width: page.documentElement.scrollWidth,
    wide: all.filter(e => e.getBoundingClientRect().right > view.innerWidth + 1).length,
    size: Math.min(...texts.map(e => parseFloat(view.getComputedStyle(e).fontSize))),
  });
};
frame.srcdoc = %s;
</script>"""


def look(text, width, folder):
    """How a browser lays a page out on a screen of that width."""
    path = folder / "look.html"
    content = re.sub(r"<meta http-equiv=[^>]*>", "", text)
    path.write_text(LOOK % (width, json.dumps(content).replace("</", "<\\/")))
    tree, _ = browse(path)
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", tree)[1]))


@pytest.mark.slow
def test_a_browser_shows_the_page_on_a_narrow_screen(results, run, tmp_path):
    width = 390
    path = write_report(results, run)
    _, complaints = browse(path)
    assert complaints == []
    seen = look(path.read_text(), width, tmp_path)
    assert len(seen["images"]) >= 6
    assert min(seen["images"]) > 0
    # nothing is wider than the screen, and text is large enough to be read
    assert seen["width"] <= width
    assert seen["wide"] == 0
    assert seen["size"] >= 12
