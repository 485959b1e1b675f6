"""From corpus and teacher to the identity and the plan of a cache, before any model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa

from logitcache_pipeline.columns import extra_columns
from logitcache_pipeline.corpus import CorpusSurvey, read_records, survey
from logitcache_pipeline.extend import Base, KnownSamples, fitted_columns, load_base
from logitcache_pipeline.fingerprint import teacher_identity, tokenizer_identity_of
from logitcache_pipeline.plan import PlanSummary, default_shard_rows, plan_tables
from logitcache_pipeline.settings import BuildSettings
from logitcache_pipeline.tokenize import Excluded, Overlong, TokenizedSample, TokenizeSettings, tokenize_records
from logitcache_pipeline.vocabulary import vocabulary_table
from logitcache_storage.commit import new_attempt
from logitcache_storage.errors import CorpusError, InputError
from logitcache_storage.id_layouts import default_id_layout
from logitcache_storage.objects import ObjectStore
from logitcache_storage.plans import commit_extension, commit_plan, write_parquet, write_samples
from logitcache_storage.progress import Meter, progress
from logitcache_storage.schema import CacheIdentity, CorpusIdentity, ExtensionRecord, ObjectRecord, PlanPart, PlanRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prepared:
    """A corpus that was surveyed, and all it takes to plan it."""

    settings: BuildSettings
    corpus: CorpusSurvey
    tokenizer: PreTrainedTokenizerBase
    tokenize_settings: TokenizeSettings
    vocab_size: int
    storage_options: Mapping[str, Any] | None

    @property
    def shard_rows(self) -> int:
        """Target rows of a shard."""
        return self.settings.shard_rows or default_shard_rows(self.corpus.num_bytes)

    @property
    def corpus_identity(self) -> CorpusIdentity:
        """Which data these are, and how they become samples."""
        return CorpusIdentity(self.corpus.fingerprint, self.corpus.num_records, asdict(self.tokenize_settings))

    def behind(self, base: Base) -> Prepared:
        """The same for an extension of a cache: settings that were not given are the cache's."""
        dtype = base.identity.teacher.dtype if self.settings.dtype == "auto" else self.settings.dtype
        shard_rows = self.settings.shard_rows or base.identity.shard_rows
        return replace(self, settings=replace(self.settings, dtype=dtype, shard_rows=shard_rows))

    def identity(self, dtype: str) -> CacheIdentity:
        """What the cache will be a cache of, with a teacher of this arithmetic.

        Raises:
            InputError: k is above the vocabulary size, or another setting is out of range.
        """
        settings = self.settings
        return CacheIdentity(
            teacher=teacher_identity(settings.teacher, dtype=dtype, engine=settings.engine, **settings.loading_options),
            tokenizer=tokenizer_identity_of(self.tokenizer),
            corpus=self.corpus_identity,
            vocab_size=self.vocab_size,
            k=settings.k,
            kept_mass=settings.kept_mass,
            precision=settings.precision,
            container=settings.format,
            shard_rows=self.shard_rows,
            role=settings.role,
            id_layout=default_id_layout(settings.format, self.vocab_size),
        )

    def plan(self, meter: Meter, base: Base | None) -> Iterator[pa.Table | PlanSummary]:
        """Tables of samples, and last their summary (`plan.plan_tables`).

        Args:
            meter: counts records.
            base: what the plan stands behind; None: it is the first.

        Raises:
            CorpusError: the columns are not the cache's; and all that tokenization refuses.
        """
        shape = self.tokenize_settings.shape(self.corpus.fields, source_id=self.settings.data[0])
        columns = extra_columns(self.corpus.columns, shape.text_fields)
        records = read_records(self.settings.data, self.storage_options)
        found = tokenize_records(records, self.tokenizer, self.tokenize_settings)
        samples, first_shard = _inside_vocabulary(found, self.vocab_size, meter), 0
        if base is not None:
            columns = fitted_columns(columns, base)
            samples, first_shard = KnownSamples.of(base).left_out(samples), len(base.plan.shard_num_rows)
        return plan_tables(samples, shard_rows=self.shard_rows, extra_columns=columns, first_shard=first_shard)


def prepare(settings: BuildSettings, storage_options: Mapping[str, Any] | None = None) -> Prepared:
    """Load tokenizer and config, and survey the corpus.

    Args:
        settings: of the build.
        storage_options: for the corpus's URLs, handed to fsspec.

    Raises:
        InputError: no tokenizer, no config, no such file, or a record that cannot be used.
    """
    from transformers import AutoConfig, AutoTokenizer

    if settings.revision is not None and Path(settings.teacher).is_dir():
        raise InputError(f"revision is for a hub id, and the teacher {settings.teacher!r} is a folder; leave it out")
    config = _load("config", AutoConfig, settings)
    vocab_size = getattr(config.get_text_config(), "vocab_size", None)
    if vocab_size is None:
        raise InputError(
            f"the teacher {settings.teacher!r} is a {config.model_type}, which has no vocabulary; expected a causal"
            " language model"
        )
    if settings.k > vocab_size:
        raise InputError(f"k must be at most the teacher's vocabulary size {vocab_size}, got {settings.k}")
    tokenizer = _load("tokenizer", AutoTokenizer, settings)
    longest = _longest_sample(config, settings)
    if settings.max_length is not None and longest is not None and settings.max_length > longest:
        raise InputError(f"max_length {settings.max_length} is above the {longest} tokens the teacher takes")
    tokenize_settings = TokenizeSettings(
        max_length=longest if settings.max_length is None else settings.max_length,
        overlong=cast(Overlong, settings.overlong),
        prompt_field=settings.prompt_field,
        response_field=settings.response_field,
    )
    found = survey(settings.data, storage_options)
    return Prepared(settings, found, tokenizer, tokenize_settings, vocab_size, storage_options)


