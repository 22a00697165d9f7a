"""What the tests of the command line share."""

import pytest
import torch

from grand_fast import cli

# Two epochs of a small model: seconds
QUICK = ["--epochs", "2", "--hidden", "8", "--attention-channels", "4", "--heads", "2",
         "--T", "1", "--backend", "reference"]  # fmt: skip


@pytest.fixture(autouse=True)
def own_folder(request, tmp_path, monkeypatch):
    """Results go to `runs/` below the current folder; threads only wait on models this small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRAND_FAST_DATA", raising=False)
    if "pictures" not in request.fixturenames:
        request.getfixturevalue("no_pictures")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fails(capsys, arguments, code):
    """The one line on standard error of a command that must fail with `code`."""
    assert cli.main(arguments) == code
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "Traceback" not in err
    assert err.startswith("grand-fast")
    return err
