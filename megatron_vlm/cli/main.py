"""`megatron-vlm COMMAND ...`: finds the command; a user's error becomes one line and exit code 1, without a hang."""

import importlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence

from megatron_vlm import __version__
from megatron_vlm.errors import MegatronVLMError, nearest
from megatron_vlm.log import quiet_libraries
from megatron_vlm.packages import missing

# command -> (module with run(argv) -> exit code, what it does)
COMMANDS = {
    "launch": ("megatron_vlm.cli.launch", "raw data to a trained model on this machine: check, plan, start, export"),
    "train": ("megatron_vlm.cli.train", "train, evaluate (--skip-train) or describe (--dry-run) a model"),
    "data": ("megatron_vlm.cli.data", "build, check and preview training data"),
    "generate": ("megatron_vlm.cli.generate", "answer prompts with a checkpoint of any kind"),
    "evaluate": ("megatron_vlm.cli.evaluate", "answer held-out records and score the answers"),
    "chat": ("megatron_vlm.cli.chat", "talk to a model in the terminal, with pictures, beside another one"),
    "demo": ("megatron_vlm.cli.demo", "the same on a page in the browser"),
    "convert": ("megatron_vlm.cli.convert", "hf2mg, assemble, mg2hf, merge, pth2hf and verify"),
    "verify-card": (
        "megatron_vlm.cli.verify_card",
        "measure what is claimed of a family, on its tiny twin, without a GPU",
    ),
    "report": ("megatron_vlm.cli.report", "one page about a run, or several: curves, data, answers, config, starts"),
    "recipe": ("megatron_vlm.cli.recipe", "list, show and copy the packaged recipes"),
    "list-cfg": ("megatron_vlm.cli.recipe", "recipes by XTuner's names too: list-cfg [-p PATTERN]"),
    "copy-cfg": ("megatron_vlm.cli.recipe", "a recipe, or a config in XTuner's form, to a folder: copy-cfg NAME DIR"),
    "completion": (
        "megatron_vlm.cli.completion",
        'commands and flags at the tab key: eval "$(megatron-vlm completion bash)"',
    ),
}

INNER = {"list-cfg": ("list",), "copy-cfg": ("copy",)}
"""XTuner's names of commands of ``recipe``."""

# command -> what XTuner, ms-swift, LLaMA-Factory, InternVL and others call it
MEANT = {
    "launch": "sft pt pretrain finetune fine-tune ft run start rlhf lora qlora llamafactory-cli swift torchrun deepspeed",
    "train --dry-run": "estimate memory plan dry-run",
    "generate": "infer inference predict answer sample batch-infer",
    "chat": "cli talk dialog conversation",
    "demo": "app webui web-ui web-demo webchat serve deploy api gradio ui",
    "evaluate": "eval eval-refcoco mmbench benchmark score test lmms-eval",
    "convert mg2hf": "export save-hf to-hf mg2hf mcore2hf mcore2hg megatron2hf",
    "convert hf2mg": "import from-hf hf2mg hf2mcore hf2megatron",
    "convert merge": "merge merge-lora merge-peft-adapter fuse",
    "convert pth_to_hf": "pth-to-hf pth2hf",
    "convert verify": "verify compare",
    "data build": "build preprocess preprocess-data prepare tokenize shard webdataset log-dataset",
    "data check": "check check-custom-dataset validate lint doctor",
    "data preview": "preview show-data view visualize",
    "data stats": "stats statistics count",
    "recipe list": "list recipes configs list-dataset-format",
    "recipe copy": "copy init new",
    "report": "plot curve tensorboard logs summary",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; a failing rank of several ends its process at once (``_leave``)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # names that are no text are shown escaped, not a reason to fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: megatron-vlm COMMAND ...\n")
        print("\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()))
        return 0 if argv else 1
    if argv[0] == "--version":
        print(__version__)
        return 0
    quiet_libraries()
    try:
        if argv[0] not in COMMANDS:
            raise MegatronVLMError(f"unknown command {argv[0]!r}{_meant(argv[0]) or nearest(argv[0], COMMANDS)}")
        code = importlib.import_module(COMMANDS[argv[0]][0]).run([*INNER.get(argv[0], ()), *argv[1:]])
        sys.stdout.flush()  # here, where who has left can be told quietly
        _close_group()
        return code
    except MegatronVLMError as error:
        if not getattr(error, "echo", False):
            print(f"{_where()}error: {error}", file=sys.stderr, flush=True)
        return _leave(1)
    except KeyboardInterrupt:
        return _leave(130)
    except BrokenPipeError:  # who read the output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _leave(128 + signal.SIGPIPE)
    except ModuleNotFoundError as error:
        text = missing(error.name)
        text = f"error: `megatron-vlm {argv[0]}`: {text}" if text else traceback.format_exc()
        print(f"{_where()}{text}", file=sys.stderr, flush=True)
        return _leave(1)
    except Exception:
        print(f"{_where()}{traceback.format_exc()}", file=sys.stderr, flush=True)
        return _leave(1)


def _meant(word: str) -> str:
    """The command that does what others call ``word``, as a message says it; empty: none is known."""
    word = word.lower().replace("_", "-")
    command = next((command for command, words in MEANT.items() if word in words.split()), "")
    return f": `megatron-vlm {command}` does that" if command.partition(" ")[0] in COMMANDS else ""


def _close_group() -> None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()


def _where() -> str:
    return f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


def _leave(code: int) -> int:
    """Returns the exit code; as one rank of several, ends the process without waiting for the others.

    An error may be this rank's alone: its peers are then inside a collective, and an orderly exit would wait for them
    (in NCCL's destructors, in atexit handlers). They notice the lost connection, or torchrun stops them.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return code
    sys.stdout.flush()
    sys.stderr.flush()
    _end_children()
    os._exit(code)


def _end_children() -> None:
    """Data workers would outlive ``os._exit`` and hold the job's output open."""
    import multiprocessing

    for child in multiprocessing.active_children():
        child.kill()


if __name__ == "__main__":
    sys.exit(main())
