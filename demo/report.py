"""What the demo prints: the table of both runs and the verdict."""

from __future__ import annotations

from demo.worker import Figures

COLUMNS = (
    "",
    "set-up",
    "generation",
    "device peak",
    "host peak",
    "locked",
    "blocks fetched",
    "GB fetched",
)


def table(runs: dict[str, Figures]) -> str:
    """One row a run. Device memory as torch counts it: allocated / reserved."""
    rows = [COLUMNS, *(_row(name, figures) for name, figures in runs.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    return "\n".join(_line(row, widths) for row in rows)


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    """The first cell to the left, the figures to the right."""
    figures = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
    return "  ".join([row[0].ljust(widths[0]), *figures])


def _row(name: str, figures: Figures) -> tuple[str, ...]:
    streamed = any(expert.stats for expert in figures.experts)
    return (
        name,
        f"{figures.set_up_s:.1f} s",
        f"{figures.generate_s:.1f} s",
        _device_peak(figures),
        gigabytes(figures.host_peak_bytes),
        gigabytes(figures.total("locked_bytes")),
        str(figures.total("fetches")) if streamed else "-",
        f"{figures.total('bytes_fetched') / 1e9:.2f}" if streamed else "-",
    )


def _device_peak(figures: Figures) -> str:
    allocated, reserved = figures.device_allocated_bytes, figures.device_reserved_bytes
    if allocated is None or reserved is None:
        return "(host)"
    return f"{gigabytes(allocated)} / {gigabytes(reserved)}"


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def experts(figures: Figures) -> str:
    """How the steps were shared out, with what each expert fetched."""
    return "; ".join(
        f"{expert.name} {expert.steps} steps, {int(expert.stats['fetches'])} blocks fetched"
        for expert in figures.experts
    )


def how_loaded(figures: Figures) -> str:
    """Where the weights of the offloaded run came from."""
    names = " and ".join(expert.name for expert in figures.experts)
    return (
        f"{gigabytes(figures.total('host_bytes'))} of blocks of {names} by "
        "wanoffload.load_pipeline, from the files straight into the host memory they are streamed "
        "from; all else by diffusers"
    )
