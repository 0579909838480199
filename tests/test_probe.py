"""Looking at the machine: rates from measured seconds, the file that keeps them, free memory."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import wanoffload
from wanoffload import Hardware, host_memory
from wanoffload.machine import probe, rate_file, rates
from wanoffload.machine.hardware import RATES
from wanoffload.machine.rate_file import known_rates
from wanoffload.machine.rates import HEAD_SIZE, HEADS, LAUNCHES, Sizes, measure

MACHINE = {"device": "a card", "uuid": "1", "torch": "2.13.0"}
MEASURED = {name: float(number) for number, name in enumerate(RATES, 1)}
SMALL = Sizes(copy_bytes=4096, rows=4, inner=8, columns=6, tokens=2, traffic_bytes=4096)


class SteadyClock:
    """Every call takes the same time; runs each once, so that what is timed is real."""

    def __init__(self, device_s: float = 0.5, host_s: float = 0.25) -> None:
        self.device_s, self.host_s = device_s, host_s
        self.timed: list[int] = []

    def device_seconds(self, run: Callable[[], object], count: int) -> float:
        run()
        self.timed.append(count)
        return self.device_s * count

    def host_seconds(self, run: Callable[[], object], count: int) -> float:
        run()
        return self.host_s * count


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of this user; nothing was warned of yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rate_file._warn_unwritable.cache_clear()
    return tmp_path


def never() -> dict[str, float]:
    raise AssertionError("measured again")


def test_rates_are_work_over_seconds() -> None:
    found = measure(torch.device("cpu"), SteadyClock(), SMALL)
    assert found == pytest.approx(
        {
            "link_gb_per_s": 4096 / 0.5 / 1e9,
            "pageable_gb_per_s": 4096 / 0.5 / 1e9,
            "matmul_tflops": 2 * 4 * 8 * 6 / 0.5 / 1e12,
            "attention_tflops": 4 * 2 * 2 * HEADS * HEAD_SIZE / 0.5 / 1e12,
            "device_gb_per_s": 3 * 4 * (4096 // 8) / 0.5 / 1e9,
            "launch_us": 0.25e6,
        }
    )
    assert set(found) == set(RATES)


def test_a_fast_kernel_is_repeated_as_long_to_warm_up_as_to_be_timed() -> None:
    clock = SteadyClock(device_s=0.01)
    assert rates._sustained(clock, lambda: None, 0.2) == pytest.approx(0.01)
    assert clock.timed == [1, 1, 20, 20]


def test_a_slow_kernel_is_timed_once() -> None:
    clock = SteadyClock(device_s=0.3)
    assert rates._sustained(clock, lambda: None, 0.2) == pytest.approx(0.3)
    assert clock.timed == [1, 1]


def test_fewer_launches_are_timed_than_a_device_queues() -> None:
    assert LAUNCHES <= 512


def test_measuring_leaves_the_global_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    measure(torch.device("cpu"), SteadyClock(), SMALL)
    assert torch.equal(torch.get_rng_state(), before)


def test_sizes_stay_under_a_gigabyte_and_shrink_to_half_of_what_is_free() -> None:
    full = Sizes()
    assert 300e6 < full.peak_bytes < 1e9
    assert Sizes.fitting(2 * full.peak_bytes) == full
    for free in (2 * full.peak_bytes - 1, 400 << 20, 100 << 20):
        sizes = Sizes.fitting(free)
        assert full.peak_bytes // 32 < sizes.peak_bytes <= free // 2
        assert sizes.tokens < full.tokens
        assert sizes.rows < full.rows


def test_too_little_device_memory_to_measure_is_an_error_with_numbers() -> None:
    with pytest.raises(wanoffload.OffloadError, match=r"needs 67 MB .* 50 MB are free.*Hardware\("):
        Sizes.fitting(50_000_000)


def test_rates_are_measured_once_and_then_read(cache: Path) -> None:
    assert known_rates(MACHINE, False, lambda: MEASURED) == MEASURED
    assert known_rates(MACHINE, False, never) == MEASURED
    (path,) = (cache / "wanoffload").iterdir()  # no temporary file is left
    assert path == rate_file.rate_file(MACHINE)


def test_refresh_measures_again_and_keeps_the_new_rates(cache: Path) -> None:
    known_rates(MACHINE, False, lambda: MEASURED)
    newer = {name: 2 * rate for name, rate in MEASURED.items()}
    assert known_rates(MACHINE, True, lambda: newer) == newer
    assert known_rates(MACHINE, False, never) == newer


@pytest.mark.parametrize("name", ["device", "uuid", "torch", "format"])
def test_another_machine_or_version_has_another_file(
    cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    known_rates(MACHINE, False, lambda: MEASURED)
    newer = dict.fromkeys(RATES, 3.0)
    if name == "format":
        monkeypatch.setattr(rate_file, "FORMAT", rate_file.FORMAT + 1)
    other = MACHINE if name == "format" else {**MACHINE, name: "another"}
    assert known_rates(other, False, lambda: newer) == newer
    assert len(list((cache / "wanoffload").iterdir())) == 2


def _broken() -> dict[str, str]:
    good = {"machine": {"format": rate_file.FORMAT, **MACHINE}, "rates": MEASURED}
    foreign = {**good, "machine": {**good["machine"], "uuid": "2"}}
    return {
        "empty": "",
        "cut": json.dumps(good)[:-20],
        "no object": "[]",
        "no rates": json.dumps({"machine": good["machine"]}),
        "another machine": json.dumps(foreign),
        "a rate is missing": json.dumps({**good, "rates": {"link_gb_per_s": 1.0}}),
        "a rate is text": json.dumps({**good, "rates": {**MEASURED, "launch_us": "x"}}),
        "a rate is 0": json.dumps({**good, "rates": {**MEASURED, "launch_us": 0}}),
        "a rate is no number": json.dumps({**good, "rates": {**MEASURED, "launch_us": None}}),
        "rates are a list": json.dumps({**good, "rates": list(RATES)}),
        "not text": "\udcff\udcfe",
    }


@pytest.mark.parametrize("kind", _broken())
def test_a_broken_or_foreign_file_is_measured_anew_and_replaced(cache: Path, kind: str) -> None:
    path = rate_file.rate_file(MACHINE)
    path.parent.mkdir()
    path.write_text(_broken()[kind], errors="surrogateescape")
    newer = dict.fromkeys(RATES, 3.0)
    assert known_rates(MACHINE, False, lambda: newer) == newer
    assert known_rates(MACHINE, False, never) == newer


def test_a_folder_that_cannot_be_written_is_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cache: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # even root can't make a folder in a file
    with caplog.at_level(logging.WARNING, "wanoffload"):
        assert known_rates(MACHINE, False, lambda: MEASURED) == MEASURED
        assert known_rates(MACHINE, False, lambda: MEASURED) == MEASURED
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(file) in caplog.text


def test_a_write_that_fails_leaves_no_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    assert known_rates(MACHINE, False, lambda: MEASURED) == MEASURED
    assert list((cache / "wanoffload").iterdir()) == []


@pytest.mark.parametrize("given", ["", "relative/folder", None])
def test_without_an_absolute_cache_folder_it_is_the_one_in_the_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str | None
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    if given is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert rate_file.rate_file(MACHINE).parent == tmp_path / ".cache" / "wanoffload"


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [(1.0, 70 + 8 - 3), (0.5, 50 - 3), (0.03, 0), (0.02, 0)],
)
def test_memory_to_be_had_is_what_is_free_or_unused_and_under_the_limit(
    fraction: float, expected: int
) -> None:
    assert (
        probe.takeable(free=70, total=100, reserved=8, allocated=3, fraction=fraction) == expected
    )


def test_on_the_cpu_nothing_is_measured_and_nothing_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_measure", never)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 12345)
    here = Hardware.probe("cpu", refresh=True)
    assert here == Hardware(platform="cpu", host_memory=12345, name=probe.processor_name())
    assert list(cache.iterdir()) == []
    assert probe.cached_at("cpu") is None


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """As far as `probe` looks, this machine has a CUDA device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    monkeypatch.setattr(probe, "free_device_bytes", lambda device: 1000 + device.index)
    monkeypatch.setattr(probe, "machine_of", lambda device: {**MACHINE, "uuid": str(device)})
    monkeypatch.setattr(probe, "_measure", lambda _: MEASURED)


