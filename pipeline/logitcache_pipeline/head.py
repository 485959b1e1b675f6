"""Hidden states to top-k, tail and label log-probs, in chunks of rows: `[N, V]` never exists.

For one row of logits z, with S the k largest and r the (k+1)-th largest:

    log tail' = r + log sum_{a not in S} exp(z_a - r)       what is outside S, relative to its own largest
    log Z     = logaddexp(lse_S z, log tail')
    log p_a   = z_a - log Z           log tail = log tail' - log Z

Asking for k + 1 entries gives r for nothing, so a row is read once for the selection and once for the sum, and a tail
that underflows against the rest keeps its exact share: it is a log-sum-exp of its own, never 1 - sum.

Shapes: N target rows, n rows of a chunk, r rows reduced at a time, V vocabulary, D hidden, k kept ids;
in the selection B blocks of b columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logitcache_storage.errors import LogitCacheError
from logitcache_storage.topk import TopKLogProbs

CHUNK_BYTES = {"cpu": 1 << 27, "cuda": 1 << 29}
"""Bytes of float32 logits in a chunk: enough rows that the head's weight is not read too often. At V = 151,936 a CPU
multiplies a row in 0.7 of the time that it takes in chunks of half the size; larger ones gain nothing."""

CPU_BLOCK_BYTES = 1 << 22
"""Bytes of a chunk that each core reduces at a time, so that the passes over a row find it in the cache."""

MOST_STRIDES = 16
"""Columns of a block in the selection, at most: a core reads so many streams at a time well, and 32 of them in twice
the time (V = 151,936)."""

HEAP_LENGTH = 64
"""From a list of so many times k on, `torch.topk` keeps a heap of k on a CPU, in less than half of the time per entry
that it takes to partition a shorter one."""


class Head:
    """The last layer of a language model, [n, D] to float32 logits [n, V], with the chunk it writes them into.

    The product runs in the weight's dtype; scale and cap are applied in float32:
    z = scale (h W^T + bias), then softcap tanh(z / softcap) if there is a cap.
    The chunk is kept between calls: on a CPU, fresh pages for every product cost as much as the product.
    """

    def __init__(
        self,
        weight_VD: Tensor,
        bias_V: Tensor | None = None,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        chunk_bytes: int | None = None,
    ) -> None:
        self.weight_VD, self.bias_V, self.scale, self.softcap = weight_VD, bias_V, scale, softcap
        bound = chunk_bytes or CHUNK_BYTES.get(weight_VD.device.type, CHUNK_BYTES["cuda"])
        self.rows_per_chunk = max(1, bound // (4 * self.vocab_size))
        shape, dtype = (self.rows_per_chunk, self.vocab_size), weight_VD.dtype
        self._product_nV = torch.empty(shape, dtype=dtype, device=weight_VD.device)
        self._logits_nV = self._product_nV if dtype == torch.float32 else self._product_nV.float()

    @property
    def vocab_size(self) -> int:
        """V, the number of rows of the weight."""
        return self.weight_VD.shape[0]

    @torch.inference_mode()
    def logits(self, hidden_nD: Tensor) -> Tensor:
        """Float32 logits of at most `rows_per_chunk` rows, [n, V]; overwritten by the next call."""
        n = len(hidden_nD)
        product_nV, logits_nV = self._product_nV[:n], self._logits_nV[:n]
        hidden_nD = hidden_nD.to(self.weight_VD.device, self.weight_VD.dtype)
        if self.bias_V is None:
            torch.mm(hidden_nD, self.weight_VD.t(), out=product_nV)
        else:
            torch.addmm(self.bias_V, hidden_nD, self.weight_VD.t(), out=product_nV)
        if logits_nV is not product_nV:
            logits_nV.copy_(product_nV)
        if self.scale != 1.0:
            logits_nV.mul_(self.scale)
        if self.softcap is not None:
            logits_nV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_nV


class PendingRows:
    """Scored rows on their way to the host: the device goes on while they are copied."""

    def __init__(self, ids_Nk: Tensor, log_probs_Nk: Tensor, scalars_2N: Tensor) -> None:
        """Start to copy; log tail and label log-prob are the two `scalars`."""
        self._host = [t.to("cpu", non_blocking=True) for t in (ids_Nk, log_probs_Nk, scalars_2N)]
        self._copied = torch.cuda.current_stream(ids_Nk.device).record_event() if ids_Nk.is_cuda else None

    def wait(self, row_name: Callable[[int], str] = "row {}".format) -> TopKLogProbs:
        """The rows, as soon as they are there.

        Args:
            row_name: what to call a row in errors.

        Raises:
            LogitCacheError: the logits of a row are NaN or infinite.
        """
        if self._copied is not None:
            self._copied.synchronize()
        ids_Nk, log_probs_Nk, scalars_2N = self._host
        _check_finite(log_probs_Nk, scalars_2N, row_name)
        N, k = ids_Nk.shape
        return TopKLogProbs(
            ids=ids_Nk.numpy(),
            log_probs=log_probs_Nk.numpy(),
            num_kept=torch.full((N,), k, dtype=torch.int32).numpy(),
            log_tail=scalars_2N[0].numpy(),
            label_log_prob=scalars_2N[1].numpy(),
        )


@torch.inference_mode()
def top_k_log_probs(head: Head, hidden_ND: Tensor, labels_N: Tensor, k: int) -> PendingRows:
    """The k most likely tokens, the tail and the label's log-prob of every row.

    Args:
        head: the model's last layer.
        hidden_ND: final hidden states at the positions that predict a target, [N, D].
        labels_N: the target tokens, [N] int64, on the head's device.
        k: entries per row, 0..V; equal logits at the border of the k are resolved either way.
    """
    N, device = len(hidden_ND), head.weight_VD.device
    ids_Nk = torch.empty((N, k), dtype=torch.int32, device=device)
    log_probs_Nk = torch.empty((N, k), dtype=torch.float32, device=device)
    scalars_2N = torch.empty((2, N), dtype=torch.float32, device=device)
    block = head.rows_per_chunk
    if device.type == "cpu":
        block = max(1, torch.get_num_threads() * CPU_BLOCK_BYTES // (4 * head.vocab_size))
    done = 0
    for hidden_nD in torch.split(hidden_ND, head.rows_per_chunk):
        for logits_rV in torch.split(head.logits(hidden_nD), block):
            rows = slice(done, done + len(logits_rV))
            ids_Nk[rows], log_probs_Nk[rows], scalars_2N[0, rows], scalars_2N[1, rows] = reduce_logits(
                logits_rV, labels_N[rows], k
            )
            done = rows.stop
    return PendingRows(ids_Nk, log_probs_Nk, scalars_2N)


def reduce_logits(logits_nV: Tensor, labels_n: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Float32 logits to ids [n, k], log-probs [n, k], log tail [n] and label log-prob [n]; overwrites the logits.

    Rows with NaN or +inf among their logits come out as NaN, never as numbers.
    """
    return normalise(reduce_part(logits_nV, labels_n, k))


