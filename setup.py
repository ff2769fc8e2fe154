"""Package metadata. The lists are plain literals: tests read them to keep the docker images on the same versions."""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent

# Exactness depends on these, so they are pinned: a bit-for-bit resume, parity with transformers, megatron-core's seams.
INSTALL = [
    "torch==2.13.0",
    "megatron-core==0.16.1",
    "transformers==5.23.0",
    "tokenizers==0.23.3",
    "safetensors==0.8.0",
    "sentencepiece==0.2.3",
    "huggingface_hub==2.4.0",
    "peft==0.21.2",
    "webdataset==1.0.2",
    "braceexpand==0.1.7",
    "pillow==13.0.0",
    "numpy==2.4.6",
    "pyyaml==6.0.3",
    "tensorboard==2.21.0",
    "psutil==7.2.2",
    "rich==15.0.0",
    "prompt_toolkit==3.0.53",
    "fsspec==2026.9.0",
    "rapidfuzz==3.14.6",
]

EXTRAS = {
    # apex has no package in any registry (the one called apex is another project): docker/Dockerfile.gpu builds it from
    # its repository.
    "gpu": [
        "flash-attn==2.8.3.post2",
        "transformer-engine[pytorch]==2.20.2",
    ],
    "video": ["av==18.1.0"],  # video files in data build; folders of frames need nothing
    "heif": ["pillow-heif==1.8.1"],  # HEIC pictures; AVIF is Pillow's own
    "qlora": ["bitsandbytes==0.50.2"],  # base weights in 4 bits
    "parquet": ["pyarrow==26.0.1"],  # data build --format parquet
    "s3": ["s3fs==2026.9.0"],  # checkpoint.save and --load of s3://
    "wandb": ["wandb==0.31.0"],  # --report_to wandb
    "mlflow": ["mlflow==3.18.0"],  # --report_to mlflow
    "swanlab": ["swanlab==0.10.3"],  # --report_to swanlab; wants protobuf below 7, which nothing else here minds
    "docs": ["mkdocs==1.6.1", "mkdocs-material==9.8.2"],  # mkdocs build --strict
    "dev": [
        "pytest==9.2.0",
        "pytest-xdist==3.8.0",
        "ruff==0.17.6",
        "mypy==2.4.1",
        "types-PyYAML==6.0.12.20261113",
        "scikit-learn==1.9.1",
        "matplotlib==3.11.2",
        "av==18.1.0",
        "pillow-heif==1.8.1",
        "pyarrow==26.0.1",
        "bitsandbytes==0.50.2",
        "pexpect==4.9.0",
        "playwright==1.65.2",
        "num2words==0.5.14",  # transformers' SmolVLMProcessor
        "gguf==0.19.0",  # weights of a published decoder, in tests that are given them
        "s3fs==2026.9.0",
        "moto==5.2.5",  # a store that speaks S3, for tests; its server is flask
        "flask==3.1.3",
        "flask-cors==6.0.5",
        "mkdocs==1.6.1",
        "mkdocs-material==9.8.2",
        "kubernetes-validate==1.37.0",  # schemas of pods and jobs, for the manifests of examples/k8s
    ],
}


def version() -> str:
    """Returns ``__version__`` without importing the package."""
    text = (ROOT / "megatron_vlm" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


class BuildWithRecipes(build_py):
    """Packs the recipes of examples/, which `megatron-vlm recipe` lists; a checkout has them beside the package."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for recipe in sorted((ROOT / "examples").rglob("*.yaml")):
            target = Path(self.build_lib, "megatron_vlm", "examples", recipe.relative_to(ROOT / "examples"))
            self.mkpath(str(target.parent))
            self.copy_file(str(recipe), str(target))


setup(
    name="megatron_vlm",
    version=version(),
    description="Vision-language models from a Hugging Face checkpoint to a Hugging Face checkpoint, on megatron-core",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    cmdclass={"build_py": BuildWithRecipes},
    packages=find_packages(include=["megatron_vlm", "megatron_vlm.*"]),
    install_requires=INSTALL,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megatron-vlm = megatron_vlm.cli.main:main"]},
)
