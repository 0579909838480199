"""Arenas that processes find by a name: who fills, who waits, and what is left when they end."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.peers import Peer, State, is_kept_waiting, mapped_arenas
from wanoffload import arena_contents, host_memory, shared_arena, shared_memory
from wanoffload._C import Descriptor, HostBackend, HostImage, HostStore
from wanoffload.arena_contents import to_pages
from wanoffload.errors import BackendError, HostMemoryError, ShareError, UsageError
from wanoffload.shared_arena import SharedArena

IDENTITY = {"model": "A", "sources": {"a.safetensors": [10, 20]}}
SIZES = [256, 4096, 10_000, 0, 3 << 20]


def join(name: str, identity: Any = IDENTITY, sizes: list[int] = SIZES) -> SharedArena:
    return SharedArena.join(name, identity, sizes, HostStore(HostBackend()))


def pattern(unit: int, size: int, seed: int = 0) -> bytes:
    start = (7 * unit + 31 * seed) % 251
    return (bytes(range(251)) * (size // 251 + 2))[start : start + size]


def fill(image: HostImage, content: bytes) -> None:
    source = ctypes.create_string_buffer(content, len(content))
    image.fill([(ctypes.addressof(source), 0, len(content))])


# What peers do. `state` holds the arena and its images.


def join_and_map(state: State, name: str, identity: Any = IDENTITY) -> bool:
    """Joins and maps all units; whether others had filled it."""
    state["arena"] = arena = join(name, identity)
    if arena.filled:
        state["images"] = [arena.image(i) for i in range(len(SIZES))]
    return bool(arena.filled)


def write(state: State, seed: int = 0) -> None:
    arena = state["arena"]
    state["images"] = [arena.image(i) for i in range(len(SIZES))]
    for i, image in enumerate(state["images"]):
        fill(image, pattern(i, SIZES[i], seed))


def publish(state: State) -> None:
    state["arena"].publish()


def close(state: State) -> None:
    state["arena"].close()


def seed_read(state: State) -> int:
    """The seed of what stands in all images."""
    found = [bytes(memoryview(image)) for image in state["images"]]
    for seed in range(8):
        if found == [pattern(i, size, seed) for i, size in enumerate(SIZES)]:
            return seed
    raise AssertionError("the bytes are nobody's")


def join_at(state: State, name: str, moment: float) -> bool:
    time.sleep(max(0.0, moment - time.time()))
    if join_and_map(state, name):
        return True
    write(state, seed=3)
    publish(state)
    return False


def shared_bytes(state: State) -> tuple[int, int]:
    return mapped_arenas()


def touch_all(state: State) -> None:
    for image in state["images"]:
        image.lock()


def fork_a_sleeper(state: State) -> int:
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    return pid


def hide(state: State) -> None:
    """What a process does that others may not look into."""
    if os.geteuid() == 0:
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(4, 0, 0, 0, 0) == 0  # PR_SET_DUMPABLE


# Who fills.


def test_the_first_fills_and_the_others_find_its_bytes(peers: list[Peer], name: str) -> None:
    first, *others = peers
    assert not first.run(join_and_map, name)
    first.run(write)
    first.run(publish)
    for peer in others:
        assert peer.run(join_and_map, name)
        assert peer.run(seed_read) == 0


def test_four_processes_hold_one_copy(peers: list[Peer], name: str) -> None:
    peers[0].run(join_at, name, 0.0)
    for peer in peers[1:]:
        peer.run(join_at, name, 0.0)
    for peer in peers:
        peer.run(touch_all)
    found = [peer.run(shared_bytes) for peer in peers]
    pages = sum(to_pages(max(size, 1)) for size in SIZES)
    assert all(rss == pages for rss, _ in found)
    assert sum(pss for _, pss in found) <= 1.05 * pages


def test_the_others_wait_until_it_is_published(peers: list[Peer], name: str) -> None:
    first, second, *_ = peers
    first.run(join_and_map, name)
    second.start(join_and_map, name)
    first.run(write)
    assert is_kept_waiting(second, name)
    first.run(publish)
    assert second.result()
    assert second.run(seed_read) == 0


@pytest.mark.parametrize("attempt", range(10))
def test_of_four_that_start_at_the_same_instant_one_fills(
    peers: list[Peer], name: str, attempt: int
) -> None:
    moment = time.time() + 0.1
    for peer in peers:
        peer.start(join_at, name, moment)
    assert sorted(peer.result() for peer in peers) == [False, True, True, True]
    assert {peer.run(seed_read) for peer in peers} == {3}
    assert len(shared_memory.find(name)) == 1


def test_of_two_that_offer_one_at_the_same_moment_one_fills(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has found none, has made one, and has looked again before either settles anything."""
    real_look, real_create = shared_arena._look, shared_memory.create
    both = threading.Barrier(2, timeout=30)
    looks = Counter[int]()
    joined: list[SharedArena] = []
    filled: list[bool] = []

    def look(*arguments: Any) -> Any:
        found = real_look(*arguments)
        looks[threading.get_ident()] += 1
        if looks[threading.get_ident()] <= 2:
            both.wait()
        return found

    def create(*arguments: Any) -> Any:
        made = real_create(*arguments)
        both.wait()
        return made

    def join_and_publish() -> None:
        arena = join(name)
        joined.append(arena)
        filled.append(arena.filled)
        arena.publish()

    monkeypatch.setattr(shared_arena, "_look", look)
    monkeypatch.setattr(shared_memory, "create", create)
    threads = [threading.Thread(target=join_and_publish) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(filled) == [False, True]
    assert len(shared_memory.find(name)) == 1


def test_only_its_user_may_open_the_memory(name: str) -> None:
    arena = join(name)
    (memory,) = shared_memory.find(name)
    assert os.fstat(memory.fd).st_mode & 0o777 == 0o600
    arena.close()


def test_two_arenas_of_one_process_and_of_other_names_are_apart(name: str) -> None:
    one, other = join(name), join(f"{name}-2", {"model": "B"})
    assert not one.filled
    assert not other.filled
    fill(one.image(0), b"1" * 256)
    assert bytes(memoryview(other.image(0))) == bytes(256)
    one.publish()
    again = join(name)
    assert again.filled
    assert again.holds(0)
    assert bytes(memoryview(again.image(0))) == b"1" * 256


def test_units_that_nobody_asked_for_are_not_there_and_take_no_memory(name: str) -> None:
    arena = join(name)
    images = [arena.image(i) for i in (0, 2)]
    arena.publish()
    other = join(name)
    assert [other.holds(i) for i in range(len(SIZES))] == [True, False, True, False, False]
    (memory,) = shared_memory.find(name)
    assert memory.filled_bytes() < 10 * 4096
    with pytest.raises(AssertionError, match="no unit 4"):
        other.image(4)
    del images


# How they end.


def test_when_the_filler_is_killed_another_fills_from_zeros(
    peers: list[Peer], mortal: Callable[[], Peer], name: str
) -> None:
    first, second, third = mortal(), *peers[:2]
    first.run(join_and_map, name)
    first.run(write)
    second.start(join_and_map, name)
    third.start(join_and_map, name)
    assert is_kept_waiting(second, name)
    assert is_kept_waiting(third, name)
    assert first.kill() == -signal.SIGKILL
    while not (second.has_result(0.05) or third.has_result(0.05)):
        pass
    filler, waiting = (second, third) if second.has_result(0) else (third, second)
    assert filler.result() is False
    assert filler.run(first_byte_is_zero)
    assert not waiting.has_result(0.3)
    filler.run(write, 5)
    filler.run(publish)
    assert waiting.result() is True
    assert waiting.run(seed_read) == 5


def are_own(state: State) -> bool:
    return not any(image.shared for image in state["images"])


def first_byte_is_zero(state: State) -> bool:
    return all(bytes(memoryview(state["arena"].image(i))[:4]) == bytes(4) for i in (0, 1, 2, 4))


def test_when_the_filler_is_killed_afterwards_the_others_go_on(
    peers: list[Peer], mortal: Callable[[], Peer], name: str
) -> None:
    first, second, third = mortal(), *peers[:2]
    first.run(join_at, name, 0.0)
    assert second.run(join_and_map, name)
    first.kill()
    assert second.run(seed_read) == 3
    assert third.run(join_and_map, name)
    assert third.run(seed_read) == 3


def test_a_holder_serves_others_after_it_closed_while_it_uses_an_image(name: str) -> None:
    arena = join(name)
    image = arena.image(0)
    arena.publish()
    arena.close()
    assert join(name).filled
    del arena, image
    assert shared_memory.find(name) == []


def test_what_was_not_published_is_filled_by_the_next(peers: list[Peer], name: str) -> None:
    first, second, *_ = peers
    first.run(join_and_map, name)
    first.run(write)
    second.start(join_and_map, name)
    assert is_kept_waiting(second, name)
    first.run(close)  # its images are still there
    assert second.result() is False
    assert second.run(first_byte_is_zero)
    second.run(write, 5)
    assert first.run(seed_read) == 0
    assert first.run(are_own)
    assert len(shared_memory.find(name)) == 1


def test_nothing_is_left_when_the_last_one_ends(mortal: Callable[[], Peer], name: str) -> None:
    before = files_in_memory()
    first, second = mortal(), mortal()
    first.run(join_at, name, 0.0)
    second.run(join_at, name, 0.0)
    assert len(shared_memory.find(name)) == 1
    first.kill()
    assert len(shared_memory.find(name)) == 1
    second.kill()
    assert shared_memory.find(name) == []
    assert files_in_memory() <= before


def files_in_memory() -> set[str]:
    """But for multiprocessing's, that peers which are killed leave for a moment."""
    return {file for file in os.listdir("/dev/shm") if not file.startswith("sem.mp-")}


def test_a_child_made_by_fork_does_not_go_on_filling_for_a_dead_parent(
    peers: list[Peer], mortal: Callable[[], Peer], name: str
) -> None:
    first = mortal()
    first.run(join_and_map, name)
    first.run(write)
    child = first.run(fork_a_sleeper)
    try:
        second = peers[0]
        second.start(join_and_map, name)
        assert is_kept_waiting(second, name)
        first.kill()
        assert second.has_result(10)
        assert second.result() is False
    finally:
        os.kill(child, signal.SIGKILL)


# What is refused.


@pytest.mark.parametrize("published", [False, True])
def test_another_model_under_the_name_is_refused_and_the_holder_is_named(
    peers: list[Peer], name: str, published: bool
) -> None:
    first, second, *_ = peers
    first.run(join_and_map, name)
    if published:
        first.run(publish)
    other = {"model": "B", "sources": {"a.safetensors": [10, 21], "b": [1, 2]}, "x": "y" * 100}
    with pytest.raises(ShareError) as caught:
        second.run(join_and_map, name, other)
    text = str(caught.value)
    assert f"'{name}', which process {first.pid} holds" in text
    assert 'model is "A" there and "B" here' in text
    assert "sources.a.safetensors[1] is 20 there and 21 here" in text
    assert "sources.b is null there and [1, 2] here; and 1 more" in text


def test_other_sizes_are_another_model(name: str) -> None:
    arena = join(name)
    with pytest.raises(ShareError, match=r"sizes\[1\] is 4096 there and 4095 here"):
        join(name, sizes=[256, 4095, *SIZES[2:]])
    arena.close()


def test_an_arena_of_another_version_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = join(name)
    monkeypatch.setattr(arena_contents, "_VERSION", 2)
    with pytest.raises(ShareError, match="another version of wanoffload"):
        join(name)
    arena.close()


@pytest.mark.parametrize("bad", ["", "a b", "ä", "a" * 101, "a\n", "a:b", None, 3])
def test_names_that_are_none_are_refused(bad: Any) -> None:
    with pytest.raises(ShareError, match=r"letters, digits and \. _ - /"):
        join(bad)


def test_too_little_memory_is_an_error_of_the_filler_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = join(name)
    image = arena.image(1)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 3 << 20)
    with pytest.raises(HostMemoryError, match=f"unit 4 of the shared arena {name}"):
        arena.image(4)
    arena.publish()
    assert bytes(memoryview(join(name).image(1))) == bytes(memoryview(image))


