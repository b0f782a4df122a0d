"""The functions of ToMe and tomesd by their own names and arguments, on the verbs of this package.

from sttm_kernels.compat import tome    # in place of tome.merge
from sttm_kernels.compat import tomesd  # in place of tomesd.merge
"""

from sttm_kernels.compat import tome as tome
from sttm_kernels.compat import tomesd as tomesd
