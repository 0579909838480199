"""How packed bytes come to the device: in chunks, through staging memory, beside compute."""

STAGING_SLOTS = 3
"""Packed chunks on the device at once: one is copied, one unpacked, one evens that out."""
CHUNK_BYTES = 48 << 20
"""Packed bytes of a staging slot, at most. The larger, the fewer gaps between copies."""
BESIDE_COMPUTE = 0.95
"""Of the link's rate alone, what copies have beside blocks that compute and unpacking. 0.94 to 0.99
was measured on H100s, of 55 GB/s (docs/results-budget-h100.md)."""
