"""What killed compilations leave: planted, and found by the run after them."""

import errno
import os
import struct
import subprocess
import sys
import time

import pytest

from train import compile_cache

SOURCE = """
#include <regex>  // takes seconds to compile
extern "C" bool matches(const char* text) { return std::regex_match(text, std::regex("a+")); }
"""
BUILD = """
from train import compile_cache
compile_cache.heal()
import torch
from torch.utils.cpp_extension import load
"""
COMPILED = BUILD + "print(torch.compile(lambda x: x.sin() + 2)(torch.zeros(3)).sum().item())"


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """The folders of extensions and of inductor, both empty."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setattr(compile_cache, "LOOK_AGAIN", 0.1)
    compile_cache.heal()
    return tmp_path.joinpath(os.environ["TORCH_EXTENSIONS_DIR"]), tmp_path / "inductor"


def plant(path, content=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_an_abandoned_lock_is_deleted_and_named(caches, capfd):
    lock = plant(caches[0] / "deepspeed_shm_comm" / "lock")
    compile_cache.heal()
    assert not lock.exists() and f"deleted {lock}" in capfd.readouterr().err


def test_a_lock_is_kept_while_its_builder_lives_and_goes_when_it_is_killed(caches):
    lock = caches[0] / "op" / "lock"
    lock.parent.mkdir()
    code = (
        "import sys, time; from torch.utils.file_baton import FileBaton;"
        " print(FileBaton(sys.argv[1]).try_acquire(), flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE) as builder:
        try:
            assert builder.stdout.readline() == b"True\n"
            compile_cache.heal()
            assert lock.exists()
        finally:
            builder.kill()
    compile_cache.heal()
    assert not lock.exists()


def test_what_changes_meanwhile_is_being_written(caches, monkeypatch):
    library = plant(caches[1] / "ab" / "cab.main.so")
    monkeypatch.setattr(compile_cache.time, "sleep", lambda _: library.write_bytes(b"more"))
    compile_cache.heal()
    assert library.exists()


def test_unfinished_files_go_and_finished_ones_stay(caches):
    # An ELF header that puts its table of 2 sections of 64 bytes at byte 1000: whole at 1,128.
    whole = (b"\x7fELF" + bytes(36) + struct.pack("<QIHHHHHH", 1000, 0, 64, 0, 0, 64, 2, 1)).ljust(1128, b"\0")
    kept = [plant(caches[1] / "a" / "whole.main.so", whole), plant(caches[1] / "h.h.gch", b"gpch.014" + bytes(100))]
    kept.append(plant(caches[1] / "a" / "source.cpp"))
    gone = [
        plant(caches[1] / "b" / "empty.main.so"),
        plant(caches[1] / "b" / "cut.main.so", whole[:-1]),
        plant(caches[1] / "b" / "zeros.so", bytes(5000)),
        plant(caches[1] / "precompiled_headers" / "begun.h.gch", bytes(16384)),
    ]
    compile_cache.heal()
    assert all(path.exists() for path in kept) and not any(path.exists() for path in gone)


def test_a_file_system_without_locks_or_of_others_does_not_end_the_run(caches, monkeypatch, capfd):
    library = plant(caches[1] / "ab" / "cab.main.so")

    def refuse(*_, **__):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(compile_cache.fcntl, "flock", refuse)
    compile_cache.heal()
    assert not library.exists()
    plant(library)
    monkeypatch.setattr(compile_cache.Path, "mkdir", refuse)
    monkeypatch.setattr(compile_cache.Path, "unlink", refuse)
    compile_cache.heal()
    assert library.exists() and f"warning: {library} is unfinished" in capfd.readouterr().err


def test_the_folder_of_extensions_is_named_once(caches):
    before = os.environ["TORCH_EXTENSIONS_DIR"]
    compile_cache.heal()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == before


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_a_compiled_graph_is_made_anew_from_an_empty_library(caches):
    first = run(COMPILED)
    assert first.stdout == "6.0\n", first.stderr
    libraries = list(caches[1].rglob("*.main.so"))
    for library in libraries:
        plant(library)
    again = run(COMPILED)
    assert libraries and again.stdout == "6.0\n" and "deleted" in again.stderr, again.stderr


@pytest.mark.slow
def test_an_extension_is_built_after_its_builder_was_killed(caches, tmp_path):
    source = plant(tmp_path / "op.cpp", SOURCE.encode())
    code = BUILD + f"load('op', [{str(source)!r}], is_python_module=False)"
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True) as builder:
        lock = caches[0] / "op" / "lock"
        while not lock.exists():
            assert builder.poll() is None, "built before it could be killed"
            time.sleep(0.05)
        os.killpg(builder.pid, 9)
    assert lock.exists()
    again = run(code)
    assert again.returncode == 0, again.stderr
    assert (caches[0] / "op" / "op.so").exists() and not lock.exists()
