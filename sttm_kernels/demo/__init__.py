"""A clip merged with STTM and drawn: what `sttm-kernels demo` shows."""
