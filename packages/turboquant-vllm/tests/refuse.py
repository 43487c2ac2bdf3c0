"""Start engines, described in JSON, that should be refused, and write what each was refused with to a JSON file."""

import json
import sys
from pathlib import Path

from vllm import LLM


def _refusal(options):
    try:
        LLM(skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=256, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "served"


def main():
    Path(sys.argv[2]).write_text(json.dumps([_refusal(options) for options in json.loads(sys.argv[1])]))


if __name__ == "__main__":
    main()
