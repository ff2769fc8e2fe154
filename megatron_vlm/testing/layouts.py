"""Every layout trains as one process does: the cases, and the check that a family's test runs over them.

rows --one process--> loss, gradients, up to 10 updates
rows --tp, pp, dp, sp, vp ... on gloo ranks--> the same, within LOSS, GRADIENT, NORM
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_vlm import registry
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.data.row import EncodedSample, row_from_samples
from megatron_vlm.files import read_json
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import adapted_mapping, gradient_errors, layout_run, merge_gradients, random_samples
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2
from megatron_vlm.weights.mapping import Mapping

LOSS = 1e-5  # relative; measured 4e-6 after 10 updates
NORM = 1e-3  # relative, over 10 updates; measured 4e-5
GRADIENT = 1e-5  # of each gradient's norm; measured 4e-6
STEPS = 10
VOCAB_MULTIPLE = 8
IDEFICS2_ROWS = [[([], 23)], [([(40, 50)], 14), ([], 9)], [([(24, 48), (16, 16)], 7)], [([], 17)]]
"""Texts first, so that a rank without images meets one with."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layout: sizes, what runs in it, frozen groups, the name of the twin, and updates after the first gradients."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    exchange: str = "auto"
    vision: str = "auto"
    sp: bool = False
    vp: int | None = None
    layers: tuple[int, ...] | None = None
    do: bool = False
    shard: str = ""
    group: int | None = None
    overlap: bool = False
    recompute: bool = False
    freeze: tuple[str, ...] = ()
    twin: str = ""
    updates: int = STEPS

    def __str__(self) -> str:
        flags = dict(
            group=self.group, sp=self.sp, vp=self.vp, do=self.do, overlap=self.overlap, recompute=self.recompute
        )
        parts = [*(name for name, on in flags.items() if on), *(f"no_{group}" for group in self.freeze)]
        sizes = f"tp{self.tp}pp{self.pp}dp{self.dp}" + (f"cp{self.cp}" if self.cp > 1 else "")
        parts += ["layers" + "_".join(map(str, self.layers))] if self.layers else []
        parts += [word for word in (self.exchange, self.vision, self.shard) if word not in ("auto", "")]
        return "-".join([*([self.twin] if self.twin else []), sizes, *parts])

    @property
    def parallel(self) -> dict[str, Any]:
        """Arguments of ParallelConfig."""
        return dict(
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            context_parallel_size=self.cp,
            context_parallel_exchange=self.exchange,
            vision_parallel=self.vision,
            sequence_parallel=self.sp,
            num_layers_per_virtual_pipeline_stage=self.vp,
            decoder_layers_per_stage=self.layers,
            data_parallel_sharding=self.shard or ("optimizer" if self.do else "none"),
            sharding_group_size=self.group,
            overlap_grad_reduce=self.overlap,
            recompute_granularity="full" if self.recompute else None,
        )


PAIRWISE_SMALL = [
    Case(tp=2, dp=2, sp=True, do=True, overlap=True, updates=3),
    Case(tp=2, pp=2, sp=True, vp=1, recompute=True, updates=3),
    Case(pp=2, dp=2, do=True, vp=1, freeze=("vision", "connector"), updates=3),
    Case(tp=2, cp=2, sp=True, updates=3),
]
"""A small cover of {tp, cp, pp, dp, sequence parallel, virtual stages, distributed optimizer, recompute, frozen, overlap} for
families of at least 4 decoder layers. A text family leaves out the frozen cases."""

EIGHT = [
    Case(tp=2, cp=2, dp=2, sp=True, do=True, overlap=True, updates=3),
    Case(pp=2, cp=2, dp=2, do=True, recompute=True, updates=3),
    Case(tp=2, cp=4, sp=True, updates=3),
    Case(tp=2, cp=2, pp=2, sp=True, vision="ahead", updates=3),
]
"""Three axes at once, on 8 ranks."""

PAIRWISE_MORE = [
    Case(pp=2, dp=2, overlap=True),
    Case(tp=4, sp=True, recompute=True),
    Case(pp=4, freeze=("llm",)),
    *EIGHT,
]
"""The rest of a cover of all pairs that the whole matrix does not hold, for the tests marked ``full``."""

