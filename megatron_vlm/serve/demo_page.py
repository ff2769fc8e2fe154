"""The page of `demo`: one file without a framework, which loads nothing from elsewhere. Texts are set as text, never as HTML."""

import json

from megatron_vlm.pages import escape
from megatron_vlm.training.metrics import charts as run_charts

_STYLE = """
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI","Noto Sans","Noto Sans CJK SC",sans-serif;margin:0 auto;max-width:76em;
padding:1em;color:#222;background:#fafafa}
h1{font-size:1.2em;margin:.2em 0}h2{font-size:1em;margin:.4em 0}
.row{display:flex;gap:1em}.row>div{flex:1;min-width:0}
.turn{white-space:pre-wrap;overflow-wrap:anywhere;border-radius:6px;padding:.5em .8em;margin:.4em 0;background:#fff;
border:1px solid #ddd}
.user{background:#e8f0fb}.error{background:#fdecea;border-color:#b00020}.note{color:#666;font-size:13px}
img{max-height:140px;max-width:100%;border:1px solid #888;border-radius:4px;margin:0 .4em .4em 0;vertical-align:top}
.pictures{margin-top:.4em}.pick{margin:.3em 0}.pick img{max-height:36px;margin:0 .4em 0 0;vertical-align:middle}
textarea{width:100%;box-sizing:border-box;font:inherit;min-height:4em}button,input{font:inherit;margin:.2em .3em .2em 0}
input[type=number]{width:6em}label{margin-right:1em}details{margin:.8em 0}svg{max-width:100%;height:auto}
"""
_SCRIPT = """
const by = id => document.getElementById(id), columns = [...document.querySelectorAll('.talk')];
let pictures = [], busy = false;
const send = (path, body, more = {}) => fetch(path, {method: 'POST', body, headers: {'X-Demo': '1', ...more}});
function add(column, kind, text) {
  const turn = document.createElement('div');
  turn.className = 'turn ' + kind; turn.textContent = text; column.append(turn);
  turn.scrollIntoView({block: 'nearest'}); return turn;
}
function tell(text) { by('status').textContent = text; }
function preview(parent, source) {
  const image = document.createElement('img');
  image.src = source; image.alt = ''; parent.append(image);
}
const place = id => '/picture/' + SESSION + '/' + id;
function attach(id) { pictures.push(id); preview(by('attached'), place(id)); }
async function problem(answer) {
  try { return (await answer.json()).error; } catch { return 'the server says ' + answer.status; }
}
by('file').addEventListener('change', async () => {
  for (const file of by('file').files) {
    if (file.size > MOST) { tell(file.name + ' has ' + file.size + ' bytes, the limit is ' + MOST); continue; }
    const answer = await send('/upload', file, {'X-Session': SESSION, 'X-Name': encodeURIComponent(file.name)});
    if (!answer.ok) { tell(await problem(answer)); continue; }
    attach((await answer.json()).id); tell('');
  }
  by('file').value = '';
});
function settings() {
  const values = {};
  for (const name of ['temperature', 'top_p', 'max_new_tokens', 'seed']) values[name] = Number(by(name).value);
  return values;
}
by('ask').addEventListener('submit', async event => {
  event.preventDefault();
  const text = by('text').value.trim();
  if (busy || !text) return;
  busy = true; by('send').disabled = true; by('stop').disabled = false; tell('waiting for the model');
  const question = JSON.stringify({session: SESSION, text, images: pictures, sampling: settings()});
  const turns = columns.map(column => {
    const turn = add(column, 'user', text);
    const shown = document.createElement('div');
    shown.className = 'pictures'; turn.append(shown);
    for (const id of pictures) preview(shown, place(id));
    return add(column, 'answer', '');
  });
  try {
    const answer = await send('/ask', question);
    if (!answer.ok) throw new Error(await problem(answer));
    tell('');
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = '';
    for (;;) {
      const {value, done} = await reader.read();
      if (done) break;
      const lines = (rest + value).split('\\n'); rest = lines.pop();
      for (const line of lines.map(JSON.parse)) {
        if (line.error) throw new Error(line.error);
        const turn = turns[line.model];
        if (line.text) { turn.textContent += line.text; turn.scrollIntoView({block: 'nearest'}); }
        if (line.done) {
          turn.textContent = line.done.text; turn.dataset.done = '1';
          const note = document.createElement('div'); note.className = 'note';
          note.textContent = line.done.tokens + ' tokens in ' + line.done.seconds + ' s (' + line.done.why + ')';
          turn.append(note);
        }
      }
    }
    by('text').value = ''; pictures = []; by('attached').replaceChildren();
  } catch (error) {
    for (const turn of turns) { turn.className = 'turn error'; turn.textContent = error.message; }
  }
  busy = false; by('send').disabled = false; by('stop').disabled = true;
});
by('text').addEventListener('keydown', event => {
  if (event.key === 'Enter' && !event.shiftKey) { event.preventDefault(); by('ask').requestSubmit(); }
});
by('stop').addEventListener('click', () => send('/stop', JSON.stringify({session: SESSION})));
by('reset').addEventListener('click', async () => {
  if (busy) return;
  await send('/reset', JSON.stringify({session: SESSION}));
  pictures = []; by('attached').replaceChildren(); columns.forEach(column => column.replaceChildren()); tell('');
});
for (const button of document.querySelectorAll('.example')) button.addEventListener('click', () => {
  by('text').value = button.dataset.text; pictures = []; by('attached').replaceChildren();
  for (const id of JSON.parse(button.dataset.images)) attach(id);
});
"""


