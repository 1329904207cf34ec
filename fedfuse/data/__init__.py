"""From a manifest to batches: reading, checking, decoding, splitting among nodes."""