CONTEXT = [
    Case(cp=2),
    Case(cp=2, exchange="heads"),
    Case(cp=4, recompute=True),
    Case(cp=2, vision="tensor"),
    Case(cp=2, freeze=("vision",), recompute=True),
    Case(cp=2, freeze=("vision", "connector")),
    Case(tp=2, cp=2),
    Case(pp=2, cp=2, overlap=True),
    Case(pp=2, cp=2, vp=1, do=True),
    Case(dp=2, cp=2, do=True, overlap=True),
]
"""Context parallelism beside each other axis, part of the whole matrix."""

DEALT = [
    Case(tp=2, pp=2, sp=True, vision="ahead"),
    Case(pp=2, cp=2, vp=1, vision="ahead", recompute=True),
    Case(pp=2, dp=2, do=True, overlap=True, vision="ahead", freeze=("vision",)),
    Case(tp=2, cp=2, sp=True, vision="share"),
    Case(tp=2, dp=2, do=True, overlap=True, vision="share"),
]
"""Towers whole on tensor parallel ranks and on later stages, part of the whole matrix."""

SHARDED = [
    Case(dp=2, shard="gradients"),
    Case(dp=4, shard="parameters", recompute=True),
    Case(tp=2, dp=2, sp=True, shard="gradients", recompute=True),
    Case(tp=2, dp=2, shard="parameters", vision="share"),
    Case(cp=2, dp=2, shard="parameters", group=2),
    Case(dp=4, shard="gradients", group=2),
    Case(dp=2, shard="parameters", freeze=("vision",)),
    Case(cp=2, shard="parameters", freeze=("vision", "connector"), recompute=True),
    Case(dp=2, shard="gradients", freeze=("llm",)),
]
"""Parameters in shards beside each other axis, part of the whole matrix."""

SIZES = [(1, 1, 2), (1, 1, 4), (1, 2, 1), (1, 2, 2), (1, 4, 1), (2, 1, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1)]


def whole_matrix(
    twin: str = "", freezes: Sequence[tuple[str, ...]] = ((),), recomputes: Sequence[bool] = (False,)
) -> list[Case]:
    """Every combination on up to 4 ranks, for the tests marked ``full``."""
    return [
        Case(tp=tp, pp=pp, dp=dp, sp=sp, vp=vp, do=do, overlap=do, recompute=recompute, freeze=freeze, twin=twin)
        for tp, pp, dp in SIZES
        for sp in ([False, True] if tp > 1 else [False])
        for vp in ([None, 1] if pp == 2 else [None])
        for do in ([False, True] if dp > 1 else [False])
        for recompute in recomputes
        for freeze in freezes
    ] + [replace(case, twin=twin) for case in (*CONTEXT, *DEALT, *SHARDED)]


@dataclass(frozen=True, kw_only=True)
class LayoutDistances:
    """How far a layout is from one process: loss and worst gradient (at ``where``) before any update, then losses and norms."""

    loss: float
    gradient: float
    where: str
    step_loss: float
    step_norm: float

    @property
    def passed(self) -> bool:
        """Within LOSS, GRADIENT and NORM."""
        return max(self.loss, self.step_loss) <= LOSS and self.gradient <= GRADIENT and self.step_norm <= NORM


def mapping_of(
    spec: registry.FamilySpec,
    config: Any,
    directory: str,
    peft: dict[str, Any] | None,
    tp: int,
    whole: Sequence[str] = (),
) -> Mapping:
    """Of what trains: the whole model, or with the section ``peft`` the adapters on it.

    On ``tp`` ranks; the parts ``whole`` are not split over them.
    """
    if peft is None:
        return spec.mapping(config, tp=tp).padded(VOCAB_MULTIPLE).whole(*whole)
    settings = {key: value for key, value in peft.items() if key != "tensors"}
    with open_source(directory) as source:
        return adapted_mapping(source, settings, tp, whole)


