"""Files that are whole or not there: trained weights, and the state of a training run.

Both are safetensors and JSON, in which nothing can execute when it is loaded.
"""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from grand_fast.nn import GRAND

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
_OUTLINE = "outline"  # key of the JSON in the header of a state's file


class WriteError(OSError):
    """A file that cannot be written; the text names it, the reason and the remedy."""

    def __str__(self) -> str:
        is_full = self.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "Make room there" if is_full else "Choose a place that can be written"
        return f"{self.filename} cannot be written: {self.strerror}. {remedy}."


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses in the block is a WriteError that names `path`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, WriteError):
            raise
        raise WriteError(error.errno, error.strerror or str(error), str(path)) from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file by one rename: whoever reads it, at any moment, finds the old one or the new.

    Also after a power failure: the content is on the disk before its name is.

    Raises:
        WriteError: there is no room, or no permission; the old file is as it was.
    """
    part = path.with_name(f"{path.name}.part")
    with writing(path):
        try:
            with open(part, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise


def write_file(path: Path, content: bytes) -> None:
    """`write_whole` where a user says, and its folder: a link, a device or a pipe stays one."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            path.write_bytes(content)
        else:
            write_whole(path.resolve(), content)


def save_checkpoint(folder: Path | str, weights: dict[str, Tensor], config: dict[str, Any]) -> Path:
    """Write weights (safetensors) and configuration (JSON) into `folder`, whole or not at all.

    Args:
        folder: made if missing; an earlier checkpoint in it is replaced.
        weights: `model.state_dict()`.
        config: `config["model"]` holds the arguments of `GRAND`; anything else is for readers.

    Returns:
        The path of the weights.
    """
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / CONFIG_FILE, json.dumps(config, indent=2).encode())
    write_whole(folder / WEIGHTS_FILE, save(weights))
    return folder / WEIGHTS_FILE


def saved_config(folder: Path) -> dict[str, Any] | None:
    """The configuration of the checkpoint in `folder`; None where a whole one is not there."""
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt"):  # checks the length
            config = json.loads((folder / CONFIG_FILE).read_text())
    except Exception:  # each of three file formats has errors of its own
        return None
    return config if isinstance(config, dict) else None


def load_checkpoint(folder: Path | str) -> GRAND:
    """The model saved in `folder`, on the CPU and in evaluation mode.

    Raises:
        FileNotFoundError: the folder holds no checkpoint. ValueError: its files do not fit.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"load_checkpoint: `folder` must hold {name}, got {folder} without it. "
                f"`grand-fast train --out {folder}` writes one."
            )
    try:
        model = GRAND(**json.loads((folder / CONFIG_FILE).read_text())["model"])
        model.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except Exception as error:  # each of three file formats has errors of its own
        raise ValueError(f"load_checkpoint: {folder} does not hold a model: {error}") from error
    return model.eval()


def save_state(path: Path, state: Any) -> None:
    """Write nested dicts, lists and tuples of tensors, numbers and strings, whole or not at all.

    One safetensors file: the tensors, and in its header an outline in JSON that says where each of
    them belongs. Numbers come back bit for bit. Not by torch.save: earlier states stay readable.
    """
    tensors: dict[str, Tensor] = {}
    outline = json.dumps(_outline(state, tensors))
    write_whole(path, save(tensors, metadata={_OUTLINE: outline}))


def load_state(path: Path) -> Any:
    """What `save_state` wrote, on the CPU.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            # Copies, because what is read may be a view of the file, which will be replaced
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return _filled(json.loads(file.metadata()[_OUTLINE]), tensors)
    except Exception as error:  # of either format
        raise ValueError(f"load_state: {path} does not hold a state: {error}") from error


def _outline(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, its tensors moved into `tensors`."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        # A copy: safetensors refuses tensors that share memory
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, dict):  # keys need not be strings
        return {"dict": [[key, _outline(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_outline(item, tensors) for item in value]
        return {type(value).__name__: items}
    assert value is None or isinstance(value, bool | int | float | str), type(value)
    return value


def _filled(outline: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(outline, dict):
        return outline
    ((kind, content),) = outline.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _filled(item, tensors) for key, item in content}
    items = [_filled(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's default generators of the CPU and, if it is a GPU, of `device`."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Continue from what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
