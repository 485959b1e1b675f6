"""Fragments of HTML, read again by a parser: the text is the corpus's, the markup is ours."""

import math
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("markupsafe", reason="pip install 'logitcache[web]'")

from logitcache_storage.cache import Sample
from logitcache_storage.inspect.data import positions, segments
from logitcache_storage.inspect.html import MEASURES, Series, distribution, legend, outcomes, tokens
from logitcache_storage.testing import make_topk
from logitcache_storage.vocabulary import VOCABULARY_SCHEMA, Vocabulary

HOSTILE = ["<script>alert(1)</script>", "</div></body>", '" onmouseover="alert(1)', "'", "&lt;b&gt;", "\x1b[31mred"]
HOSTILE += ["\u202eevil", "\x00", "<!--", " ", "\t", "\u0301", "שלום", "a\nb"]
PIECES = [word.encode() for word in HOSTILE] + ["日".encode()[:1], "日".encode()[1:], b"\xff", b" plain"]
VOCAB, K = len(PIECES), 6


class Parsed(HTMLParser):
    """Elements in order, as (tag, attributes, text directly within)."""

    def __init__(self, markup):
        super().__init__(convert_charrefs=True)
        self.elements, self._open = [], []
        self.feed(str(markup))
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])
        if tag not in ("rect", "line"):
            self._open.append(self.elements[-1])

    def handle_startendtag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        if self._open:
            self._open[-1][2] += data

    def of(self, look):
        return [e for e in self.elements if look in (e[1].get("class") or "").split()]


@pytest.fixture(scope="module")
def vocabulary():
    columns = {"token": [str(i) for i in range(VOCAB)], "text": PIECES, "special": [False] * VOCAB}
    return Vocabulary(pa.table(columns, schema=VOCABULARY_SCHEMA))


@pytest.fixture(scope="module")
def sample():
    ids = np.concatenate([[VOCAB - 1, 0], np.arange(VOCAB), [VOCAB - 1], [3, 2]]).astype(np.int32)
    targets = np.concatenate([np.arange(2, 2 + VOCAB), [len(ids) - 1]]).astype(np.int32)
    topk = make_topk(len(targets), K, VOCAB, seed=5, labels=ids[targets])
    return Sample("0" * 32, "source", ids, targets, topk)


@pytest.fixture(scope="module")
def rows(sample, vocabulary):
    return positions(sample, vocabulary, slice(0, len(sample.topk)), 3)


def test_text_of_a_corpus_is_text(sample, rows, vocabulary):
    parsed = Parsed(tokens(segments(sample, vocabulary), rows, "label", link=lambda row: f"?row={row}&a='\""))
    assert {tag for tag, _, _ in parsed.elements} == {"div", "a", "span"}
    allowed = {"class", "data-row", "title", "href", "tabindex", "aria-current"}
    assert all(set(attributes) <= allowed for _, attributes, _ in parsed.elements)
    shown = parsed.of("tok")
    assert [int(attributes["data-row"]) for _, attributes, _ in shown] == list(range(len(rows)))
    assert [text for _, _, text in shown[:5]] == HOSTILE[:5]
    assert [text for _, _, text in shown[5:8]] == [r"\x1b[31mred", r"\u202eevil", r"\x00"]
    assert shown[13][2] == "a↵\nb"
    assert shown[14][2] == "" and shown[15][2] == "日"  # a character stands with the token that completes it
    assert shown[16][2] == r"\xff"
    assert shown[3][1]["href"] == "?row=3&a='\""
    assert [text for _, _, text in parsed.of("prompt")] == [f" plain{HOSTILE[0]}", f" plain{HOSTILE[3]}"]


@pytest.mark.parametrize("name", ["label", "entropy", "tail"])
def test_shades_follow_the_edges_of_the_legend(sample, rows, vocabulary, name):
    parsed = Parsed(tokens(segments(sample, vocabulary), rows, name))
    value = {"label": lambda r: -r["label_log_prob"], "entropy": lambda r: r["entropy"], "tail": lambda r: r["tail"]}
    levels = [int(attributes["class"].split("s")[-1]) for _, attributes, _ in parsed.of("tok")]
    assert levels == [sum(value[name](row) >= edge for edge in MEASURES[name].edges) for row in rows]
    assert len(set(levels)) > 2
    assert len(Parsed(legend(name)).of("tok")) == 10


def test_a_token_says_its_numbers_and_not_by_colour_alone(sample, rows, vocabulary):
    parsed = Parsed(tokens(segments(sample, vocabulary), rows, "kl", values=[0.25] * len(rows)))
    for row, (_, attributes, _) in zip(rows, parsed.of("tok"), strict=True):
        rank = f"rank {row['label_rank']}" if row["label_rank"] else f"not among {K} kept"
        assert rank in attributes["title"] and f"entropy {row['entropy']:.3f} nats" in attributes["title"]
        assert attributes["title"].endswith("KL to the second cache, nats: 0.25")


