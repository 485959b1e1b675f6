"""The samples of a cache, a page at a time: sorted, filtered by a bar of a histogram, or searched."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from logitcache_storage.cache import Cache
from logitcache_storage.errors import InputError, LogitCacheError
from logitcache_storage.inspect.search import SearchResult
from logitcache_storage.row_bins import HISTOGRAMS
from logitcache_storage.sample_statistics import SampleTable
from logitcache_storage.web import sample
from logitcache_storage.web.page import Page, Query, link, render, site_of
from logitcache_storage.web.site import Side, sample_name

PER_PAGE = 25
READERS = 8
EXCERPT_TOKENS = 40
"""Of the first targets of a sample, in the list."""


@dataclass(frozen=True)
class Column:
    """A column of the list, by which it can be sorted."""

    name: str
    title: str
    hint: str
    style: str
    """Filter of the template."""
    descends: bool
    """Whether the first look is at its largest values."""


COLUMNS = (
    Column("index", "sample", "where it stands in the cache", "grouped", False),
    Column("num_tokens", "tokens", "prompt and targets", "grouped", True),
    Column("num_targets", "targets", "tokens that are trained on", "grouped", True),
    Column("mean_label_log_prob", "mean log-prob", "of the labels, nats", "nats", False),
    Column("min_label_log_prob", "lowest log-prob", "of the most surprising label, nats", "nats", False),
    Column("mean_entropy", "entropy", "mean over the targets, nats", "nats", True),
    Column("top_1_rate", "top-1", "how often the label is the teacher's first choice", "percent", False),
    Column("doubt", "doubt", "the teacher's surest choice where it does not keep the label", "percent", True),
)
_BY_NAME = {column.name: column for column in COLUMNS}
_OF_IDS = ("mean_entropy", "top_1_rate", "doubt")
"""Not known of a cache that keeps no ids (k = 0)."""


@dataclass(frozen=True)
class Order:
    """Which samples are listed in which order; all of it stands in the URL."""

    sort: str
    order: str
    histogram: str
    bin: int | None

    @classmethod
    def of(cls, query: Query) -> Order:
        """What the parameters say."""
        histogram = query.choice("histogram", ("", *HISTOGRAMS), "")
        return cls(
            sort=query.choice("sort", list(_BY_NAME), "index"),
            order=query.choice("order", ("ascending", "descending"), "ascending"),
            histogram=histogram,
            bin=query.integer("bin", 0) if histogram else None,
        )

    @property
    def needs_table(self) -> bool:
        """Whether the statistics decide, and not the order of the cache alone."""
        return self.sort != "index" or bool(self.histogram)

    def indices(self, n: int, table: SampleTable | None) -> Sequence[int] | npt.NDArray[np.int64]:
        """The samples of a cache of n; in its own order, all of them, where there is no table yet."""
        descending = self.order == "descending"
        if table is None or not self.needs_table:
            # Every sample has its place here, also one whose statistics could not be read.
            return range(n)[::-1] if descending else range(n)
        among = table.in_bin(self.histogram, self.bin or 0) if self.histogram else None
        return table.order(self.sort, descending=descending, among=among)

    def bar(self, k: int) -> str:
        """The bar of a histogram that the samples stand behind, in words."""
        if not self.histogram:
            return ""
        names = {item.number: item.name for item in HISTOGRAMS[self.histogram].bins_for(k)}
        return f"{HISTOGRAMS[self.histogram].title} {names.get(self.bin or 0, f'bin {self.bin}')}"

    def link(self, **changes: Any) -> str:
        """The address of the list, with other values or a page."""
        return link("/samples", **{**asdict(self), **changes})

    def head(self, column: Column) -> dict[str, str]:
        """Where the head of a column leads: to that order, or to the other way round."""
        is_current = self.sort == column.name
        descends = self.order != "descending" if is_current else column.descends
        href = self.link(sort=column.name, order="descending" if descends else "ascending")
        return {"href": href, "sorted": self.order if is_current else ""}


def show(request: Request) -> Response:
    """One page of the list, or of what a search has found."""
    side, query = site_of(request).first, Query(request)
    wanted = query.text("q")
    values = _found(side, wanted, query.text("after")) if wanted else _listed(side, query)
    columns = [column for column in COLUMNS if side.cache.identity.k or column.name not in _OF_IDS]
    return render(request, "samples.html", title="Samples", side=side, columns=columns, wanted=wanted, **values)


def _listed(side: Side, query: Query) -> dict[str, Any]:
    order, page, table = Order.of(query), query.integer("page", 1, low=1), side.table
    indices = order.indices(len(side.cache), table)
    num_pages = max(1, -(-len(indices) // PER_PAGE))
    if page > num_pages:
        raise InputError(f"page {page:,} of {num_pages:,}")
    rows, problem = _described(side.cache, table, [int(i) for i in indices[(page - 1) * PER_PAGE : page * PER_PAGE]])
    return {
        "table": table,
        "rows": rows,
        "problem": problem,
        "order": order,
        "waits": order.needs_table and table is None,
        "num_found": len(indices),
        "bar": order.bar(side.cache.identity.k),
        "page": page,
        "num_pages": num_pages,
    }


def _found(side: Side, wanted: str, after: str) -> dict[str, Any]:
    result = side.search.search(wanted, after=after, limit=PER_PAGE)
    table = side.table
    rows, problem = _described(side.cache, table, [found.index for found in result.found])
    for row, found in zip(rows, result.found, strict=True):
        row["excerpt"] = (found.excerpt[: found.start], found.excerpt[found.start : found.stop])
        row["rest"] = found.excerpt[found.stop :]
    return {
        "table": table,
        "rows": rows,
        "problem": problem,
        "order": None,
        "searched": _searched(result),
        "continued": bool(after),
        "further": None if result.next is None else link("/samples", q=wanted, after=result.next),
    }


def _described(cache: Cache, table: SampleTable | None, indices: list[int]) -> tuple[list[dict[str, Any]], str]:
    """What the list says of these samples; where they cannot be read, their numbers alone, and why."""
    rows: list[dict[str, Any]] = [
        {"index": i, "name": str(i), "facts": _facts(cache, table, i), "source_id": "", "excerpt": ("", ""), "rest": ""}
        for i in indices
    ]
    try:
        _read_together(cache, indices)
        described, tokens, vocabulary = cache.describe(indices), cache.read_tokens(indices), cache.vocabulary
    except LogitCacheError as e:
        return rows, str(e)
    for row, about, (ids, positions) in zip(rows, described, tokens, strict=True):
        text = vocabulary.decode(ids[positions[:EXCERPT_TOKENS]].tolist())
        row["name"], row["source_id"] = sample_name(row["index"], about["key"].hex()), about["source_id"]
        row["excerpt"] = (" ".join(text.split()), "")
    return rows, ""


def _read_together(cache: Cache, indices: list[int]) -> None:
    """Have the groups of the samples table that hold these samples read side by side: a bucket is slow for each."""
    of_group = {group: i for i in indices for group in cache.token_groups(np.array([i]))}
    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(cache.key, of_group.values()))


def _facts(cache: Cache, table: SampleTable | None, index: int) -> dict[str, Any]:
    if table is not None and table.known[index]:
        return table.facts(index)
    places = cache.index
    return {"index": index, "num_tokens": int(places.num_tokens[index]), "num_targets": int(places.num_targets[index])}


def _searched(result: SearchResult) -> str:
    if result.next is None:
        return "All has been searched."
    return f"The text of {result.num_searched:,} of {result.num_samples:,} samples has been searched."


PAGE = Page("samples", "Samples", (Route("/samples", show), *sample.ROUTES))
