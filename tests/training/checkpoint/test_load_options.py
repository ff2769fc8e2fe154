"""What a load takes over and what it resets: flags, freezing, precision, weights without states, another model."""

import pytest

from megatron_vlm.errors import ConfigError
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2
from megatron_vlm.training.checkpoint.config import CheckpointConfig
from megatron_vlm.weights.mapping import group_of
from tests.training.checkpoint.ranks import load_error, load_of, merge, save_of
from tests.training.checkpoint.test_load import assert_same, at, mapping_of

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def run(fn, hf_dir, where, checkpoint, **kwargs):
    """First rank's result with all ranks' full tensors in it (of ``after``, too)."""
    (tp, pp, dp, cp), parallel, options = where
    results = run_distributed(fn, hf_dir, parallel, options, checkpoint, tp=tp, pp=pp, dp=dp, cp=cp, **kwargs)
    mapping = mapping_of(hf_dir, tp)
    first = results[0] | {"full": merge(results, mapping)}
    if "after" in first:
        first["after"] = merge([r["after"] for r in results], mapping)
    return first


def of_kinds(full, *kinds):
    return {key: tensor for key, tensor in full.items() if key[0] in kinds}


def steps_by_group(full):
    groups = {}
    for kind, name in full:
        if kind == "step":
            groups.setdefault(group_of(name), set()).add(float(full[kind, name]))
    return groups


@pytest.mark.parametrize("sharded", [False, True])
def test_newly_trained_parameters_start_afresh_and_newly_frozen_ones_let_go(twins, tmp_path, sharded):
    hf_dir, save = twins("mistral"), {"save": str(tmp_path)}
    load = {"load": str(tmp_path)}
    before = run(save_of, hf_dir, at(1, 1, 2, do=sharded, freeze=("vision",)), save)
    assert steps_by_group(before["full"]) == {"llm": {3.0}, "connector": {3.0}}
    after = run(load_of, hf_dir, at(2, do=sharded, freeze=("connector",)), load, steps=1)
    assert_same(of_kinds(after["full"], "model"), of_kinds(before["full"], "model"))
    assert steps_by_group(after["full"]) == {"llm": {3.0}}
    assert steps_by_group(after["after"]) == {"llm": {4.0}, "vision": {1.0}}
    report = after["report"]
    assert set(report.kept) == {"llm"} and set(report.reset) == {"vision"} and set(report.dropped) == {"connector"}
    assert report.kept["llm"] == report.weights["llm"] and report.reset["vision"] == report.weights["vision"]
    assert "optimizer state reset (zero moments, Adam step 0): vision" in str(report)
    assert report.layouts == ("tp 1 pp 1 dp 2", "tp 2 pp 1 dp 1")


BF16 = dict(params_dtype="bf16")


def test_flags_that_leave_states_behind(twins, tmp_path):
    hf_dir, root = twins("mistral"), str(tmp_path)
    before = run(save_of, hf_dir, at(**BF16), {"save": root})
    assert of_kinds(before["full"], "param")
    weights = of_kinds(before["full"], "model")
    for flags, iteration in (({"no_load_optim": True}, 3), ({"finetune": True}, 0)):
        found = run(load_of, hf_dir, at(1, 1, 2, do=True, **BF16), {"load": root, **flags}, steps=1)
        assert found["iteration"] == iteration + 1 and found["weights_only"] == (iteration == 0)
        assert_same(of_kinds(found["full"], "model"), weights)
        assert not of_kinds(found["full"], *MOMENTS)
        rounded = {("param", name): w.float() for (_, name), w in weights.items()}
        assert_same(of_kinds(found["full"], "param"), rounded if iteration else of_kinds(before["full"], "param"))
        assert steps_by_group(found["after"]) == {group: {1.0} for group in ("llm", "vision", "connector")}
        assert not found["report"].kept and sum(found["report"].reset.values()) == len(weights)


def test_no_save_optim_and_a_run_that_took_no_step(twins, tmp_path):
    hf_dir = twins("mistral")
    for name, flags, steps in (("weights", {"no_save_optim": True}, 1), ("unstepped", {}, 0)):
        root = str(tmp_path / name)
        before = run(save_of, hf_dir, at(2, do=True, **BF16), {"save": root, **flags}, steps=steps)
        found = run(load_of, hf_dir, at(1, 2, **BF16), {"load": root})
        assert found["iteration"] == steps
        assert_same(of_kinds(found["full"], "model"), of_kinds(before["full"], "model"))
        assert not of_kinds(found["full"], *MOMENTS)


