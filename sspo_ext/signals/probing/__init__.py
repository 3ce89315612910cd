# SPDX-License-Identifier: Apache-2.0
"""Values by probing: the model is made to answer after each of its steps."""
