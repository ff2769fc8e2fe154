"""A rank that holds the models of `chat` or `demo` and answers, token by token, until its input ends.

    engine.Engine --a line of JSON each: ServeConfig, questions, stop--> stdin of every rank
                  <--a line of JSON each: ready, text, done, error, end-- stdout of rank 0

Every rank reads every question, so that none waits in a collective while the user thinks. What is asked is a conversation
whole: it is encoded as `generate` does, and so the tokens are the same.
"""

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TextIO

import torch

from megatron_vlm.data.formats.records import Record, RecordSource, VideoSettings
from megatron_vlm.data.images.pictures import decode_image
from megatron_vlm.data.row import EncodedSample
from megatron_vlm.data.sample import Turn
from megatron_vlm.data.shards.writer import load_record
from megatron_vlm.data.text.literal import unmarked
from megatron_vlm.data.types import Processor
from megatron_vlm.errors import ConfigError, MegatronVLMError
from megatron_vlm.log import quiet_libraries, setup_logging
from megatron_vlm.models.built import Model
from megatron_vlm.models.generation import SamplingConfig, stream
from megatron_vlm.parallel.batch import any_rank, together
from megatron_vlm.parallel.config import ParallelConfig
from megatron_vlm.parallel.rng import seed_step
from megatron_vlm.parallel.topology import build_topology, init_process_group
from megatron_vlm.processes import signal_with_parent
from megatron_vlm.serve.config import ServeConfig, ServedModel
from megatron_vlm.serve.opening import open_served
from megatron_vlm.serve.text_stream import TextStream
from megatron_vlm.training.answering.job import load_for_answers, opened
from megatron_vlm.training.device import start_device

Event = dict[str, Any]


class Served:
    """The models of a job, on this rank. A collective of its ranks, as are all methods.

    Args:
        config: the same on every rank.
        emit: takes what the front is told.
        stop: set where the user wants an answer to end, on any rank.

    Raises:
        MegatronVLMError: on every rank: a model that cannot be opened, or does not divide over the ranks.
    """

    def __init__(self, config: ServeConfig, emit: Callable[[Event], None], stop: threading.Event):
        self.config, self._emit, self._stop = config, emit, stop
        self.device = start_device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        init_process_group(self.device)
        with together(self.device):
            SamplingConfig.from_dict(config.sampling, "sampling")
        self._models: list[tuple[Model, Processor]] = []
        for model in config.models:
            self._load(model)

    def _load(self, served: ServedModel) -> None:
        config, device = self.config, self.device
        with opened(partial(open_served, served), config.verify_hashes, device) as source:
            with together(device):
                if self._models and config.pp > 1 and self._text(0).num_layers != source.config.text.num_layers:
                    raise ConfigError("models that answer side by side have equally many layers, or run with --pp 1")
            if not self._models:
                parallel = ParallelConfig(tensor_model_parallel_size=config.tp, pipeline_model_parallel_size=config.pp)
                self.topology = build_topology(parallel, num_layers=source.config.text.num_layers, device=device)
                seed_step(self.topology, seed=0, iteration=0)
            precision = config.precision or ("bf16" if device.type == "cuda" else "fp32")
            self._models.append(load_for_answers(source, self.topology, precision, config.data))

    def _text(self, number: int) -> Any:
        return self._models[number][0].config.text

    def answer(self, request: Mapping[str, Any]) -> None:
        """Answers a question of each model that it names, in turns a token each, and tells of every piece of text.

        Args:
            request: ``asks``: {model, turns [[role, text]], images, videos} each; ``number``: of the question, which keys its
                draws; ``sampling``: over the job's own.
        """
        try:
            with together(self.device):
                answers = [self._start(ask, request) for ask in request["asks"]]
            going = list(answers)
            while going:
                if any_rank(self._stop.is_set(), self.device):
                    for answer in going:
                        answer.end("stopped")
                    break
                going = [answer for answer in going if answer.step()]
        except MegatronVLMError as error:
            self._emit({"error": str(error)})

    def _start(self, ask: Mapping[str, Any], request: Mapping[str, Any]) -> "_Answer":
        number = ask["model"]
        # Files go with questions: what a model answered, or /system says, names none.
        asked = [(role, text if role == "user" else unmarked(text)) for role, text in ask["turns"]]
        turns = tuple(Turn(role=role, text=text) for role, text in asked)
        video = VideoSettings(max_frames=self.config.video_frames)
        source = RecordSource(path="", format="chat", root=os.curdir, video=video)
        record = Record(number=0, label="", turns=turns, images=tuple(ask["images"]), videos=tuple(ask["videos"]))
        model, processor = self._models[number]
        turns, files = load_record(source, record, processor.video)
        sample = processor.encode_prompt(turns, [decode_image(data, name) for name, data in files])
        sampling = SamplingConfig.from_dict({**self.config.sampling, **request.get("sampling", {})}, "sampling")
        room = self._text(number).longest - len(sample.input_ids)
        if room < 1:
            raise ConfigError(
                f"the conversation has {len(sample.input_ids)} tokens, the model {room + len(sample.input_ids)} positions: "
                "/reset starts anew"
            )
        sampling = sampling.replace(max_new_tokens=min(sampling.max_new_tokens, room))
        text = TextStream(processor.decode, self.config.stop_words)
        return _Answer(
            model, processor, sample, sampling, request["number"], text, lambda e: self._emit({"model": number, **e})
        )


