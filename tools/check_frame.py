"""Find out in which frame of coordinates a model answers, by asking it for boxes that are known.

Exit status: 0 where its own frame fits, 1 where another fits far better, its answers do not parse or nothing can be
said, 2 after a mistake in the command.
"""

from __future__ import annotations

import argparse
import os
import sys

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Let a model answer on known boxes and compare its numbers with the truth in every frame.",
        epilog="Example:\n  python tools/check_frame.py --model models/Qwen2.5-VL-3B-Instruct --shards data/val\n"
               "A model too large for one GPU: deepspeed --num_gpus 4 tools/check_frame.py --tp 4 --model ...",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face checkpoint of a Qwen-VL model")
    parser.add_argument("--shards", required=True, nargs="+", help="shards with known boxes: paths, folders or globs")
    parser.add_argument("--samples", type=int, default=16, help="how many known boxes (default 16)")
    parser.add_argument("--box-format", default="", help="read answers so, instead of as the model's family writes")
    parser.add_argument("--prompt", default="", help="question that holds {expression}; default: the family's own")
    parser.add_argument("--prompts-file", default="", metavar="FILE", help="YAML file of questions by task")
    parser.add_argument("--thinking", action="store_true", help="ask for thoughts before the answer")
    parser.add_argument("--max-new-tokens", type=int, default=0, help="default 128, with --thinking 1024")
    parser.add_argument("--max-pixels", type=int, help="limit of an image after the resize; default: the checkpoint's")
    parser.add_argument("--min-pixels", type=int, help="the same from below")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks, under a launcher (default 1)")
    parser.add_argument("--pp", type=int, default=1, help="pipeline stages, under a launcher (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="which samples are asked for (default 0)")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    return parser


def check(args: argparse.Namespace):
    """(context, report) of the model's answers; every rank calls it."""
    from megavg.data.prompts import Prompts
    from megavg.parallel.mcore import make_context, start_processes
    from megavg.protocols.options import LabelNoise
    from megavg.trainer.answering import LoadedModel
    from megavg.trainer.collect import make_source
    from megavg.trainer.config import DataConfig, ModelConfig
    from megavg.trainer.frame_check import check_frame, known_samples

    data = DataConfig(args.shards, check_frame_samples=args.samples, on_error="skip")
    config = ModelConfig(args.model, args.dtype, args.min_pixels, args.max_pixels, args.box_format)
    context = make_context(args.tp, args.pp, start_processes())
    model = LoadedModel(config, context, prompts_per_pass=16)
    prompts = Prompts(model.model.spec.family, args.prompt, {}, args.prompts_file, args.thinking)
    size = -(-args.samples // context.dp_size) * context.dp_size
    with make_source(data, size, args.seed, context, LabelNoise()) as source:
        samples = known_samples(source.next_batch, args.samples, context)
    limit = args.max_new_tokens or (1024 if args.thinking else 128)
    return context, check_frame(model, samples, prompts.question, limit, context)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = build_parser().parse_args(argv)
    from megavg.parallel.quiet import quieten
    from megavg.trainer.entry import part, tell

    quieten()
    try:
        context, report = check(args)
    except (ValueError, OSError) as error:
        return part(tell(error))
    if context.rank == 0:
        print(report.message())
    return part(0 if report.verdict == "fits" else 1)


if __name__ == "__main__":
    sys.exit(main())
