"""Files that are programs, as stand-ins are."""

from __future__ import annotations

import sys

# What a file of Python begins with to be a program, wherever the environment lies: `#!` takes no path with a space.
PYTHON_HEAD = f"""#!/bin/sh
'''exec' "{sys.executable}" "$0" "$@"
' '''
"""
