"""Running the commands of a guide of docs/guides as a reader does, with tiny models in the place of real ones."""

import re
import subprocess
from collections.abc import Mapping

from tests.examples.shell import ROOT, environment, free_port


def run_guide(page: str, values: Mapping[str, object], more: Mapping[str, str]) -> str:
    """Runs every ``sh`` block of docs/guides/PAGE as one script, in the root of the repository, and returns its output.

    Args:
        page: file name.
        values: what variables are assigned instead of the page's own values; each must be assigned on the page.
        more: script or command of the page -> arguments to add to each of its calls.
    """
    text = (ROOT / "docs" / "guides" / page).read_text(encoding="utf-8")
    script = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    for name, value in values.items():
        script, number = re.subn(rf"^{name}=\S+$", f"{name}={value}", script, flags=re.MULTILINE)
        assert number == 1, f"{page} assigns {name} {number} times"
    for command, arguments in more.items():
        script, number = re.subn(rf"^(.*{re.escape(command)}\b.*)$", rf"\1 {arguments}", script, flags=re.MULTILINE)
        assert number, f"{page} has no {command}"
    variables = environment(GPUS=2, DEVICE="cpu", MASTER_PORT=free_port())
    done = subprocess.run(
        ["sh", "-eux", "-c", script], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout
