"""Does merging tokens cost accuracy, and does STTM cost less of it? A task that needs motion, at a size that two cores
can train: `sttm-kernels evidence`."""
