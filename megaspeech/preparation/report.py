"""What was prepared and what was left out, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from megaspeech.config.preparation import EFFECTS
from megaspeech.preparation.timeline import Timeline
from megaspeech.preparation.units import Totals, UnitStore

_NOTES = {
    "moved_words": "words stand later than they should, because the ones before them took their frames",
    "frames_past_end": "frames of text stand after the end of their audio",
    "unknown_pieces": "stretches of text left out, which the tokenizer has no piece for",
    "text_cuts": "samples more, because texts that are longer than a sample were cut between words",
}


def report(store: UnitStore, units: Sequence, *, frame_rate: float, timeline: Timeline) -> Group:
    """Tables of units that are done: samples by source and task, and what was left out, by reason and source."""
    of_source: dict[tuple[str, str], Totals] = {}
    for unit in units:
        of_source.setdefault((unit.split, unit.source.name), Totals()).add(store.totals(unit))
    together = Totals()
    for totals in of_source.values():
        together.add(totals)
    parts = [_samples(of_source, frame_rate=frame_rate)]
    if together.rejected:
        parts.append(_rejected(of_source, together))
    for name, count in together.notes.items():
        farthest = f", at most {together.largest_shift} frames" if name == "moved_words" else ""
        parts.append(Text(f"{count:,} {_NOTES[name]}{farthest}"))
    if together.effects:
        shown = ", ".join(f"{name} {together.effects[name]:,}" for name in EFFECTS if together.effects[name])
        parts.append(Text(f"Recordings altered, each version by itself: {shown}"))
    if timeline.seconds("encode"):
        parts.append(_encoder(timeline))
    return Group(*parts)


def _samples(of_source: dict[tuple[str, str], Totals], *, frame_rate: float) -> Table:
    table = Table("split", "source", "task", title="Prepared")
    for column in ("samples", "hours"):
        table.add_column(column, justify="right")
    for (split, source), totals in of_source.items():
        for task, count in sorted(totals.samples.items()):
            table.add_row(split, source, task, f"{count:,}", f"{totals.frames[task] / frame_rate / 3600:,.2f}")
        if not totals.samples:
            table.add_row(split, source, "-", "0", "0.00")
    return table


def _rejected(of_source: dict[tuple[str, str], Totals], together: Totals) -> Table:
    sources = [key for key, totals in of_source.items() if totals.rejected]
    table = Table("left out because", title="Left out (each with its reason in rejected.jsonl)")
    for split, source in sources:
        table.add_column(f"{split} {source}", justify="right")
    for reason, _ in together.rejected.most_common():
        table.add_row(reason, *(f"{of_source[key].rejected[reason]:,}" for key in sources))
    return table


def _encoder(timeline: Timeline) -> Text:
    return Text(
        f"The encoder worked {timeline.seconds('encode'):.1f} s and waited for the decoder {timeline.share_waited:.1%} "
        f"of its time, after the first batch came at {timeline.seconds_to_first:.1f} s"
    )
