"""The section ``checkpoint`` of a run."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_vlm.config import Config, PathText
from megatron_vlm.errors import ConfigError
from megatron_vlm.weights.remote import is_url


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Config):
    """Where a run starts from and what it leaves.

    Attributes:
        load: an HF directory or hub id, Megatron weights, or a training checkpoint (its folder or one iteration's).
        save: folder for checkpoints, or a URL that fsspec knows (s3://bucket/run); None: none are written.
        staging: folder here, seen by all ranks, where checkpoints for a URL are written before they are copied there; the
            newest stays. None: ``runs/`` and the last part of the URL.
        ckpt_step: iteration to load, with no other in its place; None: the newest.
        save_interval: iterations between checkpoints; None: at the end (and on SIGTERM) only.
        save_epochs: epochs between checkpoints; excludes ``save_interval``.
        keep_last: checkpoints to keep, at least 2, so that one is left if the newest is damaged; None: all.
        keep_best: keep the checkpoint with the best held-out ``loss``, or the best of ``evaluate.metrics``, beside those; every
            iteration that is saved is evaluated, and ``best.json`` in ``save`` names it. None: the last ones alone.
        finetune: take weights only (fp32 main parameters, where there are any) and start at iteration 0 with fresh
            optimizer and data state.
        no_load_optim: leave main parameters, moments and Adam's step behind, but go on at the iteration.
        no_load_rng: draw random numbers from this run's seed instead of the checkpoint's.
        no_save_optim: write weights only; such a checkpoint is smaller and resumes without moments.
        base: where the base of adapters is now, which ``load`` holds without it; None: where their checkpoint says.
        async_save: go on training while a checkpoint is written: a step copies it to the host's memory, which must hold the
            rank's part of it once more, and a process beside the rank writes it. The last save of a run is waited for.
        save_retries, save_retry_seconds: tries of a save that failed; before the first, each further wait is twice as long.
        on_save_failure: then: stop the run, or continue to the next save, if there is one. Older checkpoints are untouched.
        verify_hashes: read every file once more before loading and compare its sha256; sizes are compared in any case.
    """

    load: PathText | None = None
    save: PathText | None = None
    staging: PathText | None = None
    ckpt_step: int | None = None
    save_interval: int | None = None
    save_epochs: float | None = None
    keep_last: int | None = None
    keep_best: str | None = None
    finetune: bool = False
    no_load_optim: bool = False
    no_load_rng: bool = False
    no_save_optim: bool = False
    base: PathText | None = None
    async_save: bool = False
    save_retries: int = 2
    save_retry_seconds: float = 10.0
    on_save_failure: Literal["stop", "continue"] = "stop"
    verify_hashes: bool = True

    def __post_init__(self) -> None:
        for name in ("save_interval", "save_epochs"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"checkpoint.{name} must be above 0, got {value}")
            if value is not None and self.save is None:
                raise ConfigError(
                    f"checkpoint.{name} is {value}, but checkpoint.save is not set: name a folder (--save)"
                )
        if self.staging is not None and self.url is None:
            raise ConfigError(
                f"checkpoint.staging has no effect without a URL in checkpoint.save, which is {self.save}"
            )
        if is_url(self.staging):
            raise ConfigError(f"checkpoint.staging {self.staging} is a URL: name a folder here")
        if self.async_save and str(self.url).startswith("memory:"):
            raise ConfigError(f"checkpoint.async_save: another process cannot write to {self.url}: leave it out")
        if self.async_save and self.save is None:
            raise ConfigError("checkpoint.async_save is on, but checkpoint.save is not set: name a folder (--save)")
        if self.keep_best is not None and self.save is None:
            raise ConfigError(
                f"checkpoint.keep_best is {self.keep_best}, but checkpoint.save is not set: name a folder (--save)"
            )
        if self.save_retries < 0 or self.save_retry_seconds < 0:
            raise ConfigError("neither checkpoint.save_retries nor checkpoint.save_retry_seconds may be negative")
        if self.save_interval is not None and self.save_epochs is not None:
            raise ConfigError("set checkpoint.save_interval or save_epochs, not both")
        if self.keep_last is not None and self.keep_last < 2:
            raise ConfigError(
                f"checkpoint.keep_last must be at least 2, got {self.keep_last}: the newest may turn out damaged"
            )
        if self.ckpt_step is not None and (self.load is None or self.ckpt_step < 0):
            raise ConfigError(f"checkpoint.ckpt_step {self.ckpt_step} needs checkpoint.load, and must not be negative")
        if self.base is not None and self.load is None:
            raise ConfigError(f"checkpoint.base {self.base}, but checkpoint.load names no adapters: set it (--load)")

    @property
    def url(self) -> str | None:
        """Where checkpoints go from ``folder``; None: they stay there."""
        return self.save if is_url(self.save) else None

    @property
    def folder(self) -> Path | None:
        """Where they are written on this host; None: nowhere."""
        if self.url is None:
            return Path(self.save) if self.save is not None else None
        url = self.url.rstrip("/")  # others may end in the same name
        digest = hashlib.sha256(url.encode()).hexdigest()[:8]
        return Path(self.staging or Path("runs", f"{url.rpartition('/')[2]}-{digest}"))
