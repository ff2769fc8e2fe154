"""One self-contained page about a run, or several over each other: curves, data, answers with their pictures, config, starts.

RunFiles --report_page--> HTML, which runs nothing and fetches nothing
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_vlm.data.images.pictures import decode_image
from megatron_vlm.errors import MegatronVLMError
from megatron_vlm.files import read_bytes
from megatron_vlm.pages import escape, page, picture, table
from megatron_vlm.training.metrics import charts
from megatron_vlm.training.metrics.charts import Line, chart
from megatron_vlm.training.metrics.run_files import RunFiles, smoothed

# key of metrics.jsonl -> title
_CURVES = {
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "tokens_per_second": "tokens a second, all ranks",
    "step_seconds": "seconds a step",
    "memory_gib": "peak memory of a rank, GiB",
    "mfu": "model FLOPs utilisation",
    "tflops": "model TFLOP/s, all ranks",
    "loss_scale": "loss scale",
}
_PART_RATES = ("lr_vision", "lr_connector")
_ANSWERS = 12  # answers shown of a prompt: the first, and the last ones
_STYLE = (
    charts.STYLE + "pre{background:#f6f6f6;padding:.6em;overflow:auto}details{margin:.6em 0}summary{cursor:pointer}"
)


def report_page(runs: Sequence[RunFiles], *, renew_seconds: int | None = None) -> str:
    """Returns the page; curves of several runs lie over each other, what else there is follows run by run.

    Args:
        runs: at least one.
        renew_seconds: see ``pages.page``.
    """
    names = _names(runs)
    losses, *scores = results(runs)
    curves = [losses, *(_curve(runs, names, key, title) for key, title in _CURVES.items()), *scores]
    body = f'<h1>{escape(", ".join(names))}</h1>{_summary(runs, names)}<div class="charts">{"".join(curves)}</div>'
    for run, name in zip(runs, names):
        body += (f"<h1>{escape(name)}</h1>" if len(runs) > 1 else "") + _data(run) + _answers(run) + _starts(run)
        body += f"<details><summary>config.yaml</summary><pre>{escape(run.config)}</pre></details>"
    return page(f"Run {', '.join(names)}", body, style=_STYLE, renew_seconds=renew_seconds)


def results(runs: Sequence[RunFiles]) -> list[str]:
    """Figures: losses, raw, smoothed and held out, then each score that a run has."""
    names, scores = _names(runs), dict.fromkeys(score for run in runs for score in run.scores)
    return [_losses(runs, names), *(_points(runs, names, score) for score in scores)]


def _names(runs: Sequence[RunFiles]) -> list[str]:
    """The last part of each folder, or all of it where two are alike."""
    short = [run.folder.resolve().name for run in runs]
    return short if len(set(short)) == len(short) else [str(run.folder) for run in runs]


def _summary(runs: Sequence[RunFiles], names: Sequence[str]) -> str:
    rows: list[Sequence[object]] = []
    for name, run in zip(names, runs):
        last: dict[str, Any] = run.steps[-1] if run.steps else {}
        losses, held = run.series("loss"), run.series("eval_loss")
        start = run.starts[-1] if run.starts else {}
        best = min(held, key=lambda point: point[1], default=None)
        rows.append(
            (
                name,
                f"{last.get('iteration', 0)} of {start.get('total', '?')}",
                f"{smoothed([loss for _, loss in losses])[-1]:.4f}" if losses else "",
                f"{held[-1][1]:.4f}" if held else "",
                f"{best[1]:.4f} at {best[0]:g}" if best else "",
                f"{sum(step['tokens'] for step in run.steps):,}",
                f"{sum(step['step_seconds'] for step in run.steps) / 3600:.2f}",
                f"{start.get('world', '?')} x {start.get('device', '?')}, {start.get('layout', '?')}",
            )
        )
    head = ("run", "iteration", "loss, smoothed", "held-out loss", "lowest", "tokens", "hours of steps", "on")
    return table(head, rows)


def _losses(runs: Sequence[RunFiles], names: Sequence[str]) -> str:
    lines = []
    for number, (run, name) in enumerate(zip(runs, names)):
        raw = run.series("loss")
        smooth = list(zip((x for x, _ in raw), smoothed([y for _, y in raw])))
        lines += [
            Line(label=f"{name}, each step", points=raw, run=number, faint=True),
            Line(label=f"{name}, training, smoothed", points=smooth, run=number),
            Line(label=f"{name}, held out", points=run.series("eval_loss"), run=number, marks=True),
        ]
    return chart("loss per supervised token", lines)


def _curve(runs: Sequence[RunFiles], names: Sequence[str], key: str, title: str) -> str:
    lines = [Line(label=n, points=run.series(key), run=i) for i, (run, n) in enumerate(zip(runs, names))]
    if key == "lr" and len(runs) == 1:
        found = [(part, runs[0].series(part)) for part in _PART_RATES]
        lines += [Line(label=p, points=s, run=i) for i, (p, s) in enumerate(found, 1) if s != runs[0].series("lr")]
    if key == "loss_scale" and all(y == 1 for line in lines for _, y in line.points):
        return ""
    return chart(title, lines, percent=key == "mfu")


def _points(runs: Sequence[RunFiles], names: Sequence[str], score: str) -> str:
    lines = []
    for number, (run, name) in enumerate(zip(runs, names)):
        points = run.series(score)
        lines += [Line(label=name, points=points, run=number), Line(label=name, points=points, run=number, marks=True)]
    return chart(score, lines)


def _data(run: RunFiles) -> str:
    data, steps = run.data, run.steps
    if not data:
        return ""
    excluded = sum((data.get("excluded") or {}).values())
    used = data["samples"] - excluded
    facts = [
        ("samples", f"{data['samples']:,}"),
        ("used", f"{used:,}, {data['tokens']:,} tokens, {data['supervised_tokens']:,} supervised"),
        ("shortened", f"{data.get('truncated', 0):,}"),
        *((f"left out: {reason}", f"{number:,}") for reason, number in run.left_out.most_common()),
        ("trained so far", f"{steps[-1]['consumed_samples'] if steps else 0:,} samples, "
                           f"{sum(step['images'] for step in steps):,} images"),
    ]  # fmt: skip
    html = f"<h2>Data</h2>{table((), facts)}"
    if run.shares:
        rows = [(name, f"{asked:.2%}", f"{got:.2%}", f"{number:,}") for name, asked, got, number in run.shares]
        html += table(("source", "share asked for", "share as trained", "samples"), rows)
    return html


def _answers(run: RunFiles) -> str:
    """Answers of each prompt over time, under the prompt's pictures."""
    prompts: dict[tuple[str, tuple[str, ...]], list[dict[str, Any]]] = {}
    for line in run.answers:
        prompts.setdefault((line["prompt"], tuple(line.get("images") or ())), []).append(line)
    html = "<h2>Answers</h2>" if prompts else ""
    for (text, images), lines in prompts.items():
        kept = lines if len(lines) <= _ANSWERS else [lines[0], *lines[1 - _ANSWERS :]]
        rows = [(line["iteration"], line.get("answer")) for line in kept]
        pictures = "".join(_picture(name) for name in images)
        html += f'<h3>{escape(text)}</h3><div class="images">{pictures}</div>{table(("iteration", "answer"), rows)}'
    return html


def _picture(name: str) -> str:
    try:
        return picture(decode_image(read_bytes(name), name), Path(name).name)
    except MegatronVLMError as error:  # it may have been moved since
        return picture(Image.new("RGB", (32, 32), "#ddd"), str(error))


def _starts(run: RunFiles) -> str:
    if not run.starts:
        return ""
    keys = ("time", "iteration", "total", "world", "device", "layout", "precision")
    rows = [[start.get(key, "") for key in keys] for start in run.starts]
    versions = (run.starts[-1].get("versions") or {}).items()
    trained = (run.starts[-1].get("trained") or {}).items()
    return (
        f"<h2>Starts</h2>{table(('time', 'from iteration', 'to', 'ranks', 'device', 'layout', 'precision'), rows)}"
        f"<h2>Trained parameters</h2>{table((), [(name, f'{number:,}') for name, number in trained])}"
        f"<h2>Versions</h2>{table((), versions)}"
    )
