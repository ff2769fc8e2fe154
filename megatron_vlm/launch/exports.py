"""What a run leaves in its output folder: HF files that others load, and a picture of the loss.

    OUTPUT/iter_N --full fine-tuning--> hf/
                  --adapters---------> adapter_config.json, adapter_model.safetensors, tokenizer and processor files
                                       merged_model/ (on request)
    OUTPUT/metrics.jsonl ------------> loss.png
                                       trainer_state.json, checkpoint-N -> iter_N, training_log.txt -> train.log
    OUTPUT/epoch_N/: the same after each epoch (on request)

Each folder appears at once: it is written beside its place and renamed.
"""

import contextlib
import shutil
from pathlib import Path

from megatron_vlm.conversion.convert import mg2hf
from megatron_vlm.errors import ConversionError, MegatronVLMError
from megatron_vlm.files import folder_beside, read_json, replace_folder, sync_path, unique_temporary, write_json
from megatron_vlm.training.metrics.run_files import RunFiles, smoothed
from megatron_vlm.weights.checkpoint_dir import MANIFEST, iteration_of

HF, MERGED, LOSS = "hf", "merged_model", "loss.png"
ADAPTER = "adapter_config.json"


def adapter_command(output: Path) -> str:
    """How an adapter is taken from a run whose base could not be named."""
    return (
        f"toolkits/convert mg2hf --adapter-only --load {output} --base HF_DIRECTORY --out DIR (XTuner's folders: "
        f"toolkits/convert pth_to_hf {output} DIR --base LLM_DIRECTORY)"
    )


def export(checkpoint: Path, out: Path, *, adapts: bool, merged: bool, adapter: bool = True) -> list[Path]:
    """Writes what others load of one checkpoint.

    Args:
        checkpoint: folder of an iteration.
        out: gets the adapter's files, ``hf/`` or ``merged_model/``, in place of older ones.
        adapts: the run trains adapters.
        merged: write the merged model too.
        adapter: write the adapter; False where its base is no HF directory.

    Returns:
        What was written.

    Raises:
        MegatronVLMError: the checkpoint cannot be read, or the disk is full; what was there before stays.
    """
    written = []
    if adapts and adapter:
        with folder_beside(out / "adapter") as folder:
            mg2hf(checkpoint, folder, adapter_only=True)
            # The file that loaders look for comes last.
            for file in sorted(folder.iterdir(), key=lambda path: path.name == ADAPTER):
                if file.is_dir() and (out / file.name).is_dir():
                    shutil.rmtree(out / file.name)
                file.replace(out / file.name)
        written.append(out / ADAPTER)
    if merged or not adapts:
        target = out / (MERGED if adapts else HF)
        with folder_beside(target) as folder:
            mg2hf(checkpoint, folder, merge=adapts)
            replace_folder(folder, target)
        written.append(target)
    sync_path(out)
    return written


class EpochExports:
    """Exports the checkpoint that ends an epoch to ``epoch_N``, while the run goes on."""

    def __init__(self, output: Path, *, adapts: bool):
        self.output, self.adapts = output, adapts
        self.seen = set(output.glob("iter_*"))

    def __call__(self) -> None:
        """Looks for new checkpoints; a failed export is a warning, and the run goes on."""
        for folder in sorted(set(self.output.glob("iter_*")) - self.seen):
            if iteration_of(folder) and (folder / MANIFEST).is_file():  # not one that is being written
                self.seen.add(folder)
                self._export(folder)

    def _export(self, folder: Path) -> None:
        try:
            epoch = int(read_json(folder / "state.json", ConversionError)["run"]["epochs"] + 1e-9)
            out = self.output / f"epoch_{epoch}"
            if epoch and not out.exists():  # else it was saved amid the next epoch: by a signal, or at the last update
                for path in export(folder, out, adapts=self.adapts, merged=False):
                    print(f"epoch {epoch}: {path}", flush=True)
        except (MegatronVLMError, OSError) as error:
            print(f"no export of {folder.name}: {error}", flush=True)


def link_log(output: Path) -> None:
    """``training_log.txt``, as InternVL's guide has it, leads to train.log from the start."""
    with contextlib.suppress(OSError):  # it is there, or the file system has no links
        (output / "training_log.txt").symlink_to("train.log")


def write_trainer_files(output: Path) -> None:
    """What transformers' Trainer leaves: ``trainer_state.json``, and ``checkpoint-N``, which leads to iteration N."""
    run = RunFiles.read(output)
    total = max((line["iteration"] for line in run.steps), default=0)
    names = {"loss": "loss", "grad_norm": "grad_norm", "lr": "learning_rate", "eval_loss": "eval_loss"}
    history = [
        {**{theirs: line[ours] for ours, theirs in names.items() if ours in line}, "step": line["iteration"]}
        for line in sorted((*run.steps, *run.evaluations), key=lambda line: line["iteration"])
    ]
    write_json(output / "trainer_state.json", {"global_step": total, "max_steps": total, "log_history": history})
    for link in output.glob("checkpoint-*"):
        if link.is_symlink():
            link.unlink()
    for folder in output.glob("iter_*"):
        if iteration_of(folder):
            with contextlib.suppress(OSError):
                (output / f"checkpoint-{iteration_of(folder)}").symlink_to(folder.name)


def draw_loss(output: Path) -> str:
    """Draws training and evaluation loss of ``metrics.jsonl``; returns a line about it."""
    metrics, picture = output / "metrics.jsonl", output / LOSS
    run = RunFiles.read(output) if metrics.is_file() else None
    steps, held_out = (run.series("loss"), run.series("eval_loss")) if run else ([], [])
    if not steps:
        return f"no {LOSS}: {metrics} has no step"
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return f"no {LOSS}: matplotlib is not installed (pip install matplotlib); the numbers are in {metrics}"
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot(*zip(*steps), linewidth=0.6, alpha=0.35, color="C0", label="each step")
    axis.plot(
        [x for x, _ in steps], smoothed([y for _, y in steps]), linewidth=1.8, color="C0", label="training, smoothed"
    )
    if held_out:
        axis.plot(*zip(*held_out), marker="D", linestyle="--", color="C1", label="held-out data")
    axis.set(xlabel="iteration", ylabel="loss per supervised token")
    axis.grid(alpha=0.3)
    axis.legend()
    temporary = unique_temporary(picture)
    figure.savefig(temporary, dpi=110, format="png")
    temporary.replace(picture)
    return f"{picture}: {len(steps)} steps, loss {steps[0][1]:.4f} -> {steps[-1][1]:.4f}"
