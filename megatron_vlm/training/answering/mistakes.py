"""A page of the answers that are wrong, each with its pictures; self-contained, whatever texts and names are."""

from collections.abc import Sequence

from megatron_vlm.data.formats.records import OWN_VIDEO, VideoSettings
from megatron_vlm.data.images.pictures import decode_image
from megatron_vlm.errors import DataError
from megatron_vlm.pages import escape, page, picture, table
from megatron_vlm.scoring.metrics import LOWER_IS_BETTER, METRICS
from megatron_vlm.training.answering.questions import Question

_REFERENCES = 10
_STYLE = "td:first-child{color:#555;min-width:7em}td{white-space:pre-wrap}"


def mistakes_page(
    model: str,
    asked: Sequence[Question],
    texts: Sequence[str],
    metrics: Sequence[str],
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    most: int,
    video: VideoSettings = OWN_VIDEO,
) -> str:
    """Returns the page.

    Args:
        model: its name.
        asked, texts: questions and answers.
        metrics: their values stand beside each answer; the first decides what is a mistake.
        head, rows: of the table of scores.
        most: mistakes on the page, the worst first.
        video: how the model takes frames.
    """
    right = 0.0 if metrics[0] in LOWER_IS_BETTER else 1.0
    values = [METRICS[metrics[0]](text, q.references)[0] for q, text in zip(asked, texts)]
    wrong = [place for place, value in enumerate(values) if abs(value - right) > 1e-9]
    wrong.sort(key=lambda place: -abs(values[place] - right))
    cards = "".join(_card(asked[place], texts[place], metrics, video) for place in wrong[:most])
    shown = f", the {most} worst of them here" if len(wrong) > most else ""
    return page(
        f"Mistakes of {model}",
        f"<h1>Mistakes of {escape(model)}</h1>{table(head, rows)}<p>{len(wrong)} of {len(asked)} answers are not fully right by "
        f"{escape(metrics[0])}{shown}. Brackets: where the value lies with 95 % certainty.</p>{cards}",
        style=_STYLE,
    )


def _card(question: Question, text: str, metrics: Sequence[str], video: VideoSettings) -> str:
    references = list(dict.fromkeys(question.references))
    more = f" and {len(references) - _REFERENCES} more" if len(references) > _REFERENCES else ""
    try:
        turns, files = question.load(video)
        pictures = [picture(decode_image(data, name), name) for name, data in files]
    except DataError as error:  # it was there when the question was asked
        turns, pictures = question.record.turns[:-1], [f'<p class="bad">{escape(error)}</p>']
    scores = ", ".join(f"{name} {METRICS[name](text, question.references)[0]:.4g}" for name in metrics)
    rows = [(turn.role, turn.text) for turn in turns]
    rows += [("answer", text), ("right", " | ".join(references[:_REFERENCES]) + more), ("scores", scores)]
    where = f"{question.where['shard']}, {question.where['key']}"
    return (
        f'<div class="card"><h3>{escape(question.name)}</h3><p class="counts">{escape(where)}'
        f"{escape(f', subset {question.subset}') if question.subset else ''}</p>"
        f'<div class="images">{"".join(pictures)}</div>{table((), rows)}</div>'
    )
