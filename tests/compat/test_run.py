"""`grand-fast run`: a program as Python runs it, and what it says at the end."""

import atexit
import io
import runpy
import subprocess
import sys

import pytest
import torch_geometric.typing  # noqa: F401  # before there is a stand-in for torch_sparse

from grand_fast import cli
from grand_fast.compat import active
from grand_fast.compat.command import main

PROGRAM = """\
import sys
from pathlib import Path
import torch
from torch_sparse import spmm
from torch_scatter import scatter_add
from torchdiffeq import odeint
import beside

edge = torch.tensor([[0, 1, 2, 2], [1, 2, 0, 1]])
x = torch.ones(3, 2)


def field(t, x):
    if "fail" in sys.argv:
        raise KeyError(beside.WORD)
    return spmm(edge, torch.ones(4), 3, 3, x) - x


if __name__ == "__main__":
    print(sys.argv[1:], beside.WORD, sys.path[0] == str(Path(__file__).resolve().parent))
    if "quiet" in sys.argv:
        sys.exit()
    if "said" in sys.argv:
        sys.exit("enough")
    print(odeint(field, x, torch.tensor([0.0, 1.0]), method="euler")[1].tolist())
    sys.exit(7)
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    for name in ("torch_sparse", "torch_scatter"):  # those of the other tests
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    (tmp_path / "beside.py").write_text("WORD = 'found'\n")
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


@pytest.mark.parametrize("run", [main, lambda argv: cli.main(["run", *argv])], ids=["main", "cli"])
def test_a_program_and_its_report(program, run, capsys):
    argv, path = sys.argv, list(sys.path)
    assert run([str(program), "-m", "--dataset", "Cora"]) == 7
    out, err = capsys.readouterr()
    assert out.splitlines() == ["['-m', '--dataset', 'Cora'] found True",
                                "[[1.0, 1.0], [1.0, 1.0], [2.0, 2.0]]"]  # fmt: skip
    assert "torch_sparse.spmm   once" in err and "torchdiffeq.odeint  once" in err
    assert "torch_scatter: it is not installed; a stand-in was there" in err
    assert (sys.argv, sys.path) == (argv, path) and not active.stack
    assert "torch_sparse" not in sys.modules


def test_options_before_the_program(program, capsys):
    assert main(["--no-spmm", "--no-attention", "--no-solver", str(program)]) == 7
    assert "ran\n  nothing" in capsys.readouterr().err
    assert main(["--no-report", str(program)]) == 7
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("flags", "changed"),
    [([], {}), (["--no-fields"], {"fields": None}), (["--exact"], {"solver": "exact"}),
     (["--no-solver"], {"solver": None, "early_stop": False})],
    ids=str,
)  # fmt: skip
def test_options_of_the_patch(flags, changed, tmp_path, capsys):
    program = tmp_path / "of_the_patch.py"
    program.write_text(
        "from grand_fast.compat import active\n"
        "p = active.stack[-1]\n"
        "print({n: getattr(p, n) for n in ('spmm', 'attention', 'fields', 'solver', 'early_stop')})"
    )
    assert main([*flags, str(program)]) == 0
    usual = {"spmm": True, "attention": True, "fields": "known", "solver": "same"}
    assert capsys.readouterr().out == f"{usual | {'early_stop': True} | changed}\n"


@pytest.mark.parametrize(("word", "code", "says"), [("quiet", 0, ""), ("said", 1, "enough\n")])
def test_how_a_program_ends(program, word, code, says, capsys):
    assert main([str(program), word]) == code
    err = capsys.readouterr().err
    assert err.startswith(says + "grand-fast: on its kernels ran")


def test_what_raises_shows_the_traceback_of_the_program(program, capsys):
    assert main([str(program), "fail"]) == 1
    err = capsys.readouterr().err
    trace, _, report = err.partition("KeyError: 'found'\n")
    assert trace.startswith("Traceback (most recent call last):\n")
    assert "in field\n" in trace and trace.count("  File ") == trace.count("program.py") == 2
    assert report.startswith("grand-fast: on its kernels ran") and "odeint  once" in report


def test_a_chain_of_errors_and_a_program_that_is_no_python(program, capsys):
    program.write_text(
        "from torchdiffeq import odeint\nimport torch\n"
        "def field(t, x): 1 / 0\n"
        "try:\n    odeint(field, torch.ones(2), torch.tensor([0.0, 1.0]), method='rk4')\n"
        "except ZeroDivisionError as error:\n    raise ValueError('mine') from error\n"
    )
    assert main([str(program)]) == 1
    err = capsys.readouterr().err
    assert "direct cause" in err and "ValueError: mine" in err and "grand_fast" not in err
    program.write_text("def f(:\n")
    assert main([str(program)]) == 1
    err = capsys.readouterr().err
    assert "SyntaxError" in err and "runpy" not in err and "line 1" in err


def test_a_module(program, monkeypatch, capsys):
    monkeypatch.chdir(program.parent)
    assert main(["-m", "program", "-m", "x"]) == 7
    assert capsys.readouterr().out.startswith("['-m', 'x'] found True")


def test_a_folder_or_package_is_its_main(program, monkeypatch, capsys):
    folder = program.parent
    monkeypatch.chdir(folder)
    (folder / "pack").mkdir()
    (folder / "pack" / "__main__.py").write_text("import sys\nprint(sys.argv, __package__, "
        "sys.path[0], sys.modules['__main__'].__file__ == __file__)")  # fmt: skip
    assert main(["pack", "x"]) == 0
    assert capsys.readouterr().out == f"['pack', 'x']  {folder}/pack True\n"
    (folder / "pack" / "__init__.py").write_text("")
    assert main(["-m", "pack"]) == 0
    assert capsys.readouterr().out == f"['{folder}/pack/__main__.py'] pack {folder} True\n"
    sys.modules.pop("pack")


def test_what_is_no_program_is_one_line(program, monkeypatch, capsys):
    folder = program.parent
    monkeypatch.chdir(folder)
    (folder / "bare").mkdir()
    (folder / "bare" / "__init__.py").write_text("")
    (folder / "wants.py").write_text("import no_such_part")
    for argv, says in (
        (["-m", "no_such_program"], "No module named no_such_program."),
        (["-m", "no_such.program"], "No module named no_such.program."),
        (["-m", "bare"], "No module named bare.__main__; 'bare' is a package and cannot be "
                         "directly executed."),
        (["bare"], "can't find '__main__' module in 'bare'."),
    ):  # fmt: skip
        assert main(argv) == 1
        assert capsys.readouterr().err == f"grand-fast run: {says}\n"
    sys.modules.pop("bare")
    assert main(["-m", "wants"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and "named 'no_such_part'" in err and "wants.py" in err


def test_bad_arguments(capsys, tmp_path):
    assert main([str(tmp_path / "none.py")]) == 2
    err = capsys.readouterr().err
    assert err == f"grand-fast run: there is no file '{tmp_path}/none.py'.\n"
    for argv, says in (([], "required: SCRIPT (see"), (["--fast", "x.py"], "--fast")):
        assert main(argv) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1


def test_help_teaches(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for word in ("torch_sparse.spmm", "SpGraphTransAttentionLayer", "odeint", "examples:",
                 "--no-solver", "standard error", "compat.patch"):  # fmt: skip
        assert word in out
    assert cli.main(["--help"]) == 0
    assert "run other people's GRAND code" in capsys.readouterr().out.replace("\n", " ")


def test_python_m_grand_fast_compat(program, monkeypatch, capsys):
    own, at_exit = sys.modules["__main__"], []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    monkeypatch.setattr(sys, "argv", ["grand_fast.compat", str(program)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("grand_fast.compat", run_name="__main__")
    assert stop.value.code == 7
    [finish] = at_exit  # what follows is the program's until then
    assert capsys.readouterr().err == "" and active.stack
    assert sys.argv == [str(program)] and sys.modules["__main__"].edge.shape == (2, 4)
    finish()
    assert capsys.readouterr().err.startswith("grand-fast: on its kernels ran\n")
    assert sys.modules["__main__"] is own and not active.stack
    monkeypatch.setattr(sys, "argv", ["grand_fast.compat", "none.py"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("grand_fast.compat", run_name="__main__")
    assert capsys.readouterr().err.startswith("python -m grand_fast.compat: there is no file")


def test_a_module_of_the_users_own_by_the_name_of_a_stand_in(program, capsys):
    (program.parent / "torch_sparse.py").write_text("spmm = lambda *a: 'mine'")
    program.write_text("import torch_sparse\nprint(torch_sparse.spmm(1))")
    assert main([str(program)]) == 0
    del sys.modules["torch_sparse"]
    out, err = capsys.readouterr()
    assert out == "mine\n" and "torch_sparse: " not in err


class Broken(io.StringIO):
    def flush(self):
        raise BrokenPipeError


@pytest.mark.parametrize("out", ["closed", None, Broken()])
def test_streams_that_are_closed(program, monkeypatch, capsys, out):
    if out == "closed":
        (out := io.StringIO()).close()
    program.write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        assert main([str(program)]) == 0
    assert capsys.readouterr().err.startswith("grand-fast: on its")
    program.write_text("import sys\nsys.exit('x' if 'x' in sys.argv else 0)")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", out)
        assert main([str(program)]) == 0 and main([str(program), "x"]) == 1
    assert capsys.readouterr().out == ""


def test_a_program_that_keeps_a_patch_of_its_own(program, capsys):
    program.write_text(
        "import sys, grand_fast as gf\np = gf.compat.patch()\n"
        "if 'fail' in sys.argv: raise KeyError('mine')"
    )
    assert main([str(program)]) == 0 and not active.stack
    assert capsys.readouterr().err.startswith("grand-fast: on its")
    assert main([str(program), "fail"]) == 1 and not active.stack
    err = capsys.readouterr().err
    assert "KeyError: 'mine'\ngrand-fast: on its" in err and "RuntimeError" not in err


def test_a_program_is_the_main_module(program, monkeypatch, capsys):
    program.write_text(
        '"""Says what it is."""\n'
        "import os, sys\n"
        "import dataclasses, inspect, pickle, typing, __main__\n"
        "@dataclasses.dataclass\nclass A:\n    x: 'int' = 1\n"
        "os.chdir('/')\n"
        "print(__file__, sys.argv[0], __name__, __spec__, __cached__, __package__, __doc__)\n"
        "print(pickle.loads(pickle.dumps(A(3))), typing.get_type_hints(A), __main__.A is A,\n"
        "      inspect.getsource(A).count('class'), __builtins__.len is len, type(__loader__))\n"
    )
    monkeypatch.chdir(program.parent)
    assert main(["--no-report", program.name]) == 0
    ours = capsys.readouterr().out
    theirs = subprocess.run(
        [sys.executable, program.name], capture_output=True, text=True, cwd=program.parent
    )
    assert ours == theirs.stdout and str(program) in ours


def test_threads_and_exit_handlers_are_part_of_the_program(program):
    program.write_text(
        "import atexit, pickle, threading, time\n"
        "class A: pass\n"
        "def late(name):\n"
        "    time.sleep(0.1)\n"
        "    import torch_scatter, torch_sparse\n"
        "    print(name, len(pickle.dumps(A())) > 0, torch_sparse.spmm.__module__, flush=True)\n"
        "atexit.register(late, 'handler')\n"
        "threading.Thread(target=late, args=['thread']).start()\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "grand_fast.compat", str(program)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0
    spmm = "True grand_fast.compat.spmm\n"
    assert done.stdout.startswith(f"thread {spmm}handler {spmm}grand-fast: on its kernels ran\n")
