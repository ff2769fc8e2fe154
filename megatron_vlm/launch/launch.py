"""One command from raw data to a trained model: check, plan, prepare, train, leave what is used afterwards.

Request --plan_run--> RunPlan --build_data--> shards --start--> processes of the run --finish--> adapter | hf/, loss.png
"""

import os
import shutil
import time
from pathlib import Path

import yaml

from megatron_vlm.errors import ConfigError, MegatronVLMError
from megatron_vlm.files import write_synced, writing
from megatron_vlm.launch import exports, processes
from megatron_vlm.launch.build_inputs import build_data, check_data
from megatron_vlm.launch.checks import Report
from megatron_vlm.launch.inputs import cache_folder
from megatron_vlm.launch.run_plan import CONFIG, RunPlan, plan_run
from megatron_vlm.options.launch_config import LaunchConfig
from megatron_vlm.options.request import Request
from megatron_vlm.training.checkpoint.run_lock import holder
from megatron_vlm.training.stop import STOPPED
from megatron_vlm.weights.checkpoint_dir import TRACKER, holds_checkpoints, newest

_LEFT_OF_A_RUN = ("checkpoint-*", "iter_*", "epoch_*", TRACKER)


def launch(request: Request) -> int:
    """Runs all of it; returns the exit code: 0 done, 1 a check or the run failed, 143 saved and stopped by a signal."""
    job = processes.find_job_rank(os.environ)
    if request.launch.cache_dir is not None:  # before the hub's library is imported, which reads it once
        os.environ["HF_HUB_CACHE"] = request.launch.cache_dir
    if request.launch.no_launch:
        return 0 if job.rank or _prepare(request, job) is not None else 1
    with processes.prepared_once(job) as share:
        plan = None
        if job.rank == 0:
            plan = _prepare(request, job)
            output = share("" if plan is None else str(plan.config.output_dir.absolute()))
        else:
            output = share(None)
    if not output:
        return 1
    return _train(request.launch, job, Path(output), plan)


def _prepare(request: Request, job: processes.JobRank) -> RunPlan | None:
    """Checks, builds what is missing and writes the resolved config; None where something failed, which was printed."""
    report, settings = Report(), request.launch
    plan = plan_run(request, job, report)
    if plan is not None:
        cache = cache_folder(settings)
        look = check_data if settings.no_launch else build_data
        for inputs in (plan.train, plan.valid):
            if inputs.paths:
                look(report, inputs, plan.config.data, plan.processor, cache)
    if report.failed or plan is None:
        print(f"\n{len(report.failed)} of the checks failed; no process of the run was started", flush=True)
        return None
    print("\nplan\n  " + "\n  ".join(plan.lines), flush=True)
    if settings.no_launch:
        print("\nall checks passed; without --no-launch the run would start now", flush=True)
        return plan
    output = plan.config.output_dir
    if (other := holder(output)) is not None:
        raise ConfigError(f"{output} is in use by {other}: wait for it, end it, or name another --output_dir")
    output.mkdir(parents=True, exist_ok=True)
    if settings.overwrite_output_dir:
        _remove_old(output, plan)
    exports.link_log(output)
    with writing(output / CONFIG):
        write_synced(output / CONFIG, yaml.safe_dump(plan.config.to_dict(), sort_keys=False).encode())
    return plan


def _remove_old(output: Path, plan: RunPlan) -> None:
    """Removes checkpoints and exports of an earlier run, unless this one starts from them."""
    load = Path(str(plan.config.checkpoint.load)).absolute()
    if load == output.absolute() or output.absolute() in load.parents:
        raise ConfigError(
            f"--overwrite_output_dir would remove {load}, which the run starts from: choose another --output_dir"
        )
    for pattern in _LEFT_OF_A_RUN:
        for path in output.glob(pattern):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _train(settings: LaunchConfig, job: processes.JobRank, output: Path, plan: RunPlan | None) -> int:
    """Starts the run, waits for it, and exports on rank 0, which alone has the plan."""
    here, port, gpus = (plan.here, plan.port, plan.devices.names) if plan and job.alone else (1, 0, ())
    if plan is None or not job.alone:
        gpus = tuple(settings.cuda_visible_devices.split(",")) if settings.cuda_visible_devices else ()
    began = time.monotonic()
    epochs = None
    if plan is not None and settings.export_each_epoch:
        epochs = exports.EpochExports(output, adapts=plan.adapts)
    print("", flush=True)
    run = processes.RunProcess(
        processes.command(output / CONFIG, here, port), processes.environment_of(job, gpus, here)
    )
    code = run.wait(epochs or (lambda: None))
    stopped = run.stopped or code == STOPPED
    if plan is None:
        return code
    print(f"\n{'stopped' if stopped else 'ended'} after {time.monotonic() - began:.0f} s", flush=True)
    if code and not stopped:
        print(f"the run failed with exit code {code}: its output above and {output / 'train.log'} say why", flush=True)
        return 1
    if not holds_checkpoints(output):
        if not plan.config.training.skip_train:
            print("nothing was saved: there is no checkpoint to export", flush=True)
        return STOPPED if stopped else code
    try:
        _finish(output, plan, settings, epochs)
    except MegatronVLMError as error:
        print(f"the checkpoint in {output} is whole, the export failed: {error}", flush=True)
        return 1
    return STOPPED if stopped else code


def _finish(output: Path, plan: RunPlan, settings: LaunchConfig, epochs: exports.EpochExports | None) -> None:
    if epochs is not None:
        epochs()
    merged = settings.save_merged_model and plan.adapts
    written = exports.export(newest(output), output, adapts=plan.adapts, merged=merged, adapter=plan.names_base)
    for path in written:
        print(f"{path}", flush=True)
    if plan.adapts and not plan.names_base:
        print(
            f"no adapter, as its base is no Hugging Face directory; to have one: {exports.adapter_command(output)}",
            flush=True,
        )
    print(exports.draw_loss(output), flush=True)
    exports.write_trainer_files(output)
