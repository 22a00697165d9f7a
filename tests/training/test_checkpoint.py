"""Files of weights and of states: what comes back, what is refused, and what a kill leaves."""

import json
import math

import pytest
import torch

from grand_fast.nn import GRAND
from grand_fast.training import checkpoint
from grand_fast.training.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_checkpoint,
    load_state,
    save_checkpoint,
    save_state,
    write_whole,
)

MODEL = {"in_channels": 5, "hidden_channels": 8, "out_channels": 2, "heads": 2, "T": 2.0}


def test_checkpoint_gives_the_same_logits(tmp_path):
    model = GRAND(**MODEL).eval()
    folder = tmp_path / "new" / "folder"
    assert save_checkpoint(folder, model.state_dict(), {"model": MODEL}) == folder / WEIGHTS_FILE
    loaded = load_checkpoint(folder)
    x, edges = torch.randn(6, 5), torch.randint(6, (2, 20))
    assert torch.equal(loaded(x, edges), model(x, edges))
    assert not loaded.training
    assert {file.name for file in folder.iterdir()} == {WEIGHTS_FILE, CONFIG_FILE}


def test_checkpoint_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"must hold {CONFIG_FILE}, got {tmp_path}"):
        load_checkpoint(tmp_path)
    save_checkpoint(tmp_path, GRAND(**MODEL).state_dict(), {"model": MODEL})
    weights = (tmp_path / WEIGHTS_FILE).read_bytes()
    (tmp_path / WEIGHTS_FILE).write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match=f"{tmp_path} does not hold a model"):
        load_checkpoint(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(weights)
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"model": MODEL | {"hidden_channels": 9}}))
    with pytest.raises(ValueError, match="does not hold a model"):
        load_checkpoint(tmp_path)


def test_a_state_comes_back_bit_for_bit(tmp_path):
    shared = torch.randn(3, 4)
    state = {
        "tensors": [shared, shared[1:], shared.T, torch.tensor(7), torch.zeros(0, 2)],
        "dtypes": {
            kind: torch.ones(2, dtype=kind) for kind in (torch.uint8, torch.float64)
        }.values(),
        0: {"betas": (0.9, 0.999), "none": None, "yes": True, "text": "a \u00e9"},
        "floats": [0.1, 1e-300, math.inf, -0.0, 2**60 + 1],
    }
    state["dtypes"] = list(state["dtypes"])
    save_state(tmp_path / "state", state)
    found = load_state(tmp_path / "state")
    assert found.keys() == state.keys()
    for name in ("tensors", "dtypes"):
        for got, want in zip(found[name], state[name], strict=True):
            assert got.dtype == want.dtype and torch.equal(got, want)
    assert found[0] == state[0] and isinstance(found[0]["betas"], tuple)
    assert found["floats"] == state["floats"] and math.copysign(1, found["floats"][3]) == -1


def test_a_damaged_state_is_named(tmp_path):
    path = tmp_path / "state"
    save_state(path, {"a": torch.randn(50)})
    content = path.read_bytes()
    for damaged in (b"", content[:100], content[:-1], b"\x80\x04." + content):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path} does not hold a state"):
            load_state(path)


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"old")

    class Full:
        def __getattr__(self, name):
            raise OSError("the disk is full")

    monkeypatch.setattr(checkpoint, "os", Full())
    with pytest.raises(OSError, match="full"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    monkeypatch.undo()
    write_whole(path, b"new")
    assert path.read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1
