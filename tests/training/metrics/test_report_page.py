"""The report's page: nothing runs or is fetched, whatever a run is called; every part is there."""

from html.parser import HTMLParser

from PIL import Image

from megatron_vlm.training.metrics.report_page import report_page
from megatron_vlm.training.metrics.run_files import RunFiles
from tests.training.metrics.test_run_files import EVIL, write_run

ALLOWED = {"html", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "span", "div", "figure", "figcaption", "img", "table",
           "tr", "td", "th", "details", "summary", "pre", "svg", "text", "line", "polyline", "path"}  # fmt: skip


class Reader(HTMLParser):
    """Texts and tags; fails on anything that could run or reach out."""

    def __init__(self, page):
        super().__init__()
        self.texts, self.tags, self.open = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        assert tag in ALLOWED, tag
        for name, value in attributes:
            assert not name.startswith("on") and name != "href", (tag, name)
            assert name != "src" or value.startswith("data:image/png;base64,")
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


def test_everything_of_a_run_is_there_and_nothing_runs(tmp_path):
    page = report_page([RunFiles.read(write_run(tmp_path / EVIL.replace("/", "|")))], renew_seconds=3)
    seen = Reader(page)
    text = " ".join(seen.texts)
    for words in ("loss per supervised token", "gradient norm", "learning rate", "tokens a second", "model FLOPs utilisation",
                  "peak memory", "eval_exact_match", "left out: too long", "62.50%", "75.00%", "Starts", "config.yaml", "答 39",
                  "Versions", "12,345", "held out: 0.05 at 40"):  # fmt: skip
        assert words in text, words
    assert "答 0" in text and "答 1 " not in text  # the first answer and the last ones
    assert "loss scale" not in text and seen.tags.count("svg") == 9 and "No such file" in text
    assert page.count("<script") == 0 and 'content="3"' in page


def test_several_runs_lie_over_each_other(tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    runs = [RunFiles.read(write_run(tmp_path / name, shift=shift)) for name, shift in (("one", 0.0), ("two", 1.0))]
    runs[0].answers[:] = [{"iteration": 0, "prompt": "What?", "images": [str(tmp_path / "a.png")], "answer": "red"}]
    text = report_page(runs)
    seen = " ".join(Reader(text).texts)
    assert "one, training, smoothed" in seen and "two, held out" in seen and seen.count("Starts") == 2
    assert 'stroke-dasharray="7 3"' in text and "a.png" in seen
