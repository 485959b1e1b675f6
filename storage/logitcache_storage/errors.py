"""Every error this project raises on purpose.

LogitCacheError                    exit status 1
├── InputError (a ValueError)      exit status 2: the arguments or the input are wrong
│   ├── CorpusError                a record, a file or a template that cannot be used
│   ├── MismatchError              two things that must agree do not (settings, tokenizer, format version)
│   └── CacheNotFoundError         no cache at this URL
├── StoreError                     the object store refused or could not be reached
│   ├── StoreUnavailableError      it does not answer, or cannot serve just now: another try may succeed
│   ├── ObjectExistsError          a create-only object is already there
│   └── ObjectNotFoundError        no object of this name
├── CorruptionError                bytes that are not what was committed
└── BuildError                     shards that could not be scored
"""


class LogitCacheError(Exception):
    """Base of all errors of this project; the command line prints it without a traceback."""

    exit_status = 1


class InputError(LogitCacheError, ValueError):
    """The arguments or the input are wrong; nothing was done."""

    exit_status = 2


class CorpusError(InputError):
    """A corpus record, file or chat template cannot be used."""


class MismatchError(InputError):
    """Two things that must agree do not: settings on resume, tokenizers, format versions."""


class CacheNotFoundError(InputError):
    """There is no cache at this URL."""


class StoreError(LogitCacheError):
    """The object store refused an operation or could not be reached."""


class StoreUnavailableError(StoreError):
    """The object store does not answer, or cannot serve just now: the same operation may succeed later."""


class ObjectExistsError(StoreError):
    """A create-only object is already there."""


class ObjectNotFoundError(StoreError):
    """There is no object of this name."""


class CorruptionError(LogitCacheError):
    """Bytes that are not what was committed: wrong checksum, wrong size, broken invariant."""


class BuildError(LogitCacheError):
    """The build ended with shards that could not be scored."""
