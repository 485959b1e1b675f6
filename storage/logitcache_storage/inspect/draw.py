"""Samples on a terminal, from the values of `data`; legible at 80 columns and without colour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from logitcache_storage.inspect.data import token_text as token_text
from logitcache_storage.terminal import Facts, facts_table, format_probability, has_colour
from logitcache_storage.visible import DOTTED_CIRCLE, is_combining, printable

SHADES = (
    (0.5, "", "0.5 or more"),
    (0.1, "black on color(229)", "0.1"),
    (0.01, "black on color(215)", "0.01"),
    (0.001, "white on color(166)", "0.001"),
    (0.0, "bold white on color(124)", "below"),
)
"""Least probability of the label, style, legend; from likely to unlikely."""

MARK_BELOW = 0.1
"""Without colour, labels less likely than this stand in MARKS."""
MARKS = "⟦", "⟧"

MAX_TEXT = 1200
"""Characters of a prompt that are shown: its beginning and its end."""

MAX_VALUE = 160
"""Characters of a column of the corpus that are shown: two lines or three; `--json` has all of it."""

BAR_WIDTH = 5


def shade(log_prob: float) -> str:
    """Style of a label with this log-prob."""
    probability = math.exp(log_prob)
    return next(style for least, style, _ in SHADES if probability >= least)


def bar(share: float, width: int) -> str:
    """A bar of `share` in [0, 1] of `width` characters, to an eighth of one."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    return ("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()).ljust(width)


def draw_listing(samples: Sequence[dict[str, Any]]) -> Table:
    """A line for each sample."""
    table = Table(box=None, pad_edge=False)
    for name in ("sample", "key", "tokens", "targets", "label lp (nats)"):
        table.add_column(name, justify="left" if name == "key" else "right", no_wrap=True)
    table.add_column("source", overflow="fold")
    for sample in samples:
        table.add_row(
            str(sample["index"]),
            sample["key"][:12],
            f"{sample['num_tokens']:,}",
            f"{sample['num_targets']:,}",
            Text(f"{sample['mean_label_log_prob']:.3f}", style=shade(sample["mean_label_log_prob"])),
            Text(printable(sample["source_id"])),
        )
    return table


def draw_sample(sample: dict[str, Any], label_log_probs: Sequence[float], console: Console) -> list[RenderableType]:
    """What the sample is, its shaded text, and a table of the positions in `sample["rows"]`.

    Args:
        sample: of `sample_data`.
        label_log_probs: of all its targets, nats.
        console: decides between colours and marks.
    """
    colour = has_colour(console)
    return [
        facts_table(_sample_facts(sample)),
        "",
        _draw_text(sample["segments"], label_log_probs, colour),
        "",
        _legend(colour),
        "",
        _draw_positions(sample["rows"]),
    ]


def _sample_facts(sample: dict[str, Any]) -> Facts:
    mean = sample["mean_label_log_prob"]
    return [
        (f"sample {sample['index']}", f"{sample['source_id']}, key {sample['key']}"),
        ("tokens", f"{sample['num_tokens']:,}, {sample['num_targets']:,} of them targets"),
        ("mean label log-prob", f"{mean:.4f} nats, perplexity {math.exp(min(-mean, 700.0)):,.2f}"),
        *((name, _beginning(str(value))) for name, value in sample["columns"].items()),
    ]


def _beginning(text: str) -> str:
    return text if len(text) <= MAX_VALUE else f"{text[: MAX_VALUE - 1]}…"


def _draw_text(segments: Sequence[dict[str, Any]], label_log_probs: Sequence[float], colour: bool) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    rows = iter(label_log_probs)
    for segment in segments:
        if segment["target"]:
            text = Text()
            for token, log_prob in zip(segment["texts"], rows, strict=False):
                marked = not colour and token and math.exp(log_prob) < MARK_BELOW
                shown = _marked(_flowing(token)) if marked else _flowing(token)
                text.append(shown, style=shade(log_prob) if colour else "")
            table.add_row("  target", _without_last_break(text))
        else:
            prompt = _flowing(_shortened("".join(segment["texts"])))
            table.add_row("  prompt", _without_last_break(Text(prompt, style="dim")))
    return table


def _flowing(text: str) -> str:
    """Line breaks are broken, and shown: they are tokens too."""
    return printable(text).replace("\n", "↵\n")


def _marked(text: str) -> str:
    """Between marks, with a last line break after them."""
    body = text.removesuffix("\n")
    circle = DOTTED_CIRCLE if is_combining(body) else ""  # or it would sit on the mark
    return f"{MARKS[0]}{circle}{body}{MARKS[1]}{text[len(body) :]}"


def _shortened(text: str) -> str:
    if len(text) <= MAX_TEXT:
        return text
    half = MAX_TEXT // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


def _without_last_break(text: Text) -> Text:
    if text.plain.endswith("\n"):
        text.right_crop(1)
    return text


def _legend(colour: bool) -> Text:
    if not colour:
        return Text(f"  {MARKS[0]}{MARKS[1]} the teacher gives the label a probability below {MARK_BELOW}")
    text = Text().append("  probability of the label: ", style="dim")
    for _, style, name in SHADES:
        text.append(f" {name} ", style=style)
    return text


def _draw_positions(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("row", "pos"):
        table.add_column(name, justify="right", style="dim", no_wrap=True)
    # Only these two give way where a line is too long; a number is never cut.
    table.add_column("label", min_width=8, max_width=14)
    for name in ("rank", "prob", "entropy", "tail"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("choices (* the label)", min_width=24)
    for row in rows:
        rank = row["label_rank"]
        table.add_row(
            str(row["row"]),
            str(row["position"]),
            Text(token_text(row["label"]), shade(row["label_log_prob"]), no_wrap=True, overflow="ellipsis"),
            str(rank) if rank else f">{row['num_kept']}" if row["num_kept"] else "-",
            format_probability(math.exp(row["label_log_prob"])),
            f"{row['entropy']:.3f}" if row["num_kept"] else "-",
            format_probability(row["tail"]),
            _choices(row),
        )
    return table


def _choices(row: dict[str, Any]) -> Text:
    """A line for each choice; the token comes last, where no script can disturb what follows it."""
    text = Text(no_wrap=True, overflow="ellipsis")
    for i, choice in enumerate(row["top"]):
        is_label = choice["id"] == row["label"]["id"]
        probability = math.exp(choice["log_prob"])
        text.append("\n" * (i > 0) + ("* " if is_label else "  "), style="bold")
        text.append(f"{format_probability(probability):>6} ")
        text.append(f"{bar(probability, BAR_WIDTH)} ", style="green" if is_label else "blue")
        text.append(token_text(choice), style="bold" if is_label else "")
    return text
