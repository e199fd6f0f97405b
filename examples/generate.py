"""Writes text that looks like Python, from an exported checkpoint and plain Lightning.

    python examples/generate.py runs/gpt_zero2/model.ckpt --prompt "class "

Nothing here imports lightning_zero: what `Fp32Export` writes is an ordinary Lightning checkpoint.
"""

import argparse
import sys
from pathlib import Path

import torch
from gpt import GPT


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="an exported .ckpt")
    parser.add_argument("--prompt", default="import ", help="what the text begins with")
    parser.add_argument("--tokens", type=int, default=500, help="bytes to write (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=40, help="choose among k bytes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices (default: %(default)s)")
    arguments = parser.parse_args()
    if not arguments.prompt:
        parser.error("--prompt must not be empty")
    return arguments


def main() -> None:
    """Prints the prompt, then each byte as it comes."""
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    model = GPT.load_from_checkpoint(arguments.checkpoint, map_location="cpu", weights_only=True).eval()
    prompt = arguments.prompt.encode()
    sys.stdout.buffer.write(prompt)
    for byte in model.generate(prompt, arguments.tokens, arguments.temperature, arguments.top_k):
        sys.stdout.buffer.write(bytes([byte]))
        sys.stdout.buffer.flush()
    print()


if __name__ == "__main__":
    main()
