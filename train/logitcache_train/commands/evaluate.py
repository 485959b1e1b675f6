"""`logitcache evaluate`: how often a model answers right."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from logitcache_storage.command import Command

if TYPE_CHECKING:
    from logitcache_train.evaluate import Accuracy, Answered, Evaluation


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of `logitcache evaluate`."""
    parser.add_argument(
        "--model",
        metavar="PATH_OR_ID",
        required=True,
        help="a causal language model with its tokenizer, or a folder of LoRA adapters",
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
        "--compare",
        choices=("exact", "math"),
        default="exact",
        help="answers as numbers or words (the default), or as mathematics: 1/2, 0.5 and \\frac{1}{2} are the same",
    )
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
    parser.add_argument("--output", metavar="FILE", help="write that document to a file")
    parser.add_argument(
        "--details",
        metavar="FILE",
        help="write every problem with all responses and whether they are right: JSON lines",
    )


def run(args: Namespace) -> int:
    """Evaluate, print and write."""
    from contextlib import nullcontext

    from logitcache_storage.errors import InputError
    from logitcache_storage.terminal import print_json
    from logitcache_train.answers import is_exact, read_problems

    for name in ("limit", "samples"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(args, name)}")
    _check_files(args)
    problems = read_problems(
        args.data, limit=args.limit, prompt_field=args.prompt_field, answer_field=args.answer_field
    )
    from logitcache_train.evaluate import evaluate, load_model
    from logitcache_train.generation import Decoding
    from logitcache_train.math_answers import MathComparison

    decoding = Decoding(args.max_new_tokens, args.temperature, args.batch_size, args.seed)
    with MathComparison() if args.compare == "math" else nullcontext(is_exact) as compare:
        model, tokenizer = load_model(args.model, dtype=args.dtype)
        found = evaluate(model, tokenizer, problems, decoding, num_samples=args.samples, compare=compare)
    document = _document(args, found, str(model.dtype).removeprefix("torch."))
    if args.json:
        print_json(document)
    else:
        _show(args, found)
    _write(args, document, found)
    return 0


COMMAND = Command("Average@n and greedy accuracy of a model on problems with answers", add_arguments, run)


def _check_files(args: Namespace) -> None:
    """Before the long work."""
    from pathlib import Path

    from logitcache_storage.errors import InputError

    for option, name in (("--output", args.output), ("--details", args.details)):
        if name is not None and (Path(name).is_dir() or not Path(name).absolute().parent.is_dir()):
            what = "is a folder" if Path(name).is_dir() else "lies in no folder that is there"
            raise InputError(f"{option} {name}: {what}; name a file to be written")


def _document(args: Namespace, found: Evaluation, dtype: str) -> dict[str, Any]:
    return {
        "model": args.model,
        "data": args.data,
        "compare": args.compare,
        "dtype": dtype,
        "num_problems": len(found.answered),
        "num_samples": found.num_samples,
        "temperature": args.temperature,
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
        "average": found.average.mean,
        "standard_error": found.average.standard_error,
        "confidence_95": list(found.average.confidence_95),
        "greedy": found.greedy.mean,
        "greedy_standard_error": found.greedy.standard_error,
        "greedy_confidence_95": list(found.greedy.confidence_95),
        "undecided_responses": found.num_undecided,
        "cut_responses": found.num_cut,
        "generated_tokens": found.num_tokens,
        "seconds": found.seconds,
        "tokens_per_second": found.num_tokens / found.seconds,
    }


def _write(args: Namespace, document: dict[str, Any], found: Evaluation) -> None:
    import json
    from pathlib import Path

    from logitcache_storage.errors import LogitCacheError

    whole = json.dumps(document, indent=2, allow_nan=False) + "\n"
    details = (json.dumps(_detail(answered)) + "\n" for answered in found.answered)
    for name, lines in ((args.output, [whole]), (args.details, details)):
        if name is None:
            continue
        try:
            with Path(name).open("w", encoding="utf-8") as file:
                file.writelines(lines)
        except OSError as e:
            raise LogitCacheError(f"{name}: cannot be written: {e.strerror}") from e


def _detail(answered: Answered) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "messages": list(answered.problem.messages),
        "reference": answered.problem.reference,
        "share_right": answered.share,
        "samples": [asdict(response) for response in answered.samples],
        "greedy": asdict(answered.greedy),
    }


def _show(args: Namespace, found: Evaluation) -> None:
    from logitcache_storage.terminal import facts_table, format_count, format_duration, open_console

    rate = format_count(found.num_tokens / max(found.seconds, 1e-9))
    responses = len(found.answered) * (found.num_samples + 1)
    facts = [
        ("problems", f"{len(found.answered):,} of {args.data}"),
        (f"Average@{found.num_samples}", f"{_percent(found.average)}, temperature {args.temperature:g}"),
        ("greedy", _percent(found.greedy)),
        ("took", f"{format_duration(found.seconds)}, {rate} tokens/s"),
    ]
    if found.num_cut:
        share = f"{found.num_cut:,} of {responses:,} responses"
        facts.append(("cut", f"{share} did not end within {args.max_new_tokens} tokens (--max-new-tokens)"))
    if found.num_undecided:
        facts.append(("undecided", f"{found.num_undecided:,} of {responses:,} answers took too long to compare"))
    console = open_console()
    console.print(args.model, soft_wrap=True)
    console.print(facts_table(facts))


def _percent(accuracy: Accuracy) -> str:
    low, high = accuracy.confidence_95
    return f"{100 * accuracy.mean:.1f}% (95%: {100 * low:.1f} to {100 * high:.1f})"
