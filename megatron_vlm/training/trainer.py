"""Trainer: the one loop.

    RunConfig --setup--> model, optimizer, loader, state --train()--> { rows -> start_step -> metrics -> evaluate -> save }

Every rank runs the same code; the source rank of each replica reads the data, rank 0 writes the reports.
"""

import dataclasses
import os
from contextlib import ExitStack

import torch
import torch.distributed as dist

from megatron_vlm.conversion.load import outline
from megatron_vlm.data.row import Row
from megatron_vlm.data.stream.counts import check_share
from megatron_vlm.data.stream.loader import DataState, RowLoader, StepRows, evaluation_rows
from megatron_vlm.log import get_logger, setup_logging
from megatron_vlm.parallel.batch import any_rank, share_rows, together
from megatron_vlm.parallel.heartbeat import Heartbeat
from megatron_vlm.parallel.rng import seed_step
from megatron_vlm.parallel.topology import build_topology, init_process_group
from megatron_vlm.progress import WarmUp
from megatron_vlm.training.answering.during import Asking
from megatron_vlm.training.balance import balanced, costs_of
from megatron_vlm.training.checkpoint.best import LOSS, Best
from megatron_vlm.training.checkpoint.load import find_checkpoint, load_checkpoint
from megatron_vlm.training.checkpoint.output_check import check_room, check_writable
from megatron_vlm.training.checkpoint.run_lock import RunLocks
from megatron_vlm.training.checkpoint.save import Origin
from megatron_vlm.training.checkpoint.saving import Saver
from megatron_vlm.training.device import start_device
from megatron_vlm.training.due import Due
from megatron_vlm.training.evaluate import EvalResult, evaluate
from megatron_vlm.training.metrics.facts import Facts
from megatron_vlm.training.metrics.logger import Metrics, show_sample
from megatron_vlm.training.metrics.reports import StepReports, Unread
from megatron_vlm.training.optimizer.build import build_optimizer, set_learning_rates, wrap_model
from megatron_vlm.training.optimizer.config import Schedule
from megatron_vlm.training.optimizer.main_parameters import fill_main
from megatron_vlm.training.peft_run import check_source, open_run, outline_adapted
from megatron_vlm.training.run_config import RunConfig
from megatron_vlm.training.step import start_step
from megatron_vlm.training.stop import STOPPED, StopSignal

log = get_logger(__name__)


