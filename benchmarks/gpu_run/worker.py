"""A step's process: does items one after the other and says in lines of JSON what came out.

    python -m benchmarks.gpu_run.worker [--device cpu] [--tiny] PART ITEM...

Before an item it writes ``{"begin": item}``, after it ``{"item": item, "status": ...}`` with "ok" or what
went wrong, in between a line for each result. Where the GPU takes no more after an error it ends, for another
process to go on.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from time import perf_counter
from typing import Any

#: Characters of an error's text.
_MOST = 400


def say(**content: Any) -> None:
    print(json.dumps(content), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small inputs, for a dry run")
    parser.add_argument("part")
    parser.add_argument("items", nargs="+")
    args = parser.parse_args(argv)
    do = None
    for item in args.items:
        say(begin=item)
        start = perf_counter()
        try:
            if do is None:  # PyTorch may fail to be imported
                from . import parts

                do = parts.make(args.part, args.device, args.tiny)
            for result in do(item):
                say(item=item, **result)
            _wait(args.device)
            status = "ok"
        except Exception as error:
            status = f"{type(error).__name__}: {str(error)[:_MOST]}"
            traceback.print_exc(file=sys.stderr)
        say(item=item, status=status, seconds=round(perf_counter() - start, 2))
        if status != "ok" and not _works(args.device):
            return 1
    return 0


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def _works(device: str) -> bool:
    """Whether the GPU goes on in this process: after an access out of bounds each call fails."""
    try:
        _wait(device)
    except Exception:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
