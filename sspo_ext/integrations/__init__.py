# SPDX-License-Identifier: Apache-2.0
"""Step advantages and step losses inside engines that train already: one module for each, imported only when asked for.

Each module names the version of its engine that it was tested with, and refuses another.
"""