@dataclass(frozen=True, eq=False)
class PartialRows:
    """What is kept of n rows of logits over all or a part of the vocabulary: parts can be merged exactly."""

    values_nk: Tensor
    """The largest logits, [n, k], in descending order."""
    ids_nk: Tensor
    """Their tokens, [n, k] int32."""
    rest_max_n: Tensor
    """The largest logit outside them, [n]; -inf where nothing is."""
    log_rest_n: Tensor
    """log sum exp(z - rest_max) over what is outside, [n]; -inf where nothing is."""
    label_logit_n: Tensor
    """The label's logit, [n]; -inf where the label is in another part."""


def reduce_part(logits_nV: Tensor, labels_n: Tensor, k: int, *, first_id: int = 0) -> PartialRows:
    """The partial rows of float32 logits, which are overwritten; column j is the token `first_id + j`."""
    V = logits_nV.shape[1]
    columns_n = labels_n - first_id
    is_here_n = (columns_n >= 0) & (columns_n < V)
    label_logit_n = logits_nV.gather(1, columns_n.clamp(0, V - 1)[:, None])[:, 0].masked_fill(~is_here_n, -math.inf)
    largest, columns = largest_entries(logits_nV, min(k + 1, V))
    values_nk, columns_nk = largest[:, :k], columns[:, :k]
    if largest.shape[1] <= k:
        nothing_n = torch.full_like(label_logit_n, -math.inf)
        return PartialRows(values_nk, columns_nk.int() + first_id, nothing_n, nothing_n, label_logit_n)
    rest_max_n = largest[:, k]
    shift_n1 = rest_max_n.masked_fill(rest_max_n == -math.inf, 0.0)[:, None]
    # e^x as 2^(x / ln 2): on a CPU torch takes a quarter of the time for it.
    terms_nV = logits_nV.scatter_(1, columns_nk, -math.inf).sub_(shift_n1).mul_(1 / math.log(2)).exp2_()
    log_rest_n = terms_nV.sum(1).log()
    return PartialRows(values_nk, columns_nk.int() + first_id, rest_max_n, log_rest_n, label_logit_n)


