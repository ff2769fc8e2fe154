"""docs/assemble.md on tiny parts and digits: a model of parts through two stages, and transformers' own class answers."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from megatron_vlm.models.families.internvl3.prompts import DEFAULT, PROMPTS
from megatron_vlm.testing.runs import metrics_of
from megatron_vlm.testing.twins.internvl3 import hf_processor
from megatron_vlm.testing.twins.parts import write_tiny_llm, write_tiny_tower
from tests.examples.guides import run_guide
from tests.launch.test_launch import write_digits

SHARED = (
    "training.train_epochs=null training.precision=fp32 training.device=cpu data.seq_length=512 data.num_workers=1 "
    "data.packing=true data.group_by=null training.micro_batch_size=1 training.global_batch_size=4 optimizer.lr=3e-3 "
    "checkpoint.save_interval=null"
)
STEPS = {"one": 10, "two": 40, "adapter": 4, "script_one": 2, "script_two": 2}


def changed(before: dict, after: dict) -> set[str]:
    """Parts of the model that training has moved."""
    assert before.keys() == after.keys()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    return {next(part for part in ("projector", "vision_tower", "l") if part in name) for name in moved}


@pytest.mark.slow
@pytest.mark.full
def test_page(tmp_path):
    write_tiny_tower(tmp_path / "tower", "internvit")
    write_tiny_llm(tmp_path / "llm", "qwen3")
    records = json.loads(write_digits(tmp_path / "digits", 240).read_text())
    for name, some in (("captions", records[:80]), ("records", records)):
        (tmp_path / f"{name}.json").write_text(json.dumps(some))
    picture = tmp_path / "digits" / records[0]["image"]
    work, values = (
        tmp_path / "work",
        {"VISION": tmp_path / "tower", "LLM": tmp_path / "llm", "IMAGES": tmp_path / "digits"},
    )
    values |= {"CAPTIONS": tmp_path / "captions.json", "RECORDS": tmp_path / "records.json", "WORK": work}
    more = {f"--output_dir $WORK/{name}": f"--max_steps {STEPS[name]} {SHARED}" for name in ("one", "two", "adapter")}
    more["pretrain_internvl3.sh"] = more["finetune_internvl3.sh"] = f"training.train_iters=2 {SHARED}"
    output = run_guide(
        "../assemble.md", values, more | {"megatron-vlm generate": f"--image {picture} --precision fp32"}
    )
    for name, steps in STEPS.items():
        losses = [line["loss"] for line in metrics_of(work / name)]
        print(f"{name}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
        assert len(losses) == steps and (name != "two" or losses[-1] < losses[0] / 2)

    start, one, two, merged, scripted = (
        load_file(work / folder / "model.safetensors")
        for folder in ("model", "one/hf", "two/hf", "adapter/merged_model", "script_hf")
    )
    assert changed(start, one) == {"projector"} and changed(one, two) == {"projector", "l"}
    assert changed(one, merged) == {"l"} and changed(start, scripted) == {"projector", "l"}

    from transformers import AutoModelForImageTextToText, InternVLForConditionalGeneration

    model = AutoModelForImageTextToText.from_pretrained(work / "two" / "hf", attn_implementation="eager").eval()
    assert type(model) is InternVLForConditionalGeneration
    processor = hf_processor(work / "two" / "hf", (work / "two" / "hf" / "chat_template.jinja").read_text())
    turns = [{"role": "system", "content": PROMPTS[DEFAULT].system}]
    turns += [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    asked = processor.apply_chat_template(turns, add_generation_prompt=True)
    inputs = processor(text=[asked], images=[Image.open(picture).convert("RGB")], return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    text = processor.tokenizer.decode(answer, skip_special_tokens=True).strip()
    print(f"answer {text!r}")
    assert text and output.rstrip().endswith(text)