def write_plan(store: ObjectStore, prepared: Prepared) -> PlanRecord:
    """Tokenize the corpus, write the samples table and the vocabulary, and commit the first plan."""
    attempt = new_attempt()
    summary, parts = _write_samples(store, attempt, prepared, None)
    vocabulary = write_parquet(store, f"vocabulary/{attempt}.parquet", vocabulary_table(prepared.tokenizer))
    return commit_plan(store, _plan_record(summary, parts, vocabulary))


def write_extension(prepared: Prepared, base: Base) -> bool:
    """The same behind a cache that is there; False where another build was faster, and all is to be done again.

    Raises:
        CorpusError: every sample is in the cache already, or the columns are not the cache's.
    """
    planned = base.plan
    summary, parts = _write_samples(base.store, new_attempt(), prepared, base)
    plan = _plan_record(summary, parts, planned.vocabulary)  # equal tokenizers have one vocabulary
    extension = ExtensionRecord(prepared.corpus_identity, len(planned.shard_num_rows), plan)
    return commit_extension(base.store, base.num_plans, extension)


def prepare_extension(store: ObjectStore, prepared: Prepared) -> tuple[Prepared, Base]:
    """The same as data for the cache on a store, and what that holds.

    Raises:
        CacheNotFoundError: there is no cache, or its first plan is not written yet.
        MismatchError: it was made with other settings.
    """
    base = load_base(store)
    prepared = prepared.behind(base)
    base.check_same(prepared.identity(prepared.settings.dtype))
    return prepared, base


def plan_summary(
    prepared: Prepared, base: Base | None = None, see: Callable[[pa.Table], None] | None = None
) -> PlanSummary:
    """What the plan would be, without writing anything; `see` is shown its tables."""
    with _planning(prepared) as meter:
        stream = _Stream(prepared.plan(meter, base))
        for table in stream:
            if see is not None:
                see(table)
    return stream.summary


def _write_samples(
    store: ObjectStore, attempt: str, prepared: Prepared, base: Base | None
) -> tuple[PlanSummary, tuple[PlanPart, ...]]:
    with _planning(prepared) as meter:
        stream = _Stream(prepared.plan(meter, base))
        parts = write_samples(store, attempt, stream)
    return stream.summary, parts


def _planning(prepared: Prepared) -> AbstractContextManager[Meter]:
    quiet = prepared.settings.log_format == "json"
    return progress("planning", total=prepared.corpus.num_records, unit="records", quiet=quiet)


def _plan_record(summary: PlanSummary, parts: tuple[PlanPart, ...], vocabulary: ObjectRecord) -> PlanRecord:
    return PlanRecord(
        num_samples=summary.num_samples,
        num_tokens=summary.num_tokens,
        num_rows=summary.num_rows,
        shard_num_rows=summary.shard_num_rows,
        report=summary.report,
        parts=parts,
        vocabulary=vocabulary,
    )


def _load(what: str, auto_class: Any, settings: BuildSettings) -> Any:
    path = settings.teacher
    try:
        return auto_class.from_pretrained(path, **settings.loading_options)
    except Exception as e:  # the libraries raise a dozen kinds of errors, some of no class of their own
        if not settings.trust_remote_code and "trust_remote_code" in str(e):
            raise InputError(
                f"the teacher {path!r} comes with code of its own, which its {what} needs; read it, and let it run here"
                " and in every worker with --trust-remote-code"
            ) from e
        is_there = Path(path).is_dir() or what != "config"  # which comes first
        problem = f"cannot load its {what}" if is_there else "neither a folder nor a model that the hub gives"
        raise InputError(f"the teacher {path!r}: {problem}: {' '.join(str(e).split())}") from e


def _longest_sample(config: Any, settings: BuildSettings) -> int | None:
    """Tokens that the teacher takes, as far as its config tells; None: no limit is known."""
    if settings.engine == "vllm":
        from logitcache_pipeline.engines.vllm import longest_request

        return longest_request(config, settings.engine_options)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


class _Stream:
    """The tables of a plan, one at a time; the summary that ends them is kept."""

    summary: PlanSummary

    def __init__(self, items: Iterator[pa.Table | PlanSummary]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[pa.Table]:
        for item in self._items:
            if isinstance(item, PlanSummary):
                self.summary = item
            else:
                yield item


def _inside_vocabulary(
    samples: Iterable[TokenizedSample | Excluded], vocab_size: int, meter: Meter
) -> Iterator[TokenizedSample | Excluded]:
    for sample in samples:
        if isinstance(sample, TokenizedSample) and int(sample.input_ids.max()) >= vocab_size:
            raise CorpusError(
                f"{sample.source_id}: token id {int(sample.input_ids.max())}, the teacher's vocabulary is"
                f" 0..{vocab_size - 1}; the tokenizer beside the teacher is not its own"
            )
        meter.advance(1)
        yield sample
