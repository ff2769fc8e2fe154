"""`megatron-vlm launch`: flags, or a YAML file and flags, from raw data to a trained model."""

from collections.abc import Sequence

from megatron_vlm.options.flags import flags_help
from megatron_vlm.options.request import read_command

USAGE = """usage: megatron-vlm launch [CONFIG | --config FILE | RECIPE] [section.key=value ...] [--flag VALUE ...]

Checks packages, model, data, GPUs, memory, disk and port; builds shards of raw data, once; picks a layout; starts the
run (torchrun, or one process; none where RANK or Slurm's variables are set); leaves the adapter or hf/ and loss.png in
--output_dir. Flags of the original programs work as they are. `--no-launch` stops after the checks.
Exit code: 0 done, 1 a check or the run failed, 143 saved and stopped by Ctrl-C or SIGTERM.

"""


def run(argv: Sequence[str]) -> int:
    """Launches; returns the exit code."""
    if "-h" in argv or "--help" in argv:
        print(USAGE + flags_help("launch"))
        return 0
    request = read_command(argv, "launch")
    from megatron_vlm.launch.launch import launch  # torch

    return launch(request)
