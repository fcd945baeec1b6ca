"""The exercises of the notebooks 05 and 06."""
from __future__ import annotations
