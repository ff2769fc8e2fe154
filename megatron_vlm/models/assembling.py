"""What families share that make one model out of parts: tensors drawn by name or renamed, and vocabularies with new rows."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_vlm.errors import ConversionError
from megatron_vlm.files import read_bytes
from megatron_vlm.weights.mapping import Entry, HFModel, TensorInfo, TensorStore

Tensors = tuple[dict[str, Callable[[], Tensor]], dict[str, TensorInfo]]
"""Readers and infos of tensors by name."""

NewRows = Literal["mean", "normal"]
SAID_ONCE = ("_name_or_path", "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version")
"""Keys of a part's config that are said once, for the whole."""
_NOT_COPIED = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".md")


def generator(seed: int, name: str) -> torch.Generator:
    """A stream of its own for each tensor, so that the order of reading does not matter."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def drawn(name: str, info: TensorInfo, seed: int, std: float = 0.02) -> Tensor:
    """A new tensor: biases zero, norms one, the rest N(0, std)."""
    if name.endswith("bias"):
        return torch.zeros(info.shape, dtype=info.dtype)
    if "norm" in name:
        return torch.ones(info.shape, dtype=info.dtype)
    return torch.empty(info.shape).normal_(0.0, std, generator=generator(seed, name)).to(info.dtype)


def new_ids(tokens: Iterable[str], tokenizer: Any, before: Collection[str], rows: int) -> list[int]:
    """Ids of ``tokens`` whose rows were never trained: the old vocabulary ``before`` lacks them (a model may have spare rows
    for them, as Qwen's), or the model of ``rows`` rows does."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokens}
    return [index for token, index in ids.items() if token not in before or index >= rows]


def extend_vocabulary(
    tensors: Tensors, names: Sequence[str], rows: int, ids: Sequence[int], new_rows: NewRows, seed: int, *, tied: bool
) -> None:
    """Gives embedding and head, ``names``, ``rows`` rows, in place; a stored ``tied`` head gets those of the embedding."""
    readers, infos = tensors
    for name in names:
        if name in infos:
            infos[name] = TensorInfo(dtype=infos[name].dtype, shape=(rows, *infos[name].shape[1:]))
            readers[name] = extended_rows(readers[name], names[0] if tied else name, rows, ids, new_rows, seed)


def with_biases(modules: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of linears and norms, by module -> those of weights and biases, by tensor."""
    return {
        f"{module}.{kind}": size
        for module, shape in modules.items()
        for kind, size in (("weight", shape), ("bias", shape[:1]))
    }


def add_connector(
    tensors: Tensors,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    draw: Callable[[str, TensorInfo], Tensor],
    projector: HFModel | None,
    others: Iterable[Sequence[str]] = (),
) -> None:
    """Gives the whole its connector, in place: a trained one, or one that is drawn.

    Args:
        shapes: name in the whole -> shape that tower and language model need.
        dtype: of what is drawn by ``draw(name, info)``.
        projector: the trained one alone, or a whole model of the kind, of which nothing else is taken; None: drawn.
        others: what others call the modules, where the tensors are those of ``with_biases``, in that order.

    Raises:
        ConversionError: names or shapes are others.
    """
    readers, infos = tensors
    if projector is None:
        infos |= {name: TensorInfo(dtype=dtype, shape=shape) for name, shape in shapes.items()}
        readers |= {name: partial(draw, name, infos[name]) for name in shapes}
        return
    stored, what = projector.tensors.infos, f"--projector {projector.directory}"
    namings = [dict(zip(shapes, shapes))]
    namings += [dict(zip(with_biases(dict.fromkeys(modules, ())), shapes, strict=True)) for modules in others]
    namings += [{f"model.{theirs}": ours for theirs, ours in naming.items()} for naming in namings]
    naming = max(namings, key=lambda names: len(names.keys() & stored.keys()))
    whole = "vision_config" in projector.config
    check_names(naming, naming.keys() & stored.keys() if whole else stored, f"{what} is none of this model")
    for theirs, ours in naming.items():
        if (found := stored[theirs].shape) != shapes[ours]:
            raise ConversionError(
                f"{what}: {theirs} has shape {list(found)}, language model and tower need {list(shapes[ours])}"
            )
        infos[ours], readers[ours] = stored[theirs], partial(projector.tensors.read, theirs)


def check_names(wanted: Collection[str], found: Collection[str], what: str) -> None:
    """Raises ConversionError, which begins with ``what``, where tensors are missing or unknown."""
    missing, unknown = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or unknown:
        raise ConversionError(
            f"{what}: {len(missing)} tensors missing ({', '.join(missing[:10]) or 'none'}), {len(unknown)} unknown "
            f"({', '.join(unknown[:10]) or 'none'})"
        )


def extended_rows(
    read: Callable[[], Tensor],
    name: str,
    rows: int,
    new_ids: Sequence[int],
    new_rows: NewRows,
    seed: int,
) -> Callable[[], Tensor]:
    """Reads a vocabulary tensor [V, H] with ``rows`` rows: those of ``new_ids`` and all beyond the old ones are new.

    Args:
        read: reads the old tensor.
        name: of the tensor, for its stream.
        rows: of the result.
        new_ids: ids of added tokens.
        new_rows: ``mean`` of the existing rows, or ``normal``: N(0, 0.02).
        seed: of what is drawn.
    """

    def read_extended() -> Tensor:
        old = read()
        first_new = min([*new_ids, old.shape[0]])
        fresh = sorted({*new_ids, *range(old.shape[0], rows)})
        full = torch.empty(rows, old.shape[1], dtype=old.dtype)
        full[: old.shape[0]] = old
        if new_rows == "mean":
            blocks = old[:first_new].split(8192)  # a float32 copy of the whole would be the largest tensor of all
            full[fresh] = (sum(block.double().sum(0) for block in blocks) / first_new).to(old.dtype)
        else:
            noise = torch.empty(len(fresh), old.shape[1]).normal_(0.0, 0.02, generator=generator(seed, name))
            full[fresh] = noise.to(old.dtype)
        return full

    return read_extended


def renamed(store: TensorStore, own: Iterable[Entry], target: Mapping[str, Entry]) -> Tensors:
    """Tensors of ``store``, which are named as ``own`` says, under the names of ``target`` (our name -> entry)."""
    readers: dict[str, Callable[[], Tensor]] = {}
    infos: dict[str, TensorInfo] = {}
    for entry in own:
        other = target[entry.name]
        full = entry.to_full([store.infos[name].meta() for name in entry.hf])
        for index, (name, part) in enumerate(zip(other.hf, other.from_full(full), strict=True)):
            infos[name] = TensorInfo.of(part)
            readers[name] = partial(_read_part, store, entry, other, index)
    return readers, infos


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    """The same under longer names."""
    readers, infos = tensors
    return {prefix + name: read for name, read in readers.items()}, {
        prefix + name: info for name, info in infos.items()
    }


def _read_part(store: TensorStore, entry: Entry, other: Entry, index: int) -> Tensor:
    if len(entry.hf) == len(other.hf):
        return store.read(entry.hf[index])
    return other.from_full(entry.to_full([store.read(name) for name in entry.hf]))[index]


def copy_small_files(source: Path, destination: Path) -> None:
    """Copies the files of a folder that hold neither weights nor its model card; its folders stay behind."""
    destination.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_NOT_COPIED):
            (destination / path.name).write_bytes(read_bytes(path))


def copy_licences(source: Path, destination: Path) -> None:
    """Copies licence and notice files."""
    for path in source.iterdir():
        if path.is_file() and path.name.upper().startswith(("LICENSE", "NOTICE", "USE_POLICY")):
            (destination / path.name).write_bytes(read_bytes(path))
