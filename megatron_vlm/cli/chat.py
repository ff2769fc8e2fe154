"""`megatron-vlm chat` and the arguments of models that are served, which `demo` shares."""

import argparse
import os
import re
from collections.abc import Sequence

from megatron_vlm.cli.arguments import add_path, add_running, add_verify_hashes, data_of, sampling_of
from megatron_vlm.errors import ConfigError
from megatron_vlm.serve.config import ServeConfig
from megatron_vlm.serve.conversation import Conversation
from megatron_vlm.serve.engine import Engine
from megatron_vlm.serve.terminal import chat

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
USAGE = """A conversation with a model in the terminal: pictures and videos by path, several turns, two models side by side.
MODEL is a Hugging Face model, Megatron weights, a training checkpoint or an adapter; XTuner's flags work as in `xtuner chat`."""


def add_models(parser: argparse.ArgumentParser) -> None:
    """Adds what ``serve_config`` reads."""
    add = parser.add_argument
    add_path(parser, "model", "what to talk to", metavar="MODEL")
    add_path(parser, "--adapter", "an adapter of MODEL")
    add_path(parser, "--base", "where MODEL is an adapter: its base (default: where its files say)")
    add_path(parser, "--visual-encoder", "a tower, where MODEL is a language model; with --llava")
    add_path(parser, "--llava", "XTuner's folder of a projector and adapters, which joins MODEL and --visual-encoder")
    add_path(
        parser,
        "--compare",
        "another model, such as the base, that answers beside this one; with --llava another folder like it",
        metavar="BASE",
    )
    add_verify_hashes(parser)
    add("--system", metavar="TEXT", help="a system turn before the conversation")
    add("--prompt-template", metavar="NAME", help="as data.template=NAME (default: the model's own)")
    add("--stop-words", nargs="+", default=[], metavar="TEXT", help="texts that end an answer")
    add("--video-frames", type=int, metavar="N", help="most frames of a video (default: the model's own, else 32)")
    add_running(parser, max_new_tokens=512, precision=None)


def serve_config(args: argparse.Namespace) -> ServeConfig:
    """Returns the models of a command line, the one to compare with first."""
    if args.adapter is not None and args.base is not None:
        raise ConfigError("--adapter is of MODEL, and --base where MODEL is itself an adapter: give one")
    if args.llava is not None:
        model = {
            "load": args.model,
            "base": args.base,
            "llava": args.llava,
            "vision": args.visual_encoder,
            "llm_adapter": args.adapter,
        }
    else:
        adapted = {"load": args.adapter, "base": args.model} if args.adapter is not None else {}
        model = {"load": args.model, "base": args.base, "vision": args.visual_encoder, **adapted}
    models = [model]
    if args.compare is not None:
        models.insert(0, {**model, "llava": args.compare} if args.llava is not None else {"load": args.compare})
    for model in models:
        for path in filter(None, model.values()):
            if not os.path.exists(path) and not _HUB_ID.fullmatch(path):
                raise ConfigError(f"{path} does not exist: name a folder, or a model of the hub as OWNER/NAME")
    data = data_of(args)
    if args.prompt_template is not None:
        data["template"] = args.prompt_template
    return ServeConfig.from_dict(
        {
            "models": models,
            "data": data,
            "sampling": sampling_of(args),
            **{
                name: getattr(args, name)
                for name in ("tp", "pp", "precision", "device", "verify_hashes", "stop_words", "video_frames")
            },
        }
    )


def run(argv: Sequence[str]) -> int:
    """Talks and returns the exit code."""
    parser = argparse.ArgumentParser(prog="megatron-vlm chat", description=USAGE)
    add_models(parser)
    what = "pictures or videos of the first question, also after /reset"
    add_path(parser, "--image", what, nargs="+", default=[], metavar="FILE")
    args = parser.parse_args(argv)
    config = serve_config(args)
    conversation = Conversation([model.name for model in config.models], args.system, args.image)
    print(f"loading {' and '.join(conversation.names)} ...", flush=True)
    with Engine(config) as engine:
        engine.ready()
        chat(engine, conversation)
    return 0
