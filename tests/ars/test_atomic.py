"""Files that are whole or as they were: links, modes, what is no file, and what a kill leaves."""

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from ars import atomic as module
from ars.atomic import drop_unfinished, replacing
from ars.regularizers import EWC, save_penalty

NAME = "file.safetensors"


def write(path, text="new"):
    with replacing(path) as unfinished:
        unfinished.write_text(text)


def save(path, _=None):
    model = torch.nn.Linear(2, 1)
    save_penalty(EWC(model, {"weight": torch.ones(1, 2)}), path)


def mode_of(path):
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.fixture(params=[write, save], ids=["text", "penalty"])
def put(request):
    if request.param is save:
        pytest.importorskip("safetensors")
    return request.param


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_mode_of_any_other(put, tmp_path, umask, mask, mode):
    umask(mask)
    put(tmp_path / NAME)
    (tmp_path / "other").touch()
    assert mode_of(tmp_path / NAME) == mode == mode_of(tmp_path / "other")
    assert sorted(os.listdir(tmp_path)) == [NAME, "other"]


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o444])
def test_a_file_that_is_replaced_hands_on_its_mode(put, tmp_path, umask, mode):
    (tmp_path / NAME).write_text("old")
    (tmp_path / NAME).chmod(mode)
    put(tmp_path / NAME)
    assert mode_of(tmp_path / NAME) == mode
    assert (tmp_path / NAME).read_bytes() != b"old"


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_followed(put, tmp_path, exists):
    """To another folder, by a relative link to a link; or to where nothing is yet."""
    (tmp_path / "real").mkdir()
    if exists:
        (tmp_path / "real" / NAME).write_text("old")
    (tmp_path / "second").symlink_to(Path("real", NAME))
    (tmp_path / "first").symlink_to(tmp_path / "second")
    put(tmp_path / "first")
    assert (tmp_path / "first").is_symlink()
    assert (tmp_path / "second").is_symlink()
    assert (tmp_path / "real" / NAME).read_bytes() != b"old"
    assert os.listdir(tmp_path / "real") == [NAME]
    assert sorted(os.listdir(tmp_path)) == ["first", "real", "second"]


def fifo(path):
    os.mkfifo(path)


def sock(path):
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (fifo, "is a named pipe"),
        (sock, "is a socket"),
        (Path.mkdir, "is a folder: name a file in it"),
    ],
)
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_what_is_no_regular_file_is_refused_and_stays(put, tmp_path, make, kind, linked):
    path = tmp_path / NAME
    make(path)
    before = os.lstat(path)
    if linked:
        path = tmp_path / "link"
        path.symlink_to(NAME)
    with pytest.raises(OSError, match=f"{kind}.*{path.name}"):
        put(path)
    after = os.lstat(tmp_path / NAME)
    assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)
    assert len(os.listdir(tmp_path)) == 1 + linked


def test_a_device_and_a_loop_of_links_are_refused(put, tmp_path):
    for path in ("/dev/null", "/dev/stdout"):
        if not stat.S_ISREG(os.stat(path).st_mode):
            with pytest.raises(OSError, match=r"is a (device|named pipe), which is not replaced"):
                put(path)
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        put(tmp_path / "a")
    with pytest.raises(
        FileNotFoundError, match=r"cannot write there, as there is no folder .*absent"
    ):
        put(tmp_path / "absent" / "file")


def test_a_block_that_raises_leaves_the_old_file(tmp_path):
    write(tmp_path / NAME, "old")

    def stopped():
        with replacing(tmp_path / NAME) as unfinished:
            unfinished.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert (tmp_path / NAME).read_text() == "old"
    assert os.listdir(tmp_path) == [NAME]


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127, "a b\n", "-"])
def test_any_name_that_a_file_can_have(tmp_path, name):
    write(tmp_path / name)
    write(tmp_path / name, "newer")
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "newer"


# Without torch, which takes seconds to import.
KILLED = """
import runpy, sys, time
with runpy.run_path(sys.argv[2])["replacing"](sys.argv[1]) as unfinished:
    unfinished.write_text("half")
    print("writing", flush=True)
    time.sleep(100)
"""


def writing(path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, path, module.__file__], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "writing\n"
    return process


@pytest.mark.skipif(os.name == "nt", reason="folders cannot be locked")
def test_what_a_killed_call_left_goes_at_the_next_and_what_is_being_written_stays(put, tmp_path):
    path = tmp_path / NAME
    write(path, "old")
    killed = writing(path)
    running = writing(path)
    foreign = writing(tmp_path / "other")
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    (tmp_path / f".{NAME}.4242.unfinished").write_text("of an earlier version")
    (tmp_path / ".mine.unfinished.txt").touch()
    assert len(os.listdir(tmp_path)) == 6
    assert path.read_text() == "old"
    put(path)
    left = [entry for entry in os.listdir(tmp_path) if entry.endswith(".unfinished")]
    assert len(left) == 2
    for process in (running, foreign):
        process.send_signal(signal.SIGKILL)
        process.communicate()
    put(path)
    left = {entry for entry in os.listdir(tmp_path) if entry.startswith(".other.")}
    assert set(os.listdir(tmp_path)) == {NAME, ".mine.unfinished.txt"} | left
    assert len(left) == 1
    drop_unfinished(tmp_path)
    assert set(os.listdir(tmp_path)) == {NAME, ".mine.unfinished.txt"}


def test_threads_that_write_one_file_leave_one_whole(tmp_path):
    path, texts = tmp_path / NAME, [str(i) * 10_000 for i in range(8)]

    def write_often(text):
        for _ in range(20):
            write(path, text)
            time.sleep(0)

    threads = [threading.Thread(target=write_often, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            assert path.read_text() in texts
    for thread in threads:
        thread.join()
    assert os.listdir(tmp_path) == [NAME]
