# SPDX-License-Identifier: BSD-3-Clause
"""How the scripts in the folder above work. Each file holds one idea; none of them imports a script.

Importing this package sets variables that torch reads when it is imported, so a script imports it first of all.
"""

import os

# torch >= 2.5 loads torch_npu by itself and fails if CANN is missing; device/choice.py imports it if an NPU is wanted.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
# When a peer dies, torch's store logs a C++ stack trace; parallel/heartbeat.py says it in one line.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
if os.path.expanduser("~") == "~":  # no HOME, no entry in passwd: caches would go to a folder named ~
    os.environ["HOME"] = os.environ.get("TMPDIR", "/tmp")
