"""Checkpoints of one rank on a real disk: written whole or not at all, harm found and named, old ones removed."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from one_rank import one_rank  # noqa: F401  a fixture
from small_store import loaded, make_state, make_store, save, steps, two_steps  # noqa: F401  a fixture

from megaspeech.checkpoint.checksums import find_damage
from megaspeech.checkpoint.ranks import RankFailure, Ranks
from megaspeech.checkpoint.store import CheckpointStore, SaveError, check_whole
from megaspeech.checkpoint.writing import write_snapshots

pytestmark = pytest.mark.usefixtures("one_rank")
NOBODY = 65534


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    assert store.search() == (None, []) and store.latest_step() == 0
    path, notes = save(store, 3)
    assert notes == () and store.search() == (path, []) and store.latest_step() == 3
    state = loaded(store, path, like=torch.zeros(3, 4))
    assert state["step"] == 3 and state["w"].unique().tolist() == [3.0]
    assert state["optimizer"]["m"].unique().tolist() == [1.5]
    assert store.finish(blocking=True) is None


def test_a_save_in_the_background_holds_what_was_there_when_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, gate = make_store(tmp_path, "checkpoint.async_save=true"), threading.Event()
    prepare = store._prepare
    monkeypatch.setattr(store, "_prepare", lambda *args, **names: gate.wait(60) and prepare(*args, **names))
    weights = torch.randn(100, 1000)
    expected = weights.clone()
    store.save(make_state(weights, step=7), step=7)
    weights.zero_()
    assert store.finish(blocking=False) is None
    with pytest.raises(AssertionError, match="one save at a time"):
        store.save(make_state(weights, step=8), step=8)
    threading.Timer(0.05, gate.set).start()
    assert store.latest_step() == 7  # waits for it
    path = store.finish(blocking=False).path
    assert store.search() == (path, [])
    assert torch.equal(loaded(store, path, like=weights)["w"], expected)


def _copy(store: CheckpointStore, directory: Path) -> CheckpointStore:
    shutil.copytree(store.directory, directory / "checkpoints")
    return CheckpointStore(directory / "checkpoints", config=store.config, manifest=store.manifest)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def _shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\n")


FILES = ("__0_0.distcp", ".metadata", "common.pt", "config.toml", "manifest.json", "metadata.json")
HARMS = [
    (_flip, r"{} is corrupt: its checksum is \w{{32}}, and was \w{{32}}"),
    (_shorten, r"{} has [\d,]+ bytes of [\d,]+"),
    (_lengthen, r"{} has [\d,]+ bytes of [\d,]+"),
    (os.remove, "{} is missing"),
]
CASES = [(name, harm, words.format(re.escape(name))) for name in FILES for harm, words in HARMS]
CASES += [
    ("checksums.json", os.remove, "checksums.json is missing"),
    ("checksums.json", _shorten, "checksums.json is unreadable"),
]


@pytest.mark.parametrize("name, harm, damage", CASES, ids=lambda value: getattr(value, "__name__", None))
def test_harm_is_named_and_the_one_before_used(
    two: CheckpointStore, tmp_path: Path, name: str, harm: Callable[[Path], None], damage: str
) -> None:
    store = _copy(two, tmp_path)
    first, second = store.directory / "step_00000001", store.directory / "step_00000002"
    assert store.search() == (second, [])
    harm(second / name)
    path, (line,) = store.search()
    assert path == first and re.fullmatch(f"{second}: {damage}( .*)?", line)
    with pytest.raises(ValueError, match=f"(checkpoint {second} is damaged|there is no checkpoint at {second})"):
        check_whole(second)
    check_whole(first)
    shutil.rmtree(first)
    with pytest.raises(ValueError, match=r"holds no whole checkpoint: .*step_00000002.*start anew"):
        store.search()


def test_every_byte_of_the_checksums_counts(two: CheckpointStore, tmp_path: Path) -> None:
    """A flip in the list itself is damage too, whichever byte it hits."""
    path = _copy(two, tmp_path).directory / "step_00000002"
    whole = (path / "checksums.json").read_bytes()
    digits = [place for place, byte in enumerate(whole) if chr(byte) not in " \n"]
    for place in digits[::7]:
        (path / "checksums.json").write_bytes(whole[:place] + bytes([whole[place] ^ 0x01]) + whole[place + 1 :])
        assert find_damage(path) is not None, whole[place - 20 : place + 20]


def test_latest_may_name_an_older_checkpoint(two: CheckpointStore, tmp_path: Path) -> None:
    store = _copy(two, tmp_path)
    pointer = store.directory / "latest"
    assert store.latest_step() == 2
    pointer.unlink()
    assert store.latest_step() == 2  # the newest
    pointer.write_text("step_00000001\n")
    assert store.latest_step() == 1
    _flip(store.directory / "step_00000001" / "common.pt")
    with pytest.raises(ValueError, match="holds no whole checkpoint"):  # newer ones are of another course
        store.search()
    pointer.write_text("step_00000003\n")  # removed by hand
    damaged = f"{store.directory}/step_00000003: checksums.json is missing"
    assert store.search() == (store.directory / "step_00000002", [damaged])


def test_the_last_are_kept_and_every_nth(tmp_path: Path) -> None:
    store = make_store(tmp_path, "checkpoint.keep_last=2", "checkpoint.keep_every=3")
    for step in range(8):
        save(store, step)
    assert steps(store) == [0, 3, 6, 7]
    (store.directory / "latest").write_text("step_00000003\n")
    save(store, 4)  # the run went back: 6 and 7 are of a course that was left
    assert steps(store) == [0, 3, 4, 6, 7] and store.latest_step() == 4
    path, _ = save(store, 6)  # over the old one
    assert store.search() == (path, []) and loaded(store, path, like=torch.zeros(3, 4))["step"] == 6
    assert steps(store) == [0, 3, 4, 6, 7]


def test_leftovers_of_killed_runs_are_never_read_and_go_with_the_next_save(
    two: CheckpointStore, tmp_path: Path
) -> None:
    store = _copy(two, tmp_path)
    for name in ("step_00000003.part", "step_00000004.removed"):
        shutil.copytree(store.directory / "step_00000002", store.directory / name)
    (store.directory / "latest").unlink()
    assert store.latest_step() == 2
    save(store, 5)
    assert steps(store) == [2, 5]


def test_a_removal_that_fails_is_said(tmp_path: Path) -> None:
    store = make_store(tmp_path, "checkpoint.keep_last=1")
    path, _ = save(store, 1)
    elsewhere = path.rename(tmp_path / "elsewhere")
    path.symlink_to(elsewhere)  # on another disk, say; what lies behind a link is not ours to remove
    assert store.latest_step() == 1
    newest, (note,) = save(store, 2)
    assert note.startswith(f"{path}.removed could not be removed (") and "symbolic link" in note
    assert store.search() == (newest, []) and find_damage(elsewhere) is None


@contextmanager
def _as_nobody() -> Iterator[None]:
    """Root may write everywhere."""
    me = os.geteuid()
    if me == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(me)


@contextmanager
def _largest_file(num_bytes: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def _assert_intact(store: CheckpointStore) -> None:
    """Steps 1 and 2 as they were, nothing left over; and the next save works."""
    assert store.search() == (store.directory / "step_00000002", [])
    assert sorted(path.name for path in store.directory.iterdir()) == ["latest", "step_00000001", "step_00000002"]
    path, notes = save(store, 3)
    assert store.search() == (path, []) and notes == ()


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("room", [0, 50_000])
def test_a_write_that_fails(two: CheckpointStore, tmp_path: Path, room: int, in_background: bool) -> None:
    """No room for the weights, which every rank writes; or for what the first rank writes at the end."""
    store = _copy(two, tmp_path)
    store.in_background = in_background
    state = {**make_state(torch.zeros(3, 4), step=3), "common": "x" * 100_000}
    with _largest_file(room):
        store.save(state, step=3)
        with pytest.raises(SaveError, match="step_00000003 could not be written: rank 0: File too large") as failure:
            store.finish(blocking=True)
    assert "step_00000002, saved before, is untouched" in str(failure.value)
    _assert_intact(store)


@pytest.mark.parametrize("harm", [os.remove, _shorten])
def test_a_file_that_the_first_rank_sees_otherwise(
    two: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Callable[[Path], None]
) -> None:
    """A node whose disk is not mounted writes below the mount point, and is none the wiser."""

    def write_elsewhere(snapshot: object, directory: Path, *, ranks: Ranks) -> dict:
        checksums = write_snapshots(snapshot, directory, ranks=ranks)
        harm(directory / "__0_0.distcp")
        return checksums

    store = _copy(two, tmp_path)
    with monkeypatch.context() as patched, pytest.raises(SaveError, match="__0_0.distcp is not .* one file system?"):
        patched.setattr("megaspeech.checkpoint.store.write_snapshots", write_elsewhere)
        save(store, 3)
    _assert_intact(store)


def test_equal_failures_are_said_once() -> None:
    reasons = {3: "Input/output error", 0: "No space left on device", 2: "Input/output error"}
    assert str(RankFailure(reasons)) == "rank 0: No space left on device; ranks 2, 3: Input/output error"


def test_a_disk_without_room_is_found_out_before(two: CheckpointStore, tmp_path: Path) -> None:
    store = _copy(two, tmp_path)
    petabytes = ShardedTensor.from_rank_offsets("w", torch.zeros(1).expand(1 << 52))
    store.save({**make_state(torch.zeros(3, 4)), "w": petabytes}, step=3)
    with pytest.raises(SaveError, match=r"checkpoints has [\d,]+ bytes free, and it takes 18,014,398,509,"):
        store.finish(blocking=True)
    _assert_intact(store)


def test_a_full_disk(two: CheckpointStore, tmp_path: Path) -> None:
    """A real one: it has bytes, so that nothing is suspected before, but no room for another file."""
    disk = tmp_path / "disk"
    disk.mkdir()
    # Its root, config.toml, `checkpoints` with `latest` and two checkpoints of a folder and seven files; and four more.
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m,nr_inodes=23", "tmpfs", disk], capture_output=True)
    if mount.returncode:
        pytest.skip(f"nothing may be mounted here: {mount.stderr.decode().strip()}")
    try:
        store = _copy(two, disk)
        with pytest.raises(SaveError, match="step_00000003 could not be written: rank 0: No space left on device"):
            save(store, 3)
        assert store.latest_step() == 2 and steps(store) == [1, 2]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_directory_that_may_not_be_written(two: CheckpointStore, tmp_path: Path) -> None:
    store = _copy(two, tmp_path)
    mode = store.directory.stat().st_mode
    store.directory.chmod(0o555)
    with _as_nobody(), pytest.raises(SaveError, match=r"rank 0: Permission denied: .*checkpoints"):
        save(store, 3)
    store.directory.chmod(mode)
    _assert_intact(store)


def test_a_directory_that_is_gone_is_made_again_or_named(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    save(store, 1)
    shutil.rmtree(store.directory)
    path, _ = save(store, 2)
    assert store.search() == (path, [])
    shutil.rmtree(store.directory)
    store.directory.write_text("a file in its place")
    with pytest.raises(SaveError, match=f"rank 0: File exists: {store.directory}; there is none before it"):
        save(store, 3)