def test_a_process_that_others_can_not_look_into_does_not_make_one(
    mortal: Callable[[], Peer], name: str
) -> None:
    peer = mortal()
    peer.run(hide)
    with pytest.raises(ShareError, match="hides its descriptors"):
        peer.run(join_and_map, name)


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another user")
def test_memory_of_another_user_is_not_found(name: str) -> None:
    """Neither in that user's process, nor where it was passed on to one of ours."""
    number = os.memfd_create(shared_memory.PREFIX + name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(number, 4096)
    shared_memory.fcntl.fcntl(number, shared_memory.fcntl.F_ADD_SEALS, shared_memory.SEALS)
    assert len(shared_memory.find(name)) == 1
    os.fchown(number, 65534, -1)
    assert shared_memory.find(name) == []
    os.fchown(number, 0, -1)
    sleeper = subprocess.Popen(["sleep", "60"], user=65534, pass_fds=[number])
    os.close(number)
    assert name in os.readlink(f"/proc/{sleeper.pid}/fd/{number}")
    assert shared_memory.find(name) == []
    sleeper.kill()
    sleeper.wait()


def test_a_file_of_such_a_name_is_not_taken_for_memory(tmp_path: Path, name: str) -> None:
    number = os.memfd_create(shared_memory.PREFIX + name)  # without seals: nobody's offer
    assert shared_memory.find(name) == []
    os.close(number)


def test_an_offer_that_was_left_is_not_waited_for(name: str) -> None:
    left = shared_memory.create(name, 4096)
    left.unlock()  # as when its maker ends while another holds it
    arena = join(name)
    assert not arena.filled
    arena.close()
    del left


def test_an_offer_that_is_not_settled_in_time_is_an_error_that_names_its_maker(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer = shared_memory.create(name, 4096)
    monkeypatch.setattr(shared_arena, "MEET_SECONDS", 0.1)
    with pytest.raises(ShareError, match=f"process {os.getpid()} began to make"):
        join(name)
    del offer


# Images over shared memory.


@pytest.fixture
def memory() -> Descriptor:
    """1 MiB."""
    descriptor = Descriptor(os.memfd_create("wanoffload-test", os.MFD_CLOEXEC))
    os.ftruncate(descriptor.number, 1 << 20)
    return descriptor


def test_images_over_one_place_have_the_same_bytes(memory: Descriptor) -> None:
    backend = HostBackend()
    store = HostStore(backend)
    one, other = (store.map_shared(memory, 8192, 10_000) for _ in range(2))
    assert one.shared
    assert not store.allocate(1).shared
    assert one.address != other.address
    assert (one.address - 8192) % (2 << 20) == 0, "huge pages of the memory fit the mapping"
    fill(one, pattern(1, 10_000))
    assert bytes(memoryview(other)) == pattern(1, 10_000)
    assert os.pread(memory.number, 20_000, 8192) == pattern(1, 10_000) + bytes(10_000)
    assert store.mapped_bytes == 2 * 12_288
    other.lock()
    assert backend.locked_bytes == 12_288
    del one, other
    assert (store.mapped_bytes, backend.locked_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [(1, 4096), (2048, 4096), (0, (1 << 20) + 1), (1 << 20, 1), (4096, 1 << 60)],
)
def test_what_is_not_whole_pages_of_the_memory_is_refused(
    memory: Descriptor, offset: int, nbytes: int
) -> None:
    with pytest.raises(UsageError, match="whole pages"):
        HostStore(HostBackend()).map_shared(memory, offset, nbytes)


def test_the_descriptor_is_closed_with_the_last_image() -> None:
    number = os.memfd_create("wanoffload-test", os.MFD_CLOEXEC)
    os.ftruncate(number, 1 << 20)
    place = os.fstat(number).st_ino
    store, memory = HostStore(HostBackend()), Descriptor(number)
    image, own = store.map_shared(memory, 0, 4096), store.map_shared(memory, 4096, 4096)
    del memory
    own.make_own()
    assert os.fstat(number).st_ino == place
    image.make_own()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_touching_changes_nothing_that_another_process_writes(memory: Descriptor) -> None:
    store = HostStore(HostBackend(), threads=2)
    ours, theirs = (store.map_shared(memory, 0, 1 << 20) for _ in range(2))
    ended = threading.Event()

    def touch() -> None:
        while not ended.is_set():
            ours.touch()

    toucher = threading.Thread(target=touch)
    toucher.start()
    for seed in range(20):
        content = pattern(0, 1 << 20, seed)
        fill(theirs, content)
        assert bytes(memoryview(ours)) == content
    ended.set()
    toucher.join()


def test_memory_of_its_own_has_the_same_bytes_at_the_same_address(memory: Descriptor) -> None:
    backend = HostBackend()
    store = HostStore(backend)
    ours, theirs = (store.map_shared(memory, 4096, 9000) for _ in range(2))
    fill(ours, pattern(2, 9000))
    ours.lock()
    ours.protect()
    address, window = ours.address, memoryview(ours)
    ours.make_own()
    assert (ours.address, ours.shared, ours.locked) == (address, False, True)
    assert bytes(window) == pattern(2, 9000)
    fill(ours, pattern(3, 9000))
    assert bytes(window) == pattern(3, 9000)
    assert bytes(memoryview(theirs)) == pattern(2, 9000)
    assert (store.mapped_bytes, backend.locked_bytes) == (2 * 12_288, 12_288)
    ours.make_own()
    assert bytes(window) == pattern(3, 9000)


def test_memory_of_its_own_that_can_not_be_locked_is_true_and_can_be_locked_later(
    memory: Descriptor,
) -> None:
    backend = HostBackend()
    image = HostStore(backend).map_shared(memory, 0, 4096)
    fill(image, pattern(1, 4096))
    image.lock()
    backend.fail_at(1)
    with pytest.raises(BackendError):
        image.make_own()
    assert (image.shared, image.locked) == (False, False)
    fill(image, pattern(4, 4096))
    image.lock()
    assert bytes(memoryview(image)) == pattern(4, 4096)
    assert os.pread(memory.number, 4096, 0) == pattern(1, 4096)


def test_protected_memory_can_be_locked_and_not_be_filled(memory: Descriptor) -> None:
    store = HostStore(HostBackend())
    image = store.map_shared(memory, 0, 4096)
    image.protect()
    image.protect()
    image.lock()
    assert image.locked
    with pytest.raises(UsageError, match=r"make_own\(\) comes first"):
        fill(image, b"1")
    with pytest.raises(UsageError, match=r"make_own\(\) comes first"):
        image.copy_from(store.allocate(4096))
    with pytest.raises(UsageError, match=r"make_own\(\) comes first"):
        image.fill_from([])
    own = store.allocate(4096)
    own.protect()
    fill(own, b"1")


def scribble(state: State) -> None:
    state["images"][0].lock()
    state["images"][0].protect()
    ctypes.memset(state["images"][0].address, 1, 1)


def test_a_stray_write_ends_its_process_and_changes_nothing(
    peers: list[Peer], mortal: Callable[[], Peer], name: str
) -> None:
    first, second = peers[0], mortal()
    first.run(join_at, name, 0.0)
    assert second.run(join_and_map, name)
    second.start(scribble)
    assert second.wait() == -signal.SIGSEGV
    assert first.run(seed_read) == 3


def test_nothing_is_left_open_of_arenas_that_went() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number in range(30):
        arena = join(f"test/{os.getpid()}/{number}")
        arena.image(0)
        arena.publish()
        arena.close()
    del arena
    assert len(os.listdir("/proc/self/fd")) == before