class Trainer:
    """One training run.

    Args:
        config: all of it.
        heartbeat: of this process; it is told what the run does.

    Attributes:
        iteration: updates done, skipped ones included.
        num_skipped: updates skipped because fp16 gradients overflowed; they do not advance the schedule.
        data_state: where the data stands after ``iteration``; None before the first.

    Raises:
        MegatronVLMError: on every rank, where the run cannot start on any of them.
    """

    def __init__(self, config: RunConfig, heartbeat: Heartbeat):
        config.check_world(int(os.environ.get("WORLD_SIZE", "1")))
        self.config, self.heartbeat = config, heartbeat
        heartbeat.timeout, heartbeat.folder = config.parallel.heartbeat_timeout_seconds, config.output_dir
        self.device = start_device(config.training.torch_device)
        torch.backends.cuda.matmul.allow_tf32 |= config.training.tf32
        minutes, start = config.parallel.distributed_timeout_minutes, config.parallel.start_timeout_seconds
        init_process_group(self.device, minutes, heartbeat, start)
        check_writable(config, self.device)
        self.closing, self.locks = ExitStack(), RunLocks()
        with together(self.device):  # before the first file of the run is touched
            config.check_device(self.device.type)
            if dist.get_rank() == 0 and not config.training.skip_train:
                self.locks = RunLocks(config.run_folders)
        self.closing.callback(self.locks.close)
        setup_logging(dist.get_rank(), config.output_dir / "train.log")
        self.stop = StopSignal()
        self.closing.callback(self.stop.close)
        heartbeat.on_orphan = self._stop_as_orphan
        self.iteration = self.num_skipped = self.previous_samples = 0
        self.seed = config.training.seed
        self.data_state: DataState | None = None
        self.loader: RowLoader | None = None
        self.scores: dict[str, float] = {}  # of this iteration
        self.metrics: Metrics | None = None
        try:
            self._open()
            self._build()
            check_room(config, self.model, trained_only=self.origin.peft is not None)
            self._restore()
            self._start_saves()
            self._start_data()
            self._start_reports()
        except BaseException:
            self.stop.ignore()
            self.close()
            raise

    def train(self) -> int:
        """Runs to the end; returns the exit code: 0, or 143 after a signal, everything saved."""
        try:
            return self._train()
        except BaseException:
            self.stop.ignore()
            self.reports.give_up()
            raise

    def _train(self) -> int:
        if self.config.training.skip_train:
            self.evaluate()
            self.show_answers()
            return 0
        self.show_answers()
        stopping, warm_up = False, WarmUp()
        while not stopping and not self._due.finished:
            self.reports.begin()
            self.heartbeat.at("data", self.iteration + 1)
            rows = self._next_rows()
            self.heartbeat.at("step")
            seed_step(self.topology, self.seed, self.iteration)
            rates = self.schedule.at(self.iteration - self.num_skipped)
            set_learning_rates(self.optimizer, rates, self.config.optimizer.weight_decay)
            with warm_up:
                step = start_step(self.model, self.optimizer, rows)
            self._commit(step.skipped)
            self.reports.add(Unread(step, self.iteration, rates, self.consumed_samples, self.sample_ids))
            if self._due.evaluation:
                self.evaluate()
            if self._due.answers:
                self.show_answers()
            stopping = any_rank(self.stop.requested, self.device)
            self.saver.advance()
            if stopping or self._due.save:
                self.save(last=stopping or self._due.finished)
        self.reports.flush()
        done = f"{self.iteration} iterations, {self.consumed_samples} samples, {self.num_skipped} updates skipped"
        if stopping:
            log.warning("stopped by a signal after %s; exit code %d", done, STOPPED)
            return STOPPED
        log.info("done: %s", done)
        return 0

    def evaluate(self) -> EvalResult:
        """Loss over ``data.valid``, recorded in the metrics."""
        self.reports.flush()
        self.heartbeat.at("evaluation")
        config, topology, data = self.config, self.topology, self.config.data
        seed_step(topology, self.seed, self.iteration)  # sequence parallel layers ask for seeded generators
        limit = config.training.eval_iters
        rows = None
        if topology.is_source:
            rows = evaluation_rows(
                data,
                self.processor,
                paths=data.valid,
                dp_rank=topology.dp_rank,
                dp_size=topology.dp,
                micro_batch_size=config.training.micro_batch_size,
                multiple_of=config.row_multiple,
                fill_to=config.row_fill,
                max_rows=limit * config.num_microbatches_per_batch if limit else None,
                output_dir=config.output_dir,
            )
        result = evaluate(self.model, rows, fill_to=config.row_fill)
        if self.metrics is not None:
            self.metrics.evaluation(self.iteration, result)
        self.scores[LOSS] = result.loss
        return result

    def show_answers(self) -> None:
        """Answers ``evaluate.prompts`` and ``evaluate.file`` as the model now does."""
        if self.asking:
            self.reports.flush()
            self.heartbeat.at("answers")
            seed_step(self.topology, self.seed, self.iteration)
            self.scores |= self.asking.ask(self.model, self.iteration, self.metrics)

    def save(self, last: bool = False) -> None:
        """Writes a checkpoint, or starts to, where ``checkpoint.save`` says so; ``last``: of this run.

        Raises:
            CheckpointError: on every rank: it cannot be written, and ``checkpoint.on_save_failure`` is to stop.
        """
        if self.config.checkpoint.save is None:
            log.warning("checkpoint.save is not set: nothing is saved")
            return
        assert self.data_state is not None
        self.reports.flush()  # a step that is not finite is never saved
        self.heartbeat.at("save")
        state = {
            "iteration": self.iteration,
            "num_skipped": self.num_skipped,
            "consumed_samples": self.consumed_samples,
            "epochs": self.consumed_samples / self.samples_per_epoch,
            "seed": self.seed,
            "data": self.data_state.to_dict(),
            "config": self.config.to_dict(),
        }
        best = self.config.checkpoint.keep_best
        if self.origin.best is not None and best in self.scores:
            self.origin.best.saving(self.iteration, self.scores[best])
        self.saver.save(state, last)

    @property
    def consumed_samples(self) -> int:
        """Samples of all steps so far, holes included."""
        return self.data_state.consumed_samples if self.data_state is not None else 0

    def close(self) -> None:
        """Ends data workers and closes files; safe after a failure."""
        self.closing.close()

    def _stop_as_orphan(self) -> None:
        log.warning("torchrun, which started this rank, is gone: the run finishes its step, saves and stops")
        self.stop.requested = True

    # ---- setup, in this order ----

    def _open(self) -> None:
        """Opens what ``checkpoint.load`` names: its family, config and files decide all that follows."""
        config = self.config
        self.heartbeat.at("load")
        self.found = find_checkpoint(config.checkpoint, self.device)
        with together(self.device):  # rank 0 first: a model from the hub is fetched once
            if dist.get_rank() == 0:
                opened = open_run(config, self.found)
        with together(self.device):
            if dist.get_rank() != 0:
                opened = open_run(config, self.found)
        found, (self.source, peft, self.found) = self.found, opened
        self.closing.callback(self.source.close)
        with together(self.device):
            hf_files = check_source(config, self.source, found, start=self.found.iteration if self.found else 0)
        self.peft = peft
        self.origin = Origin(hf_files=hf_files, loaded_from=found.folder if found else None, peft=peft)
        config.check_model(self.source.config)
        with together(self.device):
            self.processor = self.source.spec.open_processor(self.source.hf_dir, config.data)
            self.asking = Asking(config.evaluate, self.processor, self.source.config.text.longest)

    def _build(self) -> None:
        """Builds topology and stages (weights loaded unless a checkpoint has them; adapters added), buffers and optimizer."""
        source, plan = self.source, self.peft.plan if self.peft else None
        self.config = balanced(self.config, source.config, self.processor, plan, self.device)
        config, layers = self.config, source.config.text.num_layers
        self.topology = build_topology(config.parallel, num_layers=layers, device=self.device)
        options = config.model_options
        cut_first = (
            config.parallel.fully_sharded
        )  # then filled: nothing is whole on the device, or in the host's memory
        with together(self.device):
            if self.peft is not None:
                self.model, fill = outline_adapted(source, self.peft, self.topology, options, config.training.seed)
            else:
                self.model, fill = outline(source, self.topology, options)
            fills = self.peft is not None or self.found is None
            if fills and not cut_first:
                fill(self.model)
        self.optimizer = None
        if cut_first or not config.training.skip_train:
            self.model = wrap_model(self.model, config.parallel)
        if fills and cut_first:
            with together(self.device):
                fill(self.model)
        if not config.training.skip_train:
            self.optimizer = build_optimizer(config.optimizer, self.model, config.parallel.host_share)
            if self.found is None:
                with together(self.device):
                    fill_main(source, self.model, self.optimizer, self.peft.tensors if self.peft else {})

    def _restore(self) -> None:
        """Continues a checkpoint, or says that only weights are taken from it."""
        if self.found is None:
            return
        load_checkpoint(self.config.checkpoint, self.found, self.model, self.optimizer)
        state = self.found.state
        if self.found.weights_only:
            log.info("only the weights are taken; started anew: optimizer, schedule, iteration, data order and seed")
            return
        self.iteration, self.num_skipped = state["iteration"], state["num_skipped"]
        self.data_state = DataState.from_dict(state["data"])
        if not self.config.checkpoint.no_load_rng:
            self.seed = state["seed"]
        old, new = self.data_state.seed, self.config.training.seed
        if new != old:
            text = "training.seed is %d, but the checkpoint's data order has seed %d and goes on: --finetune starts a new one"
            log.warning(text, new, old)

    def _start_saves(self) -> None:
        checkpoint, stop = self.config.checkpoint, self.stop
        with together(self.device):
            if checkpoint.keep_best is not None and checkpoint.folder is not None and dist.get_rank() == 0:
                best = Best(checkpoint.folder, checkpoint.keep_best, self.iteration, checkpoint.url)
                self.origin = dataclasses.replace(self.origin, best=best)
        self.saver = Saver(checkpoint, self.model, self.optimizer, self.origin, self.locks, lambda: stop.requested)
        self.closing.callback(self.saver.close)

    def _start_data(self) -> None:
        """Starts the loader on source ranks and settles the length of the run on all."""
        config, topology, training = self.config, self.topology, self.config.training
        if training.skip_train:
            self.num_iterations = self.iteration
            return
        facts, error = None, None
        if topology.is_source:
            try:
                self.loader = RowLoader(
                    config.data,
                    self.processor,
                    paths=config.data.train,
                    seed=self.data_state.seed if self.data_state else training.seed,
                    global_batch_size=training.global_batch_size,
                    micro_batch_size=training.micro_batch_size,
                    dp_rank=topology.dp_rank,
                    dp_size=topology.dp,
                    multiple_of=config.row_multiple,
                    fill_to=config.row_fill,
                    state=self.data_state,
                    output_dir=config.output_dir,
                    costs=costs_of(config, self.source.config, self.peft.plan if self.peft else None),
                )
                self.closing.callback(self.loader.close)
                check_share(self.loader.report(), config.data, config.output_dir / "excluded.jsonl")
                log.info("data: %s", self.loader.report())
                iterations = self._count_iterations(self.loader)
                self.loader.require_all(iterations, training.train_epochs)
                facts = [self.loader.samples_per_epoch, iterations]
            except Exception as caught:
                error = caught
        _, facts = share_rows(topology, () if facts else None, facts, error)
        self.samples_per_epoch, self.num_iterations = facts
        self.schedule = Schedule.of(config.optimizer, self.num_iterations)

    def _count_iterations(self, loader: RowLoader) -> int:
        training = self.config.training
        if training.train_iters is not None:
            return training.train_iters
        epochs = training.train_epochs
        if training.train_samples is not None:
            epochs = training.train_samples / loader.samples_per_epoch
        assert epochs is not None
        return loader.steps_per_epoch(epochs)

    def _start_reports(self) -> None:
        config, topology = self.config, self.topology
        self.facts = Facts(config, self.model, self.loader, adapts=self.peft is not None)
        log.info("%s; %d iterations from %d", self.facts, self.num_iterations, self.iteration)
        if not any(self.facts.trained.values()) and not config.training.skip_train:
            log.warning("every parameter is frozen: nothing will change")
        with together(self.device):
            if topology.rank == 0:
                self.metrics = Metrics.of_run(
                    config.output_dir,
                    config.logging,
                    config.to_dict(),
                    start=self.iteration,
                    total=self.num_iterations,
                    evaluation_only=config.training.skip_train,
                )
                self.closing.callback(self.metrics.close)
                if not config.training.skip_train:
                    self.metrics.started(self.facts.of_start(self.iteration, self.num_iterations))
        late, interval = self.device.type == "cuda", config.logging.log_interval
        self.reports = StepReports(self.facts, self.metrics, self.num_iterations, interval, self.saver.times, late=late)

    # ---- one iteration ----

    def _next_rows(self) -> tuple[Row, ...]:
        """The rows of the next step on every rank of the replica; the data state is kept once the step is committed."""
        step: StepRows | None = None
        error: Exception | None = None
        if self.loader is not None:
            try:
                step = self.loader.next_step()
            except Exception as caught:
                error = caught
        extra = step.state.to_dict() if step else None
        self.sample_ids = step.sample_ids if step else ()
        rows, extra = share_rows(self.topology, step.rows if step else None, extra, error)
        self.next_state = DataState.from_dict(extra)
        if step is not None and self.data_state is None and self.topology.rank == 0:
            log.info("first sample, its supervised text in [[ ]]:\n%s", show_sample(rows[0], self.processor))
        return rows

    def _commit(self, skipped: bool) -> None:
        self.previous_samples, self.iteration = self.consumed_samples, self.iteration + 1
        self.num_skipped += skipped
        self.scores = {}
        self.data_state = self.next_state

    @property
    def _due(self) -> Due:
        consumed = (self.previous_samples, self.consumed_samples)
        return Due(self.config, self.iteration, consumed, self.samples_per_epoch)
