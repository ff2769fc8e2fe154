"""Training few parameters: LoRA and QLoRA on any layout, and adapters in and out of PEFT's files.

config.py   PeftConfig, the section ``peft`` of a run
select.py   names -> PeftPlan: which linears get a pair A, B; which modules train in full
plan.py     PeftPlan; pairs as entries of the weight map
lora.py     PeftPlan -> the pairs in a model's stages, everything else frozen
base.py     which base a checkpoint of adapters belongs to
adapter.py, adapter_io.py, adapter_folders.py   an adapter in memory, in PEFT's files, in XTuner's folders
merge.py    base and adapter as one weight source; adapters of checkpoints, folders and models saved with theirs inside
export.py   writing adapters for PEFT, in any naming of the family

Adapters are more entries of the family's weight map, derived from those of the linears they belong to; so sharding marks,
checkpoints, tensor parallel cutting and export are those of every other weight.
"""
