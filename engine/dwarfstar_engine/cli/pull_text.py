"""What ``dwarfstar models`` and ``dwarfstar pull`` print, as wide as the terminal. Pure."""

from __future__ import annotations

import textwrap
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from dwarfstar_engine.model.hub_names import DOWNLOADS, Offer
from dwarfstar_engine.node.pull import Progress
from dwarfstar_engine.views import ModelFilesView, ModelFileView

NARROW = 80  # columns; no table is narrower
HEADING = f"{'architecture':>14}{'params':>8}{'type':>10}{'layers':>8}{'GiB':>9}{'context':>9}"
SHORT_HEADING = f"{'arch':>11}{'params':>8}{'type':>9}{'layers':>7}{'GiB':>8}{'context':>8}"
UNKNOWN = "–"
PACE_WINDOW_S = 15.0  # the rate is that of the last seconds: a link's speed changes
MAX_SAMPLES = 64  # of the rate; a sample is taken when something is printed
GIB = 1 << 30


def models_text(view: ModelFilesView, folder: Path, width: int) -> str:
    """The models, and below them why some cannot be served."""
    width = max(width, NARROW)
    lines = list(_table(view.models, width)) if view.models else []
    notes = [f"! {_clean(model.name)}: {model.reason}" for model in view.models if model.reason]
    if view.left_out:
        notes.append(f"! {view.left_out} more files were not looked at: there are too many, or the disk is too slow")
    if view.unfinished_gib:
        notes.append(
            f"! {view.unfinished_gib:.2f} GiB of pulls that are not complete lie in {folder / DOWNLOADS}: pull again "
            "to go on, or delete that folder"
        )
    if not any(Path(model.path).parent == folder for model in view.models):
        notes.append(f"no GGUF files in {folder}: `dwarfstar pull OWNER/NAME` gets one from a model hub")
    if notes and lines:
        lines.append("")
    for note in notes:
        lines += textwrap.wrap(note, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


def _table(models: Sequence[ModelFileView], width: int) -> Iterator[str]:
    wide = width > NARROW
    heading = HEADING if wide else SHORT_HEADING
    room = width - len(heading) - 2
    name = min(room, max(len("name"), *(len(_clean(model.name)) for model in models)))
    yield f"{'name':{name}}{heading}"
    for model in models:
        yield (f"{_short(_clean(model.name), name):{name}}{_figures(model, wide=wide)}").rstrip()


def _figures(model: ModelFileView, *, wide: bool) -> str:
    mark = "" if model.supported else " !"
    broken = model.broken
    cells = (
        UNKNOWN if broken else _short(model.architecture, 13 if wide else 10),
        UNKNOWN if broken else count(model.parameters),
        UNKNOWN if broken else _short(model.quantisation, 9 if wide else 8),
        UNKNOWN if broken else str(model.layers),
        f"{model.size_gib:.2f}",
        str(model.context) if model.context else UNKNOWN,
    )
    widths = (14, 8, 10, 8, 9, 9) if wide else (11, 8, 9, 7, 8, 8)
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)) + mark


def count(n: int) -> str:
    """A number of parameters as models are called by it."""
    for unit, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if n >= 0.9995 * unit:
            return f"{n / unit:.3g}{letter}"
    return str(n)


def _clean(text: str) -> str:
    """Without what would steer a terminal."""
    return text if text.isprintable() else ascii(text)


def _short(text: str, width: int) -> str:
    """Cut in the middle: both ends of a model's name tell something."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def offers_text(offers: Sequence[Offer]) -> str:
    """A repository's models, and what each is called."""
    lines = [f"{'type':10}{'GiB':>9}  file"]
    for offer in offers:
        more = f"  (and {len(offer.files) - 1} more parts)" if len(offer.files) > 1 else ""
        lines.append(f"{offer.quantisation or UNKNOWN:10}{offer.size / GIB:9.2f}  {_clean(offer.files[0].path)}{more}")
    return "\n".join(lines)


class Pace:
    """How fast a download is, from what was printed last."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque(maxlen=MAX_SAMPLES)

    def line(self, progress: Progress, now: float) -> str:
        """How far it is, how fast, and how long it takes still."""
        if self._samples and progress.done < self._samples[-1][1]:
            self._samples.clear()  # it began anew
        if progress.doing == "pulling":
            self._samples.append((now, progress.done))
        while len(self._samples) > 2 and now - self._samples[0][0] > PACE_WINDOW_S:
            self._samples.popleft()
        share = progress.done / max(1, progress.total)
        text = f"{progress.doing} {share:4.0%}  {progress.done / GIB:.2f} of {progress.total / GIB:.2f} GiB"
        return text + self._rate(progress)

    def _rate(self, progress: Progress) -> str:
        if len(self._samples) < 2 or progress.doing != "pulling":
            return ""
        (first, had), (last, has) = self._samples[0], self._samples[-1]
        if last <= first or has <= had:
            return "  stalled" if last - first > 1.0 else ""
        rate = (has - had) / (last - first)
        return f"  {rate / 1e6:.1f} MB/s  {duration((progress.total - progress.done) / rate)} left"


def duration(seconds: float) -> str:
    """As people say it: the two largest units."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    hours = whole // 3600
    return f"{hours} h {whole % 3600 // 60} min" if hours < 100 else "days"
