"""transformers' video processors without torchvision: their own source, over the two steps of the base class that they call.

The class of ``models/NAME/video_processing_NAME.py`` is run as it stands there; its base, ``TorchvisionBackend``, is replaced
by its own formulas: ``tvF.resize`` of 8-bit pixels is torch's ``interpolate`` with antialiasing, ``normalize`` a subtraction
and a division.
"""

import functools
import sys
import types
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import transformers
from transformers import SmolVLMProcessor
from transformers.image_utils import PILImageResampling
from transformers.video_utils import VideoMetadata

MODES = {PILImageResampling.BICUBIC: "bicubic", PILImageResampling.LANCZOS: "lanczos"}


class Base:
    rescale_factor, default_to_square, num_frames, fps = 1 / 255, True, None, None

    def __init__(self, **settings):
        for name, value in settings.items():
            setattr(self, name, value)

    def resize(self, image, size, resample=None, antialias=True, **kwargs):
        # Frames of a batch one by one: [B, T, C, H, W].
        flat, mode = image.flatten(0, 1), MODES[PILImageResampling(resample)]
        if flat.shape[-2:] != (size.height, size.width):
            flat = F.interpolate(flat, (size.height, size.width), mode=mode, antialias=antialias)
        return flat.unflatten(0, image.shape[:2])

    def rescale_and_normalize(self, images, do_rescale, factor, do_normalize, mean, std):
        mean, std = torch.tensor(mean) * (1.0 / factor), torch.tensor(std) * (1.0 / factor)
        return images.to(torch.float32).sub(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))

    def frames(self, video, metadata):
        """Samples and processes one video, uint8 [T, C, H, W]; returns (data, its metadata)."""
        metadata.frames_indices = self.sample_frames(metadata)
        size = transformers.image_utils.SizeDict(**self.size)
        names = ("do_resize", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "resample")
        more = ("do_pad", "patch_size", "temporal_patch_size", "merge_size", "cap_pixels_per_frame")
        values = {name: getattr(self, name) for name in (*names, *more) if hasattr(self, name)}
        taken = video[torch.as_tensor(metadata.frames_indices).long()]
        return self._preprocess([taken], size=size, return_tensors="pt", **values), metadata


PARTS = ("", ".transforms", ".transforms.v2", ".transforms.v2.functional")


@functools.cache
def _class(model, name):
    folder = Path(transformers.__file__).parent / "models" / model
    source = (folder / f"video_processing_{model}.py").read_text()
    source = source.replace("(BaseVideoProcessor)", "(Base)").replace("@auto_docstring\n", "")
    stubs = {f"torchvision{part}": types.ModuleType("stub") for part in PARTS}
    for outer, inner in pairwise(stubs):
        setattr(stubs[outer], inner.rpartition(".")[2], stubs[inner])
    package = f"transformers.models.{model}"
    there = {"Base": Base, "__package__": package, "__name__": f"{package}.video"}
    hidden = {key: sys.modules.get(key) for key in stubs}
    sys.modules.update(stubs)
    try:
        exec(compile(source, str(folder), "exec"), there)
    finally:
        for key, module in hidden.items():
            sys.modules.pop(key) if module is None else sys.modules.update({key: module})
    return there[name]


def video_processor(model, name, **settings):
    """The class ``name`` of transformers' folder ``model``, with these settings."""
    return _class(model, name)(**settings)


def metadata(total, fps):
    return VideoMetadata(total_num_frames=total, fps=fps, duration=total / fps)


def smolvlm_text(data, metadata, tokens):
    """What transformers' SmolVLMProcessor writes for a video of frames of so many tokens."""
    marks = dict(image_token="<image>", fake_image_token="<fake_token_around_image>", global_image_token="<global-img>")
    found = {"pixel_values": data["pixel_values"], "video_metadata": [metadata]}
    return SmolVLMProcessor.replace_video_token(SimpleNamespace(image_seq_len=tokens, **marks), found, 0)