@pytest.mark.usefixtures("card")
def test_sizes_are_read_afresh_beside_rates_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Hardware.probe()
    assert (first.name, first.platform, first.device_memory) == ("card 1", "cuda", 1001)
    assert {name: getattr(first, name) for name in RATES} == MEASURED
    monkeypatch.setattr(probe, "_measure", lambda _: never())
    monkeypatch.setattr(probe, "free_device_bytes", lambda _: 7)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 8)
    second = Hardware.probe("cuda:1")
    assert (second.device_memory, second.host_memory) == (7, 8)
    assert {name: getattr(second, name) for name in RATES} == MEASURED


@pytest.mark.usefixtures("card")
def test_rates_are_measured_again_when_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    Hardware.probe()
    monkeypatch.setattr(probe, "_measure", lambda _: dict.fromkeys(RATES, 3.0))
    assert Hardware.probe().launch_us == MEASURED["launch_us"]
    assert Hardware.probe(refresh=True).launch_us == 3.0


@pytest.mark.usefixtures("card")
def test_a_second_card_has_rates_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    Hardware.probe("cuda:1")
    newer = dict.fromkeys(RATES, 3.0)
    monkeypatch.setattr(probe, "_measure", lambda _: newer)
    assert Hardware.probe("cuda:0").link_gb_per_s == 3.0
    assert probe.cached_at("cuda:0") != probe.cached_at("cuda:1")


