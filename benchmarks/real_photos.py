"""The main job on real input: a smile, or fifteen years, for real photos in real Stable Diffusion latents.

    python benchmarks/real_photos.py --real DIR --out runs/real            # smile
    python benchmarks/real_photos.py --real DIR --out runs/older --task older

Calls the public commands only (`lso fit`, `lso render`); DIR is described in the README. A held-out judge and a
held-out identity network can be given as ``file.py:Class``; without them their columns stay empty.
"""

from __future__ import annotations

TASKS = {"smile": ("SmileScore", "optimize/real_smile.yaml"), "older": ("AgeScore", "optimize/real_older.yaml")}