@dataclass
class LayoutCheck:
    """Compares layouts of one model with one process, whose results are kept by frozen groups.

    Attributes:
        family: name in the registry.
        directory: of the HF twin.
        hf_config: content of its config.json.
        batches: samples of each row of the global batch (a multiple of 4 rows).
        fill: tokens that rows are filled to with virtual stages.
        no_true_gradient: ``f(hf name)``: the true gradient is zero and what is computed is round-off.
        peft: section ``peft`` of a run, and ``tensors`` of its adapters (testing/parity.py); None: everything trains.
        options: of ``ModelOptions``, for one process and all layouts alike.
        run: what runs on each rank; a test that makes a mistake on purpose gives one.
    """

    family: str
    directory: str
    hf_config: dict[str, Any]
    batches: Sequence[Sequence[EncodedSample]]
    fill: int
    no_true_gradient: Callable[[str], bool] = lambda name: False
    peft: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    run: Callable[..., Any] = layout_run
    _alone: dict[tuple[str, ...], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.spec = registry.get(self.family)
        self.config = self.spec.config(self.hf_config)

    def alone(self, freeze: tuple[str, ...]) -> tuple[float, dict[str, Any], list[tuple[float, float]]]:
        """Loss, gradients by HF name, and (loss, norm) of each update of one process."""
        if freeze not in self._alone:
            self._alone[freeze] = self._run(Case(freeze=freeze))[:3]
        return self._alone[freeze]

    def measure(self, case: Case) -> LayoutDistances:
        """Runs a case beside one process.

        Raises:
            AssertionError: no gradient at all.
        """
        loss, grads, history = self.alone(case.freeze)
        our_loss, our_grads, _, results = self._run(case)
        errors = gradient_errors(our_grads, grads)
        worst, where = max(((e, n) for n, e in errors.items() if not self.no_true_gradient(n)), default=(0.0, ""))
        steps = [
            (abs(x - y) / y, abs(m - n) / n)
            for result in results
            for (x, m), (y, n) in zip(result["history"], history[: case.updates], strict=True)
        ]
        step_loss, step_norm = (max(column) for column in zip(*steps))
        if not any(float(g.norm()) > 0 for g in grads.values()):
            raise AssertionError("no gradient at all")
        return LayoutDistances(
            loss=abs(our_loss - loss) / loss, gradient=worst, where=where, step_loss=step_loss, step_norm=step_norm
        )

    def check(self, case: Case) -> None:
        """Runs a case and compares; prints the distances.

        Raises:
            AssertionError: beyond a tolerance.
        """
        found = self.measure(case)
        first, *_, last = self.alone(case.freeze)[2]
        print(f"{case}: loss {found.loss:.1e}, worst gradient {found.gradient:.1e} {found.where}")
        print(
            f"{case.updates} updates: loss {first[0]:.4f} -> {last[0]:.4f}, off {found.step_loss:.1e}; norm {found.step_norm:.1e}"
        )
        if not found.passed:
            raise AssertionError(f"{case}: {found}")

    def _run(self, case: Case) -> tuple[float, dict[str, Any], list[tuple[float, float]], list[dict[str, Any]]]:
        virtual = case.vp or (case.layers and len(case.layers) > case.pp)
        multiple, fill = (case.tp if case.sp else 1) * case.cp, self.fill if virtual else 0
        rows = [row_from_samples(samples, multiple_of=multiple, fill_to=fill) for samples in self.batches]
        results = run_distributed(
            self.run,
            self.directory,
            rows,
            case.parallel,
            {**self.options, "freeze": case.freeze},
            case.updates,
            1e-3,
            self.peft,
            tp=case.tp,
            pp=case.pp,
            dp=case.dp,
            cp=case.cp,
        )
        whole = ("vision", "connector") if case.vision in ("share", "ahead") else ()
        mapping = mapping_of(self.spec, self.config, self.directory, self.peft, case.tp, whole)
        loss, grads = merge_gradients(results, mapping, self.config.text.vocab_size)
        return loss, grads, results[0]["history"], results


def family_check(
    family: str,
    directory: Path,
    write: Callable[[Path], Any],
    draw: Callable[..., list[EncodedSample]],
    rows: Sequence[Any],
    tower: str = "",
    fill: int = 64,
) -> LayoutCheck:
    """Of a twin that ``write(directory)`` writes, on the samples ``draw(config, row, seed=)`` of each of ``rows``.

    ``tower``: where the HF names of one without RoPE begin: a constant added to every key changes no attention weight.
    """
    write(directory)
    check = LayoutCheck(
        family=family,
        directory=str(directory),
        hf_config=read_json(directory / "config.json"),
        batches=[],
        fill=fill,
        no_true_gradient=lambda name: bool(tower) and name.startswith(tower) and name.endswith("k_proj.bias"),
    )
    check.batches = [draw(check.config, row, seed=i) for i, row in enumerate(rows)]
    return check


def idefics2_check(directory: Path, rows: Sequence[Any] = IDEFICS2_ROWS, fill: int = 48, **twin: Any) -> LayoutCheck:
    """Of an Idefics2 twin, written into ``directory`` with the options ``twin``; ``rows``: as of ``random_samples``, by row."""
    write = partial(write_tiny_idefics2, **twin)
    return family_check("idefics2", directory, write, random_samples, rows, "model.vision_model.", fill)
