"""Compiled arithmetic, where installation found a C compiler; no result needs it."""
