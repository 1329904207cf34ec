"""The guarantee: sampling, clipping, noise, and the account of what they cost."""
