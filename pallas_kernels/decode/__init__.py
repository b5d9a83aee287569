"""Decoding: one query row a sequence against a KV cache of 16-bit, FP8 or int8 numbers."""