def test_the_selected_token_is_the_one_stop_of_the_tab_key(sample, rows, vocabulary):
    shown = Parsed(tokens(segments(sample, vocabulary), rows, "label", link=str, selected=4)).of("tok")
    assert [i for i, (_, attributes, _) in enumerate(shown) if attributes["tabindex"] == "0"] == [4]
    assert [i for i, (_, attributes, _) in enumerate(shown) if attributes.get("aria-current")] == [4]


def test_a_bounded_text_says_what_is_left_out(sample, rows, vocabulary):
    parsed = Parsed(tokens(segments(sample, vocabulary), rows[:5], "label", max_prompt=10))
    assert len(parsed.of("tok")) == 5
    assert f"{len(rows) - 5} more target tokens" in parsed.of("cut")[0][2]
    assert f"[… {len(' plain' + HOSTILE[0]) - 10} characters …]" in parsed.of("prompt")[0][2]


def test_outcomes_are_every_choice_the_label_and_the_rest(sample, vocabulary):
    theirs = make_topk(len(sample.topk), 4, VOCAB, seed=9, labels=sample.labels)
    other = Sample(sample.key, "", sample.input_ids, sample.target_positions, theirs)
    for row in range(len(sample.topk)):
        here, there = (positions(s, vocabulary, slice(row, row + 1), 9)[0] for s in (sample, other))
        found = outcomes({"a": here, "b": there})
        by_token = {o["token"]["id"]: o for o in found if o["token"] is not None}
        label = int(sample.labels[row])
        assert set(by_token) == {*sample.topk.ids[row].tolist(), *theirs.ids[row].tolist(), label}
        assert [o["token"]["id"] for o in found if o["is_label"]] == [label]
        assert by_token[label]["b"] == pytest.approx(math.exp(theirs.label_log_prob[row]))
        for key in ("a", "b"):
            assert sum(o[key] or 0.0 for o in found) == pytest.approx(1, abs=2e-6)
        unknown = set(sample.topk.ids[row].tolist()) - {*theirs.ids[row].tolist(), label}
        assert {token for token, o in by_token.items() if o["b"] is None} == unknown


def test_a_bounded_list_of_outcomes_still_knows_what_every_cache_keeps(sample, vocabulary):
    theirs = make_topk(len(sample.topk), K, VOCAB, seed=9, labels=sample.labels)
    other = Sample(sample.key, "", sample.input_ids, sample.target_positions, theirs)
    rows = {k: positions(s, vocabulary, slice(2, 3), K)[0] for k, s in (("a", sample), ("b", other))}
    whole = {o["token"]["id"]: o for o in outcomes(rows) if o["token"] is not None}
    found = outcomes(rows, limit=2)
    first = {*sample.topk.ids[2, :2].tolist(), *theirs.ids[2, :2].tolist(), int(sample.labels[2])}
    assert {o["token"]["id"] for o in found if o["token"] is not None} == first
    for outcome in found[:-1]:
        assert outcome == whole[outcome["token"]["id"]]
    for key in ("a", "b"):
        assert sum(o[key] or 0.0 for o in found) == pytest.approx(1, abs=2e-6)


def test_all_others_are_no_less_than_the_tail():
    token = {"id": 3, "text": "x", "bytes": None}
    row = {"label": token, "label_rank": 1, "label_log_prob": math.log(0.6), "tail": 1e-5}
    row["top"] = [{**token, "log_prob": math.log(0.6)}, {**token, "id": 4, "log_prob": math.log(0.401)}]
    assert outcomes({"a": row})[-1]["a"] == 1e-5  # an encoding has rounded what is kept to 1.001


def test_bars_are_as_long_as_their_numbers():
    token = {"id": 1, "text": "<b>", "bytes": None}
    rows = [
        {"token": token, "is_label": True, "p": 0.4, "g": -0.15},
        {"token": None, "is_label": False, "p": 0.1, "g": 0.05},
        {"token": token, "is_label": False, "p": None, "g": None},
    ]
    parsed = Parsed(distribution(rows, [Series("p", "<p>", "first"), Series("g", "g", "gradient", True)], "<i>"))
    bars = [(float(a["x"][:-1]), float(a["width"][:-1])) for tag, a, _ in parsed.elements if tag == "rect"]
    # Probabilities on a scale to 0.5, what is signed on one from -0.2 to 0.2.
    assert bars == [(0, 80), (12.5, 37.5), (0, 20), (50, 12.5)]
    assert [text for tag, _, text in parsed.elements if tag == "caption"] == ["<i>"]
    assert [text for _, _, text in parsed.of("value")] == ["0.4000", "-0.1500", "0.1000", "+0.0500", "?", "?"]
    assert "script" not in {tag for tag, _, _ in parsed.elements} and len(parsed.of("badge")) == 1
