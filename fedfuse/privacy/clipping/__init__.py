"""Clipped sums of per-record gradients in one backward pass: `bookkeeping.BookKeeping`."""
