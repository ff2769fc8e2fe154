"""`python -m megatron_vlm COMMAND ...`, for torchrun's `-m`."""

import sys

from megatron_vlm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
