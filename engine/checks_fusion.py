"""The exercises of the notebook 07."""
from __future__ import annotations
