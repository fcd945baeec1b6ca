"""The exercises of the notebooks 08 to 10."""
from __future__ import annotations
