"""`convert pth2hf`: XTuner's step after training, for adapters and for whole models."""

import pytest

from megatron_vlm.cli.convert import main, run
from megatron_vlm.errors import ConfigError, ConversionError
from megatron_vlm.files import read_json
from megatron_vlm.testing.twins.llava_internlm2 import write_tiny_llava_internlm2
from tests.peft.test_export import checkpoint

TARGETS = ("wqkv", "wo", "w1", "w2", "w3", "output", "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    write_tiny_llava_internlm2(folder)
    return folder


def test_adapters_and_whole_models_come_out_in_xtuners_folders(llava, tmp_path):
    settings = dict(names="xtuner", target_modules=TARGETS, modules_to_save=("projector",), r=4, vision_r=2)
    trained = checkpoint(tmp_path / "run", llava, **settings)
    assert main(["pth2hf", str(llava), str(tmp_path / "parts")]) == 0
    assert main(["pth_to_hf", "config.py", str(trained), str(tmp_path / "out"), "--base", str(tmp_path / "parts")]) == 0
    for folder in ("llm_adapter", "visual_encoder_adapter"):
        assert (tmp_path / "out" / folder / "adapter_config.json").is_file()
    assert (tmp_path / "out" / "projector" / "config.json").is_file()
    for name in ("config.json", "visual_encoder/config.json", "projector/config.json"):
        assert (tmp_path / "parts" / name).is_file()


def test_adapters_on_an_assembled_base(llava, tmp_path):
    """The guide's way: hf2mg makes the base of parts, a run adapts it, pth_to_hf names the language model that it came from."""
    assert main(["pth2hf", str(llava), str(tmp_path / "parts")]) == 0
    assert main(["hf2mg", "--hf", str(tmp_path / "parts"), "--out", str(tmp_path / "assembled")]) == 0
    settings = dict(names="xtuner", target_modules=TARGETS, modules_to_save=("projector",), r=4, vision_r=2)
    trained = checkpoint(tmp_path / "run", tmp_path / "assembled", **settings)
    assert main(["pth_to_hf", str(trained), str(tmp_path / "out"), "--base", str(tmp_path / "parts")]) == 0
    record = read_json(tmp_path / "out" / "llm_adapter" / "adapter_config.json")
    assert record["base_model_name_or_path"] == str(tmp_path / "parts")
    assert (tmp_path / "out" / "visual_encoder_adapter" / "adapter_config.json").is_file()
    with pytest.raises(ConversionError, match="give the model in that layout with --base DIR"):
        run(["pth2hf", str(trained), str(tmp_path / "none")])


def test_usage_names_the_command_that_others_name(capsys):
    """Called as `toolkits/convert` as well: the two are one."""
    for argv in (["hf2mg"], ["mg2hf", "--no"], []):
        with pytest.raises(SystemExit):
            main(argv)
        said = capsys.readouterr().err
        assert said.startswith(f"usage: megatron-vlm convert {' '.join(argv[:1])}".rstrip()), said


def test_empty_paths_are_refused_by_name(tmp_path):
    """As the variable of a shell that was never set leaves them: they are not the folder that the command runs in."""
    words = {
        "hf2mg": ["--hf", "x", "--llm", "x", "--vision", "x", "--projector", "x", "--out", "x"],
        "mg2hf": ["--load", "x", "--out", "x", "--base", "x"],
        "merge": ["--base", "x", "--adapter", "x", "--out", "x"],
        "verify": ["--hf", "x", "--load", "x"],
        "pth2hf": ["x", "y", "--base", "x"],
    }
    for command, argv in words.items():
        for place, word in enumerate(argv):
            if not word.startswith("--"):
                name = argv[place - 1] if argv[place - 1].startswith("--") else r"\[CONFIG\] CHECKPOINT OUT"
                with pytest.raises(ConfigError, match=f"{name} '' is empty: name a path"):
                    run([command, *argv[:place], "", *argv[place + 1 :]])


def test_mistakes_are_named(llava, tmp_path):
    with pytest.raises(ConfigError, match=r"pth2hf takes \[CONFIG\] CHECKPOINT OUT, got 1 arguments"):
        run(["pth2hf", str(llava)])
    with pytest.raises(ConfigError, match=r"work/epoch_1.pth does not exist: name a checkpoint"):
        run(["pth2hf", "config.py", "work/epoch_1.pth", str(tmp_path / "out")])
    (tmp_path / "epoch_1.pth").touch()
    with pytest.raises(ConfigError, match=r"epoch_1.pth was written by XTuner: `hf2mg .* --projector"):
        run(["pth2hf", "config.py", str(tmp_path / "epoch_1.pth"), str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="is a whole model, which has no base"):
        run(["pth2hf", str(llava), str(tmp_path / "out"), "--base", str(llava)])
