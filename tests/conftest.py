"""Every test is offline, and finds no weights or settings of this machine's user."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # a hub that cannot be reached would be asked again and again
