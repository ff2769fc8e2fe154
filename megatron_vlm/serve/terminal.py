"""`megatron-vlm chat` in a terminal, or line by line from a pipe.

read() --a line--> /command | question --Engine--> text as it comes, of two models in two columns
"""

import contextlib
import os
import shlex
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from megatron_vlm.errors import ConfigError, MegatronVLMError, TrainingError, nearest
from megatron_vlm.files import expand_text
from megatron_vlm.serve.conversation import Conversation
from megatron_vlm.serve.engine import Engine, Event

HELP = """/image FILE ...  pictures, videos or folders of frames for the next question
/reset           forget what was said (also RESET)
/system TEXT     a system turn before the conversation; without TEXT none
/save FILE       the conversation as json, which data build and generate --input read
/exit            leave (also EXIT, Ctrl-D); Ctrl-C ends an answer that comes"""
_WORDS = {"EXIT": "/exit", "RESET": "/reset"}  # as XTuner's users type them
_WHY = {"stopped": "stopped", "length": "cut: --max-new-tokens, or the model's positions"}


def chat(engine: Engine, conversation: Conversation) -> None:
    """Talks until the user leaves."""
    screen, interactive = Console(highlight=False), sys.stdin.isatty() and sys.stdout.isatty()
    names = conversation.names
    screen.print(f"{' | '.join(names)}: /help lists the commands", style="dim", markup=False, soft_wrap=True)
    for line in _lines(interactive):
        line = _WORDS.get(line.strip(), line.strip())
        try:
            if line.split(" ")[0] == "/exit":
                return
            if line.startswith("/") and "/" not in line.split()[0][1:]:
                screen.print(_command(conversation, line), style="dim", markup=False, soft_wrap=True)
            elif line:
                _answer(engine, conversation, line, screen)
        except TrainingError:  # nobody is left to ask
            raise
        except MegatronVLMError as error:
            screen.print(f"error: {error}", style="red", markup=False, soft_wrap=True)


def _command(conversation: Conversation, line: str) -> str:
    """Does what a command says; returns what is said of it."""
    name, _, rest = line.partition(" ")
    if name == "/help":
        return HELP
    if name == "/reset":
        conversation.reset()
        return "forgotten"
    if name == "/system":
        conversation.system = rest.strip() or None
        return f"system: {conversation.system or 'none'}"
    if name == "/save":
        if not rest.strip():
            raise ConfigError("/save FILE: name the file")
        return f"saved to {conversation.save(rest.strip())}"
    if name == "/image":
        try:
            whole = os.path.exists(expand_text(rest.strip() or os.curdir, "/image"))  # a name with blanks, as it is
            files = [rest.strip()] if rest.strip() and whole else shlex.split(rest)
        except ValueError as error:
            raise ConfigError(f"/image {rest}: {error}") from error
        for file in files:
            conversation.attach(file)
        return (
            "\n".join(f"with the next question: {path}" for path in conversation.attached) or "no picture is attached"
        )
    commands = [text.split()[0] for text in HELP.splitlines()]
    raise ConfigError(f"unknown command {name}{nearest(name, [*commands, '/help'])}")


def _answer(engine: Engine, conversation: Conversation, text: str, screen: Console) -> None:
    show = _side_by_side if len(conversation.names) > 1 else _one
    with _interrupts(engine.stop):
        engine.send(conversation.ask(text))
        done = show(screen, conversation.names, engine.events())
    conversation.answered([done[model]["text"] for model in range(len(conversation.names))])


@contextlib.contextmanager
def _interrupts(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C ends the answer, the second the program."""

    def first(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop()

    before = signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _one(screen: Console, names: Any, events: Iterator[Event]) -> dict[int, dict[str, Any]]:
    done: dict[int, dict[str, Any]] = {}
    for event in events:
        if "done" in event:
            done[event["model"]] = event["done"]
        else:
            sys.stdout.write(_harmless(event["text"]))
            sys.stdout.flush()
    print(flush=True)
    if (why := done[0]["why"]) in _WHY:
        screen.print(f"({_WHY[why]})", style="dim")
    return done


def _side_by_side(screen: Console, names: Any, events: Iterator[Event]) -> dict[int, dict[str, Any]]:
    texts, done = ["" for _ in names], {}

    def columns() -> Table:
        table = Table(expand=True)
        for name in names:
            table.add_column(Text(_harmless(name)), ratio=1, overflow="fold")
        table.add_row(*(Text(_harmless(text)) for text in texts))
        return table

    with Live(columns(), console=screen, transient=True) if screen.is_terminal else contextlib.nullcontext() as live:
        for event in events:
            if "done" in event:
                done[event["model"]] = event["done"]
            else:
                texts[event["model"]] += event["text"]
            if live is not None:
                live.update(columns())
    if screen.is_terminal:
        screen.print(columns())
    else:  # whole lines for whoever reads them
        for name, text in zip(names, texts):
            print(f"{name}: {_harmless(text)}", flush=True)
    return done


def _harmless(text: str) -> str:
    """Control characters written out: a model's text does not steer the terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else repr(c)[1:-1] for c in text)


def _lines(interactive: bool) -> Iterator[str]:
    """What the user types, with editing and the history of earlier sessions; the lines of a pipe as they are."""
    if not interactive:
        yield from sys.stdin
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory

    history: History = InMemoryHistory()
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state", "megatron_vlm")
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (folder / "chat_history").touch(mode=0o600)
        history = FileHistory(str(folder / "chat_history"))
    session: PromptSession[str] = PromptSession(history=history)
    while True:
        try:
            yield session.prompt(">>> ")
        except KeyboardInterrupt:  # of a line that is being typed
            continue
        except EOFError:
            return
