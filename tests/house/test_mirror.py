"""Every file with logic has a test file of its name, at its place; those that have none yet name the test that is theirs."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_vlm"
WHOLE = {
    "testing/": "what tests are made with: they are its tests",
    "models/families/": "a folder is tested whole: below",
    "cli/": "reads words and calls the library; run as programs in tests/cli",
}
"""folder -> why its files need no tests of their names"""
OF_A_FAMILY = ("test_mapping.py", "test_model.py", "test_processor.py", "test_layouts.py")
ELSEWHERE = {
    "cli/test_main.py": "__main__",
    "conversion/test_verify.py": "models/hf_reference",
    "data/formats/test_keys.py": "data/formats/__init__ data/formats/records",
    "data/formats/test_webdataset.py": "data/formats/energon data/shards/tar_shards",
    "data/shards/test_dataset.py": "data/shards/writer",
    "data/stream/test_loader.py": "data/stream/reader data/stream/step_plan",
    "data/text/test_templates.py": "data/text/chat data/types",
    "launch/test_inputs.py": "launch/build_inputs",
    "launch/test_launch.py": "launch/exports",
    "layers/test_backend.py": "layers/linear",
    "layers/test_projector.py": "layers/mlp models/parts/projector",
    "layers/vision/test_siglip.py": "layers/vision/encoder models/parts/siglip models/parts/tower",
    "layers/vision/test_internvit.py": "models/parts/internvit",
    "models/families/idefics2/test_model.py": "layers/perceiver models/parts/perceiver models/parts/decoder",
    "models/families/idefics2/test_mutations.py": "layers/core_attention",
    "models/families/llava_internlm2/test_model.py": "layers/vision/clip",
    "models/families/qwen3_vl/test_model.py": "layers/deepstack",
    "models/families/xcomposer2/test_model.py": "layers/partial_lora layers/vision/hd models/parts/partial_lora",
    "models/families/xcomposer2/test_processor.py": "models/processing/template_processor",
    "models/parts/test_clip.py": "models/parts/build",
    "models/test_vlm.py": "models/built models/language",
    "options/test_flags.py": "options/flag_values",
    "options/test_request.py": "options/launch_config",
    "options/test_sharding.py": "options/deepspeed",
    "parallel/test_batch.py": "parallel/topology",
    "peft/test_lora_training.py": "training/peft_run",
    "test_registry.py": "models/family_config",
    "training/checkpoint/test_load.py": "training/checkpoint/tensors training/checkpoint/together training/optimizer/state",
    "training/memory/test_estimate.py": "training/memory/stages training/memory/trace",
    "training/answering/test_answers.py": "training/answering/generate",
    "training/test_step.py": "training/optimizer/build",
    "training/test_trainer.py": "training/evaluate",
}
"""test file -> files that it tests beside the one of its name, because they work only together"""
MOST = 47
"""So many there are: it only falls."""


def place_of_tests(path: Path) -> Path:
    """Where a file's tests belong; those of a folder's ``__init__`` have its name."""
    rest = path.relative_to(PACKAGE)
    stem = path.stem if path.name != "__init__.py" else path.parent.name
    return ROOT / "tests" / rest.parent / f"test_{stem}.py"


def has_logic(path: Path) -> bool:
    """More than imports, constants and declarations of fields."""
    branches = (ast.FunctionDef, ast.AsyncFunctionDef, ast.If, ast.For, ast.While, ast.Try)
    return any(isinstance(node, branches) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def test_every_file_has_tests_of_its_name():
    told = {name for names in ELSEWHERE.values() for name in names.split()}
    bare = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).with_suffix("").as_posix()
        if (
            has_logic(path)
            and not name.startswith(tuple(WHOLE))
            and name not in told
            and not place_of_tests(path).exists()
        ):
            bare.append(f"{name}.py: write {place_of_tests(path).relative_to(ROOT)}")
    assert not bare, bare


def test_files_that_are_tested_elsewhere_are_told_right():
    for test, names in ELSEWHERE.items():
        assert (ROOT / "tests" / test).is_file(), f"no tests/{test}"
        for name in names.split():
            path = PACKAGE / f"{name}.py"
            assert path.is_file(), f"{test}: no {name}.py"
            assert not place_of_tests(path).exists(), f"{name} has tests of its name: take it off the list"
    assert sum(len(names.split()) for names in ELSEWHERE.values()) <= MOST, "write tests under the file's own name"


def test_families_are_tested_whole():
    for spec in sorted((PACKAGE / "models" / "families").glob("*/__init__.py")):
        tests = ROOT / "tests" / "models" / "families" / spec.parent.name
        missing = [name for name in OF_A_FAMILY if not (tests / name).is_file()]
        assert not missing, f"{tests.relative_to(ROOT)} has no {missing}"
