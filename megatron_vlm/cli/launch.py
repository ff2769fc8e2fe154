"""`megatron-vlm launch`: flags, or a YAML file and flags, from raw data to a trained model."""

from collections.abc import Sequence

from megatron_vlm.options.arguments import read_request
from megatron_vlm.options.flags import flags_help, parse_flags
from megatron_vlm.options.recipes import load_config

USAGE = """usage: megatron-vlm launch [--config FILE | RECIPE] [section.key=value ...] [--flag VALUE ...]

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
    parsed = parse_flags(argv, "launch")
    file = load_config(parsed.config) if parsed.config else {}
    request = read_request(file, parsed.settings, parsed.notes, command="launch")
    from megatron_vlm.launch.launch import launch  # imports megatron-core: seconds

    return launch(request)
