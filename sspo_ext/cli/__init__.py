"""The command line: `sspo-ext train`, `rl`, `trace`, `demo`, `info`."""