def test_precision_switches_keep_the_finer_numbers(twins, tmp_path):
    hf_dir, coarse, fine = twins("mistral"), str(tmp_path / "bf16"), str(tmp_path / "fp32")
    half = run(save_of, hf_dir, at(1, 1, 2, do=True, **BF16), {"save": coarse})["full"]
    full = run(load_of, hf_dir, at(2), {"load": coarse})["full"]
    assert_same(of_kinds(full, *MOMENTS), of_kinds(half, *MOMENTS))
    assert_same(of_kinds(full, "model"), {("model", name): t for (_, name), t in of_kinds(half, "param").items()})
    whole = run(save_of, hf_dir, at(1, 2), {"save": fine})["full"]
    back = run(load_of, hf_dir, at(1, 1, 2, do=True, **BF16), {"load": fine})["full"]
    assert_same(of_kinds(back, *MOMENTS), of_kinds(whole, *MOMENTS))
    weights = of_kinds(whole, "model")
    assert_same(of_kinds(back, "param"), {("param", name): w for (_, name), w in weights.items()})
    assert_same(of_kinds(back, "model"), {key: w.bfloat16() for key, w in weights.items()})


def test_fp32_weights_are_main_parameters_of_what_starts_from_them(twins, tmp_path):
    """A bf16 run that takes weights alone from an fp32 run has them whole, and an fp32 run takes a bf16 run's main parameters."""
    hf_dir, coarse, fine = twins("mistral"), str(tmp_path / "bf16"), str(tmp_path / "fp32")
    whole = of_kinds(run(save_of, hf_dir, at(1, 2), {"save": fine})["full"], "model")
    for flags in ({"no_load_optim": True}, {"finetune": True}):
        found = run(load_of, hf_dir, at(2, **BF16), {"load": fine, **flags})["full"]
        assert_same(of_kinds(found, "param"), {("param", name): w for (_, name), w in whole.items()})
    half = of_kinds(run(save_of, hf_dir, at(1, 1, 2, do=True, **BF16), {"save": coarse})["full"], "param")
    found = run(load_of, hf_dir, at(2), {"load": coarse, "finetune": True})["full"]
    assert_same(of_kinds(found, "model"), {("model", name): w for (_, name), w in half.items()})


def test_loss_scale_of_fp16(twins, tmp_path):
    hf_dir, fp16 = twins("mistral"), at(params_dtype="fp16")
    saved = run(save_of, hf_dir, fp16, {"save": str(tmp_path)}, steps=0)
    found = run(load_of, hf_dir, fp16, {"load": str(tmp_path)})
    assert found["loss_scale"] == saved["loss_scale"] == 2.0**31
    assert [(s["growth_tracker"], s["hysteresis_tracker"]) for s in found["scalers"]] == [(1, 0)]
    assert found["report"].loss_scale
    fresh = run(load_of, hf_dir, fp16, {"load": str(tmp_path), "no_load_optim": True})
    assert fresh["loss_scale"] == 2.0**32 and not fresh["report"].loss_scale


def test_release_is_weights_at_iteration_0(twins, tmp_path):
    hf_dir = twins("mistral")
    before = run(save_of, hf_dir, at(), {"save": str(tmp_path)})
    (tmp_path / "iter_0000003").rename(tmp_path / "release")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    for load in (tmp_path, tmp_path / "release"):
        found = run(load_of, hf_dir, at(2), {"load": str(load)})
        assert found["iteration"] == 0 and found["weights_only"]
        assert_same(found["full"], of_kinds(before["full"], "model"))


def test_another_model_is_refused_on_every_rank(twins, tmp_path):
    run(save_of, twins("mistral"), at(), {"save": str(tmp_path / "save")}, steps=0)
    tied = run_distributed(load_error, twins("tied"), at()[1], {"load": str(tmp_path / "save")}, dp=2)
    assert all("language_model.output_layer.weight: in the checkpoint, not in the model" in text for text in tied)
    other = tmp_path / "other"
    sizes = dict(text_hidden=32, ffn=64, layers=5, vision_hidden=32, vision_ffn=40, vision_layers=2, depth=1)
    write_tiny_idefics2(other, perceiver_head_dim=8, **sizes)
    for text in run_distributed(load_error, str(other), at(2)[1], {"load": str(tmp_path / "save")}, tp=2):
        assert "decoder.layers.0.mlp.linear_fc2.weight: [32, 48] in the checkpoint, [32, 64] in the model" in text
        assert "decoder.layers.4.input_layernorm.weight: in the model, not in the checkpoint" in text


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"keep_last": 1, "save": "x"}, "keep_last must be at least 2"),
        ({"save_interval": 0, "save": "x"}, "save_interval must be above 0"),
        ({"save_interval": 5}, "checkpoint.save is not set"),
        ({"save_interval": 5, "save_epochs": 1.0, "save": "x"}, "not both"),
        ({"ckpt_step": 5}, "needs checkpoint.load"),
    ],
)
def test_settings_that_cannot_work(fields, message):
    with pytest.raises(ConfigError, match=message):
        CheckpointConfig(**fields)
