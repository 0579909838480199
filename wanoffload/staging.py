"""How packed bytes come to the device: in chunks, through staging memory."""

STAGING_SLOTS = 3
"""Packed chunks on the device at once: one is copied, one unpacked, one evens that out. Under a
budget that has no room for it, one: see `residency`."""
CHUNK_BYTES = 48 << 20
"""Packed bytes of a staging slot, at most. The larger, the fewer gaps between copies."""