def merge_parts(parts: Sequence[PartialRows], k: int) -> PartialRows:
    """The partial rows of a vocabulary of which each part saw other tokens."""
    values = torch.cat([part.values_nk for part in parts], dim=1)
    ids = torch.cat([part.ids_nk for part in parts], dim=1)
    values, order = values.sort(dim=1, descending=True)
    # What is not selected joins the rest: each entry is a rest of its own, with the log-sum 0.
    rest_max = torch.cat([values[:, k:], *(part.rest_max_n[:, None] for part in parts)], dim=1)
    log_rest = torch.cat([torch.zeros_like(values[:, k:]), *(part.log_rest_n[:, None] for part in parts)], dim=1)
    rest_max_n = rest_max.amax(1)
    shift_n1 = rest_max_n.masked_fill(rest_max_n == -math.inf, 0.0)[:, None]
    return PartialRows(
        values_nk=values[:, :k],
        ids_nk=ids.gather(1, order[:, :k]),
        rest_max_n=rest_max_n,
        log_rest_n=(rest_max - shift_n1 + log_rest).logsumexp(1),
        label_logit_n=torch.stack([part.label_logit_n for part in parts]).amax(0),
    )


def normalise(rows: PartialRows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids [n, k], log-probs [n, k], log tail [n] and label log-prob [n] of rows that saw the whole vocabulary."""
    # Relative to the row's largest logit, so that rounding is that of log-probs and not of logits.
    peak_n1 = torch.cat([rows.values_nk, rows.rest_max_n[:, None]], dim=1)[:, :1]
    values_nk = rows.values_nk - peak_n1
    log_rest_n = (rows.rest_max_n - peak_n1[:, 0]).masked_fill(rows.rest_max_n == -math.inf, 0.0) + rows.log_rest_n
    log_z_n = torch.logaddexp(values_nk.logsumexp(1), log_rest_n)
    return (
        rows.ids_nk,
        (values_nk - log_z_n[:, None]).clamp_(max=0.0),
        (log_rest_n - log_z_n).clamp_(max=0.0),
        (rows.label_logit_n - peak_n1[:, 0] - log_z_n).clamp_(max=0.0),
    )


def largest_entries(values_nV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row in descending order, and their columns: exactly `torch.topk`, but for ties.

    On a CPU in two stages where that is faster: the k blocks with the largest maxima contain the k largest entries
    (each of those blocks holds an entry at least as large as any entry of a block left out). Blocks are strided, block
    j being the columns j, j + B, j + 2B, ..., so that the maxima are taken of whole vectors; the V mod b columns at
    the end belong to no block and are always candidates. At k = 64 it takes three quarters of
    `torch.topk`'s time at V = 32,768 and two fifths at V = 151,936; a third stage gains nothing.
    """
    n, V = values_nV.shape
    # The longer the blocks the fewer their maxima, as long as a heap selects from them and a core reads them well.
    b = min(MOST_STRIDES, 2 ** int(math.log2(max(1, V // (HEAP_LENGTH * k)))))
    if values_nV.device.type != "cpu" or b < 4:
        return torch.topk(values_nV, k)
    B = V // b
    maxima_nB = values_nV[:, : b * B].view(n, b, B).amax(1)
    blocks_nk = torch.topk(maxima_nB, k, sorted=False).indices
    columns = (blocks_nk[:, None, :] + B * torch.arange(b)[:, None]).flatten(1)
    columns = torch.cat([columns, torch.arange(b * B, V).expand(n, -1)], dim=1)
    top = torch.topk(values_nV.gather(1, columns), k)
    return top.values, columns.gather(1, top.indices)


def _check_finite(log_probs_Nk: Tensor, scalars_2N: Tensor, row_name: Callable[[int], str]) -> None:
    # A log tail of -inf is a number: nothing is outside.
    log_tail_N, label_N = scalars_2N
    bad_N = ~(log_probs_Nk.isfinite().all(1) & label_N.isfinite() & (log_tail_N <= 0.0))
    if bad_N.any():
        rows = bad_N.nonzero()[:, 0].tolist()
        raise LogitCacheError(
            f"the teacher's logits are NaN or infinite in {len(rows)} of {len(bad_N)} rows, first in"
            f" {row_name(rows[0])}; score in bfloat16 or float32 if this is float16, otherwise check the weights"
        )
