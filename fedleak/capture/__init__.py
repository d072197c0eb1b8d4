"""Updates on disk: captured where the federation runs, attacked later and elsewhere.

>>> from fedleak.capture import read_captures
>>> for captured in read_captures("captures", model="net.py:Net"):  # doctest: +SKIP
...     print(captured.name, captured.observation or captured.reason)
"""

from fedleak.capture.reader import Capture, Captured, read_captures
from fedleak.capture.update import Update
from fedleak.capture.writer import CaptureWriter

__all__ = ["Capture", "CaptureWriter", "Captured", "Update", "read_captures"]