def demo_page(
    names: list[str],
    charts: str,
    examples: list[tuple[str, str, list[str]]],
    sampling: dict[str, float],
    *,
    session: str,
    nonce: str,
    most_bytes: int,
) -> str:
    """Returns the page.

    Args:
        names: of the models, a column each.
        charts: HTML of the run's curves; empty: none.
        examples: (question, right answer, ids of pictures) of held-out records.
        sampling: what the fields start with.
        session: names this page's conversation.
        nonce: of its style and script, as the policy in the header says.
        most_bytes: of a picture.
    """
    columns = "".join(f'<div><h2>{escape(name)}</h2><div class="talk"></div></div>' for name in names)
    fields = "".join(
        f'<label>{name} <input type="number" id="{name}" value="{escape(value)}" step="any" min="0"></label>'
        for name, value in sampling.items()
    )
    buttons = "".join(_example(session, *example) for example in examples)
    script = f"const SESSION = '{session}', MOST = {most_bytes};{_SCRIPT}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><link rel="icon" href="data:,">'
        f'<title>megatron-vlm demo</title><style nonce="{nonce}">{_STYLE}'
        f"{run_charts.STYLE}"
        f'</style><body><h1>megatron-vlm demo</h1><div class="row">{columns}</div><form id="ask"><div id="attached"></div>'
        '<textarea id="text" placeholder="A question; Enter sends it, Shift-Enter begins a new line"></textarea>'
        '<input type="file" id="file" multiple accept="image/*"><button id="send">Send</button>'
        '<button type="button" id="stop" disabled>Stop</button><button type="button" id="reset">Reset</button>'
        f'<span id="status" class="note" role="status"></span></form><details><summary>Sampling</summary>{fields}</details>'
        + (f"<details open><summary>Held-out examples</summary>{buttons}</details>" if buttons else "")
        + (f"<details open><summary>The run</summary>{charts}</details>" if charts else "")
        + f'<script nonce="{nonce}">{script}</script></body></html>\n'
    )


def _example(session: str, question: str, answer: str, images: list[str]) -> str:
    shown = "".join(f'<img src="/picture/{session}/{number}" alt="">' for number in images)
    return (
        f'<p class="pick">{shown}<button type="button" class="example" data-text="{escape(question)}" '
        f'data-images="{escape(json.dumps(images))}">{escape(question)}</button> '
        f'<span class="note">right: {escape(answer)}</span></p>'
    )
