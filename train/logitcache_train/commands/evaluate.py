"""`logitcache evaluate`: how often a model answers right."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from logitcache_storage.command import Command

if TYPE_CHECKING:
    from logitcache_train.evaluate import Evaluation


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of `logitcache evaluate`."""
    parser.add_argument(
        "--model", metavar="PATH_OR_ID", required=True, help="a causal language model with its tokenizer"
    )
    parser.add_argument("--data", metavar="FILE", required=True, help="JSON lines with a prompt and an answer each")
    parser.add_argument("--samples", metavar="N", type=int, default=16, help="responses to each problem (default: 16)")
    parser.add_argument("--temperature", metavar="T", type=float, default=1.0, help="of sampling, above 0 (default: 1)")
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=256, help="length of a response (default: 256)"
    )
    parser.add_argument(
        "--batch-size", metavar="N", type=int, default=256, help="responses side by side (default: 256)"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of sampling (default: 0)")
    parser.add_argument("--limit", metavar="N", type=int, help="take the first N problems only")
    parser.add_argument(
        "--prompt-field", metavar="NAME", help="where the prompt stands, if not in a field known as such"
    )
    parser.add_argument("--answer-field", metavar="NAME", help="where the expected answer stands, likewise")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: float32 on a CPU, elsewhere the checkpoint's)",
    )
    parser.add_argument("--json", action="store_true", help="the numbers as one JSON document")


def run(args: Namespace) -> int:
    """Evaluate and print."""
    from logitcache_storage.errors import InputError
    from logitcache_storage.terminal import print_json
    from logitcache_train.answers import read_problems

    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit must be at least 1, got {args.limit}")
    problems = read_problems(
        args.data, limit=args.limit, prompt_field=args.prompt_field, answer_field=args.answer_field
    )
    from logitcache_train.evaluate import evaluate, load_model
    from logitcache_train.generation import Decoding

    decoding = Decoding(args.max_new_tokens, args.temperature, args.batch_size, args.seed)
    model, tokenizer = load_model(args.model, dtype=args.dtype)
    found = evaluate(model, tokenizer, problems, decoding, num_samples=args.samples)
    if args.json:
        print_json(_data(args, found))
    else:
        _show(args, found)
    return 0


COMMAND = Command("Average@n and greedy accuracy of a model on problems with answers", add_arguments, run)


def _data(args: Namespace, found: Evaluation) -> dict[str, Any]:
    return {
        "model": args.model,
        "data": args.data,
        "num_problems": found.num_problems,
        "num_samples": found.num_samples,
        "temperature": args.temperature,
        "seed": args.seed,
        "average": found.average.mean,
        "standard_error": found.average.standard_error,
        "confidence_95": list(found.average.confidence_95),
        "greedy": found.greedy.mean,
        "greedy_standard_error": found.greedy.standard_error,
        "greedy_confidence_95": list(found.greedy.confidence_95),
        "generated_tokens": found.num_tokens,
        "seconds": found.seconds,
    }


def _show(args: Namespace, found: Evaluation) -> None:
    from logitcache_storage.terminal import facts_table, format_count, format_duration, open_console

    rate = format_count(found.num_tokens / max(found.seconds, 1e-9))
    facts = [
        ("problems", f"{found.num_problems:,} of {args.data}"),
        (f"Average@{found.num_samples}", f"{_percent(found.average)}, temperature {args.temperature:g}"),
        ("greedy", _percent(found.greedy)),
        ("took", f"{format_duration(found.seconds)}, {rate} tokens/s"),
    ]
    console = open_console()
    console.print(args.model, soft_wrap=True)
    console.print(facts_table(facts))


def _percent(accuracy: Any) -> str:
    low, high = accuracy.confidence_95
    interval = (
        "" if accuracy.standard_error != accuracy.standard_error else f" (95%: {100 * low:.1f} to {100 * high:.1f})"
    )
    return f"{100 * accuracy.mean:.1f}%{interval}"