@pytest.mark.usefixtures("card")
def test_a_device_of_amd_is_rocm_and_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(probe, "_measure", never)
    here = Hardware.probe()
    assert (here.platform, here.name, here.device_memory) == ("rocm", "card 1", None)


@pytest.mark.usefixtures("card")
def test_a_device_that_is_not_there_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match="no device cuda:2: torch sees 2 of type cuda"):
        Hardware.probe("cuda:2")


@pytest.mark.parametrize(
    ("device", "message"),
    [("meta", "of device meta"), ("gpu", "'gpu' is not a device"), (2.5, "2.5 is not a device")],
)
def test_what_is_no_machine_is_an_error(device: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Hardware.probe(device)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_the_processor_is_named_as_the_system_names_it(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("vendor_id\t: X\nmodel name\t: A Fast One @ 3 GHz\nflags\t: a\n")
    assert probe.processor_name(info) == "A Fast One @ 3 GHz"
    assert probe.processor_name(tmp_path / "missing") != ""


@pytest.mark.gpu
def test_a_real_card_is_measured_kept_and_left_as_it_was(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Hardware.probe("cuda")
    assert first.platform == "cuda"
    assert first.name == torch.cuda.get_device_name()
    assert all(getattr(first, name) > 0 for name in RATES)
    allocated = torch.cuda.memory_allocated()  # cuBLAS keeps its workspace
    torch.cuda.reset_peak_memory_stats()
    random = torch.cuda.get_rng_state()
    Hardware.probe("cuda", refresh=True)
    assert torch.cuda.memory_allocated() == allocated
    assert torch.cuda.max_memory_allocated() - allocated < 1e9
    assert torch.equal(torch.cuda.get_rng_state(), random)
    monkeypatch.setattr(probe, "_measure", lambda _: never())
    taken = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    again = Hardware.probe("cuda")
    assert first.device_memory is not None
    assert again.device_memory is not None
    assert int(first.device_memory) - int(again.device_memory) >= taken.nbytes // 2
    assert json.loads(probe.cached_at("cuda").read_text())["rates"]["link_gb_per_s"] > 0


@pytest.mark.gpu
def test_a_limit_on_this_process_is_the_limit_of_the_probe(cache: Path) -> None:
    _, total = torch.cuda.mem_get_info()
    try:
        torch.cuda.set_per_process_memory_fraction(0.1)
        assert probe.free_device_bytes(torch.device("cuda", 0)) <= 0.1 * total
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
