"""Where machine code is kept between processes, and what happens where it cannot be."""

import stat
import tempfile
from pathlib import Path

import pytest

from grand_fast.kernels.cpu import machine_code

pwd, resource = pytest.importorskip("pwd"), pytest.importorskip("resource")  # not on Windows

SOURCE = "define void @probe(ptr %from, i64 %count) { ret void }"


@pytest.fixture
def no_home(monkeypatch, tmp_path):
    """A process without HOME, of a user whom the system does not know."""

    def unknown(uid):
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(RuntimeError):
        Path.home()
    return tmp_path


def compiles():
    machine_code.compile_kernel("probe", SOURCE)(0, 0)


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_kernel_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiles()
    assert [name[:6] for name in files(tmp_path / "grand_fast" / "kernels")] == ["probe-"]
    monkeypatch.setattr(machine_code, "_compile", None)
    compiles()


def test_without_a_home_it_is_a_temporary_folder_of_the_user_alone(no_home, monkeypatch):
    compiles()
    (folder,) = no_home.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [name[:6] for name in files(folder)] == ["probe-"]
    monkeypatch.setattr(machine_code, "_compile", None)
    compiles()


@pytest.mark.parametrize("planted", ["open", "another's", "link", "file"])
def test_a_temporary_folder_that_others_may_write_is_not_used(no_home, monkeypatch, planted):
    """What lies in the cache is executed."""
    compiles()
    (folder,) = no_home.iterdir()
    (kept,) = folder.iterdir()
    if planted == "open":
        folder.chmod(0o777)
    elif planted == "another's":
        uid = machine_code.os.getuid()
        monkeypatch.setattr(machine_code.os, "getuid", lambda: uid + 1)
        folder.rename(folder.with_name(f"grand_fast-{uid + 1}"))
    else:
        folder.rename(no_home / "elsewhere")
        if planted == "link":
            folder.symlink_to(no_home / "elsewhere")
        else:
            folder.touch()
    before = files(no_home)
    read = []
    monkeypatch.setattr(machine_code, "_read", read.append)
    compiles()
    assert read == [] and files(no_home) == before and kept.name in before


def test_no_place_at_all(no_home, monkeypatch):
    def nowhere():
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    assert machine_code._cache_folder() is None
    compiles()
    assert files(no_home) == []


def test_a_cache_that_cannot_be_made(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compiles()
    assert files(tmp_path) == ["file"]


@pytest.mark.parametrize("room", [0, 100])
def test_a_full_disk_leaves_nothing_behind(monkeypatch, tmp_path, room):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        compiles()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path) == []
    compiles()
    assert [name[:6] for name in files(tmp_path)] == ["probe-"]


def test_a_damaged_file_is_compiled_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiles()
    (path,) = (tmp_path / "grand_fast" / "kernels").iterdir()
    whole = path.read_bytes()
    for damaged in (whole[:-1], b"", whole[:40] + bytes([whole[40] ^ 1]) + whole[41:]):
        path.write_bytes(damaged)
        compiles()
        assert path.read_bytes() == whole
