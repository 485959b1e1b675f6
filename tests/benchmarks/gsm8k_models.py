"""A teacher and a student that have learnt something, for benchmarks that need rows of trained models.

A byte-level BPE of the GSM8K file, and two Llamas trained on it from scratch, on all tokens of question, newline,
answer and end. The last 100 records are held out. Equal settings give equal weights on one machine.

    python tests/benchmarks/gsm8k_models.py --output DIR

writes the checkpoints `DIR/teacher` and `DIR/student`, and, last, `DIR/DONE`: the losses as JSON. A folder that has one
of the same settings is left as it is.

Shapes: B sequences, L positions, V vocabulary.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k-1000.jsonl"
NUM_HELD_OUT = 100
VOCAB_SIZE = 8192
"""Asked for; pairs that occur twice in the file give 7,468."""
BATCH_SIZE = 8
IGNORE_INDEX = -100


@dataclass(frozen=True)
class Settings:
    """Size and training of one model."""

    hidden_size: int
    num_layers: int
    num_epochs: int
    learning_rate: float
    seed: int


TEACHER = Settings(hidden_size=192, num_layers=3, num_epochs=5, learning_rate=3e-3, seed=0)
STUDENT = Settings(hidden_size=128, num_layers=2, num_epochs=2, learning_rate=3e-3, seed=1)


@dataclass(frozen=True)
class Sample:
    """Token ids of a record; the answer and its end begin at `answer_start`."""

    input_ids: list[int]
    answer_start: int


def main() -> int:
    """Make both models, or find them made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    print(json.dumps(ensure_models(parser.parse_args().output), indent=1))
    return 0


def report_with_models(
    description: str | None,
    run: Callable[[Path], dict[str, Any]],
    draw: Callable[[dict[str, Any], Path], None],
) -> int:
    """The command line of a benchmark that needs the models: print its results, and draw them where asked."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "logitcache-gsm8k-models")
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    # What libraries print on the way must not end up in the results.
    with contextlib.redirect_stdout(sys.stderr):
        report = run(args.models)
    print(json.dumps(report, indent=1))
    if args.figure is not None:
        draw(report, args.figure)
    return 0


def ensure_models(output: Path) -> dict[str, Any]:
    """Train what `output` lacks, on one thread; sizes, and losses in nats per token."""
    logging.disable_progress_bar()
    settings = {"teacher": asdict(TEACHER), "student": asdict(STUDENT), "vocab_size_asked": VOCAB_SIZE}
    done = output / "DONE"
    if done.is_file():
        report: dict[str, Any] = json.loads(done.read_text())
        if report["settings"] == settings:
            return report
        done.unlink()
    torch.set_num_threads(1)
    records = read_records()
    tokenizer = train_tokenizer(records)
    samples = encode(tokenizer, records)
    training, held_out = samples[:-NUM_HELD_OUT], samples[-NUM_HELD_OUT:]
    report = {"settings": settings, "vocab_size": len(tokenizer), "unigram_loss": unigram_loss(training, held_out)}
    for name, chosen in (("student", STUDENT), ("teacher", TEACHER)):
        start = time.perf_counter()
        model = train(build_model(chosen, tokenizer), training, chosen)
        model.save_pretrained(output / name)
        tokenizer.save_pretrained(output / name)
        report[name] = {
            "parameters": model.num_parameters(),
            "seconds": round(time.perf_counter() - start, 1),
            "training_loss": mean_loss(model, training[:NUM_HELD_OUT]),
            "held_out_loss": mean_loss(model, held_out),
        }
        print(name, report[name], file=sys.stderr, flush=True)
    done.write_text(json.dumps(report, indent=1) + "\n")
    return report


def read_records() -> list[dict[str, str]]:
    """All records of the file, each with `question` and `answer`."""
    return [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]


def train_tokenizer(records: Sequence[dict[str, str]]) -> PreTrainedTokenizerFast:
    """The BPE of these texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=2,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{r['question']}\n{r['answer']}" for r in records), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def encode(tokenizer: Any, records: Sequence[dict[str, str]]) -> list[Sample]:
    """Records as `logitcache build` lays them out without a chat template."""
    prompts = tokenizer([r["question"] + "\n" for r in records]).input_ids
    answers = tokenizer([r["answer"] for r in records]).input_ids
    end = [tokenizer.eos_token_id]
    return [Sample(p + a + end, len(p)) for p, a in zip(prompts, answers, strict=True)]


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of random weights, embedding and head tied."""
    torch.manual_seed(settings.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden_size,
            intermediate_size=3 * settings.hidden_size,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.hidden_size // 64,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(model: LlamaForCausalLM, samples: Sequence[Sample], settings: Settings) -> LlamaForCausalLM:
    """AdamW with a warm-up and a cosine down to a tenth, over batches of samples of similar length."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.1, fused=True
    )
    batches = [b for epoch in range(settings.num_epochs) for b in shuffled_batches(samples, seed=epoch)]
    model.train()
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * step / len(batches)))
            group["lr"] = settings.learning_rate * min(1.0, (step + 1) / 50) * (0.1 + 0.9 * cosine)
        loss = batch_loss(model, batch)
        torch.autograd.backward([loss])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def shuffled_batches(samples: Sequence[Sample], *, seed: int) -> list[list[Sample]]:
    """Batches of similar length in random order; a function of the seed."""
    generator = random.Random(seed)
    nearly_sorted = sorted(samples, key=lambda s: len(s.input_ids) + generator.uniform(0, 16))
    batches = [nearly_sorted[i : i + BATCH_SIZE] for i in range(0, len(samples), BATCH_SIZE)]
    generator.shuffle(batches)
    return batches


def batch_loss(model: LlamaForCausalLM, batch: Sequence[Sample]) -> torch.Tensor:
    """Mean cross-entropy over all tokens but the first of each; padding on the right, where no token looks."""
    length = max(len(s.input_ids) for s in batch)
    labels_BL = torch.full((len(batch), length), IGNORE_INDEX)
    for row, sample in enumerate(batch):
        labels_BL[row, : len(sample.input_ids)] = torch.tensor(sample.input_ids)
    logits_BLV = model(input_ids=labels_BL[:, :-1].clamp(min=0), use_cache=False).logits
    return F.cross_entropy(logits_BLV.flatten(0, 1), labels_BL[:, 1:].flatten(), ignore_index=IGNORE_INDEX)


@torch.inference_mode()
def mean_loss(model: LlamaForCausalLM, samples: Sequence[Sample]) -> float:
    """Nats per token over all tokens but the first of each sample."""
    weighted = [(batch_loss(model, [s]).item(), len(s.input_ids) - 1) for s in samples]
    return round(sum(loss * n for loss, n in weighted) / sum(n for _, n in weighted), 4)


def unigram_loss(training: Sequence[Sample], held_out: Sequence[Sample]) -> float:
    """What token frequencies alone would give on the held-out samples, each count plus one half."""
    counts = Counter(i for s in training for i in s.input_ids[1:])
    ids = [i for s in held_out for i in s.input_ids[1:]]
    total = sum(counts.values()) + VOCAB_SIZE / 2
    return round(-sum(math.log((counts[i] + 0.5) / total) for i in ids) / len(ids), 4)


if __name__ == "__main__":
    sys.exit(main())
