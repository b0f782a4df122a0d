"""`sttm-kernels flops`: which setting of ToMe and of STTM takes a share of a model's operations."""

from __future__ import annotations

import argparse
from pathlib import Path

from sttm_kernels.bench import shares
from sttm_kernels.console import InputError, extra, why_not_imported

HELP = "Count a model's operations, and find the merging that takes a share of them."


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text!r}")
    return value


def _tokens(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = ", ".join(shares.MODELS)
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help=f"{known}; a name of timm's; or a folder with a config.json of transformers (default: the first, all)",
    )
    parser.add_argument("--share", type=_share, default=0.62, help="of the operations (default: %(default)s)")
    parser.add_argument("--r", type=_tokens, metavar="N", help="tokens merged in every layer, in place of a share")
    parser.add_argument("--keep", type=_share, metavar="PART", help="of each stage of STTM, in place of a share")
    parser.add_argument(
        "--shape",
        type=int,
        nargs="+",
        metavar="N",
        help="of one input, (3, H, W) or (T, 3, H, W), where it is not known",
    )


def run(arguments: argparse.Namespace) -> int:
    left_out = False
    for name in arguments.models or shares.MODELS:
        full = None
        try:
            for setting in shares.settings(_model(name, arguments.shape), arguments.share, arguments.r, arguments.keep):
                full = full or setting.operations
                counted = ""
                if full and setting.operations:
                    counted = f"{setting.operations / 1e9:>9.1f} GFLOP{setting.operations / full:>7.3f}"
                print(f"{name:<14}{counted:<24} {setting.says}", flush=True)
        except ImportError as error:
            left_out = True
            print(f"{name:<14}{'':<24} left out: {why_not_imported(error)}", flush=True)
        except (TypeError, ValueError) as error:
            raise InputError(f"{name}: {error}") from None
    return int(left_out)


def _model(name: str, shape: list[int] | None) -> shares.Model:
    given = tuple(shape) if shape else None
    if name in shares.MODELS:
        return shares.MODELS[name]
    if Path(name, "config.json").exists():
        extra("transformers", "transformers", "command flops", "hf")
        return shares.of_folder(name, given)
    if not extra("timm", "timm", "command flops", "timm").is_model(name):
        known = ", ".join(shares.MODELS)
        raise InputError(f"MODEL must be one of {known}, of timm, or a folder with a config.json, got {name}")
    return shares.of_timm(name, given)
