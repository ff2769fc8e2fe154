"""Chat templates of model folders: found, and rendered in a process of its own with a bound on time, memory and output.

A template is a program that a stranger wrote. Jinja's sandbox keeps it from files and attributes, but not from loops in loops or
from texts that double; so a short-lived process without this one's memory runs it, and is ended where it takes too much.
"""

import functools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vlm.errors import ConfigError
from megatron_vlm.files import describe, read_json, read_text

CPU_SECONDS = 2
WALL_SECONDS = 60  # a loaded machine may take its time to start a process; the time of the CPU is what counts
MEMORY = 1 << 30
MAX_TEMPLATE = 1 << 20
MAX_OUTPUT = 1 << 20

# The environment is that of transformers' ``apply_chat_template``.
_CHILD = """
import json, resource, sys
given = json.load(sys.stdin)
for limit, value in ((resource.RLIMIT_CPU, given["cpu"]), (resource.RLIMIT_AS, given["memory"]), (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(limit, (value, value))
try:
    import jinja2, jinja2.ext, jinja2.sandbox
    def refuse(message):
        raise jinja2.exceptions.TemplateError(message)
    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = refuse
    env.globals["strftime_now"] = lambda form: "today"
    size, parts = 0, []
    for part in env.from_string(given["template"]).generate(**given["variables"]):
        size += len(part)
        if size > given["output"]:
            raise ValueError(f"it writes more than {given['output']} characters")
        parts.append(part)
    answer = {"text": "".join(parts)}
except MemoryError:
    answer = {"error": f"it takes more than {given['memory'] >> 20} MiB"}
except RecursionError:
    answer = {"error": "it is nested too deeply"}
except Exception as error:
    answer = {"error": f"{type(error).__name__}: {error}"[:500]}
sys.stdout.buffer.write(json.dumps(answer).encode())
"""


def chat_template(hf_dir: Path) -> str | None:
    """Returns the processor's chat template, from wherever transformers has kept it over the years.

    Raises:
        ConfigError: it is no text, or beyond the limit.
    """
    if (hf_dir / "chat_template.jinja").is_file():
        return read_text(hf_dir / "chat_template.jinja", max_bytes=MAX_TEMPLATE)
    for name in ("chat_template.json", "processor_config.json"):
        if (hf_dir / name).is_file() and "chat_template" in (settings := read_json(hf_dir / name)):
            template = settings["chat_template"]
            if template is not None and not isinstance(template, str):
                kind = type(template).__name__
                raise ConfigError(f"{describe(hf_dir / name)}: 'chat_template' must be a text, this is {kind}")
            return template
    return None


def render(template: str, messages: Sequence[Mapping[str, Any]], hf_dir: Path, **variables: Any) -> str:
    """Returns what a template makes of a conversation, as transformers' ``apply_chat_template`` without tokens.

    Args:
        template: of the folder ``hf_dir``, which errors name.
        messages: as transformers takes them.
        variables: what else it may use: ``bos_token`` ...

    Raises:
        ConfigError: an error in it, or more time, memory or output than a template needs.
    """
    variables = {"add_generation_prompt": False, "tools": None, "documents": None, **variables}
    answer = _run(template, json.dumps({"messages": messages, **variables}))
    if "text" not in answer:
        raise ConfigError(
            f"the chat template of {describe(hf_dir)} cannot be used: {answer['error']}; take the one of the published model"
        )
    return answer["text"]


@functools.lru_cache(64)  # a folder's is asked for by every part of a program that reads the folder
def _run(template: str, variables: str) -> dict[str, str]:
    given = {"template": template, "variables": json.loads(variables), "cpu": CPU_SECONDS, "memory": MEMORY}
    text = json.dumps({**given, "output": MAX_OUTPUT})
    command = [sys.executable, "-I", "-c", _CHILD]
    try:
        done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=WALL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"it runs for more than {WALL_SECONDS} s"}
    if done.returncode < 0:
        return {"error": f"it runs for more than {CPU_SECONDS} s, or takes more than {MEMORY >> 20} MiB"}
    if done.returncode or not done.stdout:
        return {"error": done.stderr.decode(errors="replace").strip()[-300:] or f"exit code {done.returncode}"}
    return json.loads(done.stdout)
