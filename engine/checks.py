"""All exercises: importing their rooms adds them to `check`, which helpers.py hands on."""
from engine import (
    checks_defects,
    checks_fusion,
    checks_images,
    checks_products,
    checks_results,
    checks_text,
)
from engine.exercises import check