class _Answer:
    """An answer that comes."""

    def __init__(
        self,
        model: Model,
        processor: Processor,
        sample: EncodedSample,
        sampling: SamplingConfig,
        number: int,
        text: TextStream,
        emit: Callable[[Event], None],
    ):
        self._text, self._emit, self._started = text, emit, time.monotonic()
        self._prompt_tokens = len(sample.input_ids)
        self._tokens = stream(
            model,
            [sample],
            sampling,
            stop_ids=processor.stop_ids,
            filler_token_id=processor.filler_token_id,
            first_number=number,
        )

    def step(self) -> bool:
        """Takes a token; returns whether more may come."""
        token = next(self._tokens, {0: -1})[0]
        if token is None or token < 0:
            self.end("end" if token is None else "length")
            return False
        if text := self._text.add(token):
            self._emit({"text": text})
        if self._text.stopped:
            self.end("stop word")
        return not self._text.stopped

    def end(self, why: str) -> None:
        """Tells that it is over: the model ended it, its length is reached, a stop word came, or the user stopped it."""
        self._tokens.close()
        if text := self._text.rest():
            self._emit({"text": text})
        seconds = time.monotonic() - self._started
        facts = {"tokens": len(self._text.ids), "prompt_tokens": self._prompt_tokens, "seconds": round(seconds, 3)}
        self._emit({"done": {"text": self._text.text, "why": why, **facts}})


def serve(
    config: ServeConfig, requests: Iterator[dict[str, Any]], emit: Callable[[Event], None], stop: threading.Event
):
    """Loads and answers until there are no more requests; every rank of a job calls it with the same ones."""
    served = Served(config, emit, stop)
    emit({"ready": [model.name for model in config.models]})
    for request in requests:
        served.answer(request)
        emit({"end": True})


def main() -> int:
    """A rank as a process: its front's lines in, events out."""
    signal_with_parent(signal.SIGKILL)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no event
    quiet_libraries()
    setup_logging()
    stop = threading.Event()

    def emit(event: Event) -> None:
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(event), file=out, flush=True)

    try:
        config = ServeConfig.from_dict(json.loads(sys.stdin.readline()))
        serve(config, _requests(sys.stdin, stop), emit, stop)
    except MegatronVLMError as error:
        emit({"fatal": str(error)})
    except BrokenPipeError:  # the front is gone
        pass
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
    out.close()
    os._exit(0)  # peers may hang in a collective, and there is nothing to save


def _requests(lines: TextIO, stop: threading.Event) -> Iterator[dict[str, Any]]:
    """Questions in order; a stop is heard while one is answered, and is over with the next question."""
    waiting: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def read() -> None:
        for line in lines:
            request = json.loads(line)
            if "stop" in request:
                stop.set()
                continue
            stop.clear()
            waiting.put(request)
        stop.set()
        waiting.put(None)

    threading.Thread(target=read, daemon=True).start()
    while (request := waiting.get()) is not None:
        yield request


if __name__ == "__main__":
    sys.exit(main())
