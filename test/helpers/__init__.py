# SPDX-License-Identifier: BSD-3-Clause
"""Helpers that the unit tests, the fault tests and the benchmarks share."""
