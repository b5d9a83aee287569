"""Rows on their way into an FP8 product: normalised or gated and quantized, in one pass over memory."""
