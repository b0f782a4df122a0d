"""What `sttm-kernels bench` measures: workloads, operations and rivals, their times, and the pictures of them."""
