"""``megatron-vlm completion bash | zsh``: what a shell runs to complete commands, sub-commands, flags and recipes.

    eval "$(megatron-vlm completion bash)"     # in ~/.bashrc, or zsh in ~/.zshrc

The shell asks ``megatron-vlm completion words -- WORDS``; the words are read off each command's own ``--help``, so that there
is no second list of them. Where none fits, the shell completes files.
"""

import contextlib
import importlib
import io
import re
from collections.abc import Callable, Sequence

from megatron_vlm.cli.main import COMMANDS
from megatron_vlm.errors import ConfigError
from megatron_vlm.options import recipes

_BASH = """_megatron_vlm() {
  local IFS=$'\\n'
  COMPREPLY=($(megatron-vlm completion words -- "${COMP_WORDS[@]:1:$COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _megatron_vlm megatron-vlm
"""
_ZSH = f"autoload -Uz compinit bashcompinit && compinit -u && bashcompinit\n{_BASH}"
_NAMES_RECIPES = ("--config", "show", "copy")


def run(argv: Sequence[str]) -> int:
    """Prints a shell's script, or the words that it asks for: ``words -- WORDS``, of which the last is being typed.

    Raises:
        ConfigError: another shell.
    """
    if list(argv[:2]) == ["words", "--"]:
        print("\n".join(words(argv[2:])))
        return 0
    if list(argv) not in (["bash"], ["zsh"]):
        raise ConfigError(f"completion {' '.join(argv)}: name a shell, `megatron-vlm completion bash` or `zsh`")
    print(_BASH if argv[0] == "bash" else _ZSH, end="")
    return 0


def words(typed: Sequence[str]) -> list[str]:
    """What may stand at the end of ``typed``, whose last word is begun: commands, sub-commands, flags, names of recipes."""
    *before, begun = typed or [""]
    known: list[str] = []
    if not before:
        known = list(COMMANDS)
    elif before[-1] in _NAMES_RECIPES:
        known = recipes.names()
    elif before[0] in COMMANDS:
        command = importlib.import_module(COMMANDS[before[0]][0]).run
        usage, inner = _help(command), before[1:2]
        subs = re.findall(r"^ {4}([a-z]\w*)(?: |$)", usage, re.MULTILINE)
        if inner and inner[0] in subs:
            usage, subs = _help(command, *inner), []
        known = [*subs, *sorted(set(re.findall(r"--[\w-]+", usage)))]
    return [word for word in known if word.startswith(begun)]


def _help(command: Callable[[Sequence[str]], int], *words: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        command([*words, "--help"])
    return out.getvalue()
